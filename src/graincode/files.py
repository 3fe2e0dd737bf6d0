"""Files that are whole on disk, and known to be where they are read; the cache, hashes, a time limit on the network."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import socket
import stat
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np

from graincode.core.errors import Damaged, GraincodeError
from graincode.locks import locked

log = logging.getLogger(__name__)

# what reading a damaged file may raise; a header's text is parsed as Python's
_UNREADABLE = OSError, ValueError, TypeError, EOFError, ArithmeticError, RecursionError, MemoryError
_UNREADABLE += SyntaxError, TokenError, zipfile.BadZipFile, zlib.error
_LARGEST, _DEEPEST = 2**22, 64  # bytes and levels of a JSON file of ours
_LEFTOVER = re.compile(r"\..+\.partial-((?P<writer>[0-9a-f]+-\d+-\d+)-)?[a-z0-9_]{8}(\.\w+)?")
_GREATEST = 2**1000
_LONG_AGO_SECONDS = 24 * 3600


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it at the end; nothing changes if the block raises."""
    if path.is_dir():
        raise GraincodeError(f"{path} is a directory where a file is to be: move it away, and do the same again")
    partial = _partial(path, path.suffix)
    try:
        yield partial
        _to_disk(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_directory(path: Path, replaces: bool = False) -> Iterator[Path]:
    """A temporary directory beside `path`, renamed to it at the end; refuses a path that is there already, or else
    replaces it: a process that is killed meanwhile leaves it, as `path` or as `path.before`."""
    if os.path.lexists(path) and not replaces:  # also a link to what is gone
        raise GraincodeError(f"{path} is there already: move it away, or give another name")
    partial = _partial(path)
    partial.mkdir()
    try:
        yield partial
        for file in partial.iterdir():
            file.chmod(partial.stat().st_mode & 0o666)  # some libraries write for the owner alone
            _to_disk(file)
        before = path.with_name(f"{path.name}.before")
        if replaces and os.path.lexists(path):
            remove(before)
            path.rename(before)
        os.replace(partial, path)
        if replaces:
            remove(before)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a file, or a directory with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def scratch_directory(parent: Path, name: str) -> Iterator[Path]:
    """A temporary directory, removed at the end; if this process is killed, by the next of that name in `parent`."""
    folder = _partial(parent / name)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _partial(path: Path, suffix: str = "") -> Path:
    """A temporary name that says whose it is; those for the same path whose process is gone are removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    start = f".{path.name.removesuffix(suffix)}.partial-"
    for left in path.parent.glob(f"{glob.escape(start)}*"):
        with suppress(OSError):  # another process clears it, too, or it is another user's
            if _is_left(left):
                remove(left)
    return path.with_name(f"{start}{_writer(os.getpid())}-{secrets.token_hex(4)}{suffix}")


def _writer(pid: int) -> str | None:
    """What tells a process from all others of this and other machines; None if there is no such process here."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        place = [socket.gethostname(), os.readlink("/proc/self/ns/pid")]
    except OSError:  # also where there is no /proc: then only age tells what is left
        return f"0-{pid}-0" if pid == os.getpid() else None
    return None if state in "ZX" else f"{short_hash(place)}-{pid}-{fields[18]}"


def _is_left(path: Path) -> bool:
    """Whether the process that wrote to a temporary name is gone: one of this machine, or any after a day."""
    if (found := _LEFTOVER.fullmatch(path.name)) is None:
        return False
    writer, own = found["writer"] or "", _writer(os.getpid())
    place, _, pid = writer.rpartition("-")[0].partition("-")
    if writer and own is not None and place == own.partition("-")[0] and place != "0":
        return _writer(int(pid)) != writer
    return time.time() - path.lstat().st_mtime > _LONG_AGO_SECONDS


def _to_disk(file: Path) -> None:
    """Wait until a file's content is on the disk; a rename may get there first, and a crash then leave it empty."""
    with file.open("r+b") as opened:  # Windows writes no file to disk that is open for reading
        os.fsync(opened.fileno())


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed process left half written by `replacing` or `new_directory`; no other may be writing."""
    for path in folder.glob(".*.partial-*"):
        if _LEFTOVER.fullmatch(path.name):
            remove(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON as a whole."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path, keys: Mapping[str, type], advice: str) -> dict[str, Any]:
    """A JSON object of ours that has these keys, with values of these types; `float` takes whole numbers too, and only
    finite ones.

    Raises:
        Damaged: with the advice, also where there is no such file.
    """
    try:
        if file_size(path) > _LARGEST:
            raise ValueError("too large")
        value = json.loads(path.read_text("utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__} instead of an object")
        if _is_deeper(value, _DEEPEST):
            raise ValueError("nested too deeply")
        for key, kind in keys.items():
            if key not in value:
                raise ValueError(f"without {key}")
            if not (is_number(value[key], kind) if kind in (int, float) else isinstance(value[key], kind)):
                raise ValueError(f"{key} is {value[key]!r}")
    except _UNREADABLE as error:
        raise Damaged.at(path, error, advice) from None
    return value


def is_number(value: Any, kind: type) -> bool:
    """Whether a value of JSON is a whole number, or with float any, that a float can hold."""
    is_one = isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)
    return is_one and -_GREATEST < value < _GREATEST


def _is_deeper(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_is_deeper(one, levels - 1) for one in inner)


def file_size(path: Path) -> int:
    """Bytes of a file; an OSError if it is none: to open a pipe would wait for ever."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no file of bytes", str(path))
    return found.st_size


def read_array(
    path: Path, kind: type[np.generic], shape: Sequence[int | None], advice: str, mapped: bool = False
) -> np.ndarray:
    """An array of an .npy file of ours, in memory or `mapped`.

    Args:
        kind: of its numbers, one type or numpy's name for several, such as `np.integer`.
        shape: None for any length.
    Raises:
        Damaged: with the advice, also where there is no such file, or it is shorter than its header says.
    """
    try:
        file_size(path)
        array = np.load(path, "r", allow_pickle=False)  # mapped, nothing is allocated that the file does not have
        if not isinstance(array, np.ndarray):
            raise ValueError("an archive")
        if not np.issubdtype(array.dtype, kind):
            raise ValueError(f"values of {array.dtype}")
        if len(array.shape) != len(shape) or any(n not in (m, None) for n, m in zip(shape, array.shape, strict=True)):
            wanted = ", ".join("N" if length is None else str(length) for length in shape)
            raise ValueError(f"of shape {array.shape}, expected ({wanted})")
    except _UNREADABLE as error:
        raise Damaged.at(path, _plain(error), advice) from None
    return array if mapped else np.array(array)


def allocate_array(path: Path, dtype: Any, shape: Sequence[int]) -> None:
    """Write an .npy file of zeros and take the room for it: mapped, a file that has none would kill the process.

    Raises OSError with the path if there is none, and then leaves no file.
    """
    try:
        np.lib.format.open_memmap(path, "w+", dtype, tuple(shape))
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as opened:
                os.posix_fallocate(opened.fileno(), 0, path.stat().st_size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def open_npz(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    """The arrays of an .npz file, none unpickled; a ValueError if it is damaged, also where the block reads one, or if
    it declares more than a file of its size holds."""
    with reading_npz():
        _check_sizes(path)
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays


@contextmanager
def reading_npz() -> Iterator[None]:
    """Have all that a damaged .npz may raise in the block be a ValueError."""
    try:
        yield
    except GraincodeError:
        raise
    except (*_UNREADABLE, RuntimeError, KeyError) as error:
        raise ValueError(f"cannot be read as .npz of plain arrays ({_plain(error)})") from None


def _plain(error: Exception) -> Exception | str:
    """An error of reading arrays, but for numpy's advice to read them unsafely."""
    return "not an array" if "pickle" in str(error) else error


def _check_sizes(path: Path) -> None:
    """Refuse an .npz before memory is taken for what it declares."""
    size = file_size(path)
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        declared = sum(member.file_size for member in members)
        if len(members) > 1000 or declared > 2**26 + 100 * size:
            raise ValueError(f"it declares {len(members)} arrays of {declared:,} bytes in a file of {size:,}")
        for member in (member for member in members if member.filename.endswith(".npy")):
            with archive.open(member) as opened:
                shape, _, dtype = read_header(opened)
                taken = opened.tell() + math.prod(shape) * dtype.itemsize
            if taken != member.file_size and not dtype.hasobject:  # an object is refused where it is read
                raise ValueError(f"{member.filename!r} declares {taken:,} bytes and has {member.file_size:,}")


def read_header(opened: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and type of an .npy file, which is left at its first value."""
    known = np.lib.format
    is_first = known.read_magic(opened) == (1, 0)
    return (known.read_array_header_1_0 if is_first else known.read_array_header_2_0)(opened)


def build_once(path: Path, subject: str, build: Callable[[], None], whole: Callable[[], bool] | None = None) -> None:
    """Build a file or directory (`subject` in errors) unless it is there; of several processes one builds, others wait.

    Args:
        build: makes it appear as a whole (see `replacing` and `new_directory`), or raises.
        whole: whether it is there and not damaged, if that can be told; a damaged one is removed and built anew.
    """
    whole = whole or path.exists
    if whole():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent / f".{path.name}.lock"):
            if not whole():
                remove(path)
                build()
    except OSError as error:
        where = f"{path.parent} cannot take {subject} ({error.strerror or error})"
        raise GraincodeError(f"{where}: free space there, or set GRAINCODE_CACHE to another folder") from error


def cache_root() -> Path:
    """Where what was computed or fetched once is kept: $GRAINCODE_CACHE, or ~/.cache/graincode."""
    return Path(os.environ.get("GRAINCODE_CACHE") or "~/.cache/graincode").expanduser()


def sha256(file: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    file_size(file)
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def short_hash(value: Any) -> str:
    """8 hex digits over the JSON form of a value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]


@contextmanager
def network_timeout(seconds: float = 20) -> Iterator[None]:
    """A time limit on every wait for the network inside the block."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
