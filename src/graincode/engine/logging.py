"""Where a run's figures and pictures go: a JSON-lines file always, TensorBoard if it is configured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from graincode.core.losses import Term


@dataclass(frozen=True)
class LogSettings:
    """What `conf/logging` gives.

    Attributes:
        tensorboard: whether to write TensorBoard events beside log.jsonl.
    """

    tensorboard: bool = True


class RunLog:
    """Scalars and images of one run.

    Args:
        folder: of the run.
        step: steps done before; lines of later ones, left by an interrupted run, are dropped.
        tensorboard: whether to write TensorBoard events too.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        self._file = folder / "log.jsonl"
        kept = [line for line in read_log(folder) if line["step"] <= step]
        self._file.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers by name; a name's part before "/" groups it in TensorBoard."""
        with self._file.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: Tensor) -> None:
        """Log a (3, H, W) uint8 image, in TensorBoard alone."""
        if self._writer is not None:
            self._writer.add_image(name, image, step)

    def close(self) -> None:
        """Flush what is buffered."""
        if self._writer is not None:
            self._writer.close()


def read_log(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's log, in order; a last line that was cut off is left out."""
    file, lines = folder / "log.jsonl", []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


class Meter:
    """Means of terms over a logging interval, kept on the device: one synchronisation per `flush`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, terms: Mapping[str, Term]) -> None:
        """Take in one step's terms."""
        for name, term in terms.items():
            total = term.total.detach().double()
            pair = torch.stack([total, torch.as_tensor(term.count, dtype=torch.float64, device=total.device)])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def flush(self) -> dict[str, float]:
        """The means since the last flush, by name."""
        if not self._sums:
            return {}
        names, values = list(self._sums), torch.stack(list(self._sums.values())).cpu()
        self._sums = {}
        return {name: float(total / max(count, 1)) for name, (total, count) in zip(names, values, strict=True)}
