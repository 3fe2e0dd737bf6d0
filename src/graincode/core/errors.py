"""The one exception type whose message is meant for the user's eyes, and the checks that raise it."""

from __future__ import annotations

import errno
from typing import Any, get_args

import torch


class GraincodeError(ValueError):
    """Bad input: one line that says what was found and what was expected.

    A message about an argument begins `name=value: `, so that the command line can name the key that it came from.
    """

    @classmethod
    def of_no_room(cls, error: Exception, job: str) -> GraincodeError | None:
        """The error of a job as the user's, if it is that a device's memory or a disk is full; None otherwise."""
        if isinstance(error, torch.OutOfMemoryError):
            training = (
                "trainer.batch_size= less, hardware.gradient_checkpointing=true or hardware.gradient_accumulation= more"
            )
            less = training if job.startswith("train_") else "batch_size= less"
            if job in ("sample", "evaluate"):
                less += ", or for samples precision=bfloat16"
            return cls(f"{'. '.join(str(error).split('. ')[:2])}: type {less}")
        if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return None
        where = f" for {error.filename}" if error.filename else ""
        return cls(f"no room on the disk{where} ({error.strerror}): make room; the same command then goes on")

    @property
    def line(self) -> str:
        """The message alone: a worker process of a loader puts its traceback before it."""
        return str(self).strip().splitlines()[-1].removeprefix("graincode.core.errors.GraincodeError: ")


def check(name: str, value: Any, expected: str, holds: bool) -> None:
    """Refuse an argument: `check("sigma", sigma, "a number above 0", sigma > 0)`.

    Raises:
        GraincodeError: "sigma=-1: expected a number above 0".
    """
    if not holds:
        raise GraincodeError(f"{name}={value}: expected {expected}")


def check_choice(name: str, value: Any, options: Any) -> None:
    """Refuse a value that is not among options: a `Literal`, or a collection of values.

    Raises:
        GraincodeError: "order=late: expected one of confidence, random".
    """
    known = list(get_args(options) or options)
    check(name, value, f"one of {', '.join(map(str, known))}", value in known)
