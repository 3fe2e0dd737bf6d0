"""Which precision the parts of a training have."""

import pytest
import torch
from helpers_training import TRAINER, make_stage, tokenizer_stage

from graincode.core.precision import products
from graincode.core.rng import SampleRng
from graincode.distributed import hardware
from graincode.distributed.hardware import Hardware
from graincode.runs.run import Run
from graincode.training.loop import Training
from graincode.training.stage import Evaluation
from graincode.training.trackers import LogSettings


@pytest.mark.parametrize("kind", ["gan", "generator"])
def test_only_steps_have_the_precision_of_training(kind, tmp_path, monkeypatch):
    """The first codebook, thresholds and evaluations are in that of the later jobs."""
    stage, start = make_stage(False, kind)
    found = {"start": set(), "step": set(), "evaluation": set()}

    def note(place):
        found[place].add((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))

    def begin():
        note("start")
        start()

    def evaluate(module, limit, draw):
        note("evaluation")
        return Evaluation({"objective": 1.0})

    stage.evaluate = evaluate
    forward = stage.trainables[0].forward
    stage.trainables[0].forward = lambda wrapped, batch, step, before: (
        step.number and note("step"), forward(wrapped, batch, step, before)
    )[1]  # fmt: skip
    monkeypatch.setattr(hardware, "products", lambda precision, device: products(precision, "cuda"))
    machine = Hardware(mixed_precision="bf16", tf32=True, threads=1).machine()
    with Run(tmp_path / "run", {}, {}) as run:
        Training(stage, machine, torch.optim.SGD, TRAINER, 5, run, LogSettings(), begin).run()
    assert found == {
        "start": {("highest", False)}, "step": {("high", True)}, "evaluation": {("highest", False)},
    }  # fmt: skip


def test_a_router_that_learns_decides_in_full_precision_under_autocast():
    stage, _ = tokenizer_stage(False, "feature")
    router, features = stage.trainables[0].module.router.eval(), [torch.randn(3, 8, n, n) for n in (4, 8)]
    probe = torch.nn.Module()
    probe.features, probe.rng = features, SampleRng(0, torch.arange(3))
    exact = router(probe)
    with torch.autocast("cpu", torch.bfloat16):
        found = router(probe)
    assert found.density.dtype == torch.float32
    assert torch.equal(found.density, exact.density)
