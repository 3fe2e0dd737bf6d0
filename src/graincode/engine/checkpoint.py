"""Resume states: all that the next step depends on; nothing random, since randomness is a function of the step."""

from __future__ import annotations

import logging
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from graincode.core.errors import GraincodeError
from graincode.files import replacing

log = logging.getLogger(__name__)


class Checkpoints:
    """The resume states of one run.

    Args:
        folder: where they lie.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after `step` steps, as a whole, and let older ones go."""
        with replacing(self.folder / f"step_{step:09d}.pt") as partial:
            torch.save({"step": step, **state}, partial)
        for older in sorted(self.folder.glob("step_*.pt"))[: -self.keep]:
            older.unlink()

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """The newest state that can be read, or None; a damaged one is named, and the one before is taken.

        Raises:
            GraincodeError: there are states, and all of them are damaged.
        """
        files = sorted(self.folder.glob("step_*.pt"), reverse=True)
        for file in files:
            try:
                return torch.load(file, map_location=device, weights_only=True)
            except (RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, OSError) as error:
                log.warning("%s is damaged (%s): trying the one before", file, " ".join(str(error).split())[:100])
        if files:
            raise GraincodeError(f"all checkpoints in {self.folder} are damaged: move them away to start from step 0")
        return None
