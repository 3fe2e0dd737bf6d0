"""What the files of runs say: read only, without torch, and whatever is damaged is said of that run alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from graincode.core.errors import Damaged, GraincodeError, brief
from graincode.files import is_number, read_json
from graincode.locks import is_held
from graincode.runs.identity import flatten

State = Literal["running", "stopped", "finished", "failed", "damaged"]

_OF_A_RUN = {"config.json", "result.json", "run.lock", "state"}


@dataclass(frozen=True)
class ListedRun:
    """What is known of a run.

    Attributes:
        step: of the last state, if it saves any.
        objective: recorded, or of the best evaluation so far.
        changed: when its log or result was written last, in seconds since 1970.
        settings: what matters to its result, by dotted key.
        metrics: that it recorded, by dotted key.
        problem: the error that ended it, or what is damaged.
    """

    path: Path
    job: str
    name: str
    state: State
    step: int | None = None
    objective: float | None = None
    changed: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""

    @property
    def stands(self) -> str:
        """Its state in words."""
        if self.state in ("finished", "damaged") or self.step is None:
            return self.state
        return f"{self.state} at step {self.step}"


def find_runs(folder: Path) -> list[ListedRun]:
    """The runs in a directory of runs (`runs_dir`), in one of a job, or in that of a run itself; the newest first.

    Raises:
        GraincodeError: there is no such directory.
    """
    if not folder.is_dir():
        raise GraincodeError(f"{folder}: no directory of runs; give another, such as runs")
    if _is_run(folder):
        return [read_run(folder)]
    inner = _folders(folder)
    found = [one for one in inner if _is_run(one)] or [one for job in inner for one in _folders(job) if _is_run(one)]
    return sorted(map(read_run, found), key=lambda run: (run.job, -run.changed, run.name))


def find_run(name: str, folder: Path) -> ListedRun:
    """A run by its path, or by NAME or JOB/NAME in a directory of runs; GraincodeError if there is none, or several."""
    if _is_run(Path(name)):
        return read_run(Path(name).resolve())
    if not folder.is_dir():
        raise GraincodeError(f"{name}: no run is there, nor is a directory {folder} of runs; type a run's path")
    found = [run for run in find_runs(folder) if name in (run.name, f"{run.job}/{run.name}")]
    if len(found) != 1:
        several = ", ".join(f"{run.job}/{run.name}" for run in found)
        raise GraincodeError(f"{name}: {f'one of {several}' if found else f'no run in {folder}'}; type a run's path")
    return found[0]


def read_run(path: Path) -> ListedRun:
    """What the files of a run say; never raises for what they hold."""
    known: dict[str, Any] = {"settings": {}, "metrics": {}, "machine": {}, "state": "stopped"}
    advice = "remove it"
    try:
        known["changed"] = max(_changed(path / name) for name in ("result.json", "log.jsonl", "config.json"))
        known["settings"] = read_json(path / "config.json", {"identity": dict}, advice)["identity"]
        for name, keys in (("machine", {}), ("failed", {"error": str}), ("result", {"objective": float})):
            if (path / f"{name}.json").exists():
                known[name] = read_json(path / f"{name}.json", keys, advice)
        if (best := path / "state" / "best.json").exists():
            found = read_json(best, {"metrics": dict}, advice)["metrics"]
            known["objective"] = _numbers(found).get("objective")
        steps = [int(state.name[5:]) for state in (path / "state").glob("step_" + 9 * "[0-9]")]
        known["step"] = max(steps, default=0 if (path / "state").exists() else None)
        failed, result = known.pop("failed", None), known.pop("result", None)
        if result is not None:
            known["objective"] = result["objective"]
            if not isinstance(metrics := result.get("metrics") or result, dict):
                raise Damaged.at(path / "result.json", f"metrics is {metrics!r}", advice)
            known["metrics"] = _numbers(metrics)
        if result is not None and "lengthened" not in result:
            known["state"] = "finished"
        elif is_held(path / "run.lock"):
            known["state"] = "running"
        elif failed is not None:
            known |= {"state": "failed", "problem": failed["error"]}
    except (Damaged, OSError, RecursionError) as error:
        problem = error.finding if isinstance(error, Damaged) else f"{path}: {brief(error)}"
        known = {key: known[key] for key in ("settings", "metrics", "machine", "changed") if key in known}
        known |= {"state": "damaged", "problem": problem}
    return ListedRun(path, path.absolute().parent.name, path.name, **known)


def differing(runs: Iterable[ListedRun]) -> dict[Path, dict[str, Any]]:
    """Settings in which the runs of a job differ, by run: those that not most of them have alike."""
    by_job: dict[str, list[ListedRun]] = {}
    for run in runs:
        by_job.setdefault(run.job, []).append(run)
    found: dict[Path, dict[str, Any]] = {}
    for mine in by_job.values():
        unlike = _unlike(mine)
        most = {key: Counter(map(str, values)).most_common(1)[0] for key, values in unlike.items()}
        common = {key: value for key, (value, count) in most.items() if 2 * count > len(mine)}
        for index, run in enumerate(mine):
            own = {key: values[index] for key, values in unlike.items() if key in run.settings}
            found[run.path] = {key: value for key, value in own.items() if str(value) != common.get(key)}
    return found


def side_by_side(runs: Sequence[ListedRun]) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Settings in which runs differ, and all of their metrics, by key, for each run; None where a run has none."""
    metrics = dict.fromkeys(key for run in runs for key in run.metrics)
    return _unlike(runs), {key: [run.metrics.get(key) for run in runs] for key in metrics}


def best_of(runs: Iterable[ListedRun]) -> list[ListedRun]:
    """Of finished runs of one job that have the same metrics, that of the least objective."""
    best: dict[tuple[str, frozenset[str]], ListedRun] = {}
    for run in runs:
        kind = run.job, frozenset(run.metrics)
        if run.state == "finished" and (kind not in best or run.objective < best[kind].objective):
            best[kind] = run
    return list(best.values())


def _unlike(runs: Sequence[ListedRun]) -> dict[str, list[Any]]:
    """Settings in which runs differ, in order, but for those that only repeat one of a shorter name."""
    found: dict[str, list[Any]] = {}
    seen = set()
    for key in sorted({key for run in runs for key in run.settings}, key=lambda key: (key.count("."), key)):
        values = [run.settings.get(key) for run in runs]
        known = [value for value, run in zip(values, runs, strict=True) if run.settings]  # not those of damaged ones
        if any(value != known[0] for value in known):
            same = key.rpartition(".")[2], repr(values)
            if same not in seen:
                found[key] = values
            seen.add(same)
    return found


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in _OF_A_RUN)


def _folders(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink() and path.name[0] != "."]
    except OSError:
        return []


def _changed(file: Path) -> float:
    return file.stat().st_mtime if file.exists() else 0.0


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in flatten(values).items() if is_number(value, float)}
