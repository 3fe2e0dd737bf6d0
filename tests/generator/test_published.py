"""DQ-Transformer as its authors' code computes it (golden/published/stackgpt_uncond.npz), as far as ours can agree."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_golden import FOLDER
from strategies import random_codes, random_grains

from graincode.config.job import build, with_layout
from graincode.config.validate import check
from graincode.core.codes import GrainCodes
from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout
from graincode.core.losses import weighted_sum
from graincode.core.schedules import warmup_cosine
from graincode.core.sequences import to_sequences
from graincode.generator import AutoregressiveObjective, HeterogeneousEmbedding
from graincode.generator.dgit_ar import SequenceLikelihood
from graincode.training.stage import parameter_groups

LAYOUT = CodeLayout((64, 64), ((16, 16), (8, 8)), 32, 0, "shared", "rows", True)
COARSE_END, FINE_START = 17, 66  # of the published positions
CONTENT_END, CONTENT_START = 33, 34


@pytest.fixture(scope="module")
def published():
    with np.load(FOLDER / "stackgpt_uncond.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.mark.parametrize("image", [0, 1])
def test_sequences_are_the_published_ones(published, image):
    codes = GrainCodes.checked(published[f"grains_{image}"][None], published[f"indices_{image}"][None], LAYOUT)
    sequences, table = to_sequences(codes), LAYOUT.slots()
    slots, contents = sequences.slots[0], sequences.contents[0]
    positions = torch.where(table.grain[slots] == 0, table.region[slots], table.finest[slots])
    is_start = ~table.is_code[slots] & ~table.is_end[slots]
    positions = torch.where(table.is_end[slots], COARSE_END, torch.where(is_start, FINE_START, positions))
    contents = torch.where(table.is_end[slots], CONTENT_END, torch.where(is_start, CONTENT_START, contents))
    # theirs begins with a start, which ours has before the sequence, and closes with an end, which ours implies
    for name, ours in (("position", positions), ("content", contents)):
        coarse, fine = (published[f"{grain}_{name}_{image}"] for grain in ("coarse", "fine"))
        assert torch.equal(ours, torch.cat([coarse[1:], fine[:-1]])), name


@pytest.mark.parametrize("image", [0, 1])
def test_the_loss_is_the_published_one_on_the_same_logits(published, image):
    nats = {}
    for name in ("content", "position"):
        target = torch.cat([published[f"{grain}_{name}_{image}"] for grain in ("coarse", "fine")])[1:]
        nats[name] = F.cross_entropy(published[f"{name}_logits_{image}"], target, reduction="none")[None]
    grain = (torch.arange(nats["content"].shape[1]) >= len(published[f"coarse_position_{image}"]) - 1).long()[None]
    every = torch.ones_like(grain, dtype=torch.bool)  # marks are paid for as well
    likelihood = SequenceLikelihood(nats["content"], nats["position"], every, every, grain, 2, 2)
    terms = AutoregressiveObjective(1.0)(likelihood)
    expected = {name: float(value) for name, value in published.items() if value.ndim == 0}
    assert float(terms["content"].mean) == pytest.approx(expected[f"content_loss_{image}"], abs=1e-9)
    assert float(terms["position_0"].mean) == pytest.approx(expected[f"coarse_position_loss_{image}"], abs=1e-9)
    assert float(terms["position_1"].mean) == pytest.approx(expected[f"fine_position_loss_{image}"], abs=1e-9)
    loss = expected[f"content_loss_{image}"] + expected[f"position_loss_{image}"]
    assert float(weighted_sum(terms)) == pytest.approx(loss, abs=1e-9)


@pytest.fixture(scope="module", params=["ar_imagenet", "ar_ffhq"])
def recipe(request):
    small = ["width=32", "heads=4", "position_layers=1", "content_layers=2"]
    return check("train_generator", [f"experiment={request.param}", *(f"generator.size.{key}" for key in small)])


def test_a_recipe_trains_as_published(recipe):
    trainer, optimizer = recipe.trainer, recipe.optimizer
    assert (trainer.warmup_steps, trainer.clip_grad_norm, trainer.ema_decay) == (0, 0, 0)
    assert (optimizer._target_, optimizer.lr, optimizer.weight_decay) == ("torch.optim.AdamW", 5e-4, 0.01)
    assert list(optimizer.betas) == [0.9, 0.95]
    assert warmup_cosine(1, trainer.steps, 0) == 1
    assert warmup_cosine(trainer.steps, trainer.steps, 0) < 1e-8


def test_a_recipe_starts_and_weighs_as_published(recipe):
    layout = replace(LAYOUT, classes=3, **recipe.generator.sequence)
    assert layout.max_tokens == LAYOUT.max_tokens
    with_layout(recipe.generator.model, layout)
    torch.manual_seed(0)
    model, objective = build(recipe.generator.model), build(recipe.generator.objective)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.ndim == 2:
            spread = 0.02 * (1 + 6 / parameter.numel() ** 0.5)
            assert 0.02**2 / spread < parameter.std() < spread, name
    groups = parameter_groups(model)
    assert {id(p) for p in groups[0]["params"]} == {
        id(part.weight) for part in model.modules() if isinstance(part, torch.nn.Linear)
    }
    assert groups[1]["weight_decay"] == 0
    codes = random_codes(layout, random_grains(layout, 2))
    labels = torch.zeros(2, dtype=torch.long)
    terms = objective(model.eval()(codes, labels))
    assert {name: term.weight for name, term in terms.items() if term.weight} == {
        "content": 1, "position_0": 0.5, "position_1": 0.5,
    }  # fmt: skip


def test_dropout_of_tokens_is_in_training_alone():
    embedding = HeterogeneousEmbedding(LAYOUT, 16, dropout=0.25)
    slots, contents = torch.arange(40)[None], torch.zeros(1, 40, dtype=torch.long)
    torch.manual_seed(0)
    dropped, whole = (embedding.train(mode)(slots, contents, torch.zeros(1, 16)) for mode in (True, False))
    assert 0.15 < float((dropped == 0).float().mean()) < 0.35
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.75)
    assert torch.equal(embedding(slots, contents, torch.zeros(1, 16)), whole)
    with pytest.raises(GraincodeError, match=r"^dropout=1: expected a number from 0 to below 1"):
        HeterogeneousEmbedding(LAYOUT, 16, dropout=1)
