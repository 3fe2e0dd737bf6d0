from dataclasses import replace

import pytest
import torch
from helpers_generators import CLASSED, MODERN, WIDTH, labels_for, make_ar
from strategies import LAYOUTS, random_codes, random_grains

from graincode.core.codes import GrainCodes
from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout
from graincode.core.logits import draw
from graincode.core.prompts import CodePrefix
from graincode.core.sequences import from_sequences, to_sequences
from graincode.generator import (
    AutoregressiveObjective,
    ClassConditioning,
    DGiTAR,
    HeterogeneousEmbedding,
    NoConditioning,
    Transformer,
)
from graincode.generator.dgit_ar import CachedLogits
from graincode.sampling import autoregressive as sampling

SMALL = CodeLayout((32, 32), ((16, 16), (8, 8)), 256, 10)
VARIANTS = {
    "plain": {},
    "modern": {"block": MODERN},
    "modelled": {"last_positions": "modelled"},
    "rotary alone": {"block": {"rotary": True}, "parts": {"position": "none", "index": False}},
    "shared positions": {"parts": {"position": "shared", "grain": False}},
    "one stack": {"layers": (0, 2)},
    "no conditioning": {"block": MODERN | {"adaln": False}, "conditioning": NoConditioning},
    "given map": {"grain_map": "given"},
    "map alone": {"block": MODERN, "conditioning": NoConditioning, "grain_map": "given"},
}


CASES = [
    pytest.param(layout, variant, id=f"{layout}-{variant}")
    for layout in CLASSED
    for variant, options in VARIANTS.items()
    if layout.num_grains > 1 or not {"last_positions", "grain_map"} & options.keys()
]


@pytest.mark.parametrize(("layout", "variant"), CASES)
def test_cached_logits_are_the_training_logits_at_every_step(layout, variant):
    model, codes = make_ar(layout, **VARIANTS[variant]), random_codes(layout, random_grains(layout, 4))
    labels, sequences = labels_for(layout, 4), to_sequences(codes)
    condition = model.condition(labels, codes.grains)
    hidden, contents = model.hidden_and_contents(sequences, condition)
    cached = CachedLogits(model, condition)
    slot, content = torch.full((4,), layout.start_slot), torch.full((4,), layout.no_content)
    grain = torch.zeros(4, dtype=torch.long)
    for step in range(sequences.slots.shape[1]):
        with torch.no_grad():
            cached.take(slot, content)
            regions = cached.regions()
            logits = cached.contents(sequences.slots[:, step])
        alive = sequences.slots[:, step] != layout.pad_slot
        expected = model.regions_of(hidden[:, step], grain)
        torch.testing.assert_close(regions[alive], expected[alive], atol=1e-4, rtol=0)
        torch.testing.assert_close(logits[alive], contents[alive, step], atol=1e-4, rtol=0)
        slot, content = sequences.slots[:, step], sequences.contents[:, step]
        grain = grain + (alive & layout.slots().is_end[slot.clamp(max=layout.num_slots - 1)])


@pytest.mark.parametrize("variant", ["plain", "modern"])
@pytest.mark.parametrize("layout", CLASSED, ids=str)
def test_a_sample_depends_on_its_seed_index_and_label_alone(layout, variant):
    model = make_ar(layout, dtype=torch.float64, **VARIANTS[variant])
    labels = labels_for(layout, 5)
    everything = model.sample(labels, seed=5, batch_size=5)
    again = model.sample(labels, seed=5, batch_size=3)
    assert torch.equal(again.indices, everything.indices)
    assert torch.equal(again.grains, everything.grains)
    alone = model.sample(labels[4:], seed=5, first_index=4, batch_size=1)
    assert torch.equal(alone.indices[0], everything.indices[4])
    assert not torch.equal(alone.indices[0], everything.indices[3])


def test_in_float32_a_sample_is_the_same_at_a_fixed_compute_batch():
    layout = LAYOUTS[2]
    model, labels = make_ar(layout), labels_for(layout, 10)
    everything = model.sample(labels, seed=1, batch_size=8)
    part = model.sample(labels[8:], seed=1, first_index=8, batch_size=8)
    assert torch.equal(part.indices, everything.indices[8:])


@pytest.mark.parametrize(("layout", "variant"), CASES)
def test_likelihood_of_one_image_does_not_depend_on_the_others(layout, variant):
    model = make_ar(layout, dtype=torch.float64, **VARIANTS[variant])
    codes = random_codes(layout, random_grains(layout, 5))
    labels = labels_for(layout, 5)
    together = model(codes, labels).total
    for row in range(5):
        torch.testing.assert_close(model(codes[[row]], labels[[row]]).total[0], together[row])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", [LAYOUTS[2], LAYOUTS[5]], ids=str)
def test_changing_a_code_changes_nothing_before_it(layout, variant):
    model = make_ar(layout, dtype=torch.float64, **VARIANTS[variant])
    codes = random_codes(layout, random_grains(layout, 3))
    sequences, labels = to_sequences(codes), labels_for(layout, 3)
    condition = model.condition(labels, codes.grains)
    hidden, contents = model.hidden_and_contents(sequences, condition)

    def after(slots, contents):
        return model.hidden_and_contents(type(sequences)(slots, contents, layout), condition)

    for j in range(0, sequences.slots.shape[1] - 1, 3):
        changed = sequences.contents.clone()
        changed[:, j] = (changed[:, j] + 1) % layout.codebook_size
        hidden_after, contents_after = after(sequences.slots, changed)
        assert torch.equal(hidden[:, : j + 1], hidden_after[:, : j + 1])
        assert torch.equal(contents[:, : j + 1], contents_after[:, : j + 1])
        assert not torch.equal(contents[:, j + 1 :], contents_after[:, j + 1 :])
        moved = sequences.slots.clone()
        moved[:, j] = (moved[:, j] + 1) % layout.num_slots
        hidden_after, contents_after = after(moved, sequences.contents)
        assert torch.equal(hidden[:, : j + 1], hidden_after[:, : j + 1])  # which decide where code j is
        assert torch.equal(contents[:, :j], contents_after[:, :j])
        assert not torch.equal(contents[:, j:], contents_after[:, j:])


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


@pytest.mark.parametrize("order", [("regions", False), ("rows", True)], ids=str)
@pytest.mark.parametrize("codebook", ["shared", "per_grain"])
@pytest.mark.parametrize(("size", "grains", "variant"), [
    (size, grains, variant)
    for size, grains in (
        ((4, 4), ((2, 2),)), ((4, 4), ((4, 2), (2, 2))), ((4, 4), ((4, 4), (4, 2), (2, 2))),
        ((4, 6), ((4, 2), (2, 2))), ((8, 4), ((4, 4), (4, 2), (2, 2))),
    )
    for variant in ("plain", "modern", "given map")
    if len(grains) > 1 or variant != "given map"
], ids=str)  # fmt: skip
def test_likelihood_sums_to_one_over_all_codes(size, grains, variant, codebook, order):
    layout = CodeLayout(size, grains, 2, 1, codebook, *order)
    codes = GrainCodes.cat(list(every_code(layout)))
    model = make_ar(layout, dtype=torch.float64, **VARIANTS[variant])
    chances = (-model(codes, torch.zeros(len(codes), dtype=torch.long)).total).exp()
    if model.needs_prompt:  # over the codes of each map
        maps = codes.grains.flatten(1).unique(dim=0, return_inverse=True)[1]
        chances = torch.zeros(int(maps.max()) + 1, dtype=torch.float64).index_add(0, maps, chances)
        assert len(chances) == layout.num_grains**layout.num_regions
    else:
        chances = chances.sum()
    torch.testing.assert_close(chances, torch.ones_like(chances), atol=1e-9, rtol=0)


@pytest.mark.parametrize("variant", ["plain", "modelled", "given map"])
def test_codes_in_another_order_are_taken_in_its_own(variant):
    own = replace(LAYOUTS[5], last_grain_order="rows", grain_starts=True)
    model, labels = make_ar(own, dtype=torch.float64, **VARIANTS[variant]), labels_for(own, 4)
    mine = random_codes(own, random_grains(own, 4))
    theirs = replace(mine, layout=LAYOUTS[5])
    assert torch.equal(model(theirs, labels).total, model(mine, labels).total)
    assert model.prompt_of(theirs) is None or model.prompt_of(theirs).layout == own


def test_starts_of_grains_cost_nothing():
    layout = LAYOUTS[-1]
    codes = random_codes(layout, random_grains(layout, 4))
    likelihood = make_ar(layout)(codes, labels_for(layout, 4))
    sequences, table = to_sequences(codes), layout.slots()
    known = sequences.slots.clamp(max=layout.num_slots - 1)
    is_start = sequences.is_token & ~table.is_code[known] & ~table.is_end[known]
    assert (is_start.sum(dim=1) == layout.num_grains - 1).all()
    assert float((likelihood.content + likelihood.position)[is_start].abs().sum()) == 0
    assert not likelihood.is_decision[is_start].any()


def test_modelled_last_positions_are_paid_for_over_all_regions():
    layout = CodeLayout((4, 4), ((4, 2), (2, 2)), 2, 1)
    codes = GrainCodes.cat(list(every_code(layout)))
    labels = torch.zeros(len(codes), dtype=torch.long)
    model = make_ar(layout, dtype=torch.float64, last_positions="modelled")
    modelled = model(codes, labels)
    assert float((-modelled.total).exp().sum()) < 0.9  # what cannot be has a share of the probability
    last = modelled.is_decision & (modelled.grain == 1)
    assert torch.equal(last.sum(dim=1), (codes.grains == 1).sum(dim=(1, 2)))
    # its logits, renormalised over both regions, by hand: the first fine region of an image that is fine everywhere
    fine = (codes.grains == 1).all(dim=(1, 2)).nonzero()[0]
    sequences = to_sequences(codes[fine])
    hidden, _ = model.hidden_and_contents(sequences, model.condition(labels[:1], None))
    logits = model.regions_of(hidden[0, 1:2], torch.ones(1, dtype=torch.long))[0, :2]
    assert float(modelled.position[fine, 1]) == pytest.approx(float(-logits.log_softmax(0)[0]))
    assert modelled.bits()["position_1"].shape == (len(codes),)
    drawn = model.sample(labels[:50], batch_size=50)
    assert (drawn.grains == 1).any()


def plain_decoder(model, codes, labels):
    """K = 1, written anew: a causal decoder in raster order, which gets the next position after its first stack."""

    def attention(block, x):
        q, k, v = (part.view(*x.shape[:2], 4, -1) for part in block.attention.qkv(block.norm1(x)).chunk(3, dim=-1))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
        length = x.shape[1]
        scores = scores + torch.full((length, length), -torch.inf, dtype=x.dtype).triu(1)
        mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)
        return x + block.attention.out(mixed)

    def stack(transformer, x):
        for block in transformer.blocks:
            x = attention(block, x)
            x = x + block.mlp[2](torch.nn.functional.gelu(block.mlp[0](block.norm2(x))))
        return transformer.norm(x)

    embedding, contents = model.embedding, codes.indices.flatten(1)
    cells = contents.shape[1]
    at = embedding.position.weight[:cells] + embedding.grain.weight[0]
    start = embedding.position.weight[cells + 1] + embedding.grain.weight[1] + embedding.content.weight[-1]
    tokens = embedding.content(contents[:, :-1]) + at[:-1]
    tokens = torch.cat([start.expand(len(contents), 1, -1), tokens], dim=1) + embedding.index.weight[:cells]
    tokens = tokens + model.conditioning.table(labels)[:, None]

    def unit(x):
        x = x - x.mean(dim=-1, keepdim=True)
        return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()

    hidden = stack(model.position_transformer, unit(tokens))
    states = stack(model.content_transformer, hidden + unit(at))
    logits = states @ model.content_head.weight.T + model.content_head.bias
    return -logits.log_softmax(-1).gather(2, contents[..., None])[..., 0]


def test_with_one_grain_it_is_a_plain_raster_decoder():
    layout = CodeLayout((16, 24), ((4, 4),), 16, 3)
    model, codes = make_ar(layout, dtype=torch.float64), random_codes(layout, random_grains(layout, 5))
    labels = labels_for(layout, 5)
    likelihood = model(codes, labels)
    torch.testing.assert_close(likelihood.content, plain_decoder(model, codes, labels))
    assert float(likelihood.position.abs().max()) == 0


def test_a_plain_decoder_does_not_know_the_next_position():
    layout = CodeLayout((16, 24), ((4, 4),), 16, 3)
    model = make_ar(layout, dtype=torch.float64, layers=(0, 2), next_position=False)
    codes, labels = random_codes(layout, random_grains(layout, 5)), labels_for(layout, 5)
    sequences = to_sequences(codes)
    before = model(codes, labels).content
    model.embedding.position.weight[int(sequences.slots[0, -1])] += 1  # no token stands behind the last one
    torch.testing.assert_close(model(codes, labels).content, before)
    assert len(model.sample(labels, batch_size=5)) == 5
    with pytest.raises(GraincodeError, match=r"^next_position=False: expected true"):
        make_ar(LAYOUTS[2], next_position=False)


@pytest.mark.parametrize("layout", [
    CodeLayout((4, 4), ((4, 2), (2, 2)), 2, 1), CodeLayout((8, 4), ((4, 4), (4, 2), (2, 2)), 2, 1),
    CodeLayout((4, 4), ((4, 2), (2, 2)), 2, 1, "shared", "rows", True),
], ids=str)  # fmt: skip
def test_samples_follow_the_likelihood(layout):
    model = make_ar(layout, dtype=torch.float64)
    codes = GrainCodes.cat(list(every_code(layout)))
    expected = (-model(codes, torch.zeros(len(codes), dtype=torch.long)).total).exp()
    count = 4000
    drawn = model.sample(torch.zeros(count, dtype=torch.long), batch_size=1000)
    key = lambda c: torch.cat([c.grains.flatten(1), c.indices.flatten(1)], dim=1)  # noqa: E731
    found = (key(drawn)[:, None] == key(codes)[None]).all(dim=2).double().mean(dim=0)
    assert float(found.sum()) == pytest.approx(1)
    spread = (expected * (1 - expected) / count).sqrt()
    assert float(((found - expected).abs() / spread.clamp(min=1e-3)).max()) < 5


@pytest.mark.parametrize(("layout", "variant"), CASES)
def test_samples_have_the_likelihood_that_they_were_drawn_with(layout, variant, monkeypatch):
    model, labels = make_ar(layout, dtype=torch.float64, **VARIANTS[variant]), labels_for(layout, 6)
    given = model.prompt_of(random_codes(layout, random_grains(layout, 6)))
    choices, steps = [], []

    def recorded(logits, uniform):
        chosen = draw(logits, uniform)
        choices.append(-logits.log_softmax(dim=1).gather(1, chosen[:, None])[:, 0])
        return chosen

    def on_step(*_):
        steps.append((choices[0], choices[-1]))  # of the next region, where it was asked for, and of the content
        choices.clear()

    monkeypatch.setattr(sampling, "draw", recorded)
    likelihood = model(model.sample(labels, batch_size=6, given=given, on_step=on_step), labels)
    regions, contents = (torch.stack(part[: likelihood.content.shape[1]], dim=1) for part in zip(*steps, strict=True))
    # "modelled" positions of the last grain are paid for, and not drawn
    decided = likelihood.is_decision & (likelihood.grain < layout.num_ends)
    torch.testing.assert_close(likelihood.content, contents * likelihood.is_code)
    torch.testing.assert_close(likelihood.position * decided, torch.where(decided, regions, 0.0))
    assert decided.any() == (layout.num_grains > 1 and not model.needs_prompt)


def test_positions_that_are_implied_cost_nothing():
    layout = LAYOUTS[2]
    codes = random_codes(layout, random_grains(layout, 4))
    likelihood = make_ar(layout)(codes, labels_for(layout, 4))
    sequences = to_sequences(codes)
    known = sequences.slots.clamp(max=layout.num_slots - 1)
    finest = layout.slots().grain[known] == layout.num_grains - 1
    assert not likelihood.is_decision[finest].any()
    coarse = (codes.grains == 0).sum(dim=(1, 2))
    assert torch.equal(likelihood.is_decision.sum(dim=1), coarse + 1)  # each coarse region, and the end
    assert float(likelihood.position[~likelihood.is_decision].abs().sum()) == 0


def test_without_conditioning_labels_do_not_matter():
    layout = LAYOUTS[2]
    model = make_ar(layout, NoConditioning)
    labels = labels_for(layout, 4)
    assert torch.equal(model.sample(labels, batch_size=4).indices, model.sample(labels * 0, batch_size=4).indices)
    codes = random_codes(layout, random_grains(layout, 4))
    assert torch.equal(model(codes, labels).total, model(codes, labels * 0).total)


def test_with_conditioning_labels_matter():
    layout = LAYOUTS[2]
    model, labels = make_ar(layout), torch.zeros(4, dtype=torch.long)
    codes = random_codes(layout, random_grains(layout, 4))
    assert not torch.equal(model(codes, labels).total, model(codes, labels + 1).total)
    with pytest.raises(GraincodeError, match="0 to 9"):
        model.sample(labels + 10)
    with pytest.raises(GraincodeError, match=r"^conditioning=class: expected none"):
        ClassConditioning(LAYOUTS[0], WIDTH)


def test_label_dropout_happens_in_training_alone():
    conditioning = ClassConditioning(LAYOUTS[2], WIDTH, dropout=0.5)
    labels = torch.zeros(2000, dtype=torch.long)
    hidden = (conditioning.train()(labels) == conditioning.table.weight[LAYOUTS[2].null_class]).all(dim=1)
    assert float(hidden.float().mean()) == pytest.approx(0.5, abs=0.05)
    assert (conditioning.eval()(labels) == conditioning.table.weight[0]).all()


def test_a_grain_map_that_is_given_is_kept_and_costs_nothing():
    layout = LAYOUTS[5]
    codes, labels = random_codes(layout, random_grains(layout, 6)), labels_for(layout, 6)
    given = CodePrefix.of_map(codes)
    assert torch.equal(given.grains, codes.grains)
    plain = make_ar(layout, dtype=torch.float64).sample(labels, batch_size=4, given=given)
    assert torch.equal(plain.grains, codes.grains)
    model = make_ar(layout, dtype=torch.float64, grain_map="given")
    for scale in (1.0, 2.0):
        drawn = model.sample(labels, batch_size=4, given=given, guidance_scale=scale)
        assert torch.equal(drawn.grains, codes.grains)
        assert not torch.equal(drawn.indices, codes.indices)
    likelihood = model(codes, labels)
    assert not likelihood.is_decision.any()
    assert set(likelihood.bits()) == {"per_image", "content_0", "content_1", "content_2"}
    other = GrainCodes(codes.grains.flip(0), random_codes(layout, codes.grains.flip(0)).indices, layout)
    first, second = (model.condition(labels, one.grains) for one in (codes, other))
    assert not torch.equal(first, second)  # it knows the map from the start
    for wrong in ({}, {"given": CodePrefix.of_grains(codes, 1)}):
        with pytest.raises(GraincodeError, match="a grain map"):
            model.sample(labels, **wrong)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_in_mixed_precision_has_the_gradients_of_float32_without_a_warning(variant):
    layout = LAYOUTS[2]
    model = make_ar(layout, **VARIANTS[variant]).requires_grad_(True)
    codes, labels = random_codes(layout, random_grains(layout, 4)), labels_for(layout, 4)
    gradients = []
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # or what warned in another test would be silent here
    try:
        for mixed in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                model(codes, labels).total.mean().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
            model.zero_grad()
    finally:
        torch.set_warn_always(always)
    exact, rough = gradients
    assert float((rough - exact).norm() / exact.norm()) < 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_are_drawn_in_half_precision_too(variant):
    layout = SMALL
    model, labels = make_ar(layout, **VARIANTS[variant]), labels_for(layout, 4)
    codes = random_codes(layout, random_grains(layout, 4))
    sequences = to_sequences(codes)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        cached = CachedLogits(model.to(dtype), model.condition(labels, codes.grains))
        slot, content = torch.full((4,), layout.start_slot), torch.full((4,), layout.no_content)
        logits = []
        for slots, contents in zip(sequences.slots.T, sequences.contents.T, strict=True):
            cached.take(slot, content)
            logits.append(torch.cat([cached.regions(), cached.contents(slots)], dim=1))
            slot, content = slots, contents
        found.append(torch.stack(logits, dim=1)[sequences.is_code])
    assert found[1].dtype == torch.float32  # in which they are truncated and guided
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 0.03
    settings = {"given": CodePrefix.of_map(codes)} if model.needs_prompt else {"region_top_k": 1}
    for scale in (1.0, 2.0) if model.classes else (1.0,):
        greedy, again = (
            model.sample(labels, seed, batch_size=4, guidance_scale=scale, top_k=1, **settings) for seed in (1, 2)
        )
        assert torch.equal(greedy.indices, again.indices)


def test_a_generator_in_training_mode_does_not_sample():
    layout = LAYOUTS[2]
    with pytest.raises(GraincodeError, match=r"call generator\.eval\(\)"):
        make_ar(layout).train().sample(labels_for(layout, 2))


@pytest.mark.parametrize(
    ("labels", "settings", "expected"),
    [
        (torch.zeros(1).long(), {"seed": -1}, "seed=-1: expected 0 or more"),
        (torch.zeros(1).long(), {"first_index": -1}, "first_index=-1: expected 0 or more"),
        (torch.zeros(1).long(), {"batch_size": 0}, "batch_size=0: expected 1 or more"),
        ([0, 1], {}, "labels="),
        (torch.tensor(1), {}, "labels="),
        (torch.zeros(2), {}, "labels="),
        (torch.zeros(0).long(), {}, "labels="),
    ],
)
def test_arguments_of_samples_that_do_not_fit_are_refused(labels, settings, expected):
    with pytest.raises(GraincodeError, match=f"^{expected}") as error:
        make_ar(LAYOUTS[2]).eval().sample(labels, **settings)
    assert "\n" not in str(error.value)


def test_parts_that_do_not_fit_are_refused():
    layout = LAYOUTS[2]
    for settings, expected in (
        ((30, 1, 4), "heads=4"), ((32, 1, 0), "heads=0"), ((32, -1, 4), "layers=-1"), ((32, 1, 4, 1.0), "dropout=1.0"),
        ((36, 1, 6, 0.0, True, "layer", "gelu", False, True), "heads=6"), 
        ((32, 1, 4, 0.0, True, "batch"), "norm=batch"), ((0, 1, 4), "width=0"),
    ):  # fmt: skip
        with pytest.raises(GraincodeError, match=f"^{expected}: expected"):
            Transformer(*settings)
    for name in ("position", "content"):
        stacks = [Transformer(WIDTH, 1, 4, causal=name != part) for part in ("position", "content")]
        with pytest.raises(GraincodeError, match=r"^causal=False: expected true"):
            DGiTAR(layout, WIDTH, HeterogeneousEmbedding(layout, WIDTH), NoConditioning(layout, WIDTH), *stacks)
    with pytest.raises(GraincodeError, match=r"^position=none: expected"):
        make_ar(layout, parts={"position": "none"})
    assert make_ar(LAYOUTS[1], parts={"position": "none"})  # the index tells it
    for one, options, name in (
        (layout, {"grain_map": "given", "last_positions": "modelled"}, "last_positions=modelled"),
        (LAYOUTS[1], {"last_positions": "modelled"}, "last_positions=modelled"),
        (LAYOUTS[1], {"grain_map": "given"}, "grain_map=given"),
        (layout, {"grain_map": "late"}, "grain_map=late"),
    ):
        with pytest.raises(GraincodeError, match=f"^{name}: expected"):
            make_ar(one, **options)
    with pytest.raises(GraincodeError, match=r"^adaln=True: expected false"):
        make_ar(layout, NoConditioning, block=MODERN)
    with pytest.raises(GraincodeError, match=r"^position_weight=-1\.0: expected"):
        AutoregressiveObjective(-1.0)


def test_settings_that_would_do_nothing_are_refused():
    layout = LAYOUTS[2]
    labels, given = labels_for(layout, 2), CodePrefix.of_map(random_codes(layout, random_grains(layout, 2)))
    never = make_ar(layout)
    never.conditioning.dropout = 0.0
    with pytest.raises(GraincodeError, match=r"^guidance_scale=2\.0: expected 1.* dropout=0"):
        never.sample(labels, guidance_scale=2.0)
    assert len(never.sample(labels)) == 2
    for model, begun, why in (
        (make_ar(LAYOUTS[1]), None, "one grain"), (make_ar(layout, grain_map="given"), given, "given grain maps"),
    ):  # fmt: skip
        for name, value, plain in (
            ("temperature", 0.5, 1.0),
            ("top_k", 3, 0),
            ("top_p", 0.5, 1.0),
            ("min_p", 0.1, 0.0),
        ):
            expected = rf"^region_{name}={value}: expected {plain}, .*{why}$"
            with pytest.raises(GraincodeError, match=expected):
                model.sample(labels, given=begun, **{f"region_{name}": value})
