"""StyleGAN's data sets: a directory or an uncompressed .zip of images, with labels in a dataset.json."""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from graincode.core.errors import GraincodeError
from graincode.data.decoding import EXTENSIONS
from graincode.data.encoded import Files, files_identity, read_file, readable
from graincode.data.scanning import is_hidden

LABELS = "dataset.json"
_LOCAL_HEADER = 30  # bytes, before a name and an extra field whose lengths are its last four
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ZipFiles(Files):
    """Image files in a .zip (see `Encoded`): `members` has the position of each one's header, and its size in bytes."""

    archive: Path
    members: Mapping[str, tuple[int, int]]

    def read(self, index: int) -> bytes:
        return self._content((self.base / self.paths[index]).relative_to(self.archive).as_posix())

    def identity(self) -> str:
        return hashlib.sha256(json.dumps([files_identity([self.archive]), *self.paths]).encode()).hexdigest()

    def _content(self, member: str) -> bytes:
        offset, size = self.members[member]
        header = read_file(self.archive, offset, _LOCAL_HEADER)
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:], "little")
        return read_file(self.archive, offset + _LOCAL_HEADER + lengths, size)

    def beside(self, name: str) -> bytes | None:
        return self._content(name) if name in self.members else None


def zip_files(path: Path) -> ZipFiles:
    """The images in an uncompressed .zip, sorted by their paths; refuses one without images."""
    try:
        with readable(path), zipfile.ZipFile(path) as archive:
            found = {info.filename: info for info in archive.infolist() if info.filename[-1:] != "/"}
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise GraincodeError(f"{path} is not a whole .zip ({error}): make it anew, or unpack it") from error
    hidden = {name for name in found if any(not part or is_hidden(part) for part in name.split("/"))}
    paths = sorted(name for name in found.keys() - hidden if name.lower().endswith(EXTENSIONS))
    if not paths:
        raise GraincodeError(f"{path}: expected images in it, files that end in {' '.join(EXTENSIONS)}")
    for name in [*paths, *({LABELS} & found.keys())]:
        if found[name].compress_type != zipfile.ZIP_STORED or found[name].flag_bits & 1:
            raise GraincodeError(f"{path} has compressed files, such as {name!r}: unpack it, and give the directory")
    if rest := found.keys() - {LABELS, *paths}:
        _logger.info("%s: left out %d files, such as %r", path, len(rest), min(rest))
    return ZipFiles(path, paths, path, {name: (info.header_offset, info.file_size) for name, info in found.items()})


def read_labels(files: Files) -> dict[str, int] | None:
    """The label of each path as dataset.json says, empty if it says that there are none; None without one.

    Raises:
        GraincodeError: it is damaged, or lacks an image.
    """
    file, content = files.base / LABELS, files.beside(LABELS)
    try:
        found = None if content is None else json.loads(content)
        if not isinstance(found, dict) or "labels" not in found:
            return None
        if found["labels"] is None:
            return {}
        labels = dict(found["labels"])
        if not all(type(label) is int and label >= 0 for label in labels.values()):
            raise ValueError("a label is no whole number from 0")
        return {path: labels[path] for path in files.paths}
    except (ValueError, TypeError, RecursionError) as error:
        reason = f'{error}; expected {{"labels": [["00000/img00000000.png", 0], ...]}}'
        raise GraincodeError(f"{file} cannot be read ({reason}): mend it, or give classes=none") from error
    except KeyError as error:
        raise GraincodeError(f"{file} has no label of {error}: make it anew, or give classes=none") from None
