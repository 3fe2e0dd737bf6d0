"""The one exception type whose message is meant for the user's eyes."""

from __future__ import annotations

import errno

import torch


class GraincodeError(ValueError):
    """Bad input. The message is one line: the value, what was expected, and what to type instead."""

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
