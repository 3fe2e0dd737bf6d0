"""Waits for what others do: a message every 30 seconds that says what is waited for, and an end."""

from __future__ import annotations

import logging
import time

from graincode.core.errors import GraincodeError, brief

log = logging.getLogger(__name__)

MESSAGE_SECONDS = 30.0

_limit_minutes = 30.0


def limit_waits(minutes: float) -> None:
    """Set the longest that this process waits for others."""
    global _limit_minutes
    _limit_minutes = minutes


class Wait:
    """A wait that begins now.

    Args:
        what: is waited for, in words.
        is_limited: whether it ends after the minutes of `limit_waits` (30 by default).
    """

    def __init__(self, what: str, is_limited: bool = True) -> None:
        self._what, self._is_limited = what, is_limited
        self._began, self._messages = time.monotonic(), 0

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._began

    def again(self, reason: object = "") -> None:
        """To be called while it has not come, with a reason if there is one; raises GraincodeError at the end."""
        seconds, why = self.seconds, f" ({brief(reason)})" if reason else ""
        if self._is_limited and seconds >= 60 * _limit_minutes:
            raise GraincodeError(f"{self._what} did not come within timeout_minutes={_limit_minutes:g}{why}")
        if seconds >= (self._messages + 1) * MESSAGE_SECONDS:
            self._messages += 1
            log.warning("waiting for %s since %.0f seconds%s", self._what, seconds, why)
