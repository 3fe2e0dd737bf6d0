"""Runs: a directory for each configuration, and one process at a time in it."""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout

from graincode.core.errors import GraincodeError, brief, check
from graincode.distributed import collectives
from graincode.distributed.signals import Stopped
from graincode.files import clear_leftovers, read_json, replacing, short_hash, write_json
from graincode.locks import locked
from graincode.runs.checkpoint import Checkpoints
from graincode.runs.table import note_member

log = logging.getLogger(__name__)

_BEGUN_FROM = "inputs.resume"  # the state of another run, by its hash
# what is there before anything is made
_ABOUT = {"config.json", "machine.json", "failed.json", "owner", "run.lock", "run.lock.owner"}
_LOCK_SECONDS = 6  # processes that load data live up to 5 seconds longer than a killed run, and hold its lock


class Run:
    """One run's directory, held by one process at a time: within `with`, which raises if another holds it.

    One that is finished can be opened, and read, where nothing can be written.

    Args:
        path: `runs_dir/job/run_name`, which the same command finds again.
        config: the resolved configuration, plain containers.
        identity: what of it matters to the result, by dotted key; a directory belongs to one identity.
        images: what identifies each split of images that is read, in words; part of the identity. A run of which
            nothing is made yet, or that is not finished and has no states, takes others.
        may_grow: keys of numbers that a run goes on with when they are larger.
        places: keys of paths; they do not count where the identity has the images that lie there.
    """

    def __init__(
        self, path: Path, config: dict[str, Any], identity: Mapping[str, Any], images: Mapping[str, str] | None = None,
        may_grow: Sequence[str] = (), places: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.path, self.config, self._may_grow, self._places = path, config, may_grow, places
        self.images = {f"inputs.{split}_images": words for split, words in (images or {}).items()}
        self.identity = {**identity, **self.images}
        self._held, self._token = ExitStack(), secrets.token_hex(8)  # process 0 alone holds it

    def __enter__(self) -> Run:
        collectives.check_agreement("their configuration, or in the images", int(short_hash(self.identity), 16))
        try:
            collectives.on_main(self._open)
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, Stopped) and collectives.is_main():
            line = error.line if isinstance(error, GraincodeError) else f"{type(error).__name__}: {brief(error)}"
            with suppress(OSError):  # as where the disk is full
                write_json(self.path / "failed.json", {"error": line})
        self._held.close()

    def check_owner(self) -> None:
        """Raise GraincodeError if another process has opened this run meanwhile, as where locks do nothing."""
        file = self.path / "owner"
        if not file.is_file() or file.read_bytes() != self._token.encode():
            line = f"another process has opened {self.path} meanwhile (by {file.name} in it)"
            raise GraincodeError(f"{line}: this one ends; let one alone work in a run")

    def _open(self) -> None:
        config, result = self.path / "config.json", self.path / "result.json"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(locked(self.path / "run.lock", _LOCK_SECONDS))
            with replacing(self.path / "owner") as partial:  # also a pipe, which would wait for its reader
                partial.write_text(self._token, "utf-8")
            if (before := self._found(config)) is not None:
                self._take(before, result)
            if before is None or self._changed(before) or not config.exists():
                write_json(config, {"config": self.config, "identity": self.identity})
            self.path.with_name(f".latest-{self.path.name}").unlink(missing_ok=True)
            if not result.exists():
                write_json(self.path / "machine.json", _machine())
                (self.path / "failed.json").unlink(missing_ok=True)
            for folder in (self.path, self.path / "state", self.path / "pictures", self.path / "codes"):
                clear_leftovers(folder)
        except Timeout:
            line = f"another process works in {self.path}: wait for it, or choose another run_name"
            raise GraincodeError(line) from None
        except OSError as error:
            is_finished = all(map(os.path.isfile, (config, result))) and not self._grown(_identity_in(config), True)
            found = f"{error.filename or self.path}: {error.strerror}"
            check("runs_dir", self.path.parents[1], f"a directory to write to ({found})", is_finished)
        note_member(self.path)

    def _found(self, config: Path) -> dict[str, Any] | None:
        """The identity of what is made in the directory, which its states say too; None if there is nothing."""
        if {path.name for path in self.path.glob("[!.]*")} <= _ABOUT:  # a start that was refused says nothing
            return None
        if config.exists():
            return _identity_in(config)
        if (found := Checkpoints(self.path / "state").identity) is None:
            log.warning("%s has no config.json: it is taken for a run with the settings of now", self.path)
        return found

    def _grown(self, before: Mapping[str, Any], is_made: bool) -> list[str]:
        """Keys in which a run is to be lengthened; raises if what stands in its directory is of another identity."""
        changed, images = self._changed(before), self.images.keys()
        numbers = (key for key in self._may_grow if key in changed and isinstance(before.get(key), int))
        grown = [key for key in numbers if before[key] < self.identity[key]]
        unknown = {key for key in images if key not in before}  # as in runs of earlier versions
        if rest := [key for key in changed if key not in {*grown, *(unknown if is_made else images)}]:
            other, more, advice = "with other settings", "", "those settings"
            if images >= {*rest}:
                other, advice = "on other images", "put them back as they were"
                states = Checkpoints(self.path / "state")
                more = "".join(f" and give resume={states.path(step)}" for step in states.steps()[:1])
            advice += self._paths_of([key for key in rest if key.startswith("inputs.")])
            line = f"{self.path} holds a run {other} ({_words(rest, before, self.identity)})"
            raise GraincodeError(f"{line}: choose another run_name{more}, or {advice}")
        if is_made and unknown:
            log.warning("%s does not say which images it was begun with: it goes on with those of now", self.path)
        return grown

    def _paths_of(self, inputs: Sequence[str]) -> str:
        """In words, where the run that stands in the directory found what it read, as far as it says another place."""
        with suppress(GraincodeError):
            before = read_json(self.path / "config.json", {"config": dict}, "")["config"]
            keys = (f"{key.removeprefix('inputs.')}_path" for key in inputs)
            typed = [f"{key}={before[key]}" for key in keys if before.get(key) not in (None, self.config.get(key))]
            return f", such as {' '.join(typed)}" if typed else ""
        return ""

    def _take(self, before: Mapping[str, Any], result: Path) -> None:
        """Go on with what a directory holds of an identity."""
        grown = self._grown(before, result.exists() or any((self.path / "state").glob("step_*")))
        if grown:
            log.info("%s is lengthened (%s)", self.path, _words(grown, before, self.identity))
            if result.exists():  # until the longer run ends, what the shorter one left stays
                write_json(result, _read_result(result) | {"lengthened": {key: self.identity[key] for key in grown}})
        if _BEGUN_FROM in before:
            self.identity[_BEGUN_FROM] = before[_BEGUN_FROM]

    def _changed(self, before: Mapping[str, Any]) -> list[str]:
        keys = before.keys() | self.identity.keys()
        if self.images.keys() <= before.keys():
            keys -= {*self._places}
        if _BEGUN_FROM not in self.identity:  # it goes on from its own states
            keys -= {_BEGUN_FROM}
        return [key for key in sorted(keys) if before.get(key) != self.identity.get(key)]

    def check_state(self, state: Path, identity: Mapping[str, Any]) -> None:
        """Refuse a state that is in the directory, but of another run; it may be one of fewer steps, or say less."""
        unknown = [key for key in self.images if key not in identity]
        if differing := self.differing(identity, but=[*self._may_grow, *unknown]):
            raise GraincodeError(f"{state} is a state of another run ({differing}): move it away")

    def differing_start(self, before: Mapping[str, Any]) -> str:
        """Which settings, but for those that may grow, differ in the run of a state that this one is to begin from."""
        return self.differing(before, but=[*self._may_grow, *self.images, *self._places, _BEGUN_FROM])

    def differing(self, before: Mapping[str, Any], but: Sequence[str] = ()) -> str:
        """Which settings and images of another run's identity differ from this one's, in words; empty if none does."""
        return _words([key for key in self._changed(before) if key not in but], before, self.identity)

    @property
    def result(self) -> dict[str, Any] | None:
        """What a finished run recorded, or None."""
        file = self.path / "result.json"
        found = collectives.broadcast_(torch.tensor([float(file.exists())]))
        result = _read_result(file) if bool(found) else {"lengthened": {}}
        return None if "lengthened" in result else result

    def finished(self, load: Callable[[], object]) -> dict[str, Any] | None:
        """The `result`, or None if `load`, which reads what the run left, raises a GraincodeError."""
        result = self.result
        try:
            if result is not None:
                load()
        except GraincodeError as error:
            log.warning("%s is finished, but what it left is not whole (%s)", self.path, error)
            return None
        return result

    def finish(self, objective: float, **more: Any) -> float:
        """Record the result, which marks the run as finished, and point `latest` of its job at it."""

        def record() -> None:
            self.check_owner()
            check("objective", objective, "a finite number; look at the log", math.isfinite(objective))
            link, latest = (self.path.with_name(name) for name in (f".latest-{self.path.name}", "latest"))
            link.unlink(missing_ok=True)
            try:
                link.symlink_to(self.path.name)
                link.replace(latest)
            except OSError as error:  # there can be no links, as on Windows, or a copied directory stands there
                link.unlink(missing_ok=True)
                log.warning("%s is not this run (%s): type its path where it is read", latest, brief(error))
            write_json(self.path / "result.json", {"objective": objective, **more})  # last: nothing is done again

        collectives.on_main(record)
        return objective

    def report_finished(self, result: dict[str, Any]) -> float:
        """Say that there is nothing left to do; returns the recorded objective."""
        advice = "choose another run_name to run it again"
        log.info("%s is finished (objective %.6g): %s", self.path, result["objective"], advice)
        return result["objective"]


def _machine() -> dict[str, Any]:
    """Where this process works, and on which devices."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"host": socket.gethostname(), "processes": collectives.count(), "visible_gpus": gpus, "begun": time.time()}


def _identity_in(file: Path) -> dict[str, Any]:
    advice = "remove it if the run has the settings of now, or choose another run_name"
    return read_json(file, {"config": dict, "identity": dict}, advice)["identity"]


def _read_result(file: Path) -> dict[str, Any]:
    return read_json(file, {"objective": float}, "remove it, and the same command ends the run again")


def _words(keys: Sequence[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How some settings changed, the first of them."""
    pairs = [(key, before.get(key), now.get(key)) for key in keys[:4]]
    alike = [(key, *(map(repr, two) if str(two[0]) == str(two[1]) else two)) for key, *two in pairs]  # 6 and "6", say
    return ", ".join(f"{key}: {old} -> {new}" for key, old, new in alike) + (", ..." if len(keys) > 4 else "")
