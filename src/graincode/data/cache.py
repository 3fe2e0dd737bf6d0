"""The cache on disk: each image decoded once, and anything else that several processes want built once."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from graincode.core.errors import GraincodeError
from graincode.core.images import from_uint8
from graincode.data.encoded import EncodedImages
from graincode.data.images import ImageBatch, ImageDataset, index_tensor
from graincode.files import cache_root, new_directory, replacing

FORMAT = 1
_CHUNK = 64


def build_once(path: Path, what: str, build: Callable[[], None]) -> None:
    """Build a file or directory unless it is there; of the processes that ask at once one builds, the others wait.

    What is built is named in errors. `build` makes it appear as a whole (see `graincode.files`), or raises.
    """
    if path.exists():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / f".{path.name}.lock"):
            if not path.exists():
                build()
    except OSError as error:
        where = f"{path.parent} cannot take {what} ({error.strerror or error})"
        raise GraincodeError(f"{where}: free space there, or set GRAINCODE_CACHE to another folder") from error


def cached(images: EncodedImages) -> CachedImages:
    """The same split with its images decoded once and for all, by a thread for each CPU.

    They lie in `cache_root()`/images under a hash of what the pixels and labels depend on: the files' identity, labels,
    size and crop, and the versions of the decoder and of the cache's format.
    """
    key = [FORMAT, PIL.__version__, images.encoded.identity(), images.labels.tolist(), *images.image_size, images.crop]
    folder = cache_root() / "images" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    needed = len(images) * (3 * images.image_size[0] * images.image_size[1] + 8)
    what = f"the {needed} bytes of the {images.split} images of {images.name}"
    build_once(folder, what, lambda: _build(images, folder, needed))
    return CachedImages(images, folder)


class CachedImages(ImageDataset):
    """A split read from the folder that `cached` built of it; refuses a damaged one, and images skipped as an error."""

    def __init__(self, images: EncodedImages, folder: Path) -> None:
        self.name, self.split, self.class_names = images.name, images.split, images.class_names
        self.image_size, self._folder = images.image_size, folder
        try:
            self.labels = torch.from_numpy(np.load(folder / "labels.npy", allow_pickle=False))
            corrupt = np.load(folder / "corrupt.npy", allow_pickle=False).tolist()
            if self._images.shape != (len(images), 3, *images.image_size):
                raise ValueError("other images")
        except (OSError, ValueError):
            raise GraincodeError(f"{folder} is damaged: remove it, so that it is built anew") from None
        self.skipped = len(corrupt)
        if corrupt and images.on_corrupt == "error":
            images.decode(corrupt[:1])  # raises the error that names it
        for index in corrupt:
            if not images.corrupt[index]:  # building it has not just said so
                images.warn_of(index, "when it was cached")

    @cached_property
    def _images(self) -> np.ndarray:
        return np.load(self._folder / "images.npy", mmap_mode="r", allow_pickle=False)

    def __getstate__(self) -> dict[str, Any]:
        # a worker process that is not forked maps the file itself: pickled, the whole of it would be copied
        return {name: value for name, value in self.__dict__.items() if name != "_images"}

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


def _build(images: EncodedImages, folder: Path, needed: int) -> None:
    for left in folder.parent.glob(f".{folder.name}.partial-*"):  # by a process that was killed, as the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    if (free := shutil.disk_usage(folder.parent).free) < needed:
        raise OSError(errno.ENOSPC, f"{free} bytes are free")
    with new_directory(folder) as partial:
        path, shape = partial / "images.npy", (len(images), 3, *images.image_size)
        offset = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape).offset

        def write(rows: range) -> Tensor:
            """Decode images into the file; a full disk is an error here, and would be a bus error in a mapped one."""
            pixels, labels = images.decode(rows)
            with path.open("r+b") as file:
                file.seek(offset + rows.start * pixels[0].nbytes)
                file.write(pixels.numpy().data)
            return labels

        chunks = [range(start, min(start + _CHUNK, len(images))) for start in range(0, len(images), _CHUNK)]
        labels = []
        with ThreadPoolExecutor(os.cpu_count()) as threads, tqdm(total=len(images), unit=" images", leave=False) as bar:
            for written in threads.map(write, chunks):
                labels.append(written)
                bar.update(len(written))
        np.save(partial / "labels.npy", torch.cat(labels).numpy())
        np.save(partial / "corrupt.npy", images.corrupt.nonzero().flatten().numpy())
