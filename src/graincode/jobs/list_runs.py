"""What was run, and how it stands. `graincode-runs --help` shows how."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graincode.core.errors import in_one_line, one_line, print_anything
from graincode.runs.listing import ListedRun, best_of, differing, find_run, find_runs, side_by_side

_LONGEST = {"name": 48, "state": 40, "value": 40}  # characters of what is shown
_AGES = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line. Exit statuses: 0; 2 and one line on standard error for bad input."""
    if arguments is None and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as `head` expects
    print_anything()
    parser = argparse.ArgumentParser("graincode-runs", description="List runs: how they stand and how they differ.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), help="of all runs, or of one job's")
    parser.add_argument("--best", action="store_true", help="the run of the least objective, of each job and metrics")
    parser.add_argument("--json", action="store_true", help="all that is known, for programs")
    parser.add_argument("--diff", nargs=2, metavar=("A", "B"), help="settings and metrics of two runs side by side")
    given = parser.parse_args(arguments)
    with in_one_line():
        if given.diff:
            first, second = (find_run(name, given.folder) for name in given.diff)
            lines = list(_compared(first, second))
        else:
            runs = find_runs(given.folder)
            differs = differing(runs)
            shown = best_of(runs) if given.best else runs
            lines = _as_json(shown, differs) if given.json else list(_listed(shown, differs))
        print("\n".join(lines))


def age(seconds: float) -> str:
    """A duration in its largest unit, such as "3 h"."""
    unit, size = next(((unit, size) for unit, size in _AGES if seconds >= size), _AGES[-1])
    return f"{max(seconds, 0) / size:.0f} {unit}"


def shown(value: Any) -> str:
    """A value in few characters, on one line."""
    text = one_line(f"{value:.6g}" if isinstance(value, float) else "-" if value is None else str(value))
    return _cut(text, _LONGEST["value"])


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """Dotted keys by their last part, or two where that is not enough, and so on."""
    keys, found = list(keys), {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        found[key] = next((end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1), key)
    return found


def _listed(runs: Sequence[ListedRun], differs: dict[Path, dict[str, Any]]) -> Iterator[str]:
    if not runs:
        return
    now = time.time()
    names = short_keys(dict.fromkeys(key for run in runs for key in differs[run.path]))
    rows = [("job", "name", "state", "objective", "age", "what differs")]
    for run in runs:
        what = " ".join(f"{names[key]}={shown(value)}" for key, value in differs[run.path].items())
        told = one_line("; ".join(filter(None, (run.problem, what))))
        name, state = _cut(one_line(run.name), _LONGEST["name"]), _cut(run.stands, _LONGEST["state"])
        rows.append((one_line(run.job), name, state, shown(run.objective), age(now - run.changed), told))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for row in rows:
        cells = (cell.rjust(width) if column in (3, 4) else cell.ljust(width)
                 for column, (cell, width) in enumerate(zip(row, widths, strict=False)))  # fmt: skip
        line = "  ".join([*cells, row[5]]).rstrip()
        yield line if room is None else _cut(line, room)


def _compared(first: ListedRun, second: ListedRun) -> Iterator[str]:
    settings, metrics = side_by_side((first, second))
    now, both = time.time(), (first, second)
    rows = [["", *(one_line(f"{run.job}/{run.name}") for run in both)], ["state", *(run.stands for run in both)]]
    rows += [["objective", *(shown(run.objective) for run in both)], ["age", *(age(now - run.changed) for run in both)]]
    for title, table in (("settings that differ", settings), ("metrics", metrics)):
        rows += [[], [f"{title}:" if table else f"{title}: none"]]
        rows += [[f"  {one_line(key)}", *map(shown, values)] for key, values in table.items()]
    width = max(len(row[0]) for row in rows if len(row) > 1)
    middle = max(len(row[1]) for row in rows if len(row) > 1)
    for row in rows:
        yield f"{row[0]:<{width}}  {row[1]:<{middle}}  {row[2]}".rstrip() if len(row) > 1 else "".join(row)
    yield from (one_line(f"{run.name}: {run.problem}") for run in both if run.problem)


def _as_json(runs: Sequence[ListedRun], differs: dict[Path, dict[str, Any]]) -> list[str]:
    known = [asdict(run) | {"path": str(run.path), "differs": differs[run.path]} for run in runs]
    plain = json.loads(json.dumps(known), parse_constant=lambda _: None)  # JSON has neither NaN nor infinite numbers
    return [json.dumps(plain, indent=2)]


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


if __name__ == "__main__":
    main()
