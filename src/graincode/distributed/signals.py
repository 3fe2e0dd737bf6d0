"""Signals: the step is finished and the state saved before the process ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Self

STATUS = 75
"""Exit status of a run that a signal stopped and that saved its state first (EX_TEMPFAIL: try again later)."""

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


class Stopped(Exception):
    """A signal stopped the run; the message says which, and that the state is saved."""


class ProcessFailed(Exception):
    """A process ended with an error that was not the user's; the message says which and how."""


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Have a function handle SIGTERM, SIGINT and SIGUSR1 in the block, in the main thread: Python allows no other."""
    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in (SIGNALS if in_main else ())}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def blocked() -> Iterator[None]:
    """Hold SIGTERM, SIGINT and SIGUSR1 back in the block; processes that are started in it inherit this."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Interruption(ExitStack):
    """While it is entered, SIGTERM, SIGINT and SIGUSR1 only ask to stop; a second SIGINT ends the process at once.

    Attributes:
        signal: the first signal that came, or None.
    """

    signal: signal.Signals | None = None

    def __enter__(self) -> Self:
        self.enter_context(handled(self._handle))
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            os._exit(130)
        self.signal = self.signal or signal.Signals(number)
