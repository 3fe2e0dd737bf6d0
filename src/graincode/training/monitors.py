"""What is watched while a model trains: means of terms, finite numbers, speed, equal weights, requests to stop."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from graincode.core.errors import GraincodeError
from graincode.core.losses import Term, as_count
from graincode.core.precision import not_finite
from graincode.data.loader import Schedule
from graincode.distributed import collectives
from graincode.distributed.hardware import Machine
from graincode.files import write_json
from graincode.runs.checkpoint import Checkpoints

try:
    import resource
except ImportError:  # Windows
    resource = None


class Meter:
    """Means of terms and frequencies over an interval, on the device; `flush` and `state` wait and add processes up."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Tensor]] = {"terms": {}, "histograms": {}}

    def add(self, terms: Mapping[str, Term], weight: float = 1.0) -> None:
        """Take in one batch's terms; with a weight of 0, their names alone."""
        for name, term in terms.items():
            total = term.total.detach().double()
            self._add("terms", name, torch.stack([total, as_count(term.count, total)]) * weight)

    def add_histograms(self, histograms: Mapping[str, Tensor]) -> None:
        """Take in (V,) counts of what one batch chose among V things."""
        for name, counts in histograms.items():
            self._add("histograms", name, counts.double())

    def _add(self, kind: str, name: str, values: Tensor) -> None:
        self._sums[kind][name] = self._sums[kind].get(name, 0) + values

    def flush(self) -> dict[str, float]:
        """The means since the last flush, and of each histogram the share of things chosen and the perplexity."""
        state = self.state()
        self._sums = {kind: {} for kind in self._sums}
        means = {name: float(total / max(count, 1)) for name, (total, count) in state["terms"].items()}
        for name, counts in state["histograms"].items():
            frequencies = counts / counts.sum().clamp(min=1)
            means[f"{name}_usage"] = float((counts > 0).double().mean())
            means[f"{name}_perplexity"] = math.exp(float(torch.special.entr(frequencies).sum()))
        return means

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What was taken in since the last flush, on all processes together, on the CPU."""
        tensors = [tensor for kept in self._sums.values() for tensor in kept.values()]
        joined = collectives.sum_(torch.cat(tensors)).cpu() if tensors else torch.zeros(0)
        pieces = iter(joined.split([len(tensor) for tensor in tensors]))
        return {kind: {name: next(pieces) for name in kept} for kind, kept in self._sums.items()}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]], device: torch.device) -> None:
        """The inverse of `state`: what all processes had taken in counts once, on process 0."""
        once = float(collectives.is_main())
        self._sums = {kind: {name: t.to(device) * once for name, t in kept.items()} for kind, kept in state.items()}


def early_read(number: Tensor) -> Callable[[], float]:
    """Copies a number that is known early in a step; the result reads it later, without waiting for the rest."""
    if not number.is_cuda:
        return number.item
    copy, event = torch.empty_like(number, device="cpu", pin_memory=True), torch.cuda.Event()
    copy.copy_(number, non_blocking=True)
    event.record()

    def read() -> float:
        event.synchronize()
        return copy.item()

    return read


class FiniteNumbers:
    """Keeps every step's terms and gradient norms, and checks once per logging interval that all are finite; where
    they are not, what is known is written to `file`."""

    def __init__(
        self, file: Path, modules: Mapping[str, nn.Module], schedule: Schedule, checkpoints: Checkpoints
    ) -> None:
        self._file, self._modules, self._schedule, self._checkpoints = file, modules, schedule, checkpoints
        self._kept: list[tuple[int, str, Tensor]] = []

    def add(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Keep a step's () values by name."""
        self._kept += [(step, name, value.reshape(())) for name, value in values.items()]

    def check(self) -> None:
        """Raise on all processes if a value since the last check was not finite on any of them."""
        if not self._kept:
            return
        kept, self._kept = self._kept, []
        values = torch.stack([value for *_, value in kept]).cpu()
        wrong = (~values.isfinite()).nonzero().flatten().tolist()
        first = int(collectives.gather_rows(torch.tensor([*wrong, len(kept)][:1]), equal=True).min())
        if first == len(kept):
            return
        (step, name, _), size, good = kept[first], self._schedule.batch_size, next(iter(self._checkpoints.steps()), 0)
        weights = [pair for module in self._modules.values() for pair in module.named_parameters()]
        record = {
            "step": step,
            "term": name,
            "values": [[*label, repr(value)] for (*label, _), value in zip(kept, values.tolist(), strict=True)],
            "images": self._schedule.indices(range((step - 1) * size, step * size)),
            "weights_not_finite": [key for key, t in weights if not getattr(t, "_local_tensor", t).isfinite().all()],
            "last_good_step": good,
        }
        collectives.on_main(lambda: write_json(self._file, record))
        line = f"{name} is not finite at step {step}: the last good state is of step {good}, and {self._file} has the"
        raise GraincodeError(f"{line} images of the step and the values before it; lower the learning rate")

    def check_state(self, step: int, state: Mapping[str, Any]) -> None:
        """Raise if the state of a step has weights that are not finite: training would not go on from it."""
        try:
            check_weights(state)
        except ValueError as error:
            good = next(iter(self._checkpoints.steps()), 0)
            line = f"{error} after step {step}, which is not saved: the last good state is of step {good}"
            raise GraincodeError(f"{line}; lower the learning rate") from None


def check_weights(state: Mapping[str, Any]) -> None:
    """Raise ValueError if a resume state, on this process, holds weights that are not finite."""
    modules = {name: one["module"] for name, one in state["trainables"].items()} | {"average": state["average"] or {}}
    for module, weights in modules.items():
        if name := not_finite(weights):
            raise ValueError(f"{module}.{name} has NaN or infinite values")


class Speed:
    """Speed of all processes, with `items` a step, `flops` an item; the loop counts `steps`, and seconds `waited`."""

    def __init__(self, machine: Machine, items: int, flops: float) -> None:
        self._machine, self._items, self._flops = machine, items, flops
        if machine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # counting FLOPs takes more than a step
        self.restart()

    def restart(self) -> None:
        """Begin a new interval, as after an evaluation."""
        self._began, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def metrics(self, tokens: float | None) -> dict[str, float]:
        """Metrics of the interval, which ends; the device was just waited for. `tokens`: of the mean item, if any."""
        seconds = time.perf_counter() - self._began
        rate = self._items * self.steps / seconds
        found = {
            "images_per_second": rate,
            "step_seconds": seconds / max(self.steps, 1),
            "data_wait_share": self.waited / seconds,
            "model_tflops": rate * self._flops / 1e12,
        }
        if self._machine.device.type == "cuda":
            found["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        elif resource is not None:
            unit = 2**30 if sys.platform == "darwin" else 2**20
            found["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        if tokens is not None:
            found["tokens_per_second"] = rate * tokens
        if (peak := self._machine.hardware.peak_tflops) is not None:
            found["model_flops_utilization"] = found["model_tflops"] / (peak * collectives.count())
        self.restart()
        return {f"speed/{name}": value for name, value in found.items()}


def check_equal_weights(modules: Mapping[str, nn.Module]) -> None:
    """Raise if processes that should hold the same weights do not, to the last bit."""
    every = [(f"{name}.{key}", t) for name, module in modules.items() for key, t in module.state_dict().items()]
    whole = {name: tensor for name, tensor in every if not isinstance(tensor, DTensor)}
    if collectives.count() == 1 or not whole:
        return
    prints = torch.stack([_fingerprint(tensor) for tensor in whole.values()])
    found = collectives.gather_rows(prints[None], equal=True)
    differing = (found != found[:1]).any(dim=0).nonzero().flatten().tolist()
    if differing:
        name = list(whole)[differing[0]]
        raise GraincodeError(f"{name} differs between processes, by a bug or a broken machine: earlier states are good")


def _fingerprint(tensor: Tensor) -> Tensor:
    """An int64 number that depends on every bit of a tensor and its position."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().flatten().view(whole).long()
    return (bits * (2 * torch.arange(len(bits), device=bits.device) + 1)).sum()
