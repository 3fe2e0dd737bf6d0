"""Encoded images, wherever their files lie: their bytes, splits that decode them, and what data sets of them share."""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import PIL
import torch
from torch import Tensor
from tqdm import tqdm

from graincode.core.errors import GraincodeError, check, check_choice
from graincode.data.decoding import BACKGROUND, check_background, read_image
from graincode.data.images import SPLITS, ImageDataset, check_image_size, fingerprint_of, split_by_hash
from graincode.files import build_once, cache_root, new_directory, replacing

CACHE_FORMAT = 1
_CHUNK = 64
Crop = Literal["center", "none"]
OnCorrupt = Literal["error", "skip"]

_logger = logging.getLogger(__name__)


class Encoded(Protocol):
    """N encoded images: where their bytes come from."""

    def name(self, index: int) -> str:
        """What errors and warnings call an image."""

    def read(self, index: int) -> bytes:
        """The content of an image's file; a GraincodeError if it is not there, which is never skipped."""

    def identity(self) -> str:
        """A hash that changes with the content, as far as names, sizes and times show; not with the folder."""


@dataclass(frozen=True)
class Files:
    """Image files on disk (see `Encoded`): their paths relative to a directory, with forward slashes."""

    base: Path
    paths: Sequence[str]

    def name(self, index: int) -> str:
        return str(self.base / self.paths[index])

    def read(self, index: int) -> bytes:
        return read_file(self.base / self.paths[index])

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
        reason = error.strerror or error
        raise GraincodeError(f"{path} cannot be read ({reason}): make it readable, or begin anew") from error


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
            content = self.encoded.read(candidate)
            try:
                name = self.encoded.name(candidate)
                return candidate, read_image(content, self.image_size, self.crop, name, self.background)
            except GraincodeError as error:
                if self.on_corrupt == "error":
                    raise
                self._skip(candidate, " ".join(str(error.__cause__).split()))
        none = f"none of the {len(self)} {self.split} images of {self.name} can be read"
        raise GraincodeError(f"{self.encoded.name(index)}: {none}")


class CachedImages(EncodedImages):
    """The same split with its images decoded once and for all, by a thread for each CPU.

    They lie in `cache_root()`/images, 3 * height * width bytes each, under a hash of all that pixels and labels depend
    on. A damaged cache is refused, and so are images that it skipped where `on_corrupt="error"`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        key = fingerprint_of(str(CACHE_FORMAT), PIL.__version__, self.fingerprint())  # before the labels change
        self._folder = cache_root() / "images" / key
        needed = len(self) * (3 * math.prod(self.image_size) + 8)
        subject = f"the {needed} bytes of the {self.split} images of {self.name}"
        build_once(self._folder, subject, lambda: self._build(needed))
        try:
            labels = np.load(self._folder / "labels.npy", allow_pickle=False)
            corrupt = np.load(self._folder / "corrupt.npy", allow_pickle=False)
            if self._images.shape != (len(self), 3, *self.image_size):
                raise ValueError("other images")
        except (OSError, ValueError):
            raise GraincodeError(f"{self._folder} is damaged: remove it, so that it is built anew") from None
        if len(corrupt) and self.on_corrupt == "error":
            self._shown(corrupt[0])  # raises the error that names it
        for index in corrupt[~self.corrupt[corrupt].numpy()]:  # building it has not just said so
            self._skip(index, "when it was cached")
        self.labels = torch.from_numpy(labels)

    @cached_property
    def _images(self) -> np.ndarray:
        return np.load(self._folder / "images.npy", mmap_mode="r", allow_pickle=False)

    def __getstate__(self) -> dict[str, Any]:
        # a worker process that is not forked maps the file itself: pickled, the whole of it would be copied
        return {name: value for name, value in self.__dict__.items() if name != "_images"}

    def load(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self._images[indices.numpy()]), self.labels[indices]

    def content_hash(self) -> str:
        file = self._folder / "content_hash"
        if file.is_file():
            return file.read_text()
        digest = super().content_hash()
        with suppress(OSError), replacing(file) as partial:  # a cache that others share may be read-only
            partial.write_text(digest)
        return digest

    def _build(self, needed: int) -> None:
        for left in self._folder.parent.glob(f".{self._folder.name}.partial-*"):  # of killed processes
            shutil.rmtree(left, ignore_errors=True)
        if (free := shutil.disk_usage(self._folder.parent).free) < needed:
            raise OSError(errno.ENOSPC, f"{free} bytes are free")
        with new_directory(self._folder) as partial, ThreadPoolExecutor(os.cpu_count()) as threads:
            path, shape = partial / "images.npy", (len(self), 3, *self.image_size)
            offset = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape).offset

            def write(rows: Tensor) -> Tensor:
                """Decode images into the file; a full disk is an error so, and would be a bus error in a mapped one."""
                images, labels = EncodedImages.load(self, rows)
                with path.open("r+b") as file:
                    file.seek(offset + int(rows[0]) * images[0].nbytes)
                    file.write(images.numpy().data)
                return labels

            chunks = torch.arange(len(self)).split(_CHUNK)
            done = tqdm(threads.map(write, chunks), total=len(chunks), unit=" images", unit_scale=_CHUNK, leave=False)
            np.save(partial / "labels.npy", torch.cat(list(done)).numpy())
            np.save(partial / "corrupt.npy", self.corrupt.nonzero().flatten().numpy())


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
    """

    image_size: int | Sequence[int] = 256
    crop: Crop = "center"
    val_fraction: float = 0.05
    test_fraction: ClassVar[float | None] = None
    cache: bool = False
    on_corrupt: OnCorrupt = "error"
    background: str = BACKGROUND

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
        check_choice("split", name, SPLITS)
        encoded, labels = self._encoded(name)
        if not len(labels):
            argument = f"{name}_fraction=0" if self._fractions.get(name) == 0 else self._origin
            raise GraincodeError(f"{argument}: expected {name} images in {self._root}, found none")
        names = self.class_names
        _logger.info("%s: %d images and %d classes in split %s", self._origin, len(labels), len(names), name)
        kind = CachedImages if self.cache else EncodedImages
        how = self.crop, self.on_corrupt, self.background
        return kind(self._name, name, self.image_size, encoded, labels, names, *how)

    def _take_out(self, names: Iterable[str], given: Iterable[str] = ()) -> dict[str, list[str]]:
        """The sorted names of "train" and of the splits that are not given, which are taken out of the train images."""
        parts = split_by_hash(list(names), {name: f for name, f in self._fractions.items() if name not in given})
        if not parts["train"]:
            keys = "".join(f" {name}_fraction=0" for name in parts if name != "train")
            raise GraincodeError(f"{self._origin}: none of its images is left to train on; add some or set{keys}")
        return parts
