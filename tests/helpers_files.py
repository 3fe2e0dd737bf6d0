"""Ways in which files are damaged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np


def to_directory(path: Path) -> None:
    """Put a directory in a file's place."""
    path.unlink()
    path.mkdir()


def to_pipe(path: Path) -> None:
    """Put a pipe in a file's place, which one could read from for ever."""
    path.unlink()
    os.mkfifo(path)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _changed(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return damage


JSON_DAMAGES: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: path.write_text(""),
    "cut": _cut,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe" + path.read_bytes()),
    "null": lambda path: path.write_text("null"),
    "a list": lambda path: path.write_text("[1, 2]"),
    "a number": lambda path: path.write_text("7"),
    "a text": lambda path: path.write_text('"text"'),
    "nested": lambda path: path.write_text("[" * 100_000),
    "long number": lambda path: path.write_text("9" * 5000),
    "no keys": lambda path: path.write_text("{}"),
    "null values": _changed(lambda value: value.update(dict.fromkeys(value))),
    "a directory": to_directory,
    "a pipe": to_pipe,
}
"""Of any JSON file of ours: each makes it unreadable, or takes the keys that it must have."""


def _array(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return lambda path: np.save(path, change(np.load(path)))


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def _archive(path: Path) -> None:
    np.savez(path.with_suffix(".npz"), np.load(path))
    shutil.move(path.with_suffix(".npz"), path)


ARRAY_DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": _bytes(lambda content: b""),
    "cut in the header": _bytes(lambda content: content[:40]),
    "cut": _bytes(lambda content: content[:-7]),
    "no header": _bytes(lambda content: content[128:]),
    "zeros": _bytes(lambda content: bytes(len(content))),
    "header of 18 TB": _bytes(lambda content: content.replace(b"'shape': (", b"'shape': (9999999999999,", 1)),
    "header nested": _bytes(lambda content: content[:10] + b"(" * 118 + content[128:]),
    "a directory": to_directory,
    "a pipe": to_pipe,
    "missing": Path.unlink,
    "float": _array(lambda array: array.astype(np.float32)),
    "complex": _array(lambda array: array.astype(np.complex64)),
    "text": _array(lambda array: array.astype("U4")),
    "bool": _array(lambda array: array.astype(bool)),
    "objects": _array(lambda array: array.astype(object)),
    "fewer": _array(lambda array: array[:-1]),
    "more": _array(lambda array: np.concatenate([array, array])),
    "one number": _array(lambda array: array.reshape(-1)[0]),
    "another axis": _array(lambda array: array[..., None]),
    "an archive": _archive,
}
"""Of any .npy file of whole numbers."""
