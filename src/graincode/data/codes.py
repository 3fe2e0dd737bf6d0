"""Codes on disk: a data set's codes in the smallest integer types, memory-mapped when they are read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graincode.core.codes import GrainCodes, Rows
from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout
from graincode.distributed import collectives

FORMAT = 1
_ARRAYS = ("grains", "indices", "labels")
_CHUNK = 8192


@dataclass(frozen=True)
class CodeBatch(Rows):
    """The codes of B images and their (B,) long labels."""

    codes: GrainCodes
    labels: Tensor


class CodeDataset:
    """A split of codes in a directory of `extract_codes`; an index list gives a batch, which is checked.

    With several views of each training image, all images come in one view, then all in the next.
    """

    def __init__(self, path: str | os.PathLike[str], split: str) -> None:
        self.path, self.split = Path(path), split
        self.info = read_info(self.path)
        self.identity = hashlib.sha256((self.path / "codes.json").read_bytes()).hexdigest()[:16]
        self.layout = CodeLayout(**self.info["layout"])
        self.class_names: tuple[str, ...] = tuple(self.info["class_names"])
        known = sorted(found.name.split(".")[0] for found in self.path.glob("*.labels.npy"))  # what is written last
        if split not in known:
            raise GraincodeError(f"{self.path} has no codes of {split}, only of {', '.join(known) or 'no split'}")
        self._arrays = [np.load(self.path / f"{split}.{name}.npy", "r", allow_pickle=False) for name in _ARRAYS]

    def __len__(self) -> int:
        return len(self._arrays[-1])

    @cached_property
    def lengths(self) -> np.ndarray:
        """(N,) int32, codes of each image; reads all grain maps, a few thousand at a time."""
        grains, costs = self._arrays[0], np.array(self.layout.codes_per_region, dtype=np.int32)
        chunks = (grains[start : start + _CHUNK] for start in range(0, len(grains), _CHUNK))
        return np.concatenate([costs[chunk].sum(axis=(1, 2), dtype=np.int32) for chunk in chunks])

    def __getitem__(self, indices: Sequence[int] | int) -> CodeBatch:
        chosen = np.atleast_1d(np.asarray(indices, dtype=np.int64))
        grains, codes, labels = (torch.from_numpy(array[chosen].astype(np.int64)) for array in self._arrays)
        return CodeBatch(GrainCodes.checked(grains, codes, self.layout), labels)


def read_info(path: Path) -> dict[str, Any]:
    """What stands beside codes: layout, class names, tokenizer, views of each training image (1 if it says none)."""
    file = path / "codes.json"
    if not file.is_file():
        raise GraincodeError(f"{path} holds no codes (no codes.json): give a directory that extract_codes wrote")
    info = json.loads(file.read_text())
    if info.get("format") != FORMAT:
        raise GraincodeError(f"{path} has codes of format {info.get('format')}, expected {FORMAT}: extract them anew")
    return {"views": 1, **info}


def write_split(
    path: Path, split: str, layout: CodeLayout, size: int, batches: Iterable[CodeBatch], first: int = 0
) -> dict[str, float]:
    """Write the codes of `size` images, all processes together; a split is there as a whole or not at all.

    Args:
        batches: of this process, in order, from the image with the index `first`.
    Returns:
        `images`, and `mean_length`, `min_length` and `max_length` in codes per image.
    """
    partial = [path / f".{split}.{name}.npy.partial" for name in _ARRAYS]

    def allocate() -> None:
        path.mkdir(exist_ok=True)
        largest = layout.num_grains - 1, layout.codebook_size - 1, max(layout.classes - 1, 0)
        for file, number, shape in zip(partial, largest, (layout.grids[0], layout.grids[-1], ()), strict=True):
            np.lib.format.open_memmap(file, mode="w+", dtype=np.min_scalar_type(number), shape=(size, *shape))
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here; in a memory map it kills the process
                with file.open("r+b") as opened:
                    os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)

    collectives.on_main(allocate)
    arrays = [np.load(file, "r+", allow_pickle=False) for file in partial]
    lengths, start = [torch.zeros(0, dtype=torch.long)], first
    for batch in batches:
        rows = slice(start, start := start + len(batch.codes))
        for array, values in zip(arrays, (batch.codes.grains, batch.codes.indices, batch.labels), strict=True):
            array[rows] = values.cpu().numpy()
        lengths.append(batch.codes.lengths.cpu())
    for array in arrays:
        array.flush()
    joined = collectives.gather_rows(torch.cat(lengths))  # behind it, every process has written its part
    if len(joined) != size:
        raise GraincodeError(f"{len(joined)} codes for {size} images of {split}: the data set has changed meanwhile")
    collectives.on_main(lambda: [os.replace(file, path / file.stem.removeprefix(".")) for file in partial])
    low, high = joined.aminmax()
    mean = float(joined.double().mean())
    return {"images": size, "mean_length": mean, "min_length": int(low), "max_length": int(high)}
