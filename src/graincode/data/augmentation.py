"""Changes of training images that keep their meaning, made on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graincode.core.errors import check
from graincode.core.images import from_uint8, to_uint8
from graincode.core.rng import AUGMENTATION, SampleRng
from graincode.data.images import DerivedImages, ImageDataset


@dataclass(frozen=True)
class Augmentation:
    """Random flips and shifts; each is a function of the seed and the image's position in training.

    Attributes:
        flip: mirror half of the images from left to right.
        shift: move images by up to so many pixels in each direction, and repeat their edge beyond it.
        crop: least share of an image's area that is kept, in (0, 1]: a part of its shape, as large as the image
            afterwards, at a random place; 1: all of it.
    """

    flip: bool = False
    shift: int = 0
    crop: float = 1.0

    def __post_init__(self) -> None:
        check("shift", self.shift, "0 or more pixels", self.shift >= 0)
        check("crop", self.crop, "above 0, up to 1", 0 < self.crop <= 1)

    def __call__(self, images: Tensor, rng: SampleRng) -> Tensor:
        """(B, 3, H, W) images to the same."""
        if not self.flip and not self.shift and self.crop == 1:
            return images
        chance = rng.uniforms(AUGMENTATION, 6)
        images = self._changed(images, chance[:, 0] < 0.5, chance[:, 1:3])
        return self._cropped(images, chance[:, 3:]) if self.crop < 1 else images

    def _cropped(self, images: Tensor, chance: Tensor) -> Tensor:
        """Images cropped by (B, 3) random numbers: of the area, and where."""
        side = (self.crop + (1 - self.crop) * chance[:, 0]).sqrt()
        shift = (1 - side)[:, None] * (2 * chance[:, 1:] - 1)
        zero = torch.zeros_like(side)
        matrices = torch.stack([side, zero, shift[:, 0], zero, side, shift[:, 1]], dim=1).view(-1, 2, 3)
        points = F.affine_grid(matrices.to(images.dtype), list(images.shape), align_corners=False)
        return F.grid_sample(images, points, padding_mode="border", align_corners=False)

    def view(self, images: Tensor, numbers: Tensor, rng: SampleRng) -> Tensor:
        """(B, 3, H, W) images in the view that (B,) long `numbers` say, for a data set that holds several of each.

        View 0 is the image as it is. With flips, odd views are mirrored, and of every two the first two are not
        shifted; without, all but view 0 are shifted, by `rng`.
        """
        chance = rng.uniforms(AUGMENTATION, 3)[:, 1:]
        is_still = numbers < (2 if self.flip else 1)
        return self._changed(images, numbers % 2 == 1, torch.where(is_still[:, None], 0.5, chance))

    def check_views(self, views: int) -> None:
        """Raise a GraincodeError unless so many views of an image all differ and use these changes."""
        settings = f"{views} and flip={str(self.flip).lower()} and shift={self.shift}"
        check("crop", self.crop, "1, as views of codes are mirrored and shifted alone", self.crop == 1)
        expected = "2 views or more" if self.shift else f"{1 + self.flip}, as so many differ"
        check("views", settings, expected, views >= 2 if self.shift else views == 1 + self.flip)

    def _changed(self, images: Tensor, mirrored: Tensor, offsets: Tensor) -> Tensor:
        """Images mirrored where (B,) `mirrored` says, and shifted by (B, 2) in [0, 1), of which 0.5 is not at all."""
        if self.flip:
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        if self.shift:
            check("shift", self.shift, "less than the side of the images", self.shift < min(images.shape[2:]))
            padded = F.pad(images, (self.shift,) * 4, mode="replicate")
            windows = padded.unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)
            top, left = (offsets * (2 * self.shift + 1)).long().unbind(1)
            images = windows[torch.arange(len(images), device=images.device), :, top, left]
        return images


class Views(DerivedImages):
    """A split with several views of each image (see `Augmentation.view`): all images in view 0, then all in 1 ..."""

    def __init__(self, dataset: ImageDataset, views: int, augmentation: Augmentation, seed: int) -> None:
        super().__init__(dataset, f"{dataset.split} ({views} views)", torch.arange(len(dataset)).repeat(views))
        self._augmentation, self._seed = augmentation, seed

    def load(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = super().load(indices)
        numbers, rng = indices // len(self._dataset), SampleRng(self._seed, indices)
        return to_uint8(self._augmentation.view(from_uint8(images), numbers, rng)), labels
