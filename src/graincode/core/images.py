"""The two representations of an image, and the one place where they are converted."""

from __future__ import annotations

import torch
from torch import Tensor

from graincode.core.errors import GraincodeError


def to_uint8(images: Tensor) -> Tensor:
    """Round images to the 256 levels that are stored, shown and measured.

    Args:
        images: floating point of any shape; -1 is black, 1 is white, values beyond are clamped.
    Returns:
        uint8 of the same shape; the exact inverse of `from_uint8` on its range.
    Raises:
        GraincodeError: the images are not floating point.
    """
    if not images.is_floating_point():
        raise GraincodeError(f"images of {images.dtype}: expected floating point in [-1, 1]; see from_uint8")
    return images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """Scale stored images to the range that the networks work in.

    Args:
        images: uint8 of any shape.
    Returns:
        float32 of the same shape in [-1, 1].
    Raises:
        GraincodeError: the images are not uint8.
    """
    if images.dtype != torch.uint8:
        raise GraincodeError(f"images of {images.dtype}: expected uint8; see to_uint8")
    return images.float().div(127.5).sub(1)
