"""The one exception type whose message is meant for the user's eyes, the checks that raise it, and how it is shown."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from numbers import Integral
from pathlib import Path
from typing import Any, get_args

SEEDS = "0 or more, below 2^57"
"""Beside a seed, 64 bits hold which of up to 64 purposes a random number has."""


class GraincodeError(ValueError):
    """Bad input: one line that says what was found and what was expected.

    A message about an argument begins `name=value: `; the command line puts the whole key in place of the name.
    """

    @property
    def line(self) -> str:
        """The message on one line, without the traceback that a worker process of a loader puts before it."""
        return one_line(re.split(r"graincode\.core\.errors\.\w+: ", str(self))[-1].strip())


class Damaged(GraincodeError):
    """A file that we wrote is not what was written."""

    @classmethod
    def at(cls, path: Path, reason: object, advice: str) -> Damaged:
        """The error "PATH is damaged (reason): advice"."""
        words = brief(reason.strerror or reason) if isinstance(reason, OSError) else brief(reason)
        return cls(f"{path} is damaged ({words}): {advice}")

    @property
    def finding(self) -> str:
        """The message without its advice."""
        return self.line.rpartition(": ")[0]


def one_line(text: str) -> str:
    """A text with escapes such as \\n for all that is not printed as it is, so that a name stays within its line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class OneLineFormatter(logging.Formatter):
    """Log messages by `one_line`."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The message; a traceback after it keeps its lines."""
        return one_line(super().formatMessage(record))


def print_anything() -> None:
    """Have this process and those that it starts print as escapes what a terminal's encoding lacks, such as "±"."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # where another object stands in its place
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    os.environ["PYTHONIOENCODING"] = f"{sys.stdout.encoding}:backslashreplace"


@contextmanager
def in_one_line() -> Iterator[None]:
    """End the command with status 2 and one line on standard error if the block raises a GraincodeError."""
    try:
        yield
    except GraincodeError as error:
        print(f"error: {error.line}", file=sys.stderr)
        sys.exit(2)


def brief(error: object) -> str:
    """The first 120 characters of an error, on one line."""
    return " ".join(str(error).split())[:120]


def check(name: str, value: Any, expected: str, holds: bool) -> None:
    """Refuse an argument unless a condition holds: GraincodeError "sigma=-1: expected a number above 0", say."""
    if not holds:
        raise GraincodeError(f"{name}={value}: expected {expected}")


def check_whole(name: str, value: Any, least: int) -> None:
    """As `check`, for a whole number of `least` or more."""
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    check(name, value, f"{least} or more, a whole number", is_whole and value >= least)


def check_seed(seed: Any) -> None:
    """Refuse a seed that not all of our random numbers can be drawn from."""
    check_whole("seed", seed, 0)
    check("seed", seed, SEEDS, seed < 2**57)


def check_choice(name: str, value: Any, options: Any) -> None:
    """As `check`, "order=late: expected one of confidence, random"; options are a `Literal` or a collection."""
    known = list(get_args(options) or options)
    check(name, value, f"one of {', '.join(map(str, known))}", value in known)
