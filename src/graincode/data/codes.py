"""Codes on disk: a data set's codes in the smallest integer types, memory-mapped when they are read."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graincode.core.codes import GrainCodes, Rows
from graincode.core.errors import Damaged, GraincodeError
from graincode.core.layout import CodeLayout
from graincode.distributed import collectives
from graincode.files import allocate_array, read_array, read_json, sha256, write_json

log = logging.getLogger(__name__)

FORMAT = 1
_ARRAYS = ("grains", "indices", "labels")
_PARTIAL = ".{}.{}.partial-together.npy"  # one name for all processes, of the form of leftovers
_CHUNK = 8192
_ADVICE = "the same extraction as before makes what is missing or damaged again"
_KEYS = {"layout": dict, "class_names": list, "tokenizer": str, "tokenizer_path": str, "splits": dict}


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
        self.layout = CodeLayout(**self.info["layout"])
        self.identity: str = self.info.pop("identity")
        self.class_names: tuple[str, ...] = tuple(self.info["class_names"])
        known = sorted(found.name.split(".")[0] for found in self.path.glob("*.labels.npy"))  # what is written last
        if split not in known:
            raise GraincodeError(f"{self.path} has no codes of {split}, only of {', '.join(known) or 'no split'}")
        self._about = self.info["splits"].get(split, {})
        self._arrays = open_arrays(self.path, split, self.layout, self._about.get("images"))
        self.check_content("labels")

    def __len__(self) -> int:
        return len(self._arrays[-1])

    def check_content(self, *names: str) -> None:
        """Refuse arrays (by default all, which are then read) that are not what was written, by the hashes of that."""
        for name, written in self._about.get("sha256", {}).items():
            file = self.path / f"{self.split}.{name}.npy"
            if name in (names or _ARRAYS) and sha256(file) != written:
                raise Damaged.at(file, "its content has changed since it was written", _ADVICE)

    @property
    def absent_classes(self) -> list[str]:
        """Names of the classes that no image of the split is of."""
        present = set(np.unique(self._arrays[-1]).tolist())
        return [name for label, name in enumerate(self.class_names) if label not in present]

    @cached_property
    def lengths(self) -> np.ndarray:
        """(N,) int32, codes of each image; reads all grain maps, a few thousand at a time."""
        grains, costs = self._arrays[0], np.array(self.layout.codes_per_region, dtype=np.int32)
        chunks = [grains[start : start + _CHUNK] for start in range(0, len(grains), _CHUNK)]
        for chunk in chunks:
            _check_range(self.path / f"{self.split}.grains.npy", chunk, len(costs))
        return np.concatenate([costs[chunk].sum(axis=(1, 2), dtype=np.int32) for chunk in chunks])

    def __getitem__(self, indices: Sequence[int] | int) -> CodeBatch:
        chosen = np.atleast_1d(np.asarray(indices, dtype=np.int64))
        grains, codes, labels = (torch.from_numpy(array[chosen].astype(np.int64)) for array in self._arrays)
        try:
            return CodeBatch(GrainCodes.checked(grains, codes, self.layout), labels)
        except GraincodeError as error:
            raise Damaged.at(self.path / f"{self.split}.*.npy", error, _ADVICE) from None


def read_info(path: Path) -> dict[str, Any]:
    """What `write_info` wrote: layout, class names, tokenizer, views of each training image (1 if it says none)."""
    file = path / "codes.json"
    if not file.exists():
        if any(path.glob("*.npy")):
            raise GraincodeError(f"{path} has codes that are not finished (no codes.json): {_ADVICE}")
        raise GraincodeError(f"{path} holds no codes (no codes.json): give a directory that extract_codes wrote")
    if (found := read_json(file, {"format": int}, _ADVICE)["format"]) != FORMAT:
        raise GraincodeError(f"{path} has codes of format {found}, expected {FORMAT}: extract them anew")
    info = read_json(file, _KEYS, _ADVICE)
    written = info.pop("identity", None)  # earlier versions wrote none
    identity, views = _identity(info), info.get("views", 1)
    try:
        if written not in (None, identity):
            raise ValueError("its content has changed since it was written")
        if not all(isinstance(name, str) for name in info["class_names"]):
            raise ValueError(f"class_names are {info['class_names']}")
        if not re.fullmatch("[0-9a-f]{16}", info["tokenizer"]):
            raise ValueError(f"tokenizer is {info['tokenizer']!r}")
        if type(views) is not int or views < 1:
            raise ValueError(f"views is {views!r}")
        if len(names := info["class_names"]) != (classes := CodeLayout(**info["layout"]).classes):
            raise ValueError(f"{len(names)} names of {classes} classes")
        if not all(isinstance(summary, dict) for summary in info["splits"].values()):
            raise ValueError("splits that are none")
    except (TypeError, ValueError, ArithmeticError) as error:
        raise Damaged.at(file, error, _ADVICE) from None
    return {**info, "views": views, "identity": identity}


def write_info(path: Path, info: Mapping[str, Any]) -> None:
    """Write what stands beside codes, when all splits are there, with 16 hex digits of a hash over it, `identity`."""
    write_json(path / "codes.json", {**info, "identity": _identity(info)})


def _identity(info: Mapping[str, Any]) -> str:
    return hashlib.sha256((json.dumps(info, indent=2) + "\n").encode()).hexdigest()[:16]


def open_arrays(path: Path, split: str, layout: CodeLayout, count: int | None = None) -> list[np.ndarray]:
    """Grains, indices and labels of a split, memory-mapped, of as many images as `count` if it is known.

    Shapes and types of all are checked, and the values of labels; those of grains and indices when they are read.
    """
    arrays: list[np.ndarray] = []
    for name, shape in zip(_ARRAYS, (layout.grids[0], layout.grids[-1], ()), strict=True):
        arrays.append(read_array(path / f"{split}.{name}.npy", np.integer, (count, *shape), _ADVICE, mapped=True))
        count = len(arrays[-1])
    if np.iinfo(kind := arrays[1].dtype).max < layout.codebook_size - 1:  # as it would not have been written
        raise Damaged.at(path / "codes.json", f"{kind} cannot hold indices of {layout.codebook_size} entries", _ADVICE)
    _check_range(path / f"{split}.labels.npy", arrays[-1], max(layout.classes, 1))
    return arrays


def _check_range(file: Path, values: np.ndarray, size: int) -> None:
    if len(values) and not 0 <= values.min() <= values.max() < size:
        raise Damaged.at(file, f"values from {values.min()} to {values.max()}, expected 0 to {size - 1}", _ADVICE)


def read_report(path: Path, split: str) -> dict[str, Any]:
    """What `write_split` says of a split: `images`, and `summary`."""
    return read_json(path / f"{split}.json", {"images": str, "summary": dict}, _ADVICE)


def is_finished(path: Path, split: str, layout: CodeLayout, images: str) -> bool:
    """Whether a split is there as `write_split` wrote it, and of the same images."""
    if not (path / f"{split}.json").exists():
        return False
    with suppress(Damaged):
        report = read_report(path, split)
        open_arrays(path, split, layout)
        hashes = {name: sha256(path / f"{split}.{name}.npy") for name in _ARRAYS}
        if report["images"] == images and report["summary"].get("sha256") == hashes:
            return True
    log.warning("%s: codes of %s are damaged, or of other images: they are made again", path, split)
    return False


def write_split(
    path: Path, split: str, layout: CodeLayout, size: int, batches: Iterable[CodeBatch], images: str, first: int = 0
) -> None:
    """Write the codes of `size` images, all processes together; a split is there as a whole or not at all.

    Args:
        batches: of this process, in order, from the image with the index `first`.
        images: what identifies the images; `SPLIT.json` keeps it, with a summary: `images`, `mean_length`, `min_length`
            and `max_length` in codes per image, and `sha256` of the files by name.
    """
    partial = [path / _PARTIAL.format(split, name) for name in _ARRAYS]

    def allocate() -> None:
        path.mkdir(exist_ok=True)
        (path / "codes.json").unlink(missing_ok=True)  # which is of what was there before
        largest = layout.num_grains - 1, layout.codebook_size - 1, max(layout.classes - 1, 0)
        for file, number, shape in zip(partial, largest, (layout.grids[0], layout.grids[-1], ()), strict=True):
            allocate_array(file, np.min_scalar_type(number), (size, *shape))

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
    low, high = joined.aminmax()
    lengths = {"mean_length": float(joined.double().mean()), "min_length": int(low), "max_length": int(high)}
    summary = {"images": size, **lengths}

    def publish() -> None:
        hashes = {name: sha256(file) for name, file in zip(_ARRAYS, partial, strict=True)}
        for name, file in zip(_ARRAYS, partial, strict=True):
            os.replace(file, path / f"{split}.{name}.npy")
        write_json(path / f"{split}.json", {"images": images, "summary": summary | {"sha256": hashes}})

    collectives.on_main(publish)
