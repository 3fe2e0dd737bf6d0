"""Encoded images as data sets, wherever their files lie: what folders, tables and tar shards share."""

from __future__ import annotations

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from graincode.core.errors import GraincodeError
from graincode.data.cache import DecodedImages, OnCorrupt, cached, warn_of
from graincode.data.images import (
    ImageDataset,
    check_choice,
    check_fractions,
    check_image_size,
    check_split,
    no_images,
    read_image,
    split_by_hash,
)

Crop = Literal["center", "none"]

_logger = logging.getLogger(__name__)


class Encoded(Protocol):
    """N encoded images: where their bytes come from."""

    def __len__(self) -> int:
        """N."""

    def name(self, index: int) -> str:
        """What errors and warnings call an image."""

    def read(self, index: int) -> bytes:
        """The content of an image's file.

        Raises:
            GraincodeError: it is not to be had. Unlike a file that cannot be decoded, this is never skipped.
        """

    def identity(self) -> str:
        """Changes when the content does, as far as names, sizes and times of change show; not with the place."""


def files_identity(files: Iterable[tuple[str, Path]]) -> str:
    """Hex SHA-256 over names, sizes and times of change (ns).

    Args:
        files: of each, the name that counts and the path.
    Raises:
        GraincodeError: a file is not there.
    """
    digest = hashlib.sha256()
    for name, path in files:
        try:
            stat = path.stat()
        except OSError as error:
            raise file_error(path, error) from error
        digest.update(os.fsencode(name) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def file_error(path: Path, error: OSError) -> GraincodeError:
    """What to say of a file that the system does not let us read."""
    return GraincodeError(
        f"{path} cannot be read ({error.strerror or error}): make it readable, or if the data set has changed "
        "meanwhile, type the same command again"
    )


class EncodedImages(DecodedImages):
    """A split of encoded images, decoded when they are asked for.

    Args:
        name, split, image_size, class_names: as in `ImageDataset`.
        encoded: N images.
        labels: (N,) long.
        crop: as in `read_image`.
        on_corrupt: "error", or "skip": the next image of the split that can be decoded (after the last, the first)
            stands in for one that cannot, with its own label in the batch, so that the length stays. The attribute
            `labels` is as given.
    """

    def __init__(
        self,
        name: str,
        split: str,
        image_size: tuple[int, int],
        encoded: Encoded,
        labels: Tensor,
        class_names: tuple[str, ...] = (),
        crop: Crop | Literal["exact"] = "center",
        on_corrupt: OnCorrupt = "error",
    ) -> None:
        self.name, self.split, self.image_size = name, split, image_size
        self.encoded, self.labels, self.class_names = encoded, labels, class_names
        self.crop, self.on_corrupt = crop, on_corrupt
        self.corrupt = torch.zeros(len(encoded), dtype=torch.bool)
        if on_corrupt == "skip":
            self.corrupt.share_memory_()  # what a loader's worker process finds counts in all of them

    @property
    def files(self) -> tuple[str, ...]:
        """What errors call each image: of a folder, the paths."""
        return tuple(self.encoded.name(index) for index in range(len(self)))

    def describe(self, index: int) -> str:
        return self.encoded.name(index)

    def key(self) -> list[Any]:
        return [self.encoded.identity(), self.labels.tolist(), *self.image_size, self.crop]

    def decode(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        images = torch.empty(len(indices), 3, *self.image_size, dtype=torch.uint8)
        shown = torch.empty(len(indices), dtype=torch.long)
        for row, index in enumerate(indices):
            shown[row], images[row] = self._readable(index)
        return images, self.labels[shown]

    def _readable(self, index: int) -> tuple[int, Tensor]:
        """Index and pixels of the image that is shown at an index: its own, unless it is corrupt and skipped."""
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            if self.corrupt[candidate]:
                continue
            content = self.encoded.read(candidate)
            try:
                return candidate, read_image(content, self.image_size, self.crop, self.encoded.name(candidate))
            except GraincodeError as error:
                if self.on_corrupt == "error":
                    raise
                self.corrupt[candidate] = True
                warn_of(self.encoded.name(candidate), str(error.__cause__))
        raise GraincodeError(
            f"none of the {len(self)} {self.split} images of {self.name} can be read, "
            f"{self.encoded.name(index)} for one: type data.root=/path/to/intact/images"
        )


class EncodedSource(ABC):
    """A data set of encoded images before it is read; a subclass says where they are.

    Args:
        origin: the key and value that say where, for errors, such as "data.root=/images".
        image_size: side of a square or (height, width) in pixels.
        crop: "center" scales until the image covers the size and crops its centre; "none" changes the aspect ratio.
        cache: decode each split once, at its first use, into a memory-mapped file of 3 * height * width bytes an
            image in $GRAINCODE_CACHE or ~/.cache/graincode, and read from there; a data set that has changed since
            is decoded anew.
        on_corrupt: of an image that cannot be decoded: "error" names it, "skip" shows the next one of the split in
            its place, warns, and counts it in the split's `skipped`.
        fractions: share of the training images for each split that may be taken out of them ("test", "val"), from 0;
            their sum is below 1.
    Raises:
        GraincodeError: an argument is not as above.
    """

    name: str

    def __init__(
        self,
        origin: str,
        image_size: int | Sequence[int],
        crop: Crop,
        cache: bool,
        on_corrupt: OnCorrupt,
        fractions: Mapping[str, float],
    ) -> None:
        check_choice("crop", crop, ("center", "none"))
        check_choice("on_corrupt", on_corrupt, ("error", "skip"))
        check_fractions(fractions)
        self.image_size = check_image_size(image_size)
        self._origin, self._crop, self._cache, self._on_corrupt = origin, crop, cache, on_corrupt
        self._fractions = fractions

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """Name of each label, the same in all splits; empty if there are no labels.

        Raises:
            GraincodeError: as `split` does.
        """

    @abstractmethod
    def _encoded(self, split: str) -> tuple[Encoded, Tensor]:
        """The images of a split and their (N,) long labels."""

    def split(self, name: str) -> ImageDataset:
        """The split "train", "val" or "test"; with a cache, decodes it into there if that has not been done.

        Raises:
            GraincodeError: there is no such split or it has no images, they are not where they should be, or the
                cache cannot be written.
        """
        check_split(name)
        encoded, labels = self._encoded(name)
        if not len(encoded):
            raise no_images(self._origin, name, self._fractions)
        names = self.class_names
        _logger.info("%s: %d images and %d classes in split %s", self._origin, len(encoded), len(names), name)
        images = EncodedImages(self.name, name, self.image_size, encoded, labels, names, self._crop, self._on_corrupt)
        return cached(images) if self._cache else images

    def _take_out(self, names: Iterable[str], given: Iterable[str] = ()) -> dict[str, list[str]]:
        """Take the splits that are not given out of the training images, by a hash of each one's name.

        Returns:
            The names of each of these splits and of "train", sorted.
        Raises:
            GraincodeError: none is left to train on.
        """
        fractions = {name: fraction for name, fraction in self._fractions.items() if name not in given}
        parts = split_by_hash(list(names), fractions)
        if not parts["train"]:
            raise GraincodeError(
                f"{self._origin} has too few images for its splits, none is left to train on: add images"
                + (f", or type {' '.join(f'data.{name}_fraction=0' for name in fractions)}" if fractions else "")
            )
        return parts
