"""The one exception type whose message is meant for the user's eyes."""

from __future__ import annotations

import errno


class GraincodeError(ValueError):
    """Bad input. The message is one line: the value, what was expected, and what to type instead."""

    @classmethod
    def of_full_disk(cls, error: OSError) -> GraincodeError | None:
        """The error as the user's, if it is that a disk is full; None otherwise."""
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return None
        where = f" for {error.filename}" if error.filename else ""
        return cls(f"no room on the disk{where} ({error.strerror}): make room; the same command then goes on")

    @property
    def line(self) -> str:
        """The message alone: a worker process of a loader puts its traceback before it."""
        return str(self).strip().splitlines()[-1].removeprefix("graincode.core.errors.GraincodeError: ")
