"""Changes of training images that keep their meaning, made on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graincode.core.errors import GraincodeError
from graincode.core.rng import AUGMENTATION, Draws


@dataclass(frozen=True)
class Augmentation:
    """Random flips and shifts; each is a function of the seed and the image's place in training.

    Attributes:
        flip: mirror half of the images from left to right.
        shift: move images by up to so many pixels in each direction; their edge is repeated beyond it.
    Raises:
        GraincodeError: the shift is negative.
    """

    flip: bool = False
    shift: int = 0

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise GraincodeError(
                f"augmentation.shift={self.shift}: expected 0 or more pixels; type augmentation.shift=0"
            )

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """(B, 3, H, W) images to the same."""
        if not self.flip and not self.shift:
            return images
        chance = draws.uniforms(AUGMENTATION, 3)
        if self.flip:
            images = torch.where((chance[:, 0] < 0.5)[:, None, None, None], images.flip(-1), images)
        if self.shift:
            height, width = images.shape[-2:]
            padded = F.pad(images, (self.shift,) * 4, mode="replicate")
            top, left = (chance[:, 1:] * (2 * self.shift + 1)).long().unbind(1)
            item = torch.arange(len(images), device=images.device)[:, None, None]
            row = (top[:, None] + torch.arange(height, device=images.device))[:, :, None]
            column = (left[:, None] + torch.arange(width, device=images.device))[:, None, :]
            images = padded[item, :, row, column].permute(0, 3, 1, 2).contiguous()
        return images
