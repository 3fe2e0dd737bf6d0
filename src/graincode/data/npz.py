"""Images in an .npz file, as others share samples: read from it batch by batch, never held."""

from __future__ import annotations

import os
import zipfile
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from graincode.core.errors import GraincodeError
from graincode.data.encoded import MAX_CLASSES
from graincode.data.images import ImageDataset
from graincode.files import open_npz, read_header, reading_npz

_LABELS = {"arr_0": "arr_1", "images": "labels"}  # arrays of images, and of their labels


def has_images(arrays: np.lib.npyio.NpzFile) -> bool:
    """Whether there are images among the arrays of a file, which are not read."""
    for name in _LABELS.keys() & {*arrays.files}:
        with arrays.zip.open(f"{name}.npy") as opened:
            if len(read_header(opened)[0]) == 4:
                return True
    return False


class NpzImages(ImageDataset):
    """The uint8 (N, H, W, 3) of an .npz file, `arr_0` or `images`, with its labels, `arr_1` or `labels`, if there are.

    A compressed file is unpacked anew from its start where images come in another order than their own.

    Attributes:
        array, arrays: name of the array of images, and of all arrays in the file.
        warnings: lines for readers of what is measured.
    Raises:
        GraincodeError: it is damaged, or has no such images; also where they are read.
    """

    split = "images"

    def __init__(self, path: Path) -> None:
        self.path, self.name, self._opened, self.warnings = path, path.name, None, []
        try:
            with open_npz(path) as arrays:
                self.arrays, shapes = tuple(arrays.files), {}
                for name in set(chain(*_LABELS.items())) & set(arrays.files):
                    with arrays.zip.open(f"{name}.npy") as opened:
                        shapes[name] = (*read_header(opened), opened.tell())
                self.array = next((name for name in _LABELS if name in shapes), "")
                shape, fortran, dtype, self._start = shapes.get(self.array, ((), False, None, 0))
                if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not shape[0] or fortran:
                    found = f"{dtype} {shape}{fortran * ' in Fortran order'}"
                    found = found if self.array else "none of them; mu and sigma are statistics"
                    raise GraincodeError(f"{path}: expected arr_0 or images, uint8 of (N, H, W, 3), but found {found}")
                self.image_size, count, labels = shape[1:3], shape[0], _LABELS[self.array]
                integers = labels in shapes and shapes[labels][0] == (count,) and shapes[labels][2].kind in "iu"
                known = arrays[labels] if integers else np.zeros(0)
        except GraincodeError:
            raise
        except ValueError as error:
            raise GraincodeError(f"{path}: no directory of images, and {error}") from None
        self._labelled = bool(len(known) and known.min() >= 0 and known.max() < MAX_CLASSES)
        if labels in shapes and not self._labelled:
            self.warnings.append(f"{labels} is left out: it is no label from 0 of each image")
        self.labels = torch.from_numpy(known.astype(np.int64)) if self._labelled else torch.zeros(count).long()
        self.class_names = ()

    @property
    def labelled(self) -> bool:
        return self._labelled

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_opened": None}  # each process reads for itself

    def load(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        pixels = np.empty((len(indices), *self.image_size, 3), np.uint8)
        try:
            with reading_npz():
                opened = self._reader()
                for row, index in zip(pixels, indices.tolist(), strict=True):
                    if opened.tell() != (place := self._start + index * row.size):
                        opened.seek(place)
                    row[:] = np.frombuffer(opened.read(row.size), np.uint8).reshape(row.shape)
        except ValueError as error:
            raise GraincodeError(f"{self.path}: {error}; make it anew") from None
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), self.labels[indices]

    def _reader(self) -> IO[bytes]:
        """The images' array, opened once in each process: two may not share the place that they read at."""
        if self._opened is None or self._opened[0] != os.getpid():
            archive = zipfile.ZipFile(self.path)
            self._opened = os.getpid(), archive.open(f"{self.array}.npy")
            self._opened[1].read(self._start)  # not by seek, after which the array's checksum would not be compared
        return self._opened[1]
