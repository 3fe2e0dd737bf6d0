"""Changes of training images that keep their meaning, made on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graincode.core.errors import GraincodeError
from graincode.core.rng import AUGMENTATION, SampleRng
from graincode.data.images import DerivedImages, ImageBatch, ImageDataset, index_tensor


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

    def __call__(self, images: Tensor, rng: SampleRng) -> Tensor:
        """(B, 3, H, W) images to the same."""
        if not self.flip and not self.shift:
            return images
        chance = rng.uniforms(AUGMENTATION, 3)
        return self._changed(images, chance[:, 0] < 0.5, chance[:, 1:])

    def view(self, images: Tensor, numbers: Tensor, rng: SampleRng) -> Tensor:
        """Given views of images, for a data set that holds several of each.

        View 0 is the image as it is. With flips, odd views are mirrored, and of every two the first two are not
        shifted; without, all but view 0 are shifted.

        Args:
            images: (B, 3, H, W).
            numbers: (B,) long, the view of each, >= 0.
            rng: for the shifts.
        Returns:
            (B, 3, H, W).
        """
        chance = rng.uniforms(AUGMENTATION, 3)[:, 1:]
        is_still = numbers < (2 if self.flip else 1)
        return self._changed(images, numbers % 2 == 1, torch.where(is_still[:, None], 0.5, chance))

    def check_views(self, views: int) -> None:
        """Raise a GraincodeError unless so many views of an image, 1 or more, all differ and use these changes."""
        settings = f"augmentation.flip={str(self.flip).lower()} augmentation.shift={self.shift}"
        most = None if self.shift else 1 + self.flip
        if most is not None and views > most:
            alone = "augmentation.flip=true (for 2) or augmentation.shift=4" if most == 1 else "augmentation.shift=4"
            raise GraincodeError(
                f"views={views}, but with {settings} an image has {most} in all: type views={most}, or {alone}"
            )
        if views == 1 and most != 1:
            raise GraincodeError(
                f"views=1 stores images as they are, but {settings}: type views=2, or "
                "augmentation.flip=false augmentation.shift=0"
            )

    def _changed(self, images: Tensor, mirrored: Tensor, places: Tensor) -> Tensor:
        """Images mirrored where (B,) `mirrored` says, and shifted by (B, 2) in [0, 1), of which 0.5 is not at all."""
        if self.flip:
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        if self.shift:
            height, width = images.shape[-2:]
            padded = F.pad(images, (self.shift,) * 4, mode="replicate")
            top, left = (places * (2 * self.shift + 1)).long().unbind(1)
            item = torch.arange(len(images), device=images.device)[:, None, None]
            row = (top[:, None] + torch.arange(height, device=images.device))[:, :, None]
            column = (left[:, None] + torch.arange(width, device=images.device))[:, None, :]
            images = padded[item, :, row, column].permute(0, 3, 1, 2).contiguous()
        return images


class Views(DerivedImages):
    """A split with several views of each image: all images in view 0, then all in view 1, and so on.

    Args:
        dataset: the split.
        views: of each image; view 0 is the image as it is.
        augmentation: makes the others, each a function of the seed, the view and the image.
        seed: of the shifts, >= 0.
    Raises:
        GraincodeError: the augmentation does not make so many views, or is not used.
    """

    def __init__(self, dataset: ImageDataset, views: int, augmentation: Augmentation, seed: int) -> None:
        augmentation.check_views(views)
        super().__init__(dataset, f"{dataset.split} ({views} views)", dataset.labels.repeat(views))
        self._augmentation, self._seed = augmentation, seed

    def __getitem__(self, indices: Sequence[int] | int) -> ImageBatch:
        chosen, count = index_tensor(indices, len(self)), len(self._dataset)
        batch = self._dataset[(chosen % count).tolist()]
        images = self._augmentation.view(batch.images, chosen // count, SampleRng(self._seed, chosen))
        return ImageBatch(images, batch.labels, chosen)
