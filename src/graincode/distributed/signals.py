"""Signals: the step is finished and the state saved before the process ends."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

STATUS = 75
"""Exit status of a run that a signal stopped and that saved its state first (EX_TEMPFAIL: try again later)."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(Exception):
    """A signal stopped the run; the message says which, and that the state is saved."""


class ProcessFailed(Exception):
    """A process ended with an error that was not the user's; the message says which and how."""


class Interruption:
    """While it is entered, SIGTERM, SIGINT and SIGUSR1 only ask to stop; a second SIGINT ends the process at once.

    Attributes:
        signal: the first signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __enter__(self) -> Interruption:
        in_main = threading.current_thread() is threading.main_thread()  # elsewhere Python allows no handlers
        self._before = {number: signal.signal(number, self._handle) for number in (SIGNALS if in_main else ())}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            os._exit(130)
        self.signal = self.signal or signal.Signals(number)
