"""Threads and cores: in a fresh process, since torch's threads are there once it has computed."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads cannot be bound here")
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
NOTHING = {name: None for name in ("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")}

SCRIPT = """
import json, os, sys, threading
import torch
from graincode.distributed.affinity import bind_threads, on_any_core
threads, index, processes = map(int, sys.argv[1:])
torch.set_num_threads(threads)
bound = bind_threads(index, processes)
masks = [sorted(os.sched_getaffinity(int(task))) for task in sorted(os.listdir("/proc/self/task"), key=int)]
seen = []
with on_any_core():
    thread = threading.Thread(target=lambda: seen.append(sorted(os.sched_getaffinity(0))))
    thread.start()
    thread.join()
again = sorted(os.sched_getaffinity(0))
torch.set_num_threads(1)
bind_threads(0, 1)
after = sorted(os.sched_getaffinity(0))
print(json.dumps({"bound": bound, "masks": masks, "main": again, "inside": seen[0], "after": after}))
"""


def run(threads, index=0, processes=1, **variables):
    env = {name: value for name, value in (os.environ | NOTHING | variables).items() if value is not None}
    arguments = [sys.executable, "-c", SCRIPT, *map(str, (threads, index, processes))]
    return json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True, env=env).stdout)


@pytest.mark.slow
@pytest.mark.skipif(len(CORES) < 2, reason="one core")
def test_threads_that_fill_the_machine_have_a_core_each():
    found = run(len(CORES))
    assert found["bound"]
    assert [mask for mask in found["masks"] if mask != CORES] == [[core] for core in CORES]
    assert found["main"] == CORES[:1]
    assert found["inside"] == found["after"] == CORES  # what is started, and when fewer threads are asked for


@pytest.mark.slow
@pytest.mark.skipif(len(CORES) < 4, reason="fewer than four cores")
def test_processes_have_cores_of_their_own():
    each = len(CORES) // 2
    assert run(each, 1, 2)["main"] == ([CORES[each]] if 2 * each == len(CORES) else CORES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("threads", "variables"), [(1, {}), (len(CORES) + 1, {}), (len(CORES), {"OMP_PROC_BIND": "false"})]
)
def test_other_threads_run_anywhere(threads, variables):
    found = run(threads, **variables)
    assert not found["bound"]
    assert all(mask == CORES for mask in found["masks"])


@pytest.mark.slow
@pytest.mark.skipif(len(CORES) < 2, reason="one core")
@pytest.mark.parametrize(("threads", "expected"), [("None", CORES[:1]), ("1", CORES)])
def test_a_job_binds_its_threads(threads, expected):
    script = f"""
import os
import graincode.jobs.cli
from graincode.distributed.hardware import Hardware
Hardware(threads={threads}).machine()
print(os.environ["GOMP_SPINCOUNT"], sorted(os.sched_getaffinity(0)))
"""
    env = {name: value for name, value in os.environ.items() if name not in {*NOTHING, "OMP_WAIT_POLICY"}}
    env["GOMP_SPINCOUNT"] = "77"  # a user's own stays
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env).stdout
    assert found == f"77 {expected}\n"


@pytest.mark.parametrize(("policy", "expected"), [(None, "10000"), ("passive", "None")])
def test_the_spin_of_waiting_threads_is_bounded_unless_the_user_has_chosen(policy, expected):
    env = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    env |= {"OMP_WAIT_POLICY": policy} if policy else {}
    script = "import os, graincode.jobs.cli; print(os.environ.get('GOMP_SPINCOUNT'))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env).stdout
    assert found == f"{expected}\n"
