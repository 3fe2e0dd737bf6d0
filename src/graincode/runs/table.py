"""Tables of finished runs: one for all evaluations, which grows, and one with a plot for each sweep."""

from __future__ import annotations

import csv
import fcntl
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graincode.files import replacing, write_json

log = logging.getLogger(__name__)

MEMBER = "GRAINCODE_SWEEP_MEMBER"
"""Environment variable: the file in which a member of a sweep notes which run it was."""

_LENGTH, _RATES = "codes_per_image", ("images.ratios", "images.psnr")
_FIRST = ("run", "mode", "images", "count", "reference")
_YARDSTICKS = ("_floor", "_of_real_images")
_COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#b07d12", "#6f4a8e", "#5b6770", "#00a6a6", "#8c510a")


def update_table(folder: Path) -> Path:
    """Write `table.csv`, with a line for every evaluation in a folder of runs.

    Args:
        folder: with a directory for each run; those with a metrics.json count.
    Returns:
        the table.
    """
    path = folder / "table.csv"
    with (folder / ".table.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = []
        for file in sorted(folder.glob("*/metrics.json")):
            if file.parent.is_symlink():  # latest
                continue
            try:
                record = json.loads(file.read_text())
                spreads = {f"{name}_std": spread["std"] for name, spread in record.pop("uncertainty").items()}
                figures = record.pop("metrics")
                rows.append({"run": file.parent.name, **_flat(record), **figures, **spreads})
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                log.warning("%s is left out of the table (%s: %s)", file, type(error).__name__, error)
        rows.sort(key=lambda row: str(row.get("finished")))
        _write_csv(path, rows, _FIRST)
    return path


def note_member(run: Path) -> None:
    """Note which run a member of a sweep is; nothing outside of sweeps."""
    if file := os.environ.get(MEMBER):
        write_json(Path(file), {"run": str(run.absolute())})


def write_sweep(folder: Path, members: Sequence[Mapping[str, Any]]) -> Path:
    """Write the table of a sweep, and a plot of its figures over the settings that vary.

    Args:
        folder: of the sweep.
        members: each with its `run` directory and its `overrides`.
    Returns:
        the table.
    """
    settings = [dict(override.lstrip("+").split("=", 1) for override in member["overrides"]) for member in members]
    names = list(dict.fromkeys(name for setting in settings for name in setting))
    varying = [name for name in names if len({setting.get(name) for setting in settings}) > 1]
    rows, figures, spreads = [], [], []
    for member, setting in zip(members, settings, strict=True):
        run = Path(member["run"])
        result = json.loads((run / "result.json").read_text())
        found = {name: value for name, value in _flat(result.get("metrics") or result).items() if _is_number(value)}
        metrics = run / "metrics.json"
        known = json.loads(metrics.read_text())["uncertainty"] if metrics.is_file() else {}
        figures.append(found)
        spreads.append({name: spread["std"] for name, spread in known.items()})
        chosen = {name: setting.get(name) for name in varying}
        rows.append(chosen | found | {f"{name}_std": std for name, std in spreads[-1].items()} | {"run": run.name})
    _write_csv(folder / "table.csv", rows, varying)
    if varying and len(rows) > 1:
        _plot(folder / "plot.png", [[setting.get(name) for name in varying] for setting in settings], varying, figures,
              spreads)  # fmt: skip
        if len({found[_LENGTH] for found in figures if _LENGTH in found and "mse" in found}) > 1:
            _rate_distortion(folder / "rate_distortion.png", settings, varying, figures)
    return folder / "table.csv"


def _collect(folder: Path) -> None:
    """Write what the members of a sweep that have finished amount to."""
    files = sorted(folder.glob("members/*.json"), key=lambda file: int(file.stem))
    members = [json.loads(file.read_text()) for file in files]
    members = [member for member in members if "overrides" in member]
    if members:
        print(f"sweep: {write_sweep(folder, members)}")


def _plot(
    path: Path,
    settings: Sequence[Sequence[str | None]],
    names: Sequence[str],
    figures: Sequence[Mapping[str, float]],
    spreads: Sequence[Mapping[str, float]],
) -> None:
    """A panel for each figure, over the setting that takes most numbers; a line for each choice of the others."""
    from matplotlib.figure import Figure as Canvas  # every process of every job imports this module

    columns = list(zip(*settings, strict=True))
    numeric = [all(_is_number(_parsed(value)) for value in column) for column in columns]
    across = max(range(len(names)), key=lambda i: (numeric[i], len(set(columns[i]))))
    if numeric[across]:
        places = [float(value) for value in columns[across]]
    else:
        ticks = list(dict.fromkeys(columns[across]))
        places = [float(ticks.index(value)) for value in columns[across]]
    lines: dict[str, list[int]] = {}
    for index, setting in enumerate(settings):
        others = [
            f"{_short(name)}={value}" for i, (name, value) in enumerate(zip(names, setting, strict=True)) if i != across
        ]
        lines.setdefault(", ".join(others), []).append(index)
    every = list(dict.fromkeys(name for found in figures for name in found))
    panels = [name for name in every if not any(part in name for part in _YARDSTICKS)]
    wide = min(3, len(panels))
    high = -(-len(panels) // wide)
    canvas = Canvas(figsize=(4.2 * wide, 2.9 * high), layout="constrained")
    axes = canvas.subplots(high, wide, squeeze=False).flatten()
    for panel, name in zip(axes, panels, strict=False):
        for colour, (label, members) in zip(_COLOURS * len(lines), lines.items(), strict=False):
            known = sorted((i for i in members if name in figures[i]), key=lambda i: places[i])
            panel.errorbar(
                [places[i] for i in known], [figures[i][name] for i in known],
                [spreads[i].get(name) or 0 for i in known], label=label, color=colour, marker="o", markersize=4,
                linewidth=1.5, elinewidth=1, capsize=2,
            )  # fmt: skip
        for part in _YARDSTICKS:
            yardstick = next((f for f in every if part in f and f.replace(part, "") == name), None)
            if yardstick is not None:
                known = sorted({(places[i], found[yardstick]) for i, found in enumerate(figures) if yardstick in found})
                panel.plot(*zip(*known, strict=True), color="#777777", linestyle="--", linewidth=1, label="real images")
        panel.set_title(name, fontsize=10)
        if not numeric[across]:
            panel.set_xticks(range(len(ticks)), ticks, fontsize=8)
        panel.grid(color="#e4e4e4", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    canvas.supxlabel(names[across], fontsize=10)
    shown = {}
    for panel in axes:
        shown |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    if any(shown):
        canvas.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=4, fontsize=9, frameon=False)
    with replacing(path) as partial:
        canvas.savefig(partial, dpi=150)


def _rate_distortion(
    path: Path, settings: Sequence[Mapping[str, str]], names: Sequence[str], figures: Sequence[Mapping[str, float]]
) -> None:
    """Error of reconstructions over codes and over bits; a line for each choice of all but the length asked for."""
    from matplotlib.figure import Figure as Canvas

    lines: dict[str, list[Mapping[str, float]]] = {}
    for setting, found in zip(settings, figures, strict=True):
        if _LENGTH in found and "mse" in found:
            others = [f"{_short(name)}={setting.get(name)}" for name in names if name not in _RATES]
            lines.setdefault(", ".join(others), []).append(found)
    canvas = Canvas(figsize=(9, 3.8), layout="constrained")
    axes = canvas.subplots(1, 2, sharey=True)
    titles = {_LENGTH: "codes per image", "bits_per_image": "bits per image, grain map included"}
    for panel, (name, title) in zip(axes, titles.items(), strict=True):
        for colour, (label, found) in zip(_COLOURS * len(lines), lines.items(), strict=False):
            points = sorted((one[name], one["mse"]) for one in found if name in one)
            panel.plot(*zip(*points, strict=True), label=label, color=colour, marker="o", markersize=4, linewidth=1.5)
        panel.set(xscale="log", yscale="log", xlabel=title)
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.xaxis.set_minor_formatter("{x:.0f}")
        panel.grid(color="#e4e4e4", linewidth=0.6, which="both")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("mean squared error")
    if any(lines):
        handles, labels = axes[0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    with replacing(path) as partial:
        canvas.savefig(partial, dpi=150)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one line of a table."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            flat[f"{prefix}{key}"] = " ".join(map(str, value))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]], first: Sequence[str]) -> None:
    names = list(dict.fromkeys([*first, *(name for row in rows for name in row)]))
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _parsed(value: str | None) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(name: str) -> str:
    return name.rpartition(".")[2]
