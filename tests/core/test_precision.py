"""The precision of products."""

import pytest
import torch

from graincode.core.precision import products


def settings():
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("precision", "device", "inside"),
    [
        ("float32", "cpu", ("highest", False, False)),
        ("float32", "cuda", ("highest", False, False)),
        ("tf32", "cpu", ("highest", False, False)),
        ("tf32", "cuda", ("high", True, False)),
        ("bfloat16", "cpu", ("highest", False, True)),
    ],
)
def test_a_block_has_its_own_precision_and_what_was_before_returns(precision, device, inside):
    before = settings()
    with products("tf32", "cuda"), products(precision, device):
        assert settings() == inside
    with pytest.raises(KeyError), products(precision, device):
        raise KeyError
    assert settings() == before


def test_full_precision_holds_inside_of_autocast():
    a, b = torch.randn(8, 16), torch.randn(16, 4)
    exact = a @ b
    with products("bfloat16", "cpu"):
        assert (a @ b).dtype == torch.bfloat16
        with products("float32", "cpu"):
            assert torch.equal(a @ b, exact)
