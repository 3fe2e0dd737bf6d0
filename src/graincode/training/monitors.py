"""What is watched while a model trains: finite numbers, speed, equal weights."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from graincode.core.errors import GraincodeError
from graincode.data.loader import Schedule
from graincode.distributed import collectives
from graincode.distributed.hardware import Machine
from graincode.files import write_json
from graincode.runs.checkpoint import Checkpoints
from graincode.runs.run import Run

if TYPE_CHECKING:
    from graincode.training.loop import _Seat


class _Vote:
    """A number that the device knows early in a step and the host reads at its end, without waiting for the rest."""

    def __init__(self, number: Tensor) -> None:
        self._number, self._event = number, None
        if number.is_cuda:
            self._number = torch.empty(number.shape, dtype=number.dtype, pin_memory=True)
            self._number.copy_(number, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def result(self) -> bool:
        """Whether it is above 0."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._number > 0)


class _Health:
    """Watches every step's terms and gradient norms, and looks at them once per logging interval."""

    def __init__(self) -> None:
        self._seen: list[tuple[int, list[str], Tensor]] = []

    def add(self, step: int, values: Mapping[str, Tensor]) -> None:
        self._seen.append((step, list(values), torch.stack([value.reshape(()) for value in values.values()])))

    def check(self, run: Run, seats: list[_Seat], schedule: Schedule, checkpoints: Checkpoints) -> None:
        """Stop the run if something was not finite since the last check, on any process.

        Raises:
            GraincodeError: on all processes; `nonfinite.json` of the run then says what is known.
        """
        if not self._seen:
            return
        seen, self._seen = self._seen, []
        values = torch.cat([found for _, _, found in seen]).cpu()
        labels = [(step, name) for step, names, _ in seen for name in names]
        wrong = (~values.isfinite()).nonzero().flatten()
        first = int(wrong[0]) if len(wrong) else len(labels)
        first = int(collectives.gather_rows(torch.tensor([first]), equal=True).min())
        if first == len(labels):
            return
        step, name = labels[first]
        weights = [
            key
            for seat in seats
            for key, tensor in seat.wrapped.named_parameters()
            if not bool(torch.isfinite(getattr(tensor, "_local_tensor", tensor)).all())
        ]
        places = range((step - 1) * schedule.batch_size, step * schedule.batch_size)
        good = next(iter(checkpoints.steps()), 0)
        dump = {
            "step": step,
            "term": name,
            "values": [[s, n, repr(v)] for (s, n), v in zip(labels, values.tolist(), strict=True)],
            "images": schedule.indices(places),
            "weights_not_finite": weights,
            "last_good_step": good,
        }
        collectives.on_main(lambda: write_json(run.path / "nonfinite.json", dump))
        raise GraincodeError(
            f"{name} is not finite at step {step}: the last good state is of step {good}, and "
            f"{run.path / 'nonfinite.json'} has the images of the step and the values before it; "
            "type a lower optimizer.lr"
        )


class _Speed:
    """How fast training is, of all processes together.

    Args:
        machine: that it runs on.
        items: in each step.
        flops: of one item, forward and backward.
    """

    def __init__(self, machine: Machine, items: int, flops: float) -> None:
        self._machine, self._items, self._flops = machine, items, flops
        self.restart()

    def restart(self) -> None:
        """Begin a new interval, as after an evaluation."""
        self._began, self._waited, self._steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def step(self) -> None:
        """A step is done."""
        self._steps += 1

    def figures(self, tokens: float | None = None) -> dict[str, float]:
        """Figures of the interval, which ends; the device has just been waited for.

        Args:
            tokens: of the mean item, without padding; None where items are no sequences.
        """
        seconds, steps = time.perf_counter() - self._began, max(self._steps, 1)
        rate = self._items * self._steps / seconds
        if self._machine.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated() / 2**30
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
        figures = {
            "speed/images_per_second": rate,
            "speed/step_seconds": seconds / steps,
            "speed/data_wait_share": self._waited / seconds,
            "speed/peak_memory_gib": memory,
            "speed/model_tflops": rate * self._flops / 1e12,
        }
        if tokens is not None:
            figures["speed/tokens_per_second"] = rate * tokens
        if (peak := self._machine.hardware.peak_tflops) is not None:
            figures["speed/model_flops_utilization"] = figures["speed/model_tflops"] / (peak * collectives.count())
        self.restart()
        return figures


def check_equal_weights(modules: Mapping[str, nn.Module]) -> None:
    """Refuse to go on when processes that should hold the same weights do not, to the last bit.

    Raises:
        GraincodeError: naming the first tensor that differs.
    """
    named = [
        (f"{name}.{key}", tensor)
        for name, module in modules.items()
        for key, tensor in module.state_dict().items()
        if not isinstance(tensor, DTensor)
    ]
    if collectives.count() == 1 or not named:
        return
    prints = torch.stack([_fingerprint(tensor) for _, tensor in named])
    every = collectives.gather_rows(prints[None], equal=True)
    differing = (every != every[:1]).any(dim=0).nonzero().flatten()
    if len(differing):
        raise GraincodeError(
            f"{named[int(differing[0])][0]} differs between processes: this is a bug or a broken machine; "
            "the states that were saved before are good"
        )


def _fingerprint(tensor: Tensor) -> Tensor:
    """An int64 number that depends on every bit of a tensor and its place."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().flatten().view(whole).long()
    return (bits * (2 * torch.arange(len(bits), device=bits.device) + 1)).sum()
