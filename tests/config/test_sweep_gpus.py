"""Sweeps of several members at a time over faked GPUs: torch is told of two, and a function stands in for the job."""

import csv
import json
import os
import subprocess
import sys
from itertools import pairwise

import pytest

FAKED = """
import sys, types

if any("popen_loky" in word or "distributed.worker" in word for word in sys.orig_argv):  # others import no torch
    import torch

    torch.cuda.device_count = lambda: 2
job = types.ModuleType("graincode.jobs.sample")


def run(cfg):
    import os, time
    from pathlib import Path
    from graincode.runs.run import Run

    began = time.time()
    with Run(Path(cfg.runs_dir) / "sample" / str(cfg.seed), {}, {"processes": os.environ.get("WORLD_SIZE")}) as opened:
        if cfg.seed == 13:
            raise ValueError("a crash")
        time.sleep(1)
        times = [began, time.time()]
        if os.environ["RANK"] == "0":
            return opened.finish(float(cfg.seed), times=times)


job.run = run
sys.modules["graincode.jobs.sample"] = job
"""


@pytest.fixture
def sweep(tmp_path):
    """Runs a sweep of stand-ins on two faked GPUs; gives its status, table, and by seed the GPUs and times of each."""
    (tmp_path / "faked").mkdir()
    (tmp_path / "faked" / "sitecustomize.py").write_text(FAKED)

    def run(*overrides):
        code = "from graincode.config.job import job_main; job_main('sample')"
        settings = ["--multirun", "hydra/launcher=joblib", "hydra.sweep.dir=sweep", "hardware=gpu", *overrides]
        path = os.pathsep.join([str(tmp_path / "faked"), *sys.path])
        env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "4,7"}
        done = subprocess.run([sys.executable, "-c", code, *settings], cwd=tmp_path, env=env, capture_output=True,
                              text=True)  # fmt: skip
        table = list(csv.DictReader((tmp_path / "sweep" / "table.csv").open(encoding="utf-8")))
        runs = {}
        for result in (tmp_path / "runs" / "sample").glob("[0-9]*/result.json"):
            machine = json.loads((result.parent / "machine.json").read_bytes())
            runs[int(result.parent.name)] = machine["visible_gpus"], json.loads(result.read_bytes())["times"]
        return done, table, runs

    return run


@pytest.mark.slow
def test_each_member_has_a_gpu_of_its_own_and_more_members_queue(sweep):
    done, table, runs = sweep("hydra.launcher.n_jobs=4", "seed=10,11,12,13")
    assert done.returncode == 1, done.stderr
    assert [(row["seed"], row["status"]) for row in table] == [("10", "0"), ("11", "0"), ("12", "0"), ("13", "1")]
    assert [row["gpus"] in ("4", "7") for row in table] == [True] * 4
    assert {gpus for gpus, _ in runs.values()} == {"4", "7"}
    on = {name: sorted(times for gpus, times in runs.values() if gpus == name) for name in ("4", "7")}
    assert all(before[1] <= after[0] for times in on.values() for before, after in pairwise(times))
