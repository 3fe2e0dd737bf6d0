"""What is watched while a model trains."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from graincode.core.errors import GraincodeError
from graincode.data.loader import Schedule
from graincode.runs.checkpoint import Checkpoints
from graincode.training.monitors import FiniteNumbers, Speed, _fingerprint


def test_fingerprints_see_every_bit_and_its_position():
    rows = torch.randn(6, 3)
    assert _fingerprint(rows) == _fingerprint(rows.clone())
    assert _fingerprint(rows[[1, 0, 2, 3, 4, 5]]) != _fingerprint(rows)
    assert _fingerprint(rows.nextafter(rows + 1)) != _fingerprint(rows)
    for kind in (torch.bool, torch.bfloat16, torch.float64):
        assert _fingerprint(rows.to(kind)).dtype == torch.int64


def test_the_first_number_that_is_not_finite_is_named_with_its_images(tmp_path):
    module, schedule = nn.Linear(2, 2), Schedule(10, 4, 0)
    checkpoints = Checkpoints(tmp_path / "state")
    checkpoints.save(1, {}, {})
    finite = FiniteNumbers(tmp_path / "nonfinite.json", {"model": module}, schedule, checkpoints)
    finite.add(1, {"loss": torch.tensor(1.0)})
    finite.check()
    with torch.no_grad():
        module.bias[0] = torch.nan
    finite.add(2, {"loss": torch.tensor(1.0), "norm": torch.tensor(torch.inf)})
    finite.add(3, {"loss": torch.tensor(torch.nan)})
    with pytest.raises(GraincodeError, match="norm is not finite at step 2: the last good state is of step 1"):
        finite.check()
    record = json.loads((tmp_path / "nonfinite.json").read_text())
    assert record["images"] == schedule.indices(range(4, 8))
    assert record["weights_not_finite"] == ["bias"]
    finite.check()  # each value once


@pytest.mark.when(
    "weights are NaN or infinite when a state is to be saved", "one line names them; the state is not saved"
)
@pytest.mark.parametrize("part", ["model", "average"])
def test_weights_that_are_not_finite_are_not_saved(part, tmp_path):
    finite = FiniteNumbers(tmp_path / "nonfinite.json", {}, Schedule(10, 4, 0), Checkpoints(tmp_path / "state"))
    weights = {"bias": torch.tensor([0.0, torch.inf]), "router.quantiles": torch.tensor([torch.nan])}
    state = {"trainables": {"model": {"module": {"weight": torch.ones(2)}}}, "average": None}
    finite.check_state(3, state)
    if part == "model":
        state["trainables"]["model"]["module"] = weights
    else:
        state["average"] = weights
    with pytest.raises(GraincodeError, match=rf"^{part}\.bias has .* after step 3.* last good state is of step 0;"):
        finite.check_state(3, state)


@pytest.mark.parametrize(("device", "resets"), [("cpu", 0), ("cuda", 1)])
def test_the_peak_of_memory_is_that_of_training_alone(device, resets, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30 * (3 - len(calls)))
    machine = SimpleNamespace(device=torch.device(device), hardware=SimpleNamespace(peak_tflops=None))
    speed = Speed(machine, 8, 1.0)  # made behind the count of FLOPs
    assert len(calls) == resets
    if resets:
        assert speed.metrics(None)["speed/peak_memory_gib"] == 2
    assert len(calls) == resets
