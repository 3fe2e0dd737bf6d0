import math

import pytest
import torch
from strategies import LAYOUTS, random_codes, random_grains

from graincode.core.codes import CodeLayout, GrainCodes, from_sequences, to_sequences
from graincode.core.errors import GraincodeError
from graincode.core.rng import uniforms
from graincode.generator import (
    AutoregressiveObjective,
    CachedLogits,
    ClassConditioning,
    DGiTAR,
    HeterogeneousEmbedding,
    NoConditioning,
    Transformer,
)
from graincode.sampling import AutoregressiveSampler

WIDTH = 32
CLASSED = [layout for layout in LAYOUTS if layout.classes]


def make(layout, conditioning=ClassConditioning, dtype=torch.float32):
    """A generator with weights large enough that nothing it does is close to uniform."""
    model = DGiTAR(
        layout,
        WIDTH,
        HeterogeneousEmbedding(layout, WIDTH),
        conditioning(layout, WIDTH),
        Transformer(WIDTH, 1, 4),
        Transformer(WIDTH, 2, 4),
    )
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    return model.eval().to(dtype).requires_grad_(False)


def labels_for(layout, count):
    return torch.arange(count) % layout.classes


@pytest.mark.parametrize("layout", CLASSED, ids=str)
def test_cached_logits_are_the_training_logits_at_every_step(layout):
    model, codes = make(layout), random_codes(layout, random_grains(layout, 4))
    labels, sequences = labels_for(layout, 4), to_sequences(codes)
    hidden, contents = model.hidden_and_contents(sequences, labels)
    cached = CachedLogits(model, labels)
    slot, content = torch.full((4,), layout.start_slot), torch.full((4,), layout.no_content)
    grain = torch.zeros(4, dtype=torch.long)
    for step in range(sequences.slots.shape[1]):
        with torch.no_grad():
            regions = cached.next_region(slot, content)
            logits = cached.next_content(sequences.slots[:, step])
        alive = sequences.slots[:, step] != layout.pad_slot
        expected = model.regions_of(hidden[:, step], grain)
        torch.testing.assert_close(regions[alive], expected[alive], atol=1e-4, rtol=0)
        torch.testing.assert_close(logits[alive], contents[alive, step], atol=1e-4, rtol=0)
        slot, content = sequences.slots[:, step], sequences.contents[:, step]
        grain = grain + (alive & (content == layout.no_content))


@pytest.mark.parametrize("layout", CLASSED, ids=str)
def test_a_sample_depends_on_its_seed_index_and_label_alone(layout):
    model = make(layout, dtype=torch.float64)
    labels = labels_for(layout, 9)
    everything = model.sample(labels, seed=5, batch_size=9)
    for batch_size in (1, 4):
        again = model.sample(labels, seed=5, batch_size=batch_size)
        assert torch.equal(again.indices, everything.indices)
        assert torch.equal(again.grains, everything.grains)
    alone = model.sample(labels[6:7], seed=5, first_index=6, batch_size=3)
    assert torch.equal(alone.indices[0], everything.indices[6])
    assert not torch.equal(model.sample(labels, seed=6, batch_size=9).indices, everything.indices)


def test_in_float32_a_sample_is_the_same_at_a_fixed_compute_batch():
    layout = LAYOUTS[2]
    model, labels = make(layout), labels_for(layout, 10)
    everything = model.sample(labels, seed=1, batch_size=8)
    part = model.sample(labels[8:], seed=1, first_index=8, batch_size=8)
    assert torch.equal(part.indices, everything.indices[8:])


@pytest.mark.parametrize("layout", CLASSED, ids=str)
def test_likelihood_of_one_image_does_not_depend_on_the_others(layout):
    model, codes = make(layout, dtype=torch.float64), random_codes(layout, random_grains(layout, 5))
    labels = labels_for(layout, 5)
    together = model(codes, labels).total
    for row in range(5):
        torch.testing.assert_close(model(codes[[row]], labels[[row]]).total[0], together[row])


def test_changing_a_code_changes_nothing_before_it():
    layout = LAYOUTS[2]
    model, codes = make(layout, dtype=torch.float64), random_codes(layout, random_grains(layout, 3))
    sequences, labels = to_sequences(codes), labels_for(layout, 3)
    hidden, contents = model.hidden_and_contents(sequences, labels)
    changed = sequences.contents.clone()
    changed[:, 9] = (changed[:, 9] + 1) % layout.codebook_size
    other = type(sequences)(sequences.slots, changed, layout)
    hidden_after, contents_after = model.hidden_and_contents(other, labels)
    assert torch.equal(hidden[:, :10], hidden_after[:, :10])
    assert torch.equal(contents[:, :10], contents_after[:, :10])
    assert not torch.equal(contents[2, 10:], contents_after[2, 10:])


def every_code(layout):
    """All codes of a tiny layout, one by one."""
    maps = torch.cartesian_prod(*[torch.arange(layout.num_grains)] * layout.num_regions)
    for grains in maps.view(-1, 1, *layout.grids[0]):
        length = int(layout.lengths(grains))
        blank = random_codes(layout, grains)
        sequences = to_sequences(blank)
        for contents in torch.cartesian_prod(*[torch.arange(layout.codebook_size)] * length).view(-1, length):
            dense = sequences.contents.clone()
            dense[sequences.is_code] = contents
            yield from_sequences(type(sequences)(sequences.slots, dense, layout))


@pytest.mark.parametrize("grains", [((2, 2),), ((4, 2), (2, 2)), ((4, 4), (4, 2), (2, 2))], ids=str)
def test_likelihood_sums_to_one_over_all_codes(grains):
    layout = CodeLayout((4, 4), grains, 2, 1)
    codes = GrainCodes.cat(list(every_code(layout)))
    total = make(layout, dtype=torch.float64)(codes, torch.zeros(len(codes), dtype=torch.long)).total
    assert float((-total).exp().sum()) == pytest.approx(1, abs=1e-9)


def test_samples_follow_the_likelihood():
    layout = CodeLayout((4, 4), ((4, 2), (2, 2)), 2, 1)
    model = make(layout, dtype=torch.float64)
    codes = GrainCodes.cat(list(every_code(layout)))
    expected = (-model(codes, torch.zeros(len(codes), dtype=torch.long)).total).exp()
    count = 4000
    drawn = model.sample(torch.zeros(count, dtype=torch.long), batch_size=1000)
    key = lambda c: torch.cat([c.grains.flatten(1), c.indices.flatten(1)], dim=1)  # noqa: E731
    found = (key(drawn)[:, None] == key(codes)[None]).all(dim=2).double().mean(dim=0)
    assert float(found.sum()) == pytest.approx(1)
    spread = (expected * (1 - expected) / count).sqrt()
    assert float(((found - expected).abs() / spread.clamp(min=1e-3)).max()) < 5


def test_the_last_cell_of_every_grid_can_be_drawn():
    layout = LAYOUTS[5]
    codes = make(layout).sample(torch.zeros(300, dtype=torch.long), batch_size=300)
    for g in range(layout.num_grains):
        assert layout.cells_at(codes.grains, g)[:, -1, -1].any(), f"grain {g}"


def test_positions_that_are_implied_cost_nothing():
    layout = LAYOUTS[2]
    codes = random_codes(layout, random_grains(layout, 4))
    likelihood = make(layout)(codes, labels_for(layout, 4))
    sequences = to_sequences(codes)
    known = sequences.slots.clamp(max=layout.num_slots - 1)
    finest = layout.slots().grain[known] == layout.num_grains - 1
    assert not likelihood.is_decision[finest].any()
    coarse = (codes.grains == 0).sum(dim=(1, 2))
    assert torch.equal(likelihood.is_decision.sum(dim=1), coarse + 1)  # each coarse region, and the end
    assert float(likelihood.position[~likelihood.is_decision].abs().sum()) == 0


def test_without_conditioning_labels_do_not_matter():
    layout = LAYOUTS[2]
    model = make(layout, NoConditioning)
    labels = labels_for(layout, 4)
    assert torch.equal(model.sample(labels, batch_size=4).indices, model.sample(labels * 0, batch_size=4).indices)
    codes = random_codes(layout, random_grains(layout, 4))
    assert torch.equal(model(codes, labels).total, model(codes, labels * 0).total)


def test_with_conditioning_labels_matter():
    layout = LAYOUTS[2]
    model, labels = make(layout), torch.zeros(4, dtype=torch.long)
    codes = random_codes(layout, random_grains(layout, 4))
    assert not torch.equal(model(codes, labels).total, model(codes, labels + 1).total)
    with pytest.raises(GraincodeError, match="0 to 9"):
        model.sample(labels + 10)
    with pytest.raises(GraincodeError, match="generator/conditioning=none"):
        ClassConditioning(LAYOUTS[0], WIDTH)


def test_guidance_of_scale_one_is_the_conditional_model_and_more_moves_away_from_the_unconditional():
    layout = LAYOUTS[2]
    model, labels = make(layout, dtype=torch.float64), labels_for(layout, 6)
    plain = model.sample(labels, batch_size=6)
    assert torch.equal(model.sample(labels, batch_size=6, guidance_scale=1.0 + 1e-13).indices, plain.indices)
    null = torch.full_like(labels, layout.null_class)
    unguided = AutoregressiveSampler(guidance_scale=1e-13)(
        CachedLogits(model, torch.cat([labels, null])), layout, uniforms(0, range(6), layout.max_tokens, 2)
    )
    unconditional = AutoregressiveSampler()(
        CachedLogits(model, null), layout, uniforms(0, range(6), layout.max_tokens, 2)
    )
    assert torch.equal(from_sequences(unguided).indices, from_sequences(unconditional).indices)
    assert not torch.equal(model.sample(labels, batch_size=6, guidance_scale=3.0).indices, plain.indices)
    with pytest.raises(GraincodeError, match=r"type sampler\.guidance_scale=1"):
        make(layout, NoConditioning).sample(labels, guidance_scale=2.0)


def test_label_dropout_happens_in_training_alone():
    conditioning = ClassConditioning(LAYOUTS[2], WIDTH, dropout=0.5)
    labels = torch.zeros(2000, dtype=torch.long)
    hidden = (conditioning.train()(labels) == conditioning.table.weight[LAYOUTS[2].null_class]).all(dim=1)
    assert float(hidden.float().mean()) == pytest.approx(0.5, abs=0.05)
    assert (conditioning.eval()(labels) == conditioning.table.weight[0]).all()


def test_greedy_and_truncated_sampling():
    layout = LAYOUTS[2]
    model, labels = make(layout), labels_for(layout, 6)
    greedy = model.sample(labels, seed=1, batch_size=6, top_k=1, region_top_k=1)
    assert torch.equal(greedy.indices, model.sample(labels, seed=2, batch_size=6, top_k=1, region_top_k=1).indices)
    with pytest.raises(GraincodeError, match="temperature"):
        model.sample(labels, temperature=0)


def test_objective_weighs_content_and_positions():
    layout = LAYOUTS[5]
    codes = random_codes(layout, random_grains(layout, 6))
    likelihood = make(layout)(codes, labels_for(layout, 6))
    terms = AutoregressiveObjective()(likelihood, layout.num_grains)
    assert float(terms["content"].mean) == pytest.approx(
        float(likelihood.content.sum() / codes.lengths.sum()), rel=1e-5
    )
    assert [terms[f"position_{g}"].weight for g in range(2)] == [0.5, 0.5]
    assert float(terms["position_0"].total + terms["position_1"].total) == pytest.approx(
        float(likelihood.position.sum()), rel=1e-5
    )
    assert float(terms["nats_per_image"].mean) == pytest.approx(float(likelihood.total.mean()), rel=1e-5)


def test_an_untrained_model_pays_log_of_the_codebook():
    layout = LAYOUTS[2]
    model = DGiTAR(
        layout, WIDTH, HeterogeneousEmbedding(layout, WIDTH), ClassConditioning(layout, WIDTH),
        Transformer(WIDTH, 1, 4), Transformer(WIDTH, 1, 4),
    )  # fmt: skip
    codes = random_codes(layout, random_grains(layout, 8))
    terms = AutoregressiveObjective()(model(codes, labels_for(layout, 8)), layout.num_grains)
    assert float(terms["content"].mean) == pytest.approx(math.log(256), abs=0.15)


def test_heads_must_divide_the_width():
    with pytest.raises(GraincodeError, match="divides it"):
        Transformer(30, 1, 4)
