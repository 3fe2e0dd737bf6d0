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
    """A split of codes that `extract_codes` wrote in a directory; an index list gives a batch, which is checked.

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
        files = {name: self.path / f"{split}.{name}.npy" for name in _ARRAYS}
        self._arrays = {name: np.load(file, mmap_mode="r", allow_pickle=False) for name, file in files.items()}

    def __len__(self) -> int:
        return len(self._arrays["labels"])

    @cached_property
    def lengths(self) -> np.ndarray:
        """(N,) int32, codes of each image; reads all grain maps, a few thousand at a time."""
        grains, costs = self._arrays["grains"], np.array(self.layout.codes_per_region, dtype=np.int32)
        chunks = (grains[start : start + _CHUNK] for start in range(0, len(grains), _CHUNK))
        return np.concatenate([costs[chunk].sum(axis=(1, 2), dtype=np.int32) for chunk in chunks])

    def __getitem__(self, indices: Sequence[int] | int) -> CodeBatch:
        chosen = np.atleast_1d(np.asarray(indices, dtype=np.int64))
        grains, codes, labels = (torch.from_numpy(self._arrays[name][chosen].astype(np.int64)) for name in _ARRAYS)
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
        path: directory.
        batches: of this process, in order, from the image with the index `first`.
    Returns:
        `images`, and `mean_length`, `min_length` and `max_length` in codes per image.
    """
    shapes = {
        "grains": (np.min_scalar_type(layout.num_grains - 1), (size, *layout.grids[0])),
        "indices": (np.min_scalar_type(layout.codebook_size - 1), (size, *layout.grids[-1])),
        "labels": (np.min_scalar_type(max(layout.classes - 1, 0)), (size,)),
    }
    partial = {name: path / f".{split}.{name}.npy.partial" for name in shapes}

    def allocate() -> None:
        path.mkdir(exist_ok=True)
        for name, (kind, shape) in shapes.items():
            np.lib.format.open_memmap(partial[name], mode="w+", dtype=kind, shape=shape)
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here; in a memory map it kills the process
                with partial[name].open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)

    collectives.on_main(allocate)
    arrays = {name: np.load(file, mmap_mode="r+", allow_pickle=False) for name, file in partial.items()}
    lengths, start = [torch.zeros(0, dtype=torch.long)], first
    for batch in batches:
        chosen = slice(start, start := start + len(batch.codes))
        for name, values in zip(_ARRAYS, (batch.codes.grains, batch.codes.indices, batch.labels), strict=True):
            arrays[name][chosen] = values.cpu().numpy()
        lengths.append(batch.codes.lengths.cpu())
    for array in arrays.values():
        array.flush()
    joined = collectives.gather_rows(torch.cat(lengths))  # behind it, every process has written its part
    if len(joined) != size:
        raise GraincodeError(f"{len(joined)} codes for {size} images of {split}: the data set has changed meanwhile")
    collectives.on_main(lambda: [os.replace(file, path / f"{split}.{name}.npy") for name, file in partial.items()])
    low, high = joined.aminmax()
    mean = float(joined.double().mean())
    return {"images": len(joined), "mean_length": mean, "min_length": int(low), "max_length": int(high)}
