"""What the checks of a device find: a line for each as it comes, and all of them as JSON and as a table."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from graincode.files import replacing, write_json


@dataclass(frozen=True)
class Line:
    """A check's name; whether it holds, None if it only measures; what was found, in words and by name."""

    name: str
    holds: bool | None
    text: str
    values: dict[str, Any] = field(default_factory=dict)


class Report:
    """The lines of all checks on a device.

    Args:
        device: "cuda" or "cpu".
        quick: whether sizes are toys, as for a rehearsal.
        limit: seconds, after which no check begins.
    """

    def __init__(self, device: str, quick: bool, limit: float = 390.0) -> None:
        self.device, self.quick, self.lines = torch.device(device), quick, list[Line]()
        self._began, self._limit = time.perf_counter(), limit
        self.bandwidth = self.products = float("nan")  # bytes and bf16 FLOPs a second, measured first

    @property
    def is_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def failed(self) -> list[str]:
        """Names of the checks that do not hold."""
        return [line.name for line in self.lines if line.holds is False]

    def say(self, name: str, text: str, holds: bool | None = None, **values: Any) -> None:
        """Add a line."""
        self.lines.append(Line(name, holds, text, values))
        word = {True: "ok", False: "FAIL", None: ""}[holds]
        print(f"{time.perf_counter() - self._began:5.0f} s {word:4} {name}: {text}", flush=True)

    def run(self, name: str, check: Callable[[Report], None]) -> None:
        """Carry out a check; what it raises is a failure of its own, and the next one is tried."""
        if time.perf_counter() - self._began > self._limit:
            return self.say(name, "left out: no time")
        try:
            check(self)
        except Exception as error:  # whatever it is, the other checks are wanted
            traceback.print_exc()
            self.say(name, f"{type(error).__name__}: {error}"[:200], holds=False)
        if self.is_gpu:
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Wait for the device."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object], repeats: int = 6, warm: int = 2) -> float:
        """Median seconds of a call, after some that do not count."""
        times = []
        for index in range((repeats + warm) if not self.quick else 2):
            began = time.perf_counter()
            call()
            self.wait()
            if index >= warm or self.quick:
                times.append(time.perf_counter() - began)
        return statistics.median(times)

    def peak(self) -> float:
        """GiB that were in use at most since the last call; 0 without a GPU."""
        if not self.is_gpu:
            return 0.0
        found = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return found

    def write(self, folder: Path, about: dict[str, Any]) -> None:
        """Write `check.json` and `check.md`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "check.json", about | {"lines": [asdict(line) for line in self.lines]})
        title = ", ".join(f"{name} {value}" for name, value in about.items())
        rows = [
            f"| {x.name} | {'' if x.holds is None else 'yes' if x.holds else '**no**'} | {x.text} |" for x in self.lines
        ]
        head = [f"On {title}.", "", "| check | holds | found |", "|---|---|---|"]
        with replacing(folder / "check.md") as partial:
            partial.write_text("\n".join([*head, *rows]) + "\n", encoding="utf-8")
