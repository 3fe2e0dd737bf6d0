"""Runs: a directory for each configuration, and one process at a time in it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from pathlib import Path
from typing import Any

from torch import nn

from graincode.core.errors import GraincodeError
from graincode.export import save_export
from graincode.files import write_json

log = logging.getLogger(__name__)


class Run:
    """One run's directory, held by one process at a time.

    A run is identified by its configuration, not by the time: the same command finds its directory again.

    Args:
        path: `runs_dir/job/run_name`.
        config: the resolved configuration, plain containers.
        identity: what of it matters to the result, flattened to dotted keys.
    Raises:
        GraincodeError: another process holds the directory, or it belongs to a run with another identity.
    """

    def __init__(self, path: Path, config: dict[str, Any], identity: dict[str, Any]) -> None:
        self.path, self._config, self._identity = path, config, identity

    def __enter__(self) -> Run:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / "run.lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise GraincodeError(
                f"another process works in {self.path}: wait for it, or type another run_name"
            ) from None
        try:
            self._claim()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _claim(self) -> None:
        file = self.path / "config.json"
        if file.is_file():
            before = json.loads(file.read_text())["identity"]
            differing = sorted(
                key for key in before.keys() | self._identity.keys() if before.get(key) != self._identity.get(key)
            )
            if differing:
                changes = ", ".join(f"{key}: {before.get(key)} -> {self._identity.get(key)}" for key in differing[:4])
                raise GraincodeError(
                    f"{self.path} holds a run with other settings ({changes}"
                    f"{', ...' if len(differing) > 4 else ''}): type another run_name, or the settings of that run"
                )
        else:
            write_json(file, {"config": self._config, "identity": self._identity})

    @property
    def result(self) -> dict[str, Any] | None:
        """What a finished run recorded, or None."""
        file = self.path / "result.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def finish(self, objective: float, **more: Any) -> float:
        """Record the result, which marks the run as finished, and point `latest` of its job at it."""
        write_json(self.path / "result.json", {"objective": objective, **more})
        link = self.path.parent / f".latest-{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(self.path.name)
        os.replace(link, self.path.parent / "latest")
        return objective

    def export(self, kind: str, config: dict[str, Any], module: nn.Module, **provenance: Any) -> None:
        """Write the trained model to `export/`, unless an interrupted run has done so already."""
        path = self.path / "export"
        if not path.exists():
            save_export(path, kind, config, module, **provenance)
        log.info("export: %s", path)

    def report_finished(self, result: dict[str, Any]) -> float:
        """Say that there is nothing left to do, and give the recorded objective."""
        log.info(
            "%s is finished (objective %.6g): type another run_name to run it again", self.path, result["objective"]
        )
        return result["objective"]
