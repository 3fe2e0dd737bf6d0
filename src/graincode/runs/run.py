"""Runs: a directory for each configuration, and one process at a time in it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from graincode.core.errors import GraincodeError, check
from graincode.distributed import collectives
from graincode.files import clear_leftovers, short_hash, write_json
from graincode.runs.table import note_member

log = logging.getLogger(__name__)

_LOCK_SECONDS = 6  # processes that load data live up to 5 seconds longer than a killed run, and hold its lock


class Run:
    """One run's directory, held by one process at a time: within `with`, which raises if another holds it.

    Args:
        path: `runs_dir/job/run_name`, which the same command finds again.
        config: the resolved configuration, plain containers.
        identity: what of it matters to the result, by dotted key; a directory belongs to one identity.
    """

    def __init__(self, path: Path, config: dict[str, Any], identity: dict[str, Any]) -> None:
        self.path, self.config, self.identity = path, config, identity
        self._lock = FileLock(path / "run.lock", timeout=_LOCK_SECONDS)  # process 0 alone acquires it

    def __enter__(self) -> Run:
        collectives.check_agreement("their configuration", int(short_hash(self.identity), 16))
        collectives.on_main(self._open)
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _open(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(poll_interval=0.2)
        except Timeout:
            line = f"another process works in {self.path}: wait for it, or choose another run_name"
            raise GraincodeError(line) from None
        except OSError as error:
            check("runs_dir", self.path.parents[1], f"a directory to write to ({error.strerror})", False)
        file = self.path / "config.json"
        if not file.is_file():
            write_json(file, {"config": self.config, "identity": self.identity})
        if changes := self.differing(json.loads(file.read_text())["identity"]):
            self._lock.release()
            line = f"{self.path} holds a run with other settings ({changes})"
            raise GraincodeError(f"{line}: choose another run_name, or those settings")
        for folder in (self.path, self.path / "state", self.path / "pictures"):
            clear_leftovers(folder)

    def differing(self, before: dict[str, Any], but: Sequence[str] = ()) -> str:
        """Which settings of another run's identity differ from this one's, in words; empty if none does."""
        keys = sorted((before.keys() | self.identity.keys()) - set(but))
        changed = [key for key in keys if before.get(key) != self.identity.get(key)]
        named = ", ".join(f"{key}: {before.get(key)} -> {self.identity.get(key)}" for key in changed[:4])
        return named + (", ..." if len(changed) > 4 else "")

    @property
    def result(self) -> dict[str, Any] | None:
        """What a finished run recorded, or None."""
        file = self.path / "result.json"
        found = collectives.broadcast_(torch.tensor([float(file.is_file())]))
        return json.loads(file.read_text()) if bool(found) else None

    def finish(self, objective: float, **more: Any) -> float:
        """Record the result, which marks the run as finished, and point `latest` of its job at it."""

        def record() -> None:
            link = self.path.with_name(f".latest-{self.path.name}")
            link.unlink(missing_ok=True)
            with suppress(OSError):  # where there can be no links, as on Windows, paths are to be typed
                link.symlink_to(self.path.name)
                link.replace(self.path.with_name("latest"))
            write_json(self.path / "result.json", {"objective": objective, **more})  # last: nothing is done again
            note_member(self.path)

        collectives.on_main(record)
        return objective

    def report_finished(self, result: dict[str, Any]) -> float:
        """Say that there is nothing left to do; returns the recorded objective."""
        collectives.on_main(lambda: note_member(self.path))
        advice = "choose another run_name to run it again"
        log.info("%s is finished (objective %.6g): %s", self.path, result["objective"], advice)
        return result["objective"]
