"""Which images each training step sees: a function of (seed, step) alone."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from graincode.core.errors import GraincodeError
from graincode.core.rng import permutation
from graincode.core.waiting import Wait
from graincode.distributed import collectives
from graincode.distributed.affinity import on_any_core
from graincode.distributed.signals import SIGNALS, asked_for, blocked, end_with_parent

_WINDOWS = 1 << 63  # the permutations below it are those of epochs
_POLL_SECONDS, _PATIENCE_SECONDS = 1.0, 10.0


class Stalled(Exception):
    """A signal asks to stop, and the worker processes give no data to finish the step with."""


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


def load_batches(dataset: Dataset[Any], parts: Iterable[Sequence[int]], workers: int = 0) -> Generator[Any]:
    """The batches at index lists, in pinned memory once this process uses a GPU; the `workers` processes end with it,
    when it is closed, or at an error.

    Raises:
        GraincodeError: no batch came from them within the limit of a `Wait`.
        Stalled: none came, and for 10 seconds a signal has asked to stop.
    """
    settings = {"prefetch_factor": 4, "worker_init_fn": _prepare_worker} if workers else {}
    pinned = torch.cuda.is_initialized()
    loader = DataLoader(dataset, sampler=parts, batch_size=None, num_workers=workers, pin_memory=pinned, **settings)
    with blocked(), on_any_core():  # until the workers handle signals themselves
        iterator = iter(loader)
    if not workers:
        yield from iterator
        return
    watch = _Watch(iterator)
    try:
        yield from watch.batches()
    finally:
        watch.over.set()
        _end(iterator)


class _Watch:
    """A thread that watches a wait for worker processes, which may be a system call that would never return.

    Attributes:
        wait: for a batch, while there is one.
        error: why it killed the workers, so that the wait ends.
    """

    def __init__(self, iterator: Any) -> None:
        self.iterator, self.over = iterator, threading.Event()
        self.what = f"data from the worker processes {', '.join(str(worker.pid) for worker in iterator._workers)}"
        self.wait: Wait | None = None
        self.error: Exception | None = None
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while not self.over.wait(_POLL_SECONDS):
            if (wait := self.wait) is not None:
                try:
                    if min(asked_for(), wait.seconds) > _PATIENCE_SECONDS:
                        raise Stalled
                    wait.again()
                except (GraincodeError, Stalled) as error:
                    self.error = error
                    signal_handling._remove_worker_pids(id(self.iterator))  # torch would raise for each that ends
                    self.iterator._worker_pids_set = False
                    for worker in self.iterator._workers:
                        worker.kill()
                    return

    def batches(self) -> Generator[Any]:
        """What the loader's iterator gives."""
        while True:
            self.wait = Wait(self.what)
            try:
                batch = next(self.iterator)
            except StopIteration:
                return
            except Exception:
                if self.error is not None:
                    raise self.error from None
                raise
            finally:
                self.wait = None
            yield batch


def _end(iterator: Any) -> None:
    for worker in iterator._workers:
        if worker.is_alive() and hasattr(signal, "SIGCONT"):
            os.kill(worker.pid, signal.SIGCONT)  # one that is stopped could not end
    iterator._shutdown_workers()
    for worker in iterator._workers:  # one that hangs: this process would wait for it at its end
        worker.kill()


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


def _prepare_worker(_: int) -> None:
    """Let a worker live on when all processes of a run get a signal, so that the run can finish its step, and end with
    the run."""
    end_with_parent()
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
