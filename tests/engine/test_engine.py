import math

import pytest
import torch
from torch import nn

from graincode.core.losses import Term, weighted_sum
from graincode.core.schedules import warmup_cosine
from graincode.data.loader import StepSampler, in_order
from graincode.engine.checkpoint import Checkpoints
from graincode.engine.config import SCHEMAS, config_directory, nearest
from graincode.engine.logging import Meter, RunLog, read_log
from graincode.engine.loop import parameter_groups
from graincode.files import new_directory, replacing


def test_each_epoch_is_a_permutation_and_any_step_can_be_started_from():
    whole = list(StepSampler(size=10, batch_size=4, seed=3, start=0, stop=25))
    stream = [index for batch in whole for index in batch]
    for epoch in range(10):
        assert sorted(stream[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert stream[:10] != stream[10:20]
    for start in (1, 7, 24):
        assert list(StepSampler(10, 4, 3, start, 25)) == whole[start:]
    assert list(StepSampler(10, 4, 4, 0, 25)) != whole


def test_a_batch_larger_than_the_data_set():
    assert len(next(iter(StepSampler(3, 7, 0, 0, 1)))) == 7


def test_in_order_gives_everything_once():
    data = torch.arange(10)
    assert torch.equal(torch.cat(list(in_order(data, 4))), data)
    assert torch.equal(torch.cat(list(in_order(data, 4, 6))), data[:6])


def test_learning_rate_rises_then_falls_to_almost_nothing():
    factors = [warmup_cosine(step, 100, 10) for step in range(1, 101)]
    assert factors[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert 0 < factors[-1] < 0.01
    assert factors[10 + 45] == pytest.approx(0.5, abs=0.01)


def test_means_of_terms_are_exact_whatever_the_batches():
    meter = Meter()
    values = torch.randn(12)
    for part in (values[:1], values[1:5], values[5:]):
        meter.add({"x": Term(part.sum(), len(part), 2.0)})
    assert meter.flush()["x"] == pytest.approx(float(values.mean()), rel=1e-5)
    assert meter.flush() == {}
    terms = {
        "a": Term(torch.tensor(6.0), 3, 0.5),
        "b": Term(torch.tensor(9.0), 0, 1.0),
        "c": Term(torch.tensor(1.0), 1, 0.0),
    }
    assert float(weighted_sum(terms)) == 10.0


def test_decay_spares_norms_biases_and_embeddings():
    module = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv2d(1, 1, 3))
    decayed, spared = parameter_groups(module)
    assert {id(p) for p in decayed["params"]} == {id(module[1].weight), id(module[3].weight)}
    assert "weight_decay" not in decayed
    assert spared["weight_decay"] == 0
    assert len(spared["params"]) + 2 == len(list(module.parameters()))


def test_checkpoints_keep_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.load(torch.device("cpu")) is None
    for step in (5, 10, 15):
        checkpoints.save(step, {"value": torch.tensor(step)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000000010.pt", "step_000000015.pt"]
    assert checkpoints.load(torch.device("cpu"))["step"] == 15


def test_files_are_replaced_as_a_whole_or_not_at_all(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("before")
    with pytest.raises(RuntimeError), replacing(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert target.read_text() == "before"
    with pytest.raises(RuntimeError), new_directory(tmp_path / "folder") as partial:
        (partial / "a").write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_a_resumed_log_has_no_lines_of_steps_that_were_lost(tmp_path):
    log = RunLog(tmp_path, 0, tensorboard=False)
    for step in (1, 2, 3):
        log.scalars(step, {"loss": math.sqrt(step)})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    RunLog(tmp_path, 2, tensorboard=False).scalars(3, {"loss": 7.0})
    assert [(line["step"], line["loss"]) for line in read_log(tmp_path)] == [(1, 1.0), (2, math.sqrt(2)), (3, 7.0)]


def test_the_nearest_key_is_suggested():
    assert nearest("codebok", {"codebook", "trainer"}) == "type codebook"
    assert "begins with one of data, trainer" in nearest("zzz", {"data.root", "trainer.steps"})


def test_every_root_config_is_there():
    for job in SCHEMAS:
        assert (config_directory() / f"{job}.yaml").is_file()
