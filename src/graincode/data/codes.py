"""Codes on disk: a data set's codes in the smallest integer types, memory-mapped when they are read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graincode.core.codes import CodeLayout, GrainCodes
from graincode.core.errors import GraincodeError

FORMAT = 1
_ARRAYS = ("grains", "indices", "labels")


@dataclass(frozen=True)
class CodeBatch:
    """Attributes:
    codes: of B images.
    labels: (B,) long.
    """

    codes: GrainCodes
    labels: Tensor

    def to(self, device: torch.device | str) -> CodeBatch:
        """The same batch on another device."""
        return CodeBatch(self.codes.to(device), self.labels.to(device))

    def pin_memory(self) -> CodeBatch:
        """The same batch in memory that a GPU copies from directly."""
        grains, indices = self.codes.grains.pin_memory(), self.codes.indices.pin_memory()
        return CodeBatch(GrainCodes(grains, indices, self.codes.layout), self.labels.pin_memory())


class CodeDataset:
    """One split of codes on disk; an index list gives a batch.

    Args:
        path: a directory that `extract_codes` wrote.
        split: "train", "val" or "test".
    Raises:
        GraincodeError: the directory holds no codes, or not this split, or another format.
    """

    def __init__(self, path: str | os.PathLike[str], split: str) -> None:
        self.path, self.split = Path(path), split
        self.info = read_info(self.path)
        self.identity = hashlib.sha256((self.path / "codes.json").read_bytes()).hexdigest()[:16]
        self.layout = CodeLayout.from_config(self.info["layout"])
        self.class_names: tuple[str, ...] = tuple(self.info["class_names"])
        files = {name: self.path / f"{split}.{name}.npy" for name in _ARRAYS}
        for file in files.values():
            if not file.is_file():
                raise GraincodeError(f"{file} is missing: finish graincode-extract-codes, or type another codes_path")
        self._arrays = {name: np.load(file, mmap_mode="r", allow_pickle=False) for name, file in files.items()}

    def __len__(self) -> int:
        return len(self._arrays["labels"])

    def __getitem__(self, indices: Sequence[int] | int) -> CodeBatch:
        chosen = np.atleast_1d(np.asarray(indices, dtype=np.int64))
        grains, codes, labels = (torch.from_numpy(self._arrays[name][chosen].astype(np.int64)) for name in _ARRAYS)
        return CodeBatch(GrainCodes(grains, codes, self.layout), labels)


def read_info(path: Path) -> dict[str, Any]:
    """What stands beside codes: layout, class names, data set and tokenizer.

    Raises:
        GraincodeError: there are no codes of a known format.
    """
    file = path / "codes.json"
    if not file.is_file():
        raise GraincodeError(f"{path} holds no codes (no codes.json): type codes_path=/a/directory/of/extract-codes")
    info = json.loads(file.read_text())
    if info.get("format") != FORMAT:
        raise GraincodeError(f"{path} has codes of format {info.get('format')}, expected {FORMAT}: extract them anew")
    return info


def write_split(
    path: Path, split: str, layout: CodeLayout, size: int, batches: Iterable[CodeBatch]
) -> dict[str, float]:
    """Write one split of codes; a split is there as a whole or not at all.

    Args:
        path: directory, which exists.
        split: name of the split.
        layout: of the codes.
        size: number of images.
        batches: all of them, in order.
    Returns:
        `images`, and `mean_length`, `min_length` and `max_length` in codes per image.
    """
    shapes = {
        "grains": (np.min_scalar_type(layout.num_grains - 1), (size, *layout.grids[0])),
        "indices": (np.min_scalar_type(layout.codebook_size - 1), (size, *layout.grids[-1])),
        "labels": (np.min_scalar_type(max(layout.classes - 1, 0)), (size,)),
    }
    arrays, names = {}, {}
    for name, (kind, shape) in shapes.items():
        names[name] = path / f".{split}.{name}.npy.partial"
        arrays[name] = np.lib.format.open_memmap(names[name], mode="w+", dtype=kind, shape=shape)
    lengths, start = [], 0
    for batch in batches:
        stop = start + len(batch.codes)
        arrays["grains"][start:stop] = batch.codes.grains.cpu().numpy()
        arrays["indices"][start:stop] = batch.codes.indices.cpu().numpy()
        arrays["labels"][start:stop] = batch.labels.cpu().numpy()
        lengths.append(batch.codes.lengths.cpu())
        start = stop
    for name, array in arrays.items():
        array.flush()
        os.replace(names[name], path / f"{split}.{name}.npy")
    joined = torch.cat(lengths).double()
    return {
        "images": len(joined),
        "mean_length": float(joined.mean()),
        "min_length": int(joined.min()),
        "max_length": int(joined.max()),
    }
