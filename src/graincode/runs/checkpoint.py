"""Resume states: all that the next step depends on; nothing random, since randomness is a function of the step."""

from __future__ import annotations

import logging
import pickle
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from graincode.core.errors import Damaged, GraincodeError, brief
from graincode.files import new_directory, read_json, remove, sha256, write_json

log = logging.getLogger(__name__)

FORMAT = 2
_ADVICE = "choose another state, or another run_name"


class Checkpoints:
    """The resume states of one run: a directory for each, `step_000000250/` with `state.pt` and `state.json`. The
    newest `keep` stay, and the one with the best evaluation. No other process may write to `folder`."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Steps that a state was saved after, the newest first."""
        return sorted((int(path.name[5:]) for path in self.folder.glob("step_" + 9 * "[0-9]")), reverse=True)

    def path(self, step: int) -> Path:
        """Directory of a state."""
        return self.folder / f"step_{step:09d}"

    def save(self, step: int, state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        """Write the state after `step` steps, tensors, numbers and containers of them, unless it is there, with the
        identity of its run; then remove the oldest. Raises GraincodeError if it cannot be written."""
        if not self.path(step).is_dir():
            try:
                with new_directory(self.path(step)) as partial:
                    torch.save({"step": step, **state}, partial / "state.pt")
                    digest = sha256(partial / "state.pt")
                    about = {"format": FORMAT, "step": step, "sha256": digest, "identity": identity}
                    write_json(partial / "state.json", about)
            except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
                line = f"{self.path(step)} cannot be written ({brief(error)}): make room; the same command then "
                raise GraincodeError(f"{line}goes on from step {next(iter(self.steps()), 0)}") from error
        self._prune()

    def mark_best(self, step: int, metrics: dict[str, float]) -> None:
        """Keep a saved state as the best, with the metrics of its evaluation, instead of the one before."""
        write_json(self.folder / "best.json", {"step": step, "metrics": metrics})
        self._prune()

    @property
    def best(self) -> dict[str, Any]:
        """The step and metrics that `mark_best` was given last; empty if it never was."""
        file = self.folder / "best.json"
        keys = {"step": int, "metrics": dict}
        return read_json(file, keys, "remove it, and the best is found anew") if file.exists() else {}

    def load(self) -> dict[str, Any] | None:
        """The newest state that can be read, or None if there are none; a damaged one is named, and passed over."""
        for step in self.steps():
            try:
                return read_state(self.path(step))
            except Damaged as error:
                log.warning("%s: trying the one before", error.finding)
        if self.steps():
            raise GraincodeError(f"all states in {self.folder} are damaged: move them away to start from step 0")
        return None

    @property
    def identity(self) -> dict[str, Any] | None:
        """The identity of the run of the newest state that says it, if any does."""
        for step in self.steps():
            with suppress(GraincodeError):
                return read_about(self.path(step))["identity"]
        return None

    def set_aside_after(self, step: int) -> None:
        """Rename states of later steps: damaged ones, whose steps are about to be done again."""
        for later in (self.path(found) for found in self.steps() if found > step):
            aside = self.folder / f"damaged_{later.name}"
            remove(aside)
            later.rename(aside)

    def _prune(self) -> None:
        for older in {*self.steps()[self.keep :]} - {self.best.get("step")}:
            remove(self.path(older))


def read_about(path: Path) -> dict[str, Any]:
    """What `state.json` of a state says; raises as `read_state`."""
    file = path / "state.json"
    found = read_json(file, {"format": int}, _ADVICE)["format"]
    if found != FORMAT:
        line = f"{path} has state format {found}, this version reads {FORMAT}: "
        raise GraincodeError(f"{line}go on with the version that wrote it, or choose another run_name")
    return read_json(file, {"step": int, "sha256": str, "identity": dict}, _ADVICE)


def read_state(path: Path) -> dict[str, Any]:
    """A state; raises `Damaged` if it is not what was written, and GraincodeError if it is of another format."""
    about = read_about(path)
    try:
        if sha256(path / "state.pt") != about["sha256"]:
            raise ValueError("its content has changed since it was written")
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state.get("step") != about["step"]:
            raise ValueError(f"no state after step {about['step']}")
        return state
    except (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, OSError) as error:
        raise Damaged.at(path, error, _ADVICE) from error
