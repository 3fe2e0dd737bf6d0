"""One command, many processes: the configuration is composed once, and every process gets it as it is."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from omegaconf import DictConfig, OmegaConf
from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext, start_processes

from graincode.core.errors import GraincodeError
from graincode.distributed.gpus import visible_gpus
from graincode.distributed.hardware import Hardware, cores_each
from graincode.distributed.rendezvous import meet
from graincode.distributed.signals import SIGNALS, STATUS, ProcessFailed, Stopped, handled, kept
from graincode.files import scratch_directory

_OF_A_WORLD = "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"
_POLL_SECONDS = 0.1
_OTHER_NODES_SECONDS = 15
_SIGKILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # which Windows lacks


def launch(entry: str, job: str, cfg: DictConfig, hardware: Hardware, gpus: Sequence[str] = ()) -> float:
    """Start this machine's processes of a job, pass signals on to them, and give the job's objective.

    Each calls the function of the dotted name `entry` with `job` and `cfg`, and sees the `gpus` alone, if there are.
    When one ends with an error, the others are ended too, on all machines: with SIGTERM, after 30 seconds with SIGKILL.
    A second SIGINT ends all at once.

    Raises:
        GraincodeError, Stopped, ProcessFailed: the error that came first; the last for a crash, or a process killed.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we report failures ourselves
    local, nodes = hardware.local_processes, hardware.num_nodes
    store = meet(hardware)
    threads = hardware.threads or cores_each(len(visible_gpus()) if gpus else local)  # others run beside it
    with scratch_directory(Path(tempfile.gettempdir()), "graincode") as folder:
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg), encoding="utf-8")
        world = {"WORLD_SIZE": nodes * local, "LOCAL_WORLD_SIZE": local, "PYTHONUNBUFFERED": 1}
        world |= {"MASTER_ADDR": store.host, "MASTER_PORT": store.port, "OMP_NUM_THREADS": threads}
        world |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}  # that store is there
        if nodes == 1 and sys.platform == "linux":
            world["GLOO_SOCKET_IFNAME"] = "lo"  # nothing listens on other interfaces
        own_path = None if sys.flags.safe_path else sys.path[0]
        world["PYTHONPATH"] = os.pathsep.join(filter(None, (own_path, os.environ.get("PYTHONPATH"))))  # as ours
        own = [{"RANK": hardware.node_rank * local + index, "LOCAL_RANK": index} for index in range(local)]
        if gpus:
            world["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        if nodes * local == 1:  # which belongs to no world
            world, own = {name: world[name] for name in world if name not in _OF_A_WORLD}, [{"RANK": 0}]
        envs = {i: {name: str(value) for name, value in (world | own[i]).items()} for i in range(local)}
        args = ("-P", "-m", "graincode.distributed.worker", entry, job, str(folder), os.getpid())
        with kept():
            logs = DefaultLogsSpecs(str(folder))
            context = start_processes(job, sys.executable, dict.fromkeys(envs, args), envs, logs)
        with _forwarding(context):
            failures = _watch(context, store if nodes > 1 else None)
        if failures:
            raise _error(folder, failures, nodes * local)
        result = folder / "objective.json"
        return json.loads(result.read_bytes()) if result.is_file() else float("nan")  # machine 0 alone has it


def _watch(context: PContext, store: TCPStore | None) -> dict[int, int]:
    """Exit statuses of the processes that did not end well, by their rank on this machine, at the end."""
    deadline = None  # once a process of another machine has failed
    while (result := context.wait(0)) is None:
        time.sleep(_POLL_SECONDS)
        if deadline is None and store is not None and _others_failed(store):
            deadline = time.monotonic() + _OTHER_NODES_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            context.close(_SIGKILL)
            return {0: 1}
    failures = {rank: failure.exitcode for rank, failure in result.failures.items()}
    if failures and store is not None and deadline is None:
        store.set("failed", "1")
        time.sleep(1)  # machine 0 holds the store: let the others read it
    return failures


def _others_failed(store: TCPStore) -> bool:
    with suppress(RuntimeError):  # machine 0 is gone, at its end or before
        return store.check(["failed"])
    return True


def _error(folder: Path, failures: dict[int, int], total: int) -> BaseException:
    """The error that came first, as the process that had it wrote it to the folder; exit statuses are in order."""
    index, status = next(iter(failures.items()))
    reports = [json.loads(file.read_bytes()) for file in folder.glob("error_*.json")]
    reports.sort(key=lambda report: (report["echo"], report["time"]))
    was_killed = status < 0 and -status not in SIGNALS  # and the others' errors only follow from that
    if reports and not was_killed:
        kinds = {2: GraincodeError, STATUS: Stopped}
        return kinds.get(reports[0]["status"], ProcessFailed)(reports[0]["message"])
    if status == 130:
        return KeyboardInterrupt()
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return ProcessFailed(f"process {index} of {total} {how}: the same command goes on from the last checkpoint")


@contextmanager
def _forwarding(context: PContext) -> Iterator[None]:
    """Pass signals on to the processes, which have sessions of their own: a terminal's Ctrl-C reaches only us."""
    interrupts = 0

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        for pid in context.pids().values():
            with suppress(ProcessLookupError):
                if interrupts > 1:
                    getattr(os, "killpg", os.kill)(pid, _SIGKILL)
                else:  # not the workers that load its data: it still needs them
                    os.kill(pid, number)
        if interrupts > 1:
            os._exit(130)

    try:
        with handled(forward):
            yield
    finally:
        context.close(_SIGKILL)
