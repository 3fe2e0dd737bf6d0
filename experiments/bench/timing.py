"""What a benchmark finds, and how two ways are timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """What a benchmark finds.

    Attributes:
        name: of the benchmark.
        value: of what is measured, in `unit`.
        unit: of the value.
        reference: what it is compared with, timed in the same run.
        ratio: how many times faster than the reference.
        goal: for the ratio, such as ">= 60"; with a unit, for the value.
    """

    name: str
    value: float
    unit: str
    reference: str
    ratio: float
    goal: str


def paired(
    ours: Callable[[], object],
    reference: Callable[[], object],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Median seconds of `ours`, and the median ratio reference / ours, from runs in turn after one warm-up each;
    `time.process_time` counts this process alone."""
    ours()
    reference()
    seconds, ratios = [], []
    for _ in range(repeats):
        times = []
        for call in (ours, reference):
            began = clock()
            call()
            times.append(clock() - began)
        seconds.append(times[0])
        ratios.append(times[1] / times[0])
    return statistics.median(seconds), statistics.median(ratios)
