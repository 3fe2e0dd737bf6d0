import math

import pytest
import torch
from helpers_generators import MODERN, WIDTH, labels_for, make_ar, make_nar, untrained
from strategies import LAYOUTS, random_codes, random_grains

from graincode.core.layout import CodeLayout
from graincode.core.losses import weighted_sum
from graincode.core.rng import SampleRng
from graincode.generator import (
    AutoregressiveObjective,
    ClassConditioning,
    DGiTAR,
    HeterogeneousEmbedding,
    MaskedObjective,
    Transformer,
)


def test_objective_weighs_content_and_positions():
    layout = LAYOUTS[5]
    codes = random_codes(layout, random_grains(layout, 6))
    likelihood = make_ar(layout)(codes, labels_for(layout, 6))
    terms = AutoregressiveObjective()(likelihood)
    per_code = float(likelihood.total.sum() / codes.lengths.sum())
    assert float(weighted_sum(terms)) == pytest.approx(per_code, rel=1e-5)
    assert float(terms["content"].mean) == pytest.approx(
        float(likelihood.content.sum() / codes.lengths.sum()), rel=1e-5
    )
    published = AutoregressiveObjective(1.0)(likelihood)
    means = [float(likelihood.position[likelihood.is_decision & (likelihood.grain == g)].mean()) for g in range(2)]
    # a third for each of three grains, also where the last one's positions are implied
    assert float(weighted_sum(published)) == pytest.approx(float(terms["content"].mean) + sum(means) / 3, rel=1e-5)
    assert float(terms["position_0"].total + terms["position_1"].total) == pytest.approx(
        float(likelihood.position.sum()), rel=1e-5
    )
    assert float(terms["bits_per_image"].mean) == pytest.approx(float(likelihood.total.mean()) / math.log(2), rel=1e-5)
    parts = [terms[f"bits_{name}_{g}"] for name, count in (("content", 3), ("position", 2)) for g in range(count)]
    assert sum(float(part.mean) for part in parts) == pytest.approx(float(terms["bits_per_image"].mean), rel=1e-5)
    assert all(part.weight == 0 for part in parts)


def test_an_untrained_model_pays_log_of_the_codebook():
    layout = LAYOUTS[2]
    model = DGiTAR(
        layout, WIDTH, HeterogeneousEmbedding(layout, WIDTH), ClassConditioning(layout, WIDTH),
        Transformer(WIDTH, 1, 4), Transformer(WIDTH, 1, 4),
    )  # fmt: skip
    codes = random_codes(layout, random_grains(layout, 8))
    terms = AutoregressiveObjective()(model(codes, labels_for(layout, 8)))
    assert terms["content"].mean.item() == pytest.approx(math.log(256), abs=0.15)


def test_an_untrained_masked_model_pays_log_of_the_codebook():
    layout = LAYOUTS[2]
    codes = random_codes(layout, random_grains(layout, 600))
    terms = MaskedObjective()(untrained(layout)(codes, labels_for(layout, 600), SampleRng(0, torch.arange(600))))
    masked = sum(terms[f"content_{g}"].count.item() for g in (0, 1))
    assert terms["content"].total.item() / masked == pytest.approx(math.log(256), abs=0.15)
    # and what is told is the mean over what was masked
    assert terms["content"].mean.item() == pytest.approx(terms["content"].total.item() / masked, rel=0.03)
    assert terms["grains"].mean.item() == pytest.approx(math.log(2), rel=0.1)


@pytest.mark.parametrize("codebook", ["shared", "per_grain"])
@pytest.mark.parametrize("grains", [((8, 8),), ((8, 8), (4, 4)), ((8, 8), (8, 4), (4, 4))], ids=str)
def test_the_loss_of_a_batch_is_that_of_its_images_and_reaches_every_weight(grains, codebook):
    layout = CodeLayout((16, 32), grains, 9, 2, codebook)
    model, codes = make_nar(layout, block=MODERN), random_codes(layout, random_grains(layout, 6))
    model.requires_grad_(True)
    labels, objective = labels_for(layout, 6), MaskedObjective(0.5)
    terms = objective(model(codes, labels, SampleRng(1, torch.arange(6))))
    counts = objective.counts(codes, model)
    assert counts.keys() == {name for name, term in terms.items() if term.weight}
    assert all(float(terms[name].count) == float(counts[name]) for name in counts)
    parts = [objective(model(codes[[i]], labels[[i]], SampleRng(1, torch.tensor([i])))) for i in range(6)]
    whole, total = weighted_sum(terms), terms["content"].total.item()
    torch.testing.assert_close(sum(weighted_sum(part, counts) for part in parts), whole)
    weighted_sum(terms).backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())
    groups = [f"at_{percent}" for percent in (25, 50, 75, 100)], [str(g) for g in range(layout.num_grains)]
    for group in groups:  # each masked code is in one
        assert sum(float(terms[f"content_{name}"].total) for name in group) == pytest.approx(total)
        assert all(0 <= float(terms[f"accuracy_{name}"].mean) <= 1 for name in group)
    figures = {name: float(term.mean.detach()) for name, term in terms.items()}
    assert objective.judge(figures) == pytest.approx(whole.item())
