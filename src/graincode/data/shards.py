"""Images in tar shards: where each one lies, found once and kept in an index."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from graincode.core.errors import GraincodeError, one_line
from graincode.data.decoding import EXTENSIONS
from graincode.data.encoded import MAX_CLASSES, files_identity, read_file, readable
from graincode.data.scanning import LeftOut
from graincode.files import open_npz, replacing

FORMAT = 2
Index = dict[str, np.ndarray]  # of N images: "shard", "offset", "size", "label" (-1 without one) int64, "name" bytes
_FIELDS = {"name": "S", "shard": "i", "offset": "i", "size": "i", "label": "i"}
_LONGEST_NAME, _LONGEST_LABEL = 4096, 20
_TAIL = 2**20  # bytes behind an end mark that are searched for another tar
_SPECIAL, _DOTTED = (
    "links, devices or sparse files",
    "images with a dot in their names, which end at the first",
)


@dataclass(frozen=True)
class Members:
    """Images in tar shards (see `Encoded`): of each the number of its shard, offset and size in bytes, and name."""

    shards: tuple[Path, ...]
    index: Mapping[str, np.ndarray]

    def name(self, index: int) -> str:
        return one_line(f"{os.fsdecode(self.index['name'][index])} in {self.shards[self.index['shard'][index]]}")

    def read(self, index: int) -> bytes:
        shard, offset, size = (int(self.index[field][index]) for field in ("shard", "offset", "size"))
        return read_file(self.shards[shard], offset, size)

    def identity(self) -> str:
        parts = files_identity(self.shards).encode(), self.index["shard"].tobytes(), self.index["offset"].tobytes()
        return hashlib.sha256(b"".join(parts)).hexdigest()


def sample_of(name: str) -> tuple[str, str]:
    """The sample that a member belongs to, and the member's extension, without a dot and in small letters."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return folder + slash + key, extension.lower()


def write_index(shards: Sequence[Path], file: Path) -> None:
    """Read the headers of all shards, and write an `Index` with "left_out", in words."""
    left = LeftOut()
    with tqdm(shards, "reading the shards' headers", unit=" shards", leave=False) as progress:
        rows = [(number, *row) for number, shard in enumerate(progress) for row in _images(shard, left)]
    shard, offset, size, label, names = zip(*rows, strict=True)
    columns = {"shard": shard, "offset": offset, "size": size, "label": label}
    with replacing(file) as partial:
        arrays = {name: np.array(values, dtype=np.int64) for name, values in columns.items()}
        np.savez(partial, name=np.array(names), left_out=np.array(str(left)), **arrays)


def read_index(file: Path) -> Index:
    """What `write_index` wrote; a ValueError if it cannot be read."""
    with open_npz(file) as arrays:
        return dict(arrays)


def is_index(file: Path, shards: Sequence[Path]) -> bool:
    """Whether a file is the index of some shards."""
    try:
        index = read_index(file)
        if index.keys() != {*_FIELDS, "left_out"} or index["left_out"].dtype.kind != "U" or index["left_out"].shape:
            return False
        shapes = {index[name].shape for name in _FIELDS}
        if len(shapes) != 1 or len(*shapes) != 1 or any(index[f].dtype.kind != kind for f, kind in _FIELDS.items()):
            return False
        shard, offset, size, label = (index[name] for name in ("shard", "offset", "size", "label"))
        if not len(shard) or shard.min() < 0 or shard.max() >= len(shards):
            return False
        room = np.array([path.stat().st_size for path in shards])[shard] - size
        return bool((size >= 0).all() and (offset >= 0).all() and (offset <= room).all()
                    and -1 <= label.min() <= label.max() < MAX_CLASSES)  # fmt: skip
    except (OSError, ValueError, MemoryError):
        return False


def _images(shard: Path, left: LeftOut) -> Iterator[tuple[int, int, int, bytes]]:
    """Offset, size, label (-1 without one) and name of each image; refuses a shard that is not as expected."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    dotted: dict[str, str] = {}
    try:
        with readable(shard), shard.open("rb") as file:
            for member in _members(file):
                key, extension = sample_of(member.name)
                is_image = f".{extension}" in EXTENSIONS
                if not is_image and extension.endswith(EXTENSIONS):
                    dotted[member.name] = key
                elif not is_image and extension != "cls":
                    continue
                elif not member.isreg() or member.issparse():
                    left.add(_SPECIAL, member.name)
                elif is_image:
                    if key in images:
                        pair = f"{images[key].name!r} or {member.name!r}"
                        raise GraincodeError(f"{shard} has two images of a sample: rename {pair}")
                    images[key] = member
                else:
                    labels[key] = _label(file, member, shard)
    except (tarfile.TarError, MemoryError, OverflowError, UnicodeError) as error:
        reason = str(error) or "a size beyond all bounds"
        raise GraincodeError(f"{shard} is not a whole uncompressed tar ({reason}): make it anew, or move it") from error
    for name in sorted(name for name, key in dotted.items() if key not in images):
        left.add(_DOTTED, name)
    if not images:
        found = f"; left out {left}" if left.counts else ""
        raise GraincodeError(f"{shard} has no images, members like 1{' or 1'.join(EXTENSIONS)}: move it away{found}")
    for key, member in images.items():
        yield member.offset_data, member.size, labels.get(key, -1), os.fsencode(member.name)


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members of a tar and of those behind it in the same file; a TarError if it is not whole."""
    start, size = 0, os.fstat(file.fileno()).st_size
    while start is not None:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            last = -1
            for member in tar:
                if member.offset <= last or len(member.name) > _LONGEST_NAME:
                    raise tarfile.ReadError("a header is damaged")
                last = member.offset
                yield member
            end = tar.offset
        if end >= size:
            raise tarfile.ReadError("it has no end mark, so it is cut short")
        file.seek(end)
        rest = file.read(_TAIL)
        zeros = (len(rest) - len(rest.lstrip(b"\0"))) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        if zeros == _TAIL and end + zeros < size:
            raise tarfile.ReadError(f"{size - end} bytes stand behind its end mark")
        if not zeros:  # where tarfile ends without a word
            raise tarfile.ReadError(f"no header at byte {end}")
        start = end + zeros if zeros < len(rest) else None


def _label(file: BinaryIO, member: tarfile.TarInfo, shard: Path) -> int:
    file.seek(member.offset_data)
    content = file.read(min(member.size, _LONGEST_LABEL + 1)).strip()
    if not content.isdigit() or len(content) > _LONGEST_LABEL or int(content) >= MAX_CLASSES:
        found = f"found {content[:_LONGEST_LABEL]!r} in {member.name!r}"
        raise GraincodeError(f"{shard}: expected a whole number below {MAX_CLASSES} as label, {found}")
    return int(content)
