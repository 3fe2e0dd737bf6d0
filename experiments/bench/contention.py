"""Training beside another process: the demo's stage 1 with threads as the jobs set them, and as torch does."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from functools import partial

from timing import Result

SECONDS, WARM_UP, ROUNDS = 6.0, 2.0, 3
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "GOMP_SPINCOUNT")
SPIN = [sys.executable, "-P", "-c", "while True: pass"]


def beside_another(busy: str) -> Result:
    """Steps/s beside a process that is always busy, or beside the same training, against half of those alone.

    Args:
        busy: "loop", "training" or "nothing": then against torch's own threads alone.
    """
    rates = {(ours, other): [] for ours in (True, False) for other in ("nothing", busy)}
    for _ in range(ROUNDS):
        for (ours, other), found in rates.items():
            found.append(_rate(ours, other))
    rate = {key: statistics.median(found) for key, found in rates.items()}
    alone, beside = rate[True, "nothing"], rate[True, busy]
    if busy == "nothing":
        other, ratio, goal = "torch's own threads", alone / rate[False, "nothing"], ">= 0.97"
    else:
        plain = rate[False, busy] / (rate[False, "nothing"] / 2)
        other, ratio, goal = f"half of it alone (torch's own threads: {plain:.2f})", beside / (alone / 2), ">= 0.6"
    return Result(f"training beside {busy}", beside, "steps/s", other, ratio, goal)


def _rate(ours: bool, busy: str) -> float:
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, __file__, *(["ours"] if ours else [])]
    start = partial(subprocess.Popen, env=env, stdout=subprocess.PIPE, text=True)
    other = {"loop": SPIN, "training": command, "nothing": None}[busy]
    beside = start(other) if other else None
    try:
        return float(start(command).communicate()[0])
    finally:
        if beside is not None:
            beside.kill()
            beside.communicate()


def _train(ours: bool) -> float:
    """Steps per second of the demo's stage 1, 32 px, batch 16, on all cores."""
    if ours:
        import graincode.jobs.cli  # noqa: F401 - sets what OpenMP reads when torch is imported
    import torch
    from engine import BATCH, demo_tokenizer, made_images

    from graincode.core.layout import CodeLayout
    from graincode.core.losses import weighted_sum
    from graincode.core.rng import SampleRng
    from graincode.distributed.affinity import bind_threads
    from graincode.tokenizer import ReconstructionObjective
    from graincode.training.stage import parameter_groups

    if ours:
        bind_threads(0, 1)
    dataset = made_images()
    module = demo_tokenizer(CodeLayout((32, 32), ((8, 8), (4, 4)), 256), dataset[range(64)].images)
    objective, steps = ReconstructionObjective(), 0
    adam = torch.optim.Adam(parameter_groups(module), lr=4e-3, betas=(0.9, 0.99), fused=True)
    module.train()
    began = start = time.perf_counter()
    while (now := time.perf_counter()) - start < SECONDS or steps == 0:
        if now - began < WARM_UP:
            start, steps = now, 0
        batch, places = dataset[range(BATCH)], torch.arange(BATCH)
        made = module(batch.images, rng=SampleRng(0, places))
        weighted_sum(objective(batch.images, made, module.router)).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        steps += 1
    return steps / (time.perf_counter() - start)


if __name__ == "__main__":
    print(_train("ours" in sys.argv))
