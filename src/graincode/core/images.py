"""The two representations of an image, and the one place where they are converted."""

from __future__ import annotations

import torch
from torch import Tensor

from graincode.core.errors import check


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1], of any shape, as uint8; values beyond are clamped. The inverse of `from_uint8`."""
    check("images", images.dtype, "floating point in [-1, 1]", images.is_floating_point())
    return images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 images of any shape as float32 in [-1, 1], as networks take them."""
    check("images", images.dtype, "torch.uint8", images.dtype == torch.uint8)
    return images.float().div(127.5).sub(1)
