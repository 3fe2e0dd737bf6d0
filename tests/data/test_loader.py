"""Which items each step sees."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from graincode.core import waiting
from graincode.core.errors import GraincodeError
from graincode.data import loader
from graincode.data.loader import Schedule, Windows, in_order, load_batches
from graincode.distributed import signals

LOADS = """
import multiprocessing
import torch
from graincode.data.loader import load_batches

batches = load_batches(torch.arange(9), [[0], [1]], workers=1)
next(batches)
print(multiprocessing.active_children()[0].pid, flush=True)
input()
"""
LENGTHS = np.random.default_rng(0).integers(16, 65, 500)


def joined(ranks, micro_batches):
    """The steps' batches, from the samplers of all processes."""
    rounds = [list(chain(*parts)) for parts in zip(*ranks, strict=True)]
    return [list(chain(*rounds[i : i + micro_batches])) for i in range(0, len(rounds), micro_batches)]


def padding(schedule, steps):
    """Share of padded positions in the micro-batches of all processes."""
    parts = [LENGTHS[part] for part in schedule.batches(0, steps)]
    return 1 - sum(part.sum() for part in parts) / sum(part.max() * len(part) for part in parts)


def test_each_epoch_is_a_permutation_and_any_step_can_be_started_from():
    whole = list(Schedule(size=10, batch_size=4, seed=3).batches(0, 25))
    stream = [index for batch in whole for index in batch]
    for epoch in range(10):
        assert sorted(stream[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert stream[:10] != stream[10:20]
    for start in (1, 7, 24):
        assert list(Schedule(10, 4, 3).batches(start, 25)) == whole[start:]
    assert list(Schedule(10, 4, 4).batches(0, 25)) != whole


def test_a_batch_larger_than_the_data_set():
    assert len(next(iter(Schedule(3, 7, 0).batches(0, 1)))) == 7


@pytest.mark.parametrize(("processes", "micro_batches"), [(1, 3), (2, 1), (2, 3), (4, 2), (12, 2)])
def test_the_global_batch_does_not_depend_on_how_it_is_divided(processes, micro_batches):
    whole = list(Schedule(17, 24, 5).batches(2, 6))
    ranks = [Schedule(17, 24, 5, r, processes, micro_batches).batches(2, 6) for r in range(processes)]
    assert joined(ranks, micro_batches) == whole


@pytest.mark.parametrize("window", [2, 5, 16])
def test_windows_hold_what_the_stream_has_there_sorted_by_length(window):
    schedule = Schedule(500, 12, 3, windows=Windows(LENGTHS, window))
    steps = list(schedule.batches(0, 10 * window))
    for first in range(0, len(steps), window):
        here = [index for step in steps[first : first + window] for index in step]
        assert sorted(here) == sorted(schedule.stream(range(first * 12, (first + window) * 12)))
        lengths = sorted(LENGTHS[step].tolist() for step in steps[first : first + window])
        assert list(chain(*lengths)) == sorted(LENGTHS[here].tolist())
    orders = [np.argsort([LENGTHS[s].sum() for s in steps[f : f + window]]).tolist() for f in (0, window, 2 * window)]
    assert window == 2 or orders[0] != orders[1] != orders[2]
    other = Schedule(500, 12, 4, windows=Windows(LENGTHS, window))
    assert list(other.batches(0, 10 * window)) != steps


def test_windows_that_divide_an_epoch_hold_each_item_of_it_once():
    schedule = Schedule(500, 10, 3, windows=Windows(LENGTHS, 25))
    stream = list(chain(*schedule.batches(0, 150)))
    for epoch in range(3):
        assert sorted(stream[epoch * 500 : epoch * 500 + 500]) == list(range(500))
    assert stream[:500] != stream[500:1000]


def test_windows_across_epochs_lose_nothing():
    schedule = Schedule(17, 4, 3, windows=Windows(LENGTHS, 3))
    stream = list(chain(*schedule.batches(0, 3 * 17)))
    assert sorted(stream) == sorted(list(range(17)) * 12)


@pytest.mark.parametrize(("processes", "micro_batches"), [(1, 3), (2, 1), (2, 3), (12, 2)])
def test_steps_of_windows_depend_on_nothing_but_seed_and_step(processes, micro_batches):
    windows = Windows(LENGTHS, 8)
    whole = list(Schedule(500, 24, 5, windows=windows).batches(0, 20))
    assert list(Schedule(500, 24, 5, windows=windows).batches(11, 13)) == whole[11:13]
    ranks = [Schedule(500, 24, 5, r, processes, micro_batches, windows).batches(5, 20) for r in range(processes)]
    assert joined(ranks, micro_batches) == whole[5:]
    assert all(LENGTHS[step].tolist() == sorted(LENGTHS[step]) for step in whole)


def test_longer_windows_pad_less():
    shares = [padding(Schedule(500, 16, 0, windows=Windows(LENGTHS, w)), 128) for w in (2, 8, 32)]
    plain = padding(Schedule(500, 16, 0), 128)
    assert plain > 0.3
    assert shares == sorted(shares, reverse=True)
    assert plain > 1.5 * shares[0]
    assert shares[-1] < 0.02


def test_micro_batches_of_sorted_steps_pad_less_and_alike_on_all_processes():
    windows = Windows(LENGTHS, 1)
    assert all(
        sorted(LENGTHS[step]) == LENGTHS[step].tolist() and sorted(step) == sorted(plain)
        for step, plain in zip(
            Schedule(500, 16, 0, windows=windows).batches(0, 60),
            Schedule(500, 16, 0).batches(0, 60),
            strict=True,
        )
    )
    one, four = (padding(Schedule(500, 16, 0, micro_batches=m, windows=windows), 128) for m in (1, 4))
    assert four < 0.3 * one
    first, last = (padding(Schedule(500, 32, 0, rank, 2, 4, windows), 128) for rank in (0, 1))
    assert first == pytest.approx(last, abs=0.01)


def test_in_order_gives_everything_once():
    data = torch.arange(10)
    assert torch.equal(torch.cat(list(in_order(data, 4))), data)
    assert torch.equal(torch.cat(list(in_order(data, 4, 6))), data[:6])


@pytest.mark.when(
    "a signal comes while a process that loads data starts", "it lives on, and the run ends with its step"
)
def test_a_worker_outlives_a_signal_that_comes_while_it_starts(monkeypatch):
    def start(worker):
        os.kill(os.getpid(), signal.SIGTERM)
        prepare(worker)

    prepare = loader._prepare_worker
    monkeypatch.setattr(loader, "_prepare_worker", start)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert torch.cat(list(load_batches(torch.arange(8), [[0, 1], [2, 3]], workers=1))).tolist() == [0, 1, 2, 3]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def _first_then_stopped(monkeypatch):
    """The batches behind the first, of a worker that is stopped."""
    monkeypatch.setattr(loader, "_POLL_SECONDS", 0.1)
    batches = load_batches(torch.arange(100), [[i, i + 1] for i in range(98)], workers=1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGSTOP)
    return batches, worker.pid


@pytest.mark.slow
@pytest.mark.when(
    "a process that loads data is stopped",
    "a message every 30 seconds names it; the run ends with an error after hardware.timeout_minutes",
)
def test_a_stopped_worker_is_named_and_waited_for_only_so_long(monkeypatch, caplog):
    monkeypatch.setattr(waiting, "MESSAGE_SECONDS", 0.2)
    monkeypatch.setattr(waiting, "_limit_minutes", 0.01)
    batches, pid = _first_then_stopped(monkeypatch)
    with pytest.raises(GraincodeError, match=f"{pid}.*timeout_minutes=0.01"):
        list(batches)
    assert any(f"waiting for data from the worker processes {pid}" in message for message in caplog.messages)
    assert not multiprocessing.active_children()


@pytest.mark.when("a process that loads data is stopped for a while", "the run goes on with it")
def test_a_worker_that_was_stopped_for_a_while_loses_nothing(monkeypatch):
    batches, pid = _first_then_stopped(monkeypatch)
    threading.Timer(0.5, os.kill, (pid, signal.SIGCONT)).start()
    assert torch.cat(list(batches)).tolist() == [j for i in range(1, 98) for j in (i, i + 1)]


def test_a_signal_is_obeyed_while_a_worker_is_stopped(monkeypatch):
    monkeypatch.setattr(loader, "_PATIENCE_SECONDS", 0.2)
    batches, _ = _first_then_stopped(monkeypatch)
    with signals.Interruption():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(loader.Stalled):
            list(batches)
    assert signals.asked_for() == 0
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_workers_end_with_the_process_that_they_load_for(tmp_path):
    (tmp_path / "loads.py").write_text(LOADS)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "loads.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    worker = int(process.stdout.readline())
    os.kill(worker, signal.SIGSTOP)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()


@pytest.mark.parametrize("uses_gpu", [False, True])
def test_all_batches_are_pinned_once_a_gpu_is_used(uses_gpu, monkeypatch):
    asked = []

    class Loader(loader.DataLoader):
        def __init__(self, *args, pin_memory, **settings):
            asked.append(pin_memory)
            super().__init__(*args, **settings)

    monkeypatch.setattr(loader, "DataLoader", Loader)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: uses_gpu)
    assert len(list(load_batches(torch.arange(4), [[0], [1, 2]]))) == 2  # of training
    assert len(list(in_order(torch.arange(4), 2))) == 2  # of evaluation and extraction
    assert asked == [uses_gpu] * 2
