"""Images in uncompressed tar shards of the WebDataset layout.

Shards are not streamed, as training takes image i where its order says so, at any number of processes: headers are read
once, and every image with one read at its offset.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import logging
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graincode.core.errors import GraincodeError, check
from graincode.data.decoding import BACKGROUND
from graincode.data.encoded import Crop, OnCorrupt, files_identity
from graincode.data.images import SPLIT_NAMES, SPLITS
from graincode.data.scanning import OUTSIDE, LeftOut, leads_outside
from graincode.data.shards import FORMAT, Index, Members, is_index, read_index, sample_of, write_index
from graincode.data.sources import EncodedSource
from graincode.files import build_once, cache_root

_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2?|txz)$", re.IGNORECASE)
_SPLIT_IN_NAME = re.compile(rf"(?<![a-z])({'|'.join(SPLIT_NAMES)})(?![a-z])", re.IGNORECASE)
_logger = logging.getLogger(__name__)


class WebDataset(EncodedSource):
    """Tar shards as a data set: a sample is the members of a shard that share their name up to its first dot.

    Of a sample count the image, a member with one of the `EXTENSIONS`, and its label, a whole number as text in a
    member .cls; either all samples have labels, or none.

    If shards are named after several splits, as in train-000.tar and imagenet-val-7.tar, or lie in directories that
    are, these are the splits (named as in `ImageFolder`), and those of val and test that are missing are taken out of
    train. Otherwise all three are taken out.

    Args:
        root: a directory of .tar files, or a glob such as /data/imagenet-*.tar.
        class_names: name of each label; by default "0", "1" and so on up to the largest label.
        others: as in `EncodedSource`.
    """

    def __init__(
        self,
        root: str | None,
        image_size: int | Sequence[int] = 256,
        crop: Crop = "center",
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        class_names: Sequence[str] | None = None,
        cache: bool = False,
        on_corrupt: OnCorrupt = "error",
        background: str = BACKGROUND,
        allow_outside: bool = False,
    ):
        self.root, self.test_fraction, self._given_names = root, test_fraction, class_names
        super().__init__(
            image_size=image_size,
            crop=crop,
            val_fraction=val_fraction,
            cache=cache,
            on_corrupt=on_corrupt,
            background=background,
            allow_outside=allow_outside,
        )

    @property
    def _name(self) -> str:
        return (self._root if self._root.is_dir() else self._root.parent).name

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        labels, given = self._index["label"], self._given_names
        count = int(labels.max()) + 1
        if count and labels.min() < 0:
            name = Members(self._shards, self._index).name(labels.argmin())
            raise GraincodeError(f"{name} has no label, but others have: add its .cls, or remove those of all")
        expected = f"{count} names or more, up to the label {count - 1}" if count else "null, as there are no labels"
        check("class_names", given, expected, not given or 0 < count <= len(given))
        return tuple(given or map(str, range(count)))

    def _encoded(self, split: str) -> tuple[Members, Tensor]:
        chosen = {field: values[self._splits[split]] for field, values in self._index.items()}
        return Members(self._shards, chosen), torch.from_numpy(chosen["label"] * bool(self.class_names))

    @cached_property
    def _shards(self) -> tuple[Path, ...]:
        if self._root.is_dir():
            folder, found = self._root, self._root.glob("*")
        else:
            plain = itertools.takewhile(lambda part: not glob.has_magic(part), self._root.parts)
            folder, found = Path(*plain), map(Path, glob.glob(str(self._root)))
        shards, left = [], LeftOut()
        for path in sorted(found):
            if _COMPRESSED.search(path.name):
                raise GraincodeError(f"{path} is compressed: unpack it to an uncompressed .tar, or move it away")
            if path.suffix != ".tar" or not path.is_file():
                left.add("that are no .tar files", path.name)
            elif leads_outside(path, folder) and not self.allow_outside:
                left.add(OUTSIDE, path.name)
            else:
                shards.append(path)
        if not shards:
            expected = "expected .tar files, or a glob (with * in place of {000..146})"
            raise GraincodeError(f"{self._origin}: {expected}{f'; left out {left}' if left.counts else ''}")
        if left.counts:
            _logger.log(logging.WARNING if OUTSIDE in left.counts else logging.INFO, "%s: left out %s", folder, left)
        return tuple(shards)

    @cached_property
    def _index(self) -> Index:
        key = hashlib.sha256(f"{FORMAT} {files_identity(self._shards)}".encode()).hexdigest()[:32]
        file = cache_root() / "webdataset" / f"{key}.npz"
        subject = f"the index of {self._origin}"
        build_once(file, subject, lambda: write_index(self._shards, file), lambda: is_index(file, self._shards))
        index = read_index(file)
        if left := index.pop("left_out").item():
            _logger.warning("%s: left out %s", self._origin, left)
        return index

    @cached_property
    def _splits(self) -> dict[str, np.ndarray]:
        """(N,) int64 of each split, the positions of its images in the index."""
        named = self._named()
        given = set(named) - {None}
        parts = np.array([SPLITS.index(part or "train") for part in named])[self._index["shard"]]
        train = np.flatnonzero(parts == 0)
        keys = [sample_of(os.fsdecode(name))[0] for name in self._index["name"][train]]
        taken = {key: SPLITS.index(part) for part, keys in self._take_out(set(keys), given).items() for key in keys}
        parts[train] = [taken[key] for key in keys]
        return {name: np.flatnonzero(parts == number) for number, name in enumerate(SPLITS)}

    def _named(self) -> list[str | None]:
        """The split that each shard's name says, or if they lie in several directories that of its directory."""
        several = len({shard.parent for shard in self._shards}) > 1
        named: list[str | None] = []
        for shard in self._shards:
            match = _SPLIT_IN_NAME.search(shard.name) or (several and _SPLIT_IN_NAME.search(shard.parent.name))
            named.append(SPLIT_NAMES[match[1].lower()] if match else None)
        if len(set(named)) == 1:  # all of one split are divided
            return [None] * len(named)
        if None in named:
            shard = self._shards[named.index(None)]
            raise GraincodeError(f"{shard}: expected train, val or test in its name, as others have; rename it")
        if "train" not in named:
            raise GraincodeError(f"{self._origin}: expected shards of train too, found {', '.join(sorted(set(named)))}")
        return named
