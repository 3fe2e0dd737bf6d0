"""The one exception type whose message is meant for the user's eyes, and the checks that raise it."""

from __future__ import annotations

from typing import Any, get_args


class GraincodeError(ValueError):
    """Bad input: one line that says what was found and what was expected.

    A message about an argument begins `name=value: `; the command line puts the whole key in place of the name.
    """

    @property
    def line(self) -> str:
        """The message without the traceback that a worker process of a loader puts before it."""
        return str(self).strip().splitlines()[-1].removeprefix("graincode.core.errors.GraincodeError: ")


def brief(error: object) -> str:
    """The first 120 characters of an error, on one line."""
    return " ".join(str(error).split())[:120]


def check(name: str, value: Any, expected: str, holds: bool) -> None:
    """Refuse an argument unless a condition holds: GraincodeError "sigma=-1: expected a number above 0", say."""
    if not holds:
        raise GraincodeError(f"{name}={value}: expected {expected}")


def check_choice(name: str, value: Any, options: Any) -> None:
    """As `check`, "order=late: expected one of confidence, random"; options are a `Literal` or a collection."""
    known = list(get_args(options) or options)
    check(name, value, f"one of {', '.join(map(str, known))}", value in known)
