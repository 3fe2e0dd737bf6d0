"""Tables of finished runs: one of all evaluations, and one with plots for each sweep."""

from __future__ import annotations

import csv
import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

from graincode.core.errors import Damaged, GraincodeError, one_line
from graincode.files import read_json, replacing, write_json
from graincode.locks import locked
from graincode.runs.identity import flatten

log = logging.getLogger(__name__)

MEMBER = "GRAINCODE_SWEEP_MEMBER"
"""Environment variable: the file in which a member of a sweep notes which run it was."""

STUDY = "study-"
"""How the names of those directories begin in which a study's members are noted, which all make one table."""

_RATES = {"codes_per_image": "codes per image", "bits_per_image": "bits per image, grain map included"}
_OURS = ("run", "status", "error")  # columns of a sweep's table beside settings and metrics
_LENGTHS = ("images.ratios", "images.psnr")  # settings that ask for lengths
_OF_REAL_IMAGES = re.compile("_floor|_of_real_images")
COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#b07d12", "#6f4a8e", "#5b6770", "#00a6a6", "#8c510a")

Lines = dict[str, list[tuple[float, float, float]]]  # points (x, y, spread of y) by the label of their line


def update_table(folder: Path) -> None:
    """Write `table.csv` in a folder of runs, with a line for every metrics.json; warns where it cannot."""
    try:
        with locked(folder / ".table.lock"):
            rows = []
            found = sorted(file for file in folder.glob("*/metrics.json") if not file.parent.is_symlink())  # latest
            for file in found:
                try:
                    record = read_json(file, {"metrics": dict, "uncertainty": dict}, "evaluate anew")
                    metrics, spreads = record.pop("metrics"), _spreads(record.pop("uncertainty"))
                    rows.append({"run": file.parent.name, **_row(record), **metrics, **spreads})
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    log.warning("%s is left out of the table (%s: %s)", file, type(error).__name__, error)
            rows.sort(key=lambda row: str(row.get("finished")))
            _write_csv(folder / "table.csv", rows, ("run", "mode", "images", "count", "reference"))
    except OSError as error:
        log.warning("%s cannot be written (%s): the next evaluation does it", folder / "table.csv", error.strerror)


def note_member(run: Path) -> None:
    """Note which run a member of a sweep is; nothing outside of sweeps."""
    if file := os.environ.get(MEMBER):
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
        write_json(Path(file), {"run": str(run.absolute())} | ({"gpus": gpus} if gpus else {}))


def read_member(file: Path) -> dict[str, Any]:
    """What is noted of a member of a sweep; nothing if that is damaged, which a warning says."""
    try:
        return read_json(file, {}, "this member is left out of the table") if file.exists() else {}
    except Damaged as error:
        log.warning("%s", error)
        return {}


def collect_sweep(members: Path) -> list[int]:
    """Write and print the table of the members that are noted in SWEEP/members/ID, and of a study those
    before them; returns their exit statuses."""
    noted, is_study = _noted(members), members.name.startswith(STUDY)
    all_of_it = noted
    if is_study:  # one that was stopped is noted again where it goes on
        before = [member for folder in sorted(members.parent.glob(f"{STUDY}*")) for member in _noted(folder)]
        all_of_it = [*{tuple(member["overrides"]): member for member in before}.values()]
    if shown := [member for member in all_of_it if "run" in member or member["status"]]:  # all but dry runs
        print(f"sweep: {write_sweep(members.parents[1], shown, is_study)}")
    if failed := [member for member in noted if member["status"] in (1, 2)]:  # and not stopped by a signal
        same = set.intersection(*(set(member["overrides"]) for member in noted))
        named = "; ".join(" ".join(typed for typed in member["overrides"] if typed not in same) for member in failed)
        print(f"{len(failed)} of {len(noted)} failed: {one_line(named)}", file=sys.stderr)
    return [member["status"] for member in noted]


def _noted(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("*.json"), key=lambda file: int(file.stem))
    return [member for file in files if "overrides" in (member := read_member(file))]


def write_sweep(folder: Path, members: Sequence[Mapping[str, Any]], is_study: bool = False) -> Path:
    """Write the table of a sweep into its folder, with plots of the metrics over the settings that vary.

    Args:
        folder: of the sweep.
        members: of each, `overrides`, exit `status`, the line of its `error`, and its `run` directory, if it had one.
        is_study: they tried one setting after the other: the plot shows the objective alone.
    Returns:
        the path of the table, in which a member without a result has its error.
    """
    typed = [[override.lstrip("+").partition("=") for override in member["overrides"]] for member in members]
    settings = [{name: value.strip("\"'") for name, _, value in overrides} for overrides in typed]
    names = dict.fromkeys(name for setting in settings for name in setting)
    varying = [name for name in names if len({setting.get(name) for setting in settings}) > 1]
    rows, metrics = [], {}
    for member, setting in zip(members, settings, strict=True):
        row = {name: setting.get(name) for name in varying}
        end = {"run": Path(member.get("run", "")).name, "status": member["status"]}
        end |= {"gpus": member["gpus"]} if "gpus" in member else {}
        try:
            found = {} if member["status"] else _found(Path(member["run"]), is_study)
            found = {name: value for name, value in found.items() if name not in row}  # as that of `classes`
            metrics |= dict.fromkeys(found)
        except GraincodeError as error:
            found, member = {}, {"error": f"its result is gone: {error.line}"}
        rows.append(row | found | end | ({"error": member["error"]} if member.get("error") else {}))
    _write_csv(folder / "table.csv", rows, [*varying, *metrics])
    metrics = {name: None for name in metrics if not name.endswith("_std")}
    if is_study and varying and metrics:
        _plot_study(folder / "plot.png", [row for row in rows if "objective" in row], varying)
    elif varying and metrics and len(rows) > 1:
        _plot_metrics(folder / "plot.png", rows, varying, list(metrics))
        if len({row["codes_per_image"] for row in rows if "mse" in row and "codes_per_image" in row}) > 1:
            others = [name for name in varying if name not in _LENGTHS]
            panels = {title: _lines(rows, rate, "mse", others) for rate, title in _RATES.items()}
            _draw(folder / "rate_distortion.png", panels, log_of="mean squared error")
    return folder / "table.csv"


def _found(run: Path, with_objective: bool) -> dict[str, float]:
    """The metrics of a run that has finished, and their uncertainties as NAME_std."""
    result = read_json(run / "result.json", {"objective": float}, "run it again")
    file = run / "metrics.json"
    spreads = read_json(file, {"uncertainty": dict}, "run it again")["uncertainty"] if file.is_file() else {}
    metrics = result.get("metrics") or result
    if not isinstance(metrics, Mapping):
        raise Damaged.at(run / "result.json", "its metrics are no object", "run it again")
    found = {k: v for k, v in (_row(metrics) | _spreads(spreads)).items() if k not in _OURS and _is_shown(v)}
    return ({"objective": result["objective"]} if with_objective else {}) | found


def _is_shown(value: Any) -> bool:
    """Whether it is a number that fits a plot."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**1000)


def _plot_metrics(path: Path, rows: Sequence[dict[str, Any]], names: Sequence[str], metrics: Sequence[str]) -> None:
    """A panel for each metric, over the setting that takes most numbers; a line for each choice of the others."""
    values = {name: [_parsed(row[name]) for row in rows] for name in names}
    numeric = {name: all(isinstance(value, float) for value in values[name]) for name in names}
    across = max(names, key=lambda name: (numeric[name], len(set(values[name]))))
    ticks = [] if numeric[across] else list(dict.fromkeys(values[across]))
    rows = [row | {"": ticks.index(x) if ticks else x} for row, x in zip(rows, values[across], strict=True)]
    others = [name for name in names if name != across]
    panels = {name: _lines(rows, "", name, others) for name in metrics if not _OF_REAL_IMAGES.search(name)}
    for name in metrics:
        if (of := _OF_REAL_IMAGES.sub("", name)) != name and of in panels:
            panels[of]["real images"] = _lines(rows, "", name, [])[""]
    _draw(path, panels, across, ticks)


def _plot_study(path: Path, rows: Sequence[Mapping[str, Any]], searched: Sequence[str]) -> None:
    """The objective in the order of the members, with the best so far, and over each setting that was searched."""
    from matplotlib.figure import Figure

    found, columns = [row["objective"] for row in rows], min(3, len(searched) + 1)
    figure = Figure(figsize=(4.4 * columns, 3.1 * -(-(len(searched) + 1) // columns)), layout="constrained")
    axes = figure.subplots(-(-(len(searched) + 1) // columns), columns, squeeze=False, sharey=True).flatten()
    axes[0].step(range(1, len(found) + 1), list(accumulate(found, min)), where="post", color=COLOURS[1])
    for panel, name in zip(axes, ["", *searched], strict=False):
        values = [_parsed(row[name]) for row in rows] if name else list(range(1, len(found) + 1))
        if not all(isinstance(value, float | int) for value in values):
            ticks = sorted({*map(str, values)})
            values = [ticks.index(str(value)) for value in values]
            panel.set_xticks(range(len(ticks)), ticks, fontsize=8)
        elif min(values) > 0 and max(values) > 8 * min(values) and name:
            panel.set_xscale("log")
        panel.plot(values, found, "o", color=COLOURS[0], markersize=4)
        panel.set_xlabel(name or "member; line: the best so far", fontsize=9)
        panel.grid(color="#e4e4e4", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes[len(searched) + 1 :]:
        panel.set_axis_off()
    axes[0].set_ylabel("objective")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150)


def _lines(rows: Sequence[Mapping[str, Any]], x: str, y: str, others: Sequence[str]) -> Lines:
    """Points of rows that have both, by the values of the other settings."""
    lines: Lines = {}
    for row in rows:
        label = ", ".join(f"{name.rpartition('.')[2]}={row[name]}" for name in others)
        if x in row and y in row:
            lines.setdefault(label, []).append((row[x], row[y], row.get(f"{y}_std") or 0))
    return lines


def _draw(
    path: Path, panels: Mapping[str, Lines], across: str = "", ticks: Sequence[Any] = (), log_of: str = ""
) -> None:
    """Panels side by side with one legend; with `log_of`, a name of y, both axes are logarithmic and y is shared."""
    from matplotlib.figure import Figure  # every process of every job imports this module

    columns, colours, shown = min(3, len(panels)), {}, {}
    high = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.1 * high), layout="constrained")
    axes = figure.subplots(high, columns, squeeze=False, sharey=bool(log_of)).flatten()
    for panel, (title, lines) in zip(axes, panels.items(), strict=False):
        panel.set_title(title, fontsize=10)
        for label, points in lines.items():
            colour = colours.setdefault(label, COLOURS[len(colours) % len(COLOURS)])
            style = {"color": colour, "marker": "o", "markersize": 4, "capsize": 2}
            if label == "real images":
                style = {"color": "#777777", "linestyle": "--"}
            shown[label] = panel.errorbar(*zip(*sorted(points), strict=True), label=label, **style)
        if log_of:
            panel.set(xscale="log", yscale="log")
            panel.xaxis.set(major_formatter="{x:.0f}", minor_formatter="{x:.0f}")
        if ticks:
            panel.set_xticks(range(len(ticks)), ticks, fontsize=8)
        panel.grid(color="#e4e4e4", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    axes[0].set_ylabel(log_of)
    figure.supxlabel(across, fontsize=10)
    if any(shown):
        figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=4, fontsize=9, frameon=False)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150)


def _row(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as one line of a table; a list is one field."""
    return {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in flatten(values).items() if v != {}}


def _spreads(uncertainty: Mapping[str, Any]) -> dict[str, float]:
    found = {name: spread.get("std") for name, spread in uncertainty.items() if isinstance(spread, Mapping)}
    return {f"{name}_std": value for name, value in found.items() if _is_shown(value)}


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]], first: Iterable[str]) -> None:
    names = list(dict.fromkeys([*first, *(name for row in rows for name in row)]))
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _parsed(value: str | None) -> Any:
    with suppress(TypeError, ValueError):
        return float(value)
    return value
