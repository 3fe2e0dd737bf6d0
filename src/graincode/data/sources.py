"""What all data sets of encoded images share: their settings, and splits by hash."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from graincode.core.errors import GraincodeError, check, check_choice
from graincode.data.cached import CachedImages
from graincode.data.decoding import BACKGROUND, check_background
from graincode.data.encoded import Crop, Encoded, EncodedImages, OnCorrupt
from graincode.data.images import SPLITS, ImageDataset, check_image_size, split_by_hash

_logger = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class EncodedSource(ABC):
    """A data set of encoded images before it is read; a subclass says where they are.

    Splits that the data set does not have are taken out of its training images by a hash of each one's name (see
    `split_by_hash`). Nothing is read before the first use.

    Args:
        image_size: side of a square or (height, width) in pixels.
        crop: "center" scales until the image covers the size and crops its centre; "none" changes the aspect ratio.
        val_fraction, test_fraction: shares of the training images to validate and to test on, from 0, below 1 in all;
            unused where the data set has such a split. Data sets that always have a test split lack the second.
        cache: decode each split once, at its first use, into a memory-mapped file (see `CachedImages`).
        on_corrupt: "error" names an image that cannot be decoded; "skip" is described at `EncodedImages`.
        background: what shows through where images are transparent: a colour's name or #rrggbb, or "none" for the
            colours that the transparent pixels have.
        allow_outside: whether files count that lie outside of where the images are: behind links that lead out of a
            directory, or named by a table.
    """

    image_size: int | Sequence[int] = 256
    crop: Crop = "center"
    val_fraction: float = 0.05
    test_fraction: ClassVar[float | None] = None
    cache: bool = False
    on_corrupt: OnCorrupt = "error"
    background: str = BACKGROUND
    allow_outside: bool = False

    path_argument: ClassVar[str] = "root"  # the argument that says where the images are

    def __post_init__(self) -> None:
        where = getattr(self, self.path_argument)
        check(self.path_argument, where, "where the images are", bool(where))
        check_choice("crop", self.crop, Crop)
        check_choice("on_corrupt", self.on_corrupt, OnCorrupt)
        check_background(self.background)
        self.image_size = check_image_size(self.image_size)
        self._origin = f"{self.path_argument}={where}"
        self._root = Path(os.path.abspath(os.path.expanduser(where)))
        found = {"test": self.test_fraction, "val": self.val_fraction}  # in the order of the hashes
        self._fractions = {name: share for name, share in found.items() if share is not None}
        shares = self._fractions.values()
        if not all(isinstance(share, int | float) and share >= 0 for share in shares) or not sum(shares) < 1:
            named = " and ".join(f"{name}_fraction={share}" for name, share in self._fractions.items())
            raise GraincodeError(f"{named}: expected shares from 0, below 1 in all")

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """Name of each label, the same in all splits; empty if there are no labels. Raises as `split` does."""

    @property
    def _name(self) -> str:
        return self._root.name

    @abstractmethod
    def _encoded(self, split: str) -> tuple[Encoded, Tensor]:
        """The images of a split and their (N,) long labels."""

    def split(self, name: str) -> ImageDataset:
        """The split "train", "val" or "test"; with a cache, decodes it into there if that has not been done."""
        found = self.undecoded(name)
        where = f"{len(found)} images and {len(found.class_names)} classes in split {name}"
        _logger.info("%s: %s", self._origin, where)
        return CachedImages(**{one.name: getattr(found, one.name) for one in fields(found)}) if self.cache else found

    def undecoded(self, name: str) -> EncodedImages:
        """A split without a cache."""
        check_choice("split", name, SPLITS)
        encoded, labels = self._encoded(name)
        if not len(labels):
            argument = f"{name}_fraction=0" if self._fractions.get(name) == 0 else self._origin
            raise GraincodeError(f"{argument}: expected {name} images in {self._root}, found none")
        how = self.crop, self.on_corrupt, self.background
        return EncodedImages(self._name, name, self.image_size, encoded, labels, self.class_names, *how)

    def _take_out(self, names: Iterable[str], given: Iterable[str] = ()) -> dict[str, list[str]]:
        """The sorted names of "train" and of the splits that are not given, which are taken out of the train images."""
        names = list(names)
        parts = split_by_hash(names, {name: f for name, f in self._fractions.items() if name not in given})
        if not parts["train"]:
            fewer = "test_fraction=0" if parts.get("test") else "a smaller val_fraction"
            more = f" or give {fewer}" if len(names) > 1 else ""
            raise GraincodeError(f"{self._origin}: none of its {len(names)} images is left to train on; add some{more}")
        return parts
