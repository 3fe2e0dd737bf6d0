"""Images in uncompressed tar shards of the WebDataset layout.

Shards are not streamed, as training takes image i where its order says so, at any number of processes: headers are read
once, and every image with one read at its offset.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from graincode.core.errors import GraincodeError, check
from graincode.data.decoding import BACKGROUND, EXTENSIONS
from graincode.data.encoded import Crop, EncodedSource, OnCorrupt, files_identity, read_file, readable
from graincode.data.images import SPLITS
from graincode.files import build_once, cache_root, replacing

FORMAT = 1
_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2?|txz)$", re.IGNORECASE)
_SPLIT_IN_NAME = re.compile(r"(?<![a-z])(train|val|test)(?:idation)?(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Members:
    """Images in tar shards (see `Encoded`): of each the number of its shard, offset and size in bytes, and name."""

    shards: tuple[Path, ...]
    index: Mapping[str, np.ndarray]

    def name(self, index: int) -> str:
        return f"{os.fsdecode(self.index['name'][index])} in {self.shards[self.index['shard'][index]]}"

    def read(self, index: int) -> bytes:
        shard, offset, size = (int(self.index[field][index]) for field in ("shard", "offset", "size"))
        return read_file(self.shards[shard], offset, size)

    def identity(self) -> str:
        parts = files_identity(self.shards).encode(), self.index["shard"].tobytes(), self.index["offset"].tobytes()
        return hashlib.sha256(b"".join(parts)).hexdigest()


class WebDataset(EncodedSource):
    """Tar shards as a data set: a sample is the members of a shard that share their name up to its first dot.

    Of a sample count the image, a member with one of the `EXTENSIONS`, and its label, a whole number as text in a
    member .cls; either all samples have labels, or none.

    If shards are named after splits, as in train-000.tar or imagenet-val-7.tar, and some are called train, these are
    the splits, and those of val and test that are missing are taken out of train. Otherwise all three are taken out.

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
    ):
        self.root, self.test_fraction, self._given_names = root, test_fraction, class_names
        super().__init__(
            image_size=image_size,
            crop=crop,
            val_fraction=val_fraction,
            cache=cache,
            on_corrupt=on_corrupt,
            background=background,
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
        root = str(self._root)
        found = sorted(map(Path, glob.glob(f"{glob.escape(root)}/*" if self._root.is_dir() else root)))
        for path in found:
            if _COMPRESSED.search(path.name):
                raise GraincodeError(f"{path} is compressed: unpack it to an uncompressed .tar, or move it away")
        if shards := tuple(path for path in found if path.suffix == ".tar"):
            return shards
        raise GraincodeError(f"{self._origin}: expected .tar files, or a glob (with * in place of {{000..146}})")

    @cached_property
    def _index(self) -> dict[str, np.ndarray]:
        """Of all images in order: "shard", "offset", "size", "label" (-1 without one), (N,) int64, and "name" bytes."""
        key = hashlib.sha256(f"{FORMAT} {files_identity(self._shards)}".encode()).hexdigest()[:32]
        file = cache_root() / "webdataset" / f"{key}.npz"
        build_once(file, f"the index of {self._origin}", lambda: _write_index(self._shards, file))
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)

    @cached_property
    def _splits(self) -> dict[str, np.ndarray]:
        """(N,) int64 of each split, the positions of its images in the index."""
        matches = [_SPLIT_IN_NAME.search(shard.name) for shard in self._shards]
        named = [match and match[1].lower() for match in matches]
        given = set(named) if "train" in named else set()
        if None in given:
            shard = self._shards[named.index(None)]
            raise GraincodeError(f"{shard}: expected train, val or test in its name, as others have; rename it")
        parts = np.array([SPLITS.index(part) if given else 0 for part in named])[self._index["shard"]]
        train = np.flatnonzero(parts == 0)
        keys = [_sample(os.fsdecode(name))[0] for name in self._index["name"][train]]
        taken = {key: SPLITS.index(part) for part, keys in self._take_out(set(keys), given).items() for key in keys}
        parts[train] = [taken[key] for key in keys]
        return {name: np.flatnonzero(parts == number) for number, name in enumerate(SPLITS)}


def _sample(name: str) -> tuple[str, str]:
    """The sample that a member belongs to, and the member's extension, without a dot and in small letters."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return folder + slash + key, extension.lower()


def _write_index(shards: Sequence[Path], file: Path) -> None:
    progress = tqdm(shards, "reading the shards' headers", unit=" shards", leave=False)
    rows = [(number, *row) for number, shard in enumerate(progress) for row in _images(shard)]
    shard, offset, size, label, names = zip(*rows, strict=True)
    with replacing(file) as partial:
        np.savez(partial, name=np.array(names), shard=shard, offset=offset, size=size, label=label)


def _images(shard: Path) -> Iterator[tuple[int, int, int, bytes]]:
    """Offset, size, label (-1 without one) and name of each image; refuses a shard that is not as expected."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    try:
        with readable(shard), tarfile.open(shard, "r:") as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                key, extension = _sample(member.name)
                if f".{extension}" in EXTENSIONS:
                    if key in images:
                        pair = f"{images[key].name} or {member.name}"
                        raise GraincodeError(f"{shard} has two images of a sample: rename {pair}")
                    images[key] = member
                elif extension == "cls":
                    content = tar.extractfile(member).read()
                    if not content.strip().isdigit():
                        found = f"found {content[:20]!r} in {member.name}"
                        raise GraincodeError(f"{shard}: expected a whole number as label, {found}")
                    labels[key] = int(content)
            if tar.offset >= shard.stat().st_size:
                raise tarfile.ReadError("it has no end mark, so it is cut short")
    except tarfile.TarError as error:
        raise GraincodeError(f"{shard} is not a whole uncompressed tar ({error}): make it anew, or move it") from error
    if not images:
        raise GraincodeError(f"{shard} has no images, members like 1{' or 1'.join(EXTENSIONS)}: move it away")
    for key, member in images.items():
        yield member.offset_data, member.size, labels.get(key, -1), os.fsencode(member.name)
