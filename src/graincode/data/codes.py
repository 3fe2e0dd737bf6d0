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

from graincode.core.codes import GrainCodes
from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout
from graincode.distributed import collectives

FORMAT = 1
_ARRAYS = ("grains", "indices", "labels")
_DENSITY = "density"  # which codes of earlier versions lack
_CHUNK = 8192


@dataclass(frozen=True)
class CodeBatch:
    """Attributes:
    codes: of B images.
    labels: (B,) long.
    density: (B, H0, W0) float32, what the tokenizer measured of each region; None if it was not kept.
    """

    codes: GrainCodes
    labels: Tensor
    density: Tensor | None = None

    def to(self, device: torch.device | str) -> CodeBatch:
        """The same batch on another device."""
        density = None if self.density is None else self.density.to(device)
        return CodeBatch(self.codes.to(device), self.labels.to(device), density)

    def pin_memory(self) -> CodeBatch:
        """The same batch in memory that a GPU copies from directly."""
        grains, indices = self.codes.grains.pin_memory(), self.codes.indices.pin_memory()
        density = None if self.density is None else self.density.pin_memory()
        return CodeBatch(GrainCodes(grains, indices, self.codes.layout), self.labels.pin_memory(), density)


class CodeDataset:
    """One split of codes on disk; an index list gives a batch. With several views of each training image, all images
    come in one view, then all in the next.

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
                there = sorted(found.name.split(".")[0] for found in self.path.glob("*.grains.npy"))
                raise GraincodeError(
                    f"{file} is missing: finish graincode-extract-codes with {split} in its splits, type another "
                    f"codes_path, or another split (there: {', '.join(there) or 'none'})"
                )
        if (density := self.path / f"{split}.{_DENSITY}.npy").is_file():
            files[_DENSITY] = density
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
        density = None
        if _DENSITY in self._arrays:
            density = torch.from_numpy(self._arrays[_DENSITY][chosen].astype(np.float32))
        return CodeBatch(GrainCodes.checked(grains, codes, self.layout), labels, density)

    def check_density(self) -> None:
        """Refuse codes that were kept without the density of their regions."""
        if _DENSITY not in self._arrays:
            raise GraincodeError(
                f"{self.path} has no {self.split}.{_DENSITY}.npy, as an earlier version wrote it: extract codes anew "
                "(graincode-extract-codes run_name=ANOTHER), or type generator.model.density_bins=1"
            )


def read_info(path: Path) -> dict[str, Any]:
    """What stands beside codes: layout, class names, tokenizer, and views of each training image (1 if it says none).

    Raises:
        GraincodeError: there are no codes of a known format.
    """
    file = path / "codes.json"
    if not file.is_file():
        raise GraincodeError(f"{path} holds no codes (no codes.json): type codes_path=/a/directory/of/extract-codes")
    info = json.loads(file.read_text())
    if info.get("format") != FORMAT:
        raise GraincodeError(f"{path} has codes of format {info.get('format')}, expected {FORMAT}: extract them anew")
    return {"views": 1, **info}


def write_split(
    path: Path, split: str, layout: CodeLayout, size: int, batches: Iterable[CodeBatch], first: int = 0
) -> dict[str, float]:
    """Write one split of codes, all processes together; a split is there as a whole or not at all.

    Args:
        path: directory.
        split: name of the split.
        layout: of the codes.
        size: number of images.
        batches: of this process, in order, with densities.
        first: index of this process's first image.
    Returns:
        `images`, and `mean_length`, `min_length` and `max_length` in codes per image.
    """
    shapes = {
        "grains": (np.min_scalar_type(layout.num_grains - 1), (size, *layout.grids[0])),
        "indices": (np.min_scalar_type(layout.codebook_size - 1), (size, *layout.grids[-1])),
        "labels": (np.min_scalar_type(max(layout.classes - 1, 0)), (size,)),
        _DENSITY: (np.dtype(np.float16), (size, *layout.grids[0])),
    }
    names = {name: path / f".{split}.{name}.npy.partial" for name in shapes}

    def make() -> None:
        path.mkdir(exist_ok=True)
        for name, (kind, shape) in shapes.items():
            np.lib.format.open_memmap(names[name], mode="w+", dtype=kind, shape=shape)
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here; in a memory map it kills the process
                with names[name].open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)

    collectives.on_main(make)
    arrays = {name: np.load(file, mmap_mode="r+", allow_pickle=False) for name, file in names.items()}
    lengths, start = [torch.zeros(0, dtype=torch.long)], first
    for batch in batches:
        stop = start + len(batch.codes)
        arrays["grains"][start:stop] = batch.codes.grains.cpu().numpy()
        arrays["indices"][start:stop] = batch.codes.indices.cpu().numpy()
        arrays["labels"][start:stop] = batch.labels.cpu().numpy()
        arrays[_DENSITY][start:stop] = batch.density.half().cpu().numpy()
        lengths.append(batch.codes.lengths.cpu())
        start = stop
    for array in arrays.values():
        array.flush()
    all_lengths = collectives.gather_rows(torch.cat(lengths))  # behind it, every process has written its part
    if len(all_lengths) != size:
        raise GraincodeError(
            f"{len(all_lengths)} codes for {size} images of {split}: the data set has changed meanwhile"
        )
    collectives.on_main(lambda: [os.replace(file, path / f"{split}.{name}.npy") for name, file in names.items()])
    joined = all_lengths.double()
    return {
        "images": len(joined),
        "mean_length": float(joined.mean()),
        "min_length": int(joined.min()),
        "max_length": int(joined.max()),
    }
