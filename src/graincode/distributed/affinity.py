"""Which cores the threads of a process use, so that a computation on all of them goes on well beside other processes.

OpenMP's threads wait for each other thousands of times a second. Where a scheduler moves them about, one stands still
while another process has its core, and the others spin. With a core for each and a short spin they lose the share of
that process alone (docs/benchmarks.md has both, measured).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

_CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []  # that a scheduler lets us use
_CHOSEN = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")  # a user who set one has decided
_PARALLEL = 1 << 20  # elements that torch sums with all its threads
_team: list[int] = []  # the kernel's numbers of OpenMP's threads, but for the one that calls them


def usable_cores() -> int:
    """CPU cores that a scheduler lets this machine's processes use; 1 or more."""
    return len(_CORES) or os.cpu_count() or 1


def bind_threads(index: int, processes: int) -> bool:
    """Give each of torch's threads a core, where `processes` processes, this one the `index`-th, fill the machine with
    them; else let them run on any. Returns whether they have one each."""
    threads = torch.get_num_threads()
    if not _CORES or any(name in os.environ for name in _CHOSEN):
        return False
    before = _tasks()
    torch.ones(_PARALLEL).sum()  # starts the threads that are not there yet
    _team.extend(sorted(_tasks() - before))
    bound = threads > 1 and threads * processes == len(_CORES) and len(_team) >= threads - 1
    own = _CORES[index * threads : (index + 1) * threads]
    for place, task in enumerate([threading.get_native_id(), *_team]):
        with suppress(OSError):  # a thread that has ended
            os.sched_setaffinity(task, {own[place]} if bound and place < threads else _CORES)
    return bound


@contextmanager
def on_any_core() -> Iterator[None]:
    """Threads and processes that are started inside may run on all cores: they would inherit this thread's."""
    if not _CORES:
        yield
        return
    bound = os.sched_getaffinity(0)
    os.sched_setaffinity(0, _CORES)
    try:
        yield
    finally:
        os.sched_setaffinity(0, bound)


def _tasks() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}
