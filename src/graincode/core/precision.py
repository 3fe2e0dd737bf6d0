"""Numbers: the precision of products, of matrices and of convolutions, and weights that are none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["float32", "tf32", "bfloat16"]


@contextmanager
def products(precision: Precision, device: str) -> Iterator[None]:
    """In the block, products on a type of device ("cpu", "cuda") have this precision, whatever is around the block.

    Args:
        precision: "float32"; "tf32", float32 whose products have mantissas of 10 bits, on GPUs that know it and nowhere
            else; "bfloat16" by autocast, and TF32 for what that leaves in float32.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    tf32 = precision != "float32" and device == "cuda"
    _set(("high" if tf32 else "highest", tf32))
    try:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            yield
    finally:
        _set(before)


def _set(values: tuple[str, bool]) -> None:
    torch.set_float32_matmul_precision(values[0])
    torch.backends.cudnn.allow_tf32 = values[1]


def promoted(weight: Tensor, x: Tensor) -> Tensor:
    """A weight in the type of what it is used on, if that has more digits: kernels of norms take no other mixture."""
    return weight.to(torch.promote_types(weight.dtype, x.dtype))


def not_finite(weights: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that has NaN or infinite values; None if there is none."""
    for name, tensor in weights.items():
        # a router's thresholds are NaN until they are calibrated, which it says itself
        has_values = tensor.is_floating_point() and tensor.numel() and not name.endswith("router.quantiles")
        if has_values and not all(end.isfinite() for end in tensor.aminmax()):
            return name
    return None
