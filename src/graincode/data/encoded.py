"""Encoded images, wherever their files lie, and a split of them that is decoded when it is read."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from graincode.core.errors import GraincodeError
from graincode.core.images import from_uint8
from graincode.data.images import ImageBatch, ImageDataset, index_tensor, read_image

Crop = Literal["center", "none"]
OnCorrupt = Literal["error", "skip"]

_logger = logging.getLogger(__name__)


class Encoded(Protocol):
    """N encoded images: where their bytes come from."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What errors and warnings call an image."""

    def read(self, index: int) -> bytes:
        """The content of an image's file; a GraincodeError if it is not there, which is never skipped."""

    def identity(self) -> str:
        """Changes when the content does, as far as names, sizes and times of change show; not with the place."""


@dataclass(frozen=True)
class Files:
    """Image files on disk (see `Encoded`): their paths relative to a directory, with forward slashes."""

    base: Path
    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.base / self.paths[index])

    def read(self, index: int) -> bytes:
        return read_file(self.base / self.paths[index])

    def identity(self) -> str:
        return files_identity((path, self.base / path) for path in self.paths)


def files_identity(files: Iterable[tuple[str, Path]]) -> str:
    """Hex SHA-256 over the names that count of files, and the sizes and times of change (ns) at their paths."""
    digest = hashlib.sha256()
    for name, path in files:
        with readable(path):
            stat = path.stat()
        digest.update(os.fsencode(name) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def read_file(path: Path, offset: int = 0, size: int = -1) -> bytes:
    """The content of a file, or a part of it; a GraincodeError if it cannot be read."""
    with readable(path), path.open("rb", buffering=0) as file:
        file.seek(offset)
        return file.read(size)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Say which file it is that the system does not let us read."""
    try:
        yield
    except OSError as error:
        raise GraincodeError(
            f"{path} cannot be read ({error.strerror or error}): make it readable, or begin anew"
        ) from error


@dataclass(eq=False)
class EncodedImages(ImageDataset):
    """A split of N encoded images, decoded when they are asked for.

    With `on_corrupt="skip"`, the next image of the split that can be decoded (after the last, the first) stands in for
    one that cannot, with its own label in the batch, so that the length stays; `corrupt` (N,) bool has those found.
    """

    name: str
    split: str
    image_size: tuple[int, int]
    encoded: Encoded
    labels: Tensor
    class_names: tuple[str, ...] = ()
    crop: Crop | Literal["exact"] = "center"
    on_corrupt: OnCorrupt = "error"

    def __post_init__(self) -> None:
        self.corrupt = torch.zeros(len(self.encoded), dtype=torch.bool)
        if self.on_corrupt == "skip":
            self.corrupt.share_memory_()  # what a loader's worker process finds counts in all of them

    @property
    def skipped(self) -> int:
        return int(self.corrupt.sum())

    def __getitem__(self, indices: Sequence[int] | int) -> ImageBatch:
        chosen = index_tensor(indices, len(self))
        images, labels = self.decode(chosen.tolist())
        return ImageBatch(from_uint8(images), labels, chosen)

    def decode(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) uint8 images and (B,) long labels at B indices; a GraincodeError if one is corrupt."""
        images = torch.empty(len(indices), 3, *self.image_size, dtype=torch.uint8)
        shown = torch.empty(len(indices), dtype=torch.long)
        for row, index in enumerate(indices):
            shown[row], images[row] = self._readable(index)
        return images, self.labels[shown]

    def warn_of(self, index: int, reason: str) -> None:
        """Say that an image is skipped."""
        name = self.encoded.name(index)
        _logger.warning("%s is corrupt (%s): the next image of the split stands in for it", name, reason)

    def _readable(self, index: int) -> tuple[int, Tensor]:
        """Index and pixels of the image that is shown at an index: its own, unless it is corrupt and skipped."""
        for candidate in chain(range(index, len(self)), range(index)):
            if self.corrupt[candidate]:
                continue
            content = self.encoded.read(candidate)
            try:
                return candidate, read_image(content, self.image_size, self.crop, self.encoded.name(candidate))
            except GraincodeError as error:
                if self.on_corrupt == "error":
                    raise
                self.corrupt[candidate] = True
                self.warn_of(candidate, " ".join(str(error.__cause__).split()))
        example = self.encoded.name(index)
        raise GraincodeError(f"{example}: none of the {len(self)} {self.split} images of {self.name} can be read")
