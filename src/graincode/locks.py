"""Locks that one process at a time can hold, also where the file system has none."""

from __future__ import annotations

import errno
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from graincode.core.waiting import Wait

log = logging.getLogger(__name__)

_NO_LOCKS = errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO


@contextmanager
def locked(path: Path, seconds: float = math.inf) -> Iterator[None]:
    """Hold a lock file, which one process at a time can; says every 30 seconds that it waits. Where the file system has
    no locks, one file stands for one (`filelock.SoftFileLock`), which goes with its process.

    Raises:
        filelock.Timeout: another has held it for so many seconds.
    """
    lock: BaseFileLock = FileLock(path)
    wait = Wait(f"another process, which holds {path}", is_limited=False)
    while not lock.is_locked:
        try:
            lock.acquire(timeout=max(min(seconds - wait.seconds, 1), 0), poll_interval=0.1)
        except Timeout:
            if wait.seconds >= seconds:
                raise
            wait.again()
        except OSError as error:
            if error.errno not in _NO_LOCKS or isinstance(lock, SoftFileLock):
                raise
            _warn_of_soft_locks(error.strerror)
            lock = SoftFileLock(path.with_name(f"{path.name}.owner"))
    try:
        yield
    finally:
        lock.release()


def is_held(path: Path) -> bool:
    """Whether some process holds a lock file, as far as this system tells; the file is only read."""
    if path.with_name(f"{path.name}.owner").exists():
        return True
    if not path.is_file():  # a pipe would wait for its writer
        return False
    with suppress(ImportError, FileNotFoundError):
        import fcntl

        # a pipe in its place is not waited for
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as opened:
            try:
                fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                return error.errno not in _NO_LOCKS
    return False


@lru_cache(maxsize=1)
def _warn_of_soft_locks(reason: str) -> None:
    log.warning("this file system has no locks (%s): files stand for them; start no run twice on two machines", reason)
