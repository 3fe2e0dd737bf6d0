"""What studies share: jobs that are run once, two at a time, a table over seeds, and what is done to images."""

from __future__ import annotations

import io
import json
import logging
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from graincode.distributed.signals import CHILD
from graincode.evaluation.record import read_record
from graincode.files import replacing, write_json

Metrics = dict[str, Any]


def start() -> None:
    """One thread, and no remarks of the library on what is only counted."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)


def numbers(values: Sequence[float]) -> str:
    """A list as an override."""
    return "[" + ",".join(f"{value:.6g}" for value in values) + "]"


def job(runs: Path, name: str, run: str, *overrides: str) -> None:
    """Run a job to its end, on one thread, unless it has finished with these settings; with others it is refused."""
    settings, kept = [f"runs_dir={runs}", f"run_name={run}", "hardware.threads=1", *overrides], runs / name / run
    asked = kept / "asked.json"
    if (kept / "result.json").is_file():
        if asked.is_file() and (before := json.loads(asked.read_bytes())) != settings:
            raise SystemExit(f"{kept} was run with {before}, not with {settings}: move it away to have it anew")
        return
    command = [sys.executable, "-P", "-m", f"graincode.jobs.{name}", *settings]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, **CHILD)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    write_json(asked, settings)


def metrics_of(runs: Path, run: str) -> Metrics:
    """What an evaluation found."""
    return read_record(runs / "evaluate" / run)["metrics"]


def run_all(
    todo: Sequence[tuple[str, int]],
    run: Callable[[str, int], list[Metrics]],
    is_new: Callable[[str, int], bool],
    write: Callable[[list[Metrics]], None],
    jobs: int,
) -> None:
    """Run rows of a table, some at a time, and write what is known after each.

    Args:
        todo: names and seeds.
        run: gives the metrics of one.
        is_new: whether one has not been run before; the time of those that have says nothing.
        write: takes the metrics of all that have finished, in the order of `todo`.
        jobs: at a time.
    """
    done: dict[tuple[str, int], list[Metrics]] = {}
    began, lock = time.monotonic(), threading.Lock()

    def one(name: str, seed: int) -> None:
        fresh, start = is_new(name, seed), time.monotonic()
        found = run(name, seed)
        with lock:
            done[name, seed] = found
            spent = time.monotonic() - start
            if fresh:
                left = (len(todo) - len(done)) * spent / jobs
                print(f"{name} seed {seed}: {spent / 60:.1f} min; about {left / 60:.0f} min to go", flush=True)
            write([metrics for key in todo for metrics in done.get(key, [])])

    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(one, *key) for key in todo]:
            future.result()
    print(f"{(time.monotonic() - began) / 60:.0f} minutes")


def seconds_in_turn(calls: Mapping[str, Callable[[int], object]], repeats: int = 3) -> dict[str, float]:
    """Median seconds of calls that are made in turn, so that what else the machine does slows all of them alike.

    Args:
        calls: by name; each takes the number of the repeat.
        repeats: after a first one that is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call(repeat)
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def table(groups: Mapping[str, Sequence[Mapping[str, Any]]], columns: Mapping[str, str], first: str) -> list[str]:
    """Means over each group of rows, with their standard deviation where there are several.

    Args:
        groups: rows by name.
        columns: titles by key; those that no row has are left out.
        first: title of the names.
    """
    columns = {k: title for k, title in columns.items() if any(k in row for rows in groups.values() for row in rows)}
    lines = [f"| {first} | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, rows in groups.items():
        cells = []
        for key in columns:
            values = [row[key] for row in rows if key in row]
            spread = f" ± {statistics.stdev(values):.1g}" if len(values) > 1 and statistics.stdev(values) > 0 else ""
            cells.append(f"{statistics.mean(values):.4g}{spread}" if values else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def write_table(
    path: Path,
    rows: Sequence[Metrics],
    name_of: Callable[[Metrics], str],
    columns: Mapping[str, str],
    first: str,
    about: str,
) -> dict[str, list[Metrics]]:
    """Write rows to PATH.json, and to PATH.md a table of them and what is said of it; gives the rows by name.

    Args:
        path: without an ending.
        rows: of all names and seeds.
        name_of: tells which of them make one row of the table.
        columns, first: as `table` has them.
        about: below the table.
    """
    write_json(path.with_suffix(".json"), rows)
    groups: dict[str, list[Metrics]] = {}
    for row in rows:
        groups.setdefault(name_of(row), []).append(row)
    with replacing(path.with_suffix(".md")) as partial:
        partial.write_text("\n".join([*table(groups, columns, first), "", about]) + "\n", encoding="utf-8")
    return groups


def noisy(images: Tensor, std: float) -> Tensor:
    """(N, 3, H, W) uint8 images with white noise of a standard deviation in grey values, the same for all."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + std * noise).round().clamp(0, 255).to(torch.uint8)


def compressed(images: Tensor, quality: int) -> Tensor:
    """(N, 3, H, W) uint8 images through JPEG."""
    made = []
    for image in images.permute(0, 2, 3, 1).numpy():
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "jpeg", quality=quality)
        made.append(np.asarray(Image.open(buffer)))
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2)
