"""Splits that are decoded once, into a memory-mapped file."""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor
from tqdm import tqdm

from graincode.core.errors import GraincodeError
from graincode.data.encoded import EncodedImages
from graincode.data.images import fingerprint_of
from graincode.distributed.affinity import on_any_core
from graincode.files import build_once, cache_root, new_directory, read_array, replacing

CACHE_FORMAT = 1
_CHUNK = 64


class CachedImages(EncodedImages):
    """The same split with its images decoded once and for all, by a thread for each CPU.

    They lie in `cache_root()`/images, 3 * height * width bytes each, under a hash of all that pixels and labels depend
    on. A damaged cache is built anew; images that it skipped are refused where `on_corrupt="error"`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        key = fingerprint_of(str(CACHE_FORMAT), PIL.__version__, self.fingerprint())  # before the labels change
        self._folder = cache_root() / "images" / key
        needed = len(self) * (3 * math.prod(self.image_size) + 8)
        subject = f"the {needed} bytes of the {self.split} images of {self.name}"
        build_once(self._folder, subject, lambda: self._build(needed), self._is_whole)
        labels, corrupt = self._array("labels", np.int64, len(self)), self._array("corrupt", np.int64, None)
        if len(corrupt) and self.on_corrupt == "error":
            self._shown(corrupt[0])  # raises the error that names it
        for index in corrupt[~self.corrupt[corrupt].numpy()]:  # building it has not just said so
            self._skip(index, "when it was cached")
        self.labels = torch.from_numpy(labels)

    def _is_whole(self) -> bool:
        try:
            self._array("images", np.uint8, *self._shape, mapped=True)
            labels, corrupt = self._array("labels", np.int64, len(self)), self._array("corrupt", np.int64, None)
        except GraincodeError:
            return False
        known = not len(corrupt) or 0 <= corrupt.min() <= corrupt.max() < len(self)
        return bool(known and np.isin(labels, self.labels.numpy()).all())

    def _array(self, name: str, kind: type[np.generic], *shape: int | None, mapped: bool = False) -> np.ndarray:
        return read_array(self._folder / f"{name}.npy", kind, shape, "remove its folder", mapped)

    @cached_property
    def _images(self) -> np.ndarray:
        return self._array("images", np.uint8, *self._shape, mapped=True)

    @property
    def _shape(self) -> tuple[int, ...]:
        return len(self), 3, *self.image_size

    def __getstate__(self) -> dict[str, Any]:
        # a worker process that is not forked maps the file itself: pickled, the whole of it would be copied
        return {name: value for name, value in self.__dict__.items() if name != "_images"}

    def load(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self._images[indices.numpy()]), self.labels[indices]

    def content_hash(self) -> str:
        file = self._folder / "content_hash"
        if file.is_file() and re.fullmatch("[0-9a-f]{64}", known := file.read_text(errors="replace", encoding="utf-8")):
            return known
        digest = super().content_hash()
        with suppress(OSError), replacing(file) as partial:  # a cache that others share may be read-only
            partial.write_text(digest, encoding="utf-8")
        return digest

    def _build(self, needed: int) -> None:
        if (free := shutil.disk_usage(self._folder.parent).free) < needed:
            raise OSError(errno.ENOSPC, f"{free} bytes are free")
        with new_directory(self._folder) as partial, on_any_core(), ThreadPoolExecutor(os.cpu_count()) as threads:
            path = partial / "images.npy"
            offset = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=self._shape).offset

            def write(rows: Tensor) -> Tensor:
                """Decode images into the file; a full disk is an error so, and would be a bus error in a mapped one."""
                images, labels = EncodedImages.load(self, rows)
                with path.open("r+b") as file:
                    file.seek(offset + int(rows[0]) * images[0].nbytes)
                    file.write(images.numpy().data)
                return labels

            chunks = torch.arange(len(self)).split(_CHUNK)
            look = {"total": len(chunks), "unit": " images", "unit_scale": _CHUNK, "leave": False}
            with tqdm(threads.map(write, chunks), **look) as done:
                np.save(partial / "labels.npy", torch.cat(list(done)).numpy())
            np.save(partial / "corrupt.npy", self.corrupt.nonzero().flatten().numpy())
