"""The two representations of an image, and the one place where they are converted."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from graincode.core.errors import GraincodeError, check


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1], of any shape, as uint8; values beyond are clamped. The inverse of `from_uint8`."""
    _check_tensor(images)
    check("images", images.dtype, "floating point in [-1, 1]", images.is_floating_point())
    return images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 images of any shape as float32 in [-1, 1], as networks take them."""
    _check_tensor(images)
    check("images", images.dtype, "torch.uint8", images.dtype == torch.uint8)
    # a GPU would multiply by the inverse of a plain number, and differ from the CPU in the last bit
    return images.float().div(torch.full((), 127.5, device=images.device)).sub(1)


def _check_tensor(images: Any) -> None:
    if not isinstance(images, Tensor):
        advice = "graincode.as_images makes one of arrays, Pillow images and files"
        raise GraincodeError(f"images of type {type(images).__name__}: expected a tensor; {advice}")


def as_floats(images: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of images from a user, in [-1, 1] as `from_uint8` makes them, in a floating point type.

    uint8 is converted, other floating point cast. Values that all look like 0 to 1 are warned of.

    Raises:
        GraincodeError: it is no tensor, of another type, or has values beyond [-1, 1].
    """
    _check_tensor(images)
    if images.dtype == torch.uint8:
        return from_uint8(images).to(dtype)
    expected = "floating point in [-1, 1], as from_uint8 makes them, or torch.uint8"
    check("images", images.dtype, expected, images.is_floating_point())
    is_dense = images.layout == torch.strided and not images.is_nested
    check("images", "nested" if images.is_nested else images.layout, "a dense tensor", is_dense)
    source, images = images.dtype, images.to(dtype)
    low, high = torch.stack(images.aminmax()).tolist() if images.numel() else (0, 0)
    check("images", f"{source} from {low:.3g} to {high:.3g}", expected, -1.01 <= low <= high <= 1.01)
    # pixels of 8 bits in [-1, 1] are odd multiples of 1 / 255, those in [0, 1] any
    if low >= 0 and high - low > 0.5 and bool((images * 255).round().remainder(2).eq(0).any()):
        line = "all images have values from 0 to 1, and -1 is black: if 0 should be, give them as uint8 or as 2 * x - 1"
        warnings.warn(line, stacklevel=4)  # the caller of `tokenize`
    return images
