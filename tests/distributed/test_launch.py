"""One command, many processes: what starts them, what stops them, and what is left; with little in place of a job."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import free_ports
from omegaconf import OmegaConf

from graincode.core.errors import GraincodeError
from graincode.distributed.hardware import Hardware
from graincode.distributed.launch import launch
from graincode.distributed.signals import ProcessFailed, Stopped

pytestmark = pytest.mark.slow
ENTRY = "helpers_launch.work"
PARENT = f"""
import json, sys
from omegaconf import OmegaConf
from graincode.distributed.hardware import Hardware
from graincode.distributed.launch import launch

case, cfg, hardware = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
launch("{ENTRY}", case, OmegaConf.create(cfg), Hardware(**hardware))
"""


def command(case, folder, victim=1, **hardware):
    """A process that starts two others."""
    settings = [json.dumps({"folder": str(folder), "victim": victim}), json.dumps({"num_processes": 2} | hardware)]
    return subprocess.Popen([sys.executable, "-c", PARENT, case, *settings], stderr=subprocess.PIPE, text=True)


@pytest.fixture(autouse=True)
def _helpers_are_found(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def started(case, folder, processes=2, **cfg):
    """The objective of a case, in the processes of one command."""
    return launch(ENTRY, case, OmegaConf.create({"folder": str(folder), **cfg}), Hardware(num_processes=processes))


def pids(folder, count=2):
    """Numbers of a command's processes, once all are there."""
    deadline = time.monotonic() + 300
    while len(found := sorted(folder.glob("*.pid"))) < count or not all(file.read_text() for file in found):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int(file.read_text()) for file in found]


def end(numbers, seconds=100):
    """Whether processes end."""
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in numbers) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(Path(f"/proc/{pid}").exists() for pid in numbers)


def test_processes_exchange_and_process_0_gives_the_objective(tmp_path):
    assert started("sums", tmp_path, processes=3, more=0.5) == 6.5


def test_processes_import_what_the_command_does(tmp_path, monkeypatch):
    (tmp_path / "own_entry.py").write_text("def work(job, cfg):\n    return 7.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert launch("own_entry.work", "own", OmegaConf.create({}), Hardware(num_processes=1)) == 7.5


@pytest.mark.parametrize(("case", "victim", "error", "said"), [
    ("is_killed", 0, ProcessFailed, "process 0 of 2 was killed by SIGKILL"),
    ("is_killed", 1, ProcessFailed, "process 1 of 2 was killed by SIGKILL"),
    ("is_refused", 1, GraincodeError, "of process 1"),
    ("crashes", 1, ProcessFailed, "process 1: RuntimeError: of process 1"),
])  # fmt: skip
def test_the_error_that_came_first_ends_the_others_and_is_raised(case, victim, error, said, tmp_path):
    began = time.monotonic()
    with pytest.raises(error, match=said):
        started(case, tmp_path, victim=victim)
    assert time.monotonic() - began < 300
    assert end(pids(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_stops_all(number, tmp_path):
    parent = command("waits", tmp_path)
    numbers = pids(tmp_path)
    parent.send_signal(number)
    assert f"{Stopped.__name__}: stopped by {number.name}" in parent.communicate(timeout=300)[1]
    assert end(numbers)


@pytest.mark.when("a command's terminal is closed under nohup", "it goes on")
def test_a_command_under_nohup_outlives_its_terminal(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        parent = command("waits", tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    pids(tmp_path)
    parent.send_signal(signal.SIGHUP)
    parent.send_signal(signal.SIGTERM)
    assert f"{Stopped.__name__}: stopped by SIGTERM" in parent.communicate(timeout=300)[1]


@pytest.mark.when("modules of our names lie in the working directory", "the processes of a job do not import them")
def test_processes_take_no_module_from_where_the_user_is(tmp_path):
    (tmp_path / "tqdm.py").write_text("raise RuntimeError('of the working directory')")
    settings = [json.dumps({"folder": str(tmp_path), "more": 0.5}), json.dumps({"num_processes": 2})]
    parent = [sys.executable, "-P", "-c", PARENT, "sums", *settings]
    done = subprocess.run(parent, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.when("a command is killed", "all of its processes end at once, those that are stopped too")
@pytest.mark.parametrize("how", ["interrupted twice", "killed", "quit"])
def test_no_process_outlives_the_command(how, tmp_path):
    parent = command("waits", tmp_path)
    numbers = pids(tmp_path)
    if how != "interrupted twice":
        os.kill(numbers[1], signal.SIGSTOP)
        parent.send_signal(signal.SIGKILL if how == "killed" else signal.SIGQUIT)
        assert "Traceback" not in parent.communicate(timeout=300)[1]
    else:
        os.kill(numbers[1], signal.SIGSTOP)  # so that the first cannot be obeyed
        parent.send_signal(signal.SIGINT)
        time.sleep(1)
        assert parent.poll() is None
        parent.send_signal(signal.SIGINT)
        assert parent.wait(100) == 130
    assert end(numbers)


def test_a_process_that_dies_ends_those_of_the_other_machine(tmp_path):
    """Both "machines" are this one."""
    nodes = {"num_processes": 1, "num_nodes": 2, "main_address": "127.0.0.1", "main_port": free_ports()}
    both = [command("is_killed", tmp_path, **nodes, node_rank=rank) for rank in (0, 1)]
    assert all("ProcessFailed: " in parent.communicate(timeout=300)[1] for parent in both)
    assert end(pids(tmp_path))
