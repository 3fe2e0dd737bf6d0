"""Signals: the step is finished and the state saved before the process ends; and what ends with its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, Self

STATUS = 75
"""Exit status of a run that a signal stopped and that saved its state first (EX_TEMPFAIL: try again later)."""

_HANGUP = getattr(signal, "SIGHUP", None)
_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
"""What asks a run to stop. SIGHUP says that its terminal was closed."""

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1

_asked_at: float | None = None  # when the first signal came to what is interrupted


class Stopped(Exception):
    """A signal stopped the run; the message says which, and that the state is saved.

    Attributes:
        together: whether all processes of the run stop at the same point.
    """

    together = True


class ProcessFailed(Exception):
    """A process ended with an error that was not the user's; the message says which and how."""


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Have a function handle `SIGNALS` in the block, in the main thread: Python allows no other. A SIGHUP that is
    ignored, as under nohup, stays so."""

    def handle(number: int, frame: FrameType | None) -> None:
        if number == _HANGUP:
            _leave_terminal()
        handler(number, frame)

    in_main = threading.current_thread() is threading.main_thread()
    chosen = [n for n in SIGNALS if n != _HANGUP or signal.getsignal(n) != signal.SIG_IGN] if in_main else []
    before = {number: signal.signal(number, handle) for number in chosen}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _leave_terminal() -> None:
    """Write to nowhere what would go to a terminal that is closed: it would be an error."""
    for number in (1, 2):
        try:
            os.write(number, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


@contextmanager
def kept() -> Iterator[None]:
    """Undo what the block does to the handling of signals."""
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
    in_main = threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)] if in_main else []
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def blocked() -> Iterator[None]:
    """Hold `SIGNALS` back in the block; processes that are started in it inherit this."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(parent: int | None = None) -> None:
    """Have this process killed when its parent ends; on Linux also while it is stopped.

    `parent` is the number that the parent has: where it is gone already, this process ends now.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    elif parent is not None:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if parent not in (None, os.getppid()):
        os._exit(1)


CHILD: dict[str, Any] = {} if _LIBC is None else {"preexec_fn": end_with_parent}
"""Arguments of `subprocess.run` for a process that is to end with this one, where that is possible."""


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def asked_for() -> float:
    """Seconds since a signal asked this process to stop what is interrupted; 0 if none did."""
    return 0.0 if _asked_at is None else time.monotonic() - _asked_at


class Interruption(ExitStack):
    """While it is entered, the `SIGNALS` only ask to stop; a second SIGINT ends the process at once.

    Attributes:
        signal: the first signal that came, or None.
    """

    signal: signal.Signals | None = None

    def __enter__(self) -> Self:
        self.callback(_ask, None)
        self.enter_context(handled(self._handle))
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            os._exit(130)
        if self.signal is None:
            self.signal = signal.Signals(number)
            _ask(time.monotonic())


def _ask(at: float | None) -> None:
    global _asked_at
    _asked_at = at
