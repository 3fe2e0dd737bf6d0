"""The cache on disk: each image decoded once, and anything else that several processes want built once."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from graincode.core.errors import GraincodeError
from graincode.core.images import from_uint8
from graincode.data.images import ImageBatch, ImageDataset, index_tensor
from graincode.files import cache_root, new_directory, replacing

FORMAT = 1

OnCorrupt = Literal["error", "skip"]

_CHUNK = 64

_logger = logging.getLogger(__name__)


class DecodedImages(ImageDataset):
    """A split whose images are decoded when they are asked for, and which `cached` decodes once and for all.

    Attributes:
        labels: (N,) long.
        corrupt: (N,) bool, those found out so far to be corrupt and to be skipped.
        on_corrupt: what to do with those.
    """

    corrupt: Tensor
    on_corrupt: OnCorrupt = "error"

    @abstractmethod
    def decode(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) uint8 images and (B,) long labels at B indices in [0, len).

        Raises:
            GraincodeError: an image is corrupt, or with `on_corrupt="skip"`, all of the split are.
        """

    @abstractmethod
    def describe(self, index: int) -> str:
        """What errors and warnings call an image."""

    @abstractmethod
    def key(self) -> list[Any]:
        """What the pixels depend on, besides the decoder's version, in JSON's types."""

    def chunks(self) -> list[range]:
        """Indices that are best decoded together; each index is in one of the ranges."""
        return [range(start, min(start + _CHUNK, len(self))) for start in range(0, len(self), _CHUNK)]

    @property
    def skipped(self) -> int:
        return int(self.corrupt.sum())

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Sequence[int] | int) -> ImageBatch:
        chosen = index_tensor(indices, len(self))
        images, labels = self.decode(chosen.tolist())
        return ImageBatch(from_uint8(images), labels, chosen)


def build_once(path: Path, build: Callable[[], None]) -> None:
    """Build a file or directory unless it is there; of the processes that ask at once one builds, the others wait.

    Args:
        path: what is wanted; its parent is made.
        build: makes it appear as a whole (see `graincode.files`), or raises.
    Raises:
        OSError: its parent cannot be written.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _logger.info("another process builds %s: waiting for it", path)
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            if not path.exists():
                build()
        finally:
            # closing is not enough: worker processes forked in between may hold the file open for a while
            fcntl.flock(lock, fcntl.LOCK_UN)


def warn_of(name: str, reason: str) -> None:
    """Say that an image is skipped."""
    _logger.warning("%s is corrupt (%s): the next image of the split stands in for it", name, " ".join(reason.split()))


def cached(images: DecodedImages) -> CachedImages:
    """The same split with its images decoded once and for all, by a process on each CPU.

    The cache lies in `cache_root()`/images under a hash of what the pixels and labels depend on: the images' `key`, and
    the versions of the decoder and of the cache's format.

    Raises:
        GraincodeError: an image is corrupt (unless these are skipped), or the cache cannot be written.
    """
    height, width = images.image_size
    key = [FORMAT, PIL.__version__, *images.key()]
    folder = cache_root() / "images" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    needed = len(images) * (3 * height * width + 8)
    try:
        build_once(folder, lambda: _build(images, folder, needed))
    except OSError as error:
        raise GraincodeError(
            f"{folder.parent} cannot take the {needed} bytes of the {images.split} images of {images.name} "
            f"({error.strerror or error}): free space there, or set GRAINCODE_CACHE to a directory with space, "
            "or type data.cache=false"
        ) from error
    return CachedImages(images, folder)


class CachedImages(ImageDataset):
    """A split read from the cache.

    Args:
        images: the split without the cache.
        folder: what `cached` built of it.
    Raises:
        GraincodeError: the folder is damaged, or an image was skipped that is an error here.
    """

    def __init__(self, images: DecodedImages, folder: Path) -> None:
        self.name, self.split, self.class_names = images.name, images.split, images.class_names
        self.image_size = images.image_size
        self._folder = folder
        try:
            self.labels = torch.from_numpy(np.load(folder / "labels.npy", allow_pickle=False))
            self._corrupt = np.load(folder / "corrupt.npy", allow_pickle=False).tolist()
            damaged = self._images.shape != (len(images), 3, *images.image_size)
        except (OSError, ValueError):
            damaged = True
        if damaged:
            raise GraincodeError(f"{folder} is damaged: remove it, so that it is built anew")
        if self._corrupt and images.on_corrupt == "error":
            images.decode(self._corrupt[:1])  # raises the error that names it
        for index in self._corrupt:
            if not images.corrupt[index]:  # building it has not just said so
                warn_of(images.describe(index), "when it was cached")

    @cached_property
    def _images(self) -> np.ndarray:
        return np.load(self._folder / "images.npy", mmap_mode="r", allow_pickle=False)

    def __getstate__(self) -> dict[str, Any]:
        # a worker process that is not forked maps the file itself: pickled, the whole of it would be copied
        return {name: value for name, value in self.__dict__.items() if name != "_images"}

    @property
    def skipped(self) -> int:
        return len(self._corrupt)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Sequence[int] | int) -> ImageBatch:
        chosen = index_tensor(indices, len(self))
        return ImageBatch(from_uint8(torch.from_numpy(self._images[chosen.numpy()])), self.labels[chosen], chosen)

    def content_hash(self) -> str:
        file = self._folder / "content_hash"
        if file.is_file():
            return file.read_text()
        digest = super().content_hash()
        with suppress(OSError), replacing(file) as partial:  # a cache that others share may be read-only
            partial.write_text(digest)
        return digest


def _build(images: DecodedImages, folder: Path, needed: int) -> None:
    for left in folder.parent.glob(f".{folder.name}.partial-*"):  # by a process that was killed, as the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{free} bytes are free")
    with new_directory(folder) as partial:
        file = partial / "images.npy"
        shape = (len(images), 3, *images.image_size)
        offset = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape).offset
        chunks = images.chunks()
        workers = min(os.cpu_count() or 1, len(chunks))
        loader = DataLoader(
            _Writing(images, file, offset), sampler=chunks, batch_size=None, num_workers=workers if workers > 1 else 0
        )
        labels = torch.empty(len(images), dtype=torch.long)
        failure = None
        with tqdm(total=len(images), desc=f"decoding {images.split}", unit=" images", leave=False) as bar:
            for rows, written in zip(chunks, loader, strict=True):
                if isinstance(written, Exception):
                    failure = written
                    break
                labels[list(rows)] = written
                bar.update(len(rows))
        # after the loop has let go of its workers: those of a loop that an error leaves take seconds to end
        if failure:
            raise failure
        np.save(partial / "labels.npy", labels.numpy())
        np.save(partial / "corrupt.npy", images.corrupt.nonzero().flatten().numpy())
    _logger.info("%s: %d %s images were decoded into %s", images.name, len(images), images.split, folder)


@dataclass(frozen=True)
class _Writing:
    """Indexed by ranges, decodes them into the file: so no pixels travel between processes.

    A full disk is an error of `write`; in a mapped file it would be a bus error.
    """

    images: DecodedImages
    file: Path
    offset: int

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: range) -> Tensor | Exception:
        """Labels of the images, or an error as a value: raised here it would arrive with a worker's traceback."""
        try:
            pixels, labels = self.images.decode(rows)
            with self.file.open("r+b") as file:
                for row, image in zip(rows, pixels.numpy(), strict=True):
                    file.seek(self.offset + row * image.nbytes)
                    file.write(image.data)
        except (GraincodeError, OSError) as error:
            return error
        return labels
