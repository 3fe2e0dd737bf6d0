"""What stages give to the training loop, and how they are evaluated."""

import pytest
import torch
from helpers_training import BATCH, LAYOUT, STEPS, Codes, generator_stage, images, make_stage, tokenizer_stage
from torch import nn

from graincode.core.layout import CodeLayout
from graincode.core.losses import weighted_sum
from graincode.core.rng import SampleRng
from graincode.data.images import TensorImages
from graincode.data.loader import Schedule
from graincode.evaluation.streams import evaluation_batch
from graincode.generator import AutoregressiveObjective
from graincode.training.stage import Step, parameter_groups


@pytest.mark.parametrize("kind", ["gan", "generator"])
def test_evaluated_items_are_spread_over_the_validation_set(kind, monkeypatch):
    stage, start = make_stage(False, kind)
    start()
    del stage.evaluate
    seen, (items, name) = [], (Codes, "__getitem__") if kind == "generator" else (TensorImages, "load")
    read = getattr(items, name)
    monkeypatch.setattr(items, name, lambda self, chosen: seen.extend(map(int, chosen)) or read(self, chosen))
    module = stage.trainables[0].module.eval()
    with torch.no_grad():
        stage.evaluate(module, 12)
        assert len(set(seen)) == 12
        assert min(seen) < 12 <= max(seen)
        stage.evaluate(module, 12, draw=True)
    drawn = seen[24:32]
    assert min(drawn) < 12 <= max(drawn)


def test_the_cases_have_a_process_whose_whole_batch_is_coarse():
    stage, start = tokenizer_stage(False, "gan")
    start()
    grains = stage.trainables[0].module.eval().route(images(False)[range(24)].images).grains.flatten(1)
    codes = Codes().codes.grains.flatten(1)
    for coarse, windows in (
        ((grains == 0).all(dim=1), None),
        ((codes == 0).all(dim=1), generator_stage(False, 1).windows),
    ):
        found = [
            bool(coarse[schedule.indices(schedule.positions(step, part))].all())
            for schedule in [Schedule(24, BATCH, 5, rank, 2, 2, windows) for rank in (0, 1)]
            for step in range(1, STEPS + 1)
            for part in (0, 1)
        ]
        assert any(found)
        assert not all(found)


def test_counts_are_known_before_the_model_runs():
    stage, start = tokenizer_stage(False, "gan")
    start()
    batch, step = stage.dataset[range(6)], Step(9, SampleRng(0, torch.arange(6)))
    output = None
    for trainable in stage.trainables:
        output = trainable.forward(trainable.module, batch, step, output)
        assert trainable.counts(batch) == {}
        assert {float(term.count) for term in output.terms.values() if not term.is_reported_only} == {6.0}
    batch, module = Codes()[range(9)], generator_stage(False, 1).trainables[0].module
    for objective in (AutoregressiveObjective(), AutoregressiveObjective(1.0)):
        terms, counts = objective(module(batch.codes, batch.labels)), objective.counts(batch.codes, module)
        assert set(counts) == {"content", "position_0"}
        assert {name: int(terms[name].count) for name in counts} == {name: int(n) for name, n in counts.items()}
    assert LAYOUT.num_grains == 2


def test_batches_by_length_weigh_every_code_alike():
    """The losses of all batches of a window add up to the loss of its images as one batch."""
    stage = generator_stage(True, 3)
    trainable, step = stage.trainables[0], Step(1, SampleRng(0, torch.arange(8)))
    trainable.module.conditioning.dropout = 0.0
    schedule = Schedule(24, 8, 5, windows=stage.windows)
    batches = [stage.dataset[schedule.indices(schedule.positions(s, 0))] for s in (1, 2, 3)]
    assert len({int(batch.codes.lengths.sum()) for batch in batches}) == 3
    parts = [weighted_sum(trainable.forward(trainable.module, batch, step, None).terms) for batch in batches]
    assert [trainable.counts(batch) == trainable.counts(batches[0]) for batch in batches] == [True] * 3
    plain = generator_stage(True, 1).trainables[0]
    plain.module = trainable.module
    whole = weighted_sum(
        plain.forward(plain.module, stage.dataset[range(24)], Step(1, SampleRng(0, torch.arange(24))), None).terms
    )
    assert float(sum(parts).detach() / 3) == pytest.approx(float(whole.detach()), rel=1e-12)


def test_validation_masks_depend_on_the_image_s_position_alone(monkeypatch):
    stage = generator_stage(True, 1, masked=True)
    del stage.evaluate  # what cases.py puts in its place
    module = stage.trainables[0].module.eval().requires_grad_(False)
    found = [stage.evaluate(module, 20).metrics]
    torch.manual_seed(1)
    found.append(stage.evaluate(module, 20).metrics)
    monkeypatch.setattr("graincode.training.generator_stage.evaluation_batch", lambda layout: 7)
    found.append(stage.evaluate(module, 20).metrics)
    assert found[1] == found[0] == pytest.approx(found[2], rel=1e-10)
    assert found[0]["objective"] == pytest.approx(found[0]["content"] + found[0]["grains"])


def test_fewer_images_are_evaluated_together_where_they_are_large():
    small, large, long = (
        CodeLayout(size, grains, 8, 2)
        for size, grains in (((32, 32), ((8, 8), (4, 4))), ((256, 256), ((16, 16),)), ((64, 64), ((4, 4), (1, 1))))
    )
    assert [evaluation_batch(layout) for layout in (small, large, long)] == [250, 32, 7]


def test_decay_spares_norms_biases_and_embeddings():
    module = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv2d(1, 1, 3))
    decayed, spared = parameter_groups(module)
    assert {id(p) for p in decayed["params"]} == {id(module[1].weight), id(module[3].weight)}
    assert "weight_decay" not in decayed
    assert spared["weight_decay"] == 0
    assert len(spared["params"]) + 2 == len(list(module.parameters()))
