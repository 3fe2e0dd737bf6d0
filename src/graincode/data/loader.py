"""Which images each training step sees: a function of (seed, step) alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from graincode.core.rng import permutation
from graincode.distributed import collectives
from graincode.distributed.signals import SIGNALS, blocked

_WINDOWS = 1 << 63  # the permutations below it are those of epochs


@dataclass(frozen=True, eq=False)
class Windows:
    """Batches by length: the items of every `steps` steps are sorted by their `lengths` (N,)."""

    lengths: np.ndarray
    steps: int


@dataclass(frozen=True, eq=False)
class Schedule:
    """How the items of each step are divided.

    Training is one endless stream of items, each epoch a permutation of the whole data set; step s takes the s-th
    `batch_size` of them. A step's batch is cut into contiguous parts: the first micro-batch of each process, then the
    second of each, and so on. With windows, the items of each `windows.steps` steps are sorted by length (equal ones
    stay in order) and cut into batches, which come in an order drawn for the window; every item still comes once per
    epoch, but for the window that holds an epoch's end.

    Attributes:
        size: items in the data set.
        batch_size: items in each step, of all processes and micro-batches together; divisible by their product.
        micro_batches: per step and process.
    """

    size: int
    batch_size: int
    seed: int
    rank: int = 0
    processes: int = 1
    micro_batches: int = 1
    windows: Windows | None = None

    def positions(self, step: int, micro_batch: int) -> range:
        """Positions in the stream of a micro-batch of a 1-based step."""
        each = self.batch_size // (self.processes * self.micro_batches)
        first = (step - 1) * self.batch_size + (micro_batch * self.processes + self.rank) * each
        return range(first, first + each)

    def indices(self, positions: range) -> list[int]:
        """Indices into the data set of what training sees at these positions."""
        if self.windows is None:
            return self.stream(positions)
        return _joined(positions, self.windows.steps * self.batch_size, lambda window: _by_length(self, window))

    def stream(self, positions: range) -> list[int]:
        """Indices into the data set of positions in the plain stream, as if there were no windows."""
        return _joined(positions, self.size, lambda epoch: _order(self.seed, epoch, self.size))

    def batches(self, start: int, stop: int) -> Iterator[list[int]]:
        """The index lists of this process's micro-batches of steps `start` + 1 to `stop`."""
        for step in range(start + 1, stop + 1):
            for micro_batch in range(self.micro_batches):
                yield self.indices(self.positions(step, micro_batch))


def load_batches(
    dataset: Dataset[Any], parts: Iterable[Sequence[int]], workers: int = 0, pin_memory: bool = False
) -> Generator[Any]:
    """The batches at index lists; its `workers` processes end with it, when it is closed, or at an error."""
    settings = {"prefetch_factor": 4, "worker_init_fn": _outlive_signals} if workers else {}
    loader = DataLoader(dataset, sampler=parts, batch_size=None, num_workers=workers, pin_memory=pin_memory, **settings)
    with blocked():  # until the workers handle signals themselves
        iterator = iter(loader)
    try:
        yield from iterator
    finally:
        if workers:
            iterator._shutdown_workers()


def in_order(
    dataset: Dataset[Any],
    batch_size: int,
    limit: int | None = None,
    workers: int = 0,
    shared: bool = False,
    order: Sequence[int] | None = None,
) -> Iterator[Any]:
    """Batches of the first `limit` items (all by default), in order, the same for any number of processes.

    Args:
        shared: give this process its contiguous share of the batches alone.
        order: of all items, by default their own.
    """
    count = len(dataset) if limit is None else min(limit, len(dataset))
    mine = collectives.items(count, batch_size) if shared else range(count)
    chosen = mine if order is None else order[mine.start : mine.stop]
    return load_batches(dataset, [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)], workers)


def _outlive_signals(_: int) -> None:
    """Let a worker live on when all processes of a run get a signal, so that the run can finish its step."""
    if hasattr(os, "setpgid"):  # out of the reach of a terminal's Ctrl-C
        os.setpgid(0, 0)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # a second SIGTERM is for the worker itself
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _joined(positions: range, each: int, block: Callable[[int], np.ndarray]) -> list[int]:
    """What stands at positions of a stream that is made of blocks of `each` items, given by their number."""
    chosen: list[int] = []
    while rest := positions[len(chosen) :]:
        number, offset = divmod(rest[0], each)
        chosen += block(number)[offset : offset + len(rest)].tolist()
    return chosen


@lru_cache(maxsize=2)
def _by_length(schedule: Schedule, window: int) -> np.ndarray:
    """The items of a window, each step's in order of length."""
    steps = schedule.windows.steps
    each = steps * schedule.batch_size
    items = np.array(schedule.stream(range(window * each, (window + 1) * each)))
    batches = items[np.argsort(schedule.windows.lengths[items], kind="stable")].reshape(steps, -1)
    return batches[permutation(schedule.seed, _WINDOWS + window, steps)].reshape(-1)


_order = lru_cache(maxsize=2)(permutation)  # of an epoch
