import pytest
import torch

from graincode.core.errors import GraincodeError
from graincode.core.images import from_uint8, to_uint8


def test_uint8_round_trip_is_exact():
    levels = torch.arange(256, dtype=torch.uint8)
    images = from_uint8(levels)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(to_uint8(images.to(dtype)), levels)


def test_to_uint8_rounds_to_the_nearest_level_and_clamps():
    between = (torch.arange(255) + 0.4) / 127.5 - 1
    assert torch.equal(to_uint8(between), torch.arange(255, dtype=torch.uint8))
    assert to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_converting_twice_is_refused():
    levels = torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(GraincodeError, match=r"torch\.uint8"):
        to_uint8(levels)
    with pytest.raises(GraincodeError, match=r"torch\.float32"):
        from_uint8(from_uint8(levels))
