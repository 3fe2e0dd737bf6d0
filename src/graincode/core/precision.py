"""The precision of products: of matrices, and of convolutions."""

from __future__ import annotations

from collections.abc import Iterator
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
