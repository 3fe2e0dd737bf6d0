"""Encoded images, wherever their files lie: their bytes, and splits that decode them."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

from graincode.core.errors import GraincodeError, one_line
from graincode.data.decoding import BACKGROUND, check_background, read_image
from graincode.data.images import ImageDataset, fingerprint_of

MAX_BYTES = 2**30  # of one file that is read as a whole
MAX_CLASSES = 2**20
Crop = Literal["center", "none"]
OnCorrupt = Literal["error", "skip"]

_logger = logging.getLogger(__name__)


class Encoded(Protocol):
    """N encoded images: where their bytes come from."""

    def name(self, index: int) -> str:
        """What errors and warnings call an image."""

    def read(self, index: int) -> bytes:
        """The content of an image's file; a GraincodeError if it is not there, which is never skipped, or TooLarge."""

    def identity(self) -> str:
        """A hash that changes with the content, as far as names, sizes and times show; not with the folder."""


class TooLarge(GraincodeError):
    """A file has more bytes than are read as a whole."""


@dataclass(frozen=True)
class Files:
    """Image files on disk (see `Encoded`): their paths relative to a directory, with forward slashes."""

    base: Path
    paths: Sequence[str]

    def name(self, index: int) -> str:
        return one_line(str(self.base / self.paths[index]))

    def read(self, index: int) -> bytes:
        return read_file(self.base / self.paths[index])

    def beside(self, name: str) -> bytes | None:
        """The content of a file of the directory that may be no image; None if it is not there."""
        return read_file(self.base / name) if os.path.lexists(self.base / name) else None

    def of(self, paths: Sequence[str]) -> Self:
        """Some of these files."""
        return replace(self, paths=paths)

    def below(self, folder: str) -> Self:
        """Those in a directory, to which their paths become relative; "a/b/", or empty for all."""
        inside = [path.removeprefix(folder) for path in self.paths if path.startswith(folder)]
        return replace(self, base=self.base / folder, paths=inside)

    def identity(self) -> str:
        return files_identity([self.base / path for path in self.paths], self.paths)


def files_identity(paths: Sequence[Path], names: Sequence[str] | None = None) -> str:
    """Hex SHA-256 over names (by default the paths' last parts), sizes and times of change (ns) of files."""
    digest = hashlib.sha256()
    for path, name in zip(paths, names or [path.name for path in paths], strict=True):
        with readable(path):
            stat = path.stat()
        digest.update(os.fsencode(name) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def read_file(path: Path, offset: int = 0, size: int | None = None) -> bytes:
    """The content of a regular file, or a part of it; a GraincodeError if it cannot be read or is not as large."""
    with readable(path):
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
            raise OSError("it is no file of bytes")
        size = found.st_size - offset if size is None else size
        if size > MAX_BYTES:
            raise TooLarge(f"{path} cannot be read ({size} bytes: expected {MAX_BYTES} at most): make it smaller")
        if offset + size > found.st_size:
            raise OSError(f"{size} bytes at {offset}: expected a file of so many, not of {found.st_size}")
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            return file.read(size)


def numbered_classes(largest: int, where: str) -> tuple[str, ...]:
    """The names "0", "1" and so on up to the largest label; refuses what is no label. `where` it was found."""
    if not 0 <= largest < MAX_CLASSES:
        raise GraincodeError(f"{where}: expected labels from 0, below {MAX_CLASSES}, found {largest}")
    return tuple(map(str, range(largest + 1)))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Say which file it is that the system does not let us read."""
    try:
        yield
    except GraincodeError:
        raise
    except (OSError, ValueError) as error:  # a ValueError: no file can be called so
        reason = getattr(error, "strerror", None) or error
        raise GraincodeError(f"{path} cannot be read ({reason}): make it readable, or move it away") from error


@dataclass(eq=False)
class EncodedImages(ImageDataset):
    """A split of N encoded images, decoded when they are read.

    With `on_corrupt="skip"`, the next image of the split that can be decoded (after the last, the first) stands in for
    one that cannot, with its own label in the batch, and a warning; `corrupt` (N,) bool has those found.
    """

    name: str
    split: str
    image_size: tuple[int, int]
    encoded: Encoded
    labels: Tensor
    class_names: tuple[str, ...] = ()
    crop: Crop | Literal["exact"] = "center"
    on_corrupt: OnCorrupt = "error"
    background: str = BACKGROUND

    def __post_init__(self) -> None:
        self.corrupt = torch.zeros(len(self), dtype=torch.bool)
        if self.on_corrupt == "skip":
            self.corrupt.share_memory_()  # what a loader's worker process finds counts in all of them

    @property
    def skipped(self) -> int:
        return int(self.corrupt.sum())

    def load(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        images = torch.empty(len(indices), 3, *self.image_size, dtype=torch.uint8)
        shown = torch.empty_like(indices)
        for row, index in enumerate(indices.tolist()):
            shown[row], images[row] = self._shown(index)
        return images, self.labels[shown]

    def fingerprint(self) -> str:
        """Of what all pixels and labels depend on; the same with a cache."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        labels = hashlib.sha256(self.labels.numpy().tobytes()).hexdigest()
        look = str(self.image_size), self.crop, str(check_background(self.background))
        return fingerprint_of(self.encoded.identity(), labels, *look, *self.class_names)

    def _skip(self, index: int, reason: str) -> None:
        self.corrupt[index] = True
        name = self.encoded.name(index)
        _logger.warning("%s is corrupt (%s): the next image of the split stands in for it", name, reason)

    def _shown(self, index: int) -> tuple[int, Tensor]:
        """Index and pixels of the image that is shown at an index: its own, unless it is corrupt and skipped."""
        for candidate in chain(range(index, len(self)), range(index)):
            if self.corrupt[candidate]:
                continue
            name, content = self.encoded.name(candidate), None
            try:
                content = self.encoded.read(candidate)
                return candidate, read_image(content, self.image_size, self.crop, name, self.background)
            except GraincodeError as error:
                if content is None and not isinstance(error, TooLarge):
                    raise
                if self.on_corrupt == "error":
                    raise GraincodeError(f"{error.line}, remove it or give on_corrupt=skip") from error
                self._skip(candidate, " ".join(str(error.__cause__ or error.line).split()))
        none = f"none of the {len(self)} {self.split} images of {self.name} can be read"
        raise GraincodeError(f"{self.encoded.name(index)}: {none}")
