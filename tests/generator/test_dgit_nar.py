import copy
import math
from itertools import pairwise

import pytest
import torch
from strategies import LAYOUTS, random_codes, random_grains

from graincode.core.codes import GrainCodes
from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout
from graincode.core.logits import draw, gumbel
from graincode.core.losses import weighted_sum
from graincode.core.prompts import CodeMask, CodePrefix
from graincode.core.rng import SampleRng, uniforms
from graincode.core.schedules import MASK_SCHEDULES
from graincode.core.sequences import from_sequences, to_sequences
from graincode.generator import (
    ClassConditioning,
    DGiTAR,
    DGiTNAR,
    HeterogeneousEmbedding,
    InformationMasking,
    MaskedObjective,
    NoConditioning,
    Transformer,
)
from graincode.generator.dgit_nar import ConditionedLogits
from graincode.sampling import AutoregressiveSampler, AutoSampler, MaskedSampler
from graincode.sampling.guidance import GuidedMaskedLogits

WIDTH = 32
CLASSED = [layout for layout in LAYOUTS if layout.classes]
MODERN = {"norm": "rms", "mlp": "swiglu", "qk_norm": True, "rotary": True, "adaln": True}
ORDERS = ("confidence", "random", "halton", "coarse_first", "dense_first")
GAMMA = {
    "cosine": lambda u: math.cos(math.pi / 2 * u),
    "linear": lambda u: 1 - u,
    "arccos": lambda u: 2 / math.pi * math.acos(u),
}


def make(layout, conditioning=ClassConditioning, dtype=torch.float64, block=None, parts=None, **options):
    """A generator with weights large enough that nothing it does is close to uniform."""
    model = DGiTNAR(
        layout,
        WIDTH,
        HeterogeneousEmbedding(layout, WIDTH, index=False, **(parts or {})),
        conditioning(layout, WIDTH),
        *(Transformer(WIDTH, 2, 4, causal=False, **(block or {})) for _ in range(2)),
        **options,
    )
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    return model.eval().to(dtype).requires_grad_(False)


VARIANTS = {
    "plain": {},
    "modern": {"block": MODERN},
    "rotary alone": {"block": {"rotary": True}, "parts": {"position": "none"}},
    "shared positions": {"parts": {"position": "shared", "grain": False}},
    "no conditioning": {"block": MODERN | {"adaln": False}, "conditioning": NoConditioning},
}


def labels_for(layout, count):
    return torch.arange(count) % layout.classes


def same(a, b):
    return torch.equal(a.grains, b.grains) and torch.equal(a.indices, b.indices)


class Recorder:
    """Logits that note what they were asked."""

    def __init__(self, logits):
        self.logits, self.seen, self.maps = logits, [], []

    def grains(self, values):
        self.maps.append(values)
        return self.logits.grains(values)

    def contents(self, slots, contents, at):
        self.slots = slots
        self.seen.append(contents)
        layout = self.logits.model.layout
        assert torch.equal(at, (contents == layout.no_content) & (slots != layout.pad_slot))
        return self.logits.contents(slots, contents, at)


def everywhere(ask, slots, contents):
    """(B, L, V) logits of all places."""
    logits = ask.contents(slots, contents, torch.ones_like(slots, dtype=torch.bool))
    return logits(torch.arange(slots.numel())).unflatten(0, slots.shape)


def drawn(model, sampler, count, given=None, seed=0):
    """Sequences, and what the model was asked on the way."""
    labels = labels_for(model.layout, count)
    if sampler.guidance_scale != 1:
        labels = torch.cat([labels, torch.full_like(labels, model.layout.null_class)])
    recorder = Recorder(ConditionedLogits(model, model.conditioning(labels)))
    numbers = uniforms(seed, range(count), *sampler.numbers(model.layout))
    return sampler(recorder, model.layout, numbers, given=given), recorder


def decoded(ask, mask, own, sampler, noise, temperatures=(1.0, 1.0), weighed=None):
    """MaskGIT's parallel decoding, written anew, of one image and one value at a time: its values after each step,
    (T, N), `mask` where they are masked; of (T, 2, N) random numbers, and what is added to the noise of each value."""
    steps, length, states, certain = len(own), own.shape[2], [], {}
    values = [mask] * length
    for t in range(1, steps + 1):
        temperature = temperatures[0] + (t - 1) / max(steps - 1, 1) * (temperatures[1] - temperatures[0])
        logits = ask(torch.tensor([values]))[0]
        masked = [i for i in range(length) if values[i] == mask]
        for i in masked:
            probabilities = (logits[i] / temperature).softmax(0)
            u = own[t - 1, 0, i]
            values[i] = int((probabilities.cumsum(0) <= u * probabilities.sum()).sum())
            certain[i] = float(logits[i].log_softmax(0)[values[i]])
        scores, left = {}, 1 - t / steps
        for i in masked:
            scores[i] = certain[i] + noise * left * -math.log(-math.log(float(own[t - 1, 1, i])))
            if weighed is not None:
                scores[i] += sampler.information_weight * left * float(weighed[i])
        share = length * GAMMA[sampler.mask_schedule](t / steps)
        count = 0 if t == steps else max(0, min(len(masked) - 1, math.floor(share + 1e-9)))
        for i in sorted(scores, key=scores.get)[:count]:
            values[i] = mask
        states.append(list(values))
    return torch.tensor(states)


def maskgit(model, labels, numbers, sampler, places=None):
    """The contents of each image after each step, (T, N); of places other than a whole grid, the slots of each."""
    layout, table, found = model.layout, model.layout.slots(), []
    last = (1.0, 1.0 if sampler.final_temperature is None else sampler.final_temperature)
    for row, (label, own) in enumerate(zip(labels, numbers, strict=True)):
        slots = (torch.arange(layout.num_regions) if places is None else places[row])[None]
        conditions = model.conditioning(torch.stack([label, torch.tensor(layout.null_class)]))[:, None]
        weighed = table.grain[slots[0]]

        def ask(codes, slots=slots, conditions=conditions):
            with_class, without = (model.content_head(model.states(slots, codes, one), slots) for one in conditions)
            there = float((codes != layout.no_content).double().mean())  # guidance is linear in it
            return without + (1 + (sampler.guidance_scale - 1) * there) * (with_class - without)

        own = own[..., : slots.shape[1]]
        found.append(decoded(ask, layout.no_content, own, sampler, sampler.choice_temperature, last, weighed))
    return found


@pytest.mark.parametrize("schedule", GAMMA)
@pytest.mark.parametrize("steps", [1, 5, 16])
def test_with_one_grain_and_no_density_it_is_maskgit_step_for_step(steps, schedule):
    layout = CodeLayout((16, 16), ((4, 4),), 11, 3)
    model, labels = make(layout), labels_for(layout, 4)
    sampler = MaskedSampler(steps=steps, mask_schedule=schedule, choice_temperature=3.0)
    sequences, recorder = drawn(model, sampler, 4)
    numbers = uniforms(0, range(4), steps, 2, layout.num_regions)
    expected = torch.stack(maskgit(model, labels, numbers, sampler), dim=1)
    assert len(recorder.seen) == steps
    for step in range(1, steps):
        assert torch.equal(recorder.seen[step], expected[step - 1])
    assert torch.equal(sequences.contents, expected[-1])
    assert not recorder.maps


@pytest.mark.parametrize("schedule", GAMMA)
@pytest.mark.parametrize("grains", [((8, 8), (4, 4)), ((8, 8), (4, 4), (2, 2))], ids=str)
def test_the_grain_map_too_is_drawn_step_for_step(grains, schedule):
    layout, steps, count = CodeLayout((32, 32), grains, 5, 3), 6, 4
    model, labels = make(layout), labels_for(layout, count)
    sampler = MaskedSampler(
        steps=2, grain_steps=steps, mask_schedule=schedule, grain_choice_temperature=1.0, grain_temperature=0.8,
        final_temperature=0.1, choice_temperature=0.0,
    )  # fmt: skip
    sequences, recorder = drawn(model, sampler, count)
    numbers = uniforms(0, range(count), *sampler.numbers(layout))[:, : 2 * steps * layout.num_regions]
    assert len(recorder.maps) == steps
    for row, own in enumerate(numbers.unflatten(1, (steps, 2, -1))):
        condition = model.conditioning(labels[[row]])

        def ask(values, condition=condition):
            return model.grain_head(model.region_states(values, condition))

        states = decoded(ask, layout.num_grains, own, sampler, noise=1.0, temperatures=(0.8, 0.8))
        for state, found in zip(states, recorder.maps[1:], strict=False):
            assert torch.equal(found[row], state)
        assert torch.equal(from_sequences(sequences).grains[row].flatten(), states[-1])


@pytest.mark.parametrize(
    "settings",
    [
        {"information_weight": 5.0},
        {"final_temperature": 0.3},
        {"guidance_scale": 4.0, "guidance_schedule": "linear"},
    ],
    ids=str,
)
def test_settings_count_as_they_are_written(settings):
    layout, steps = LAYOUTS[2], 6
    model, labels = make(layout), labels_for(layout, 4)
    codes = random_codes(layout, random_grains(layout, 4))
    given = CodeMask.of_regions(codes, torch.zeros(4, 4).bool(), keep_map=True)
    sampler = MaskedSampler(steps=steps, choice_temperature=1.5, **settings)
    sequences, recorder = drawn(model, sampler, 4, given)
    places = [slots[slots != layout.pad_slot] for slots in recorder.slots]
    numbers = uniforms(0, range(4), *sampler.numbers(layout))[:, 2 * sampler.grain_steps * layout.num_regions :]
    expected = maskgit(model, labels, numbers.unflatten(1, (steps, 2, -1)), sampler, places)
    for row, states in enumerate(expected):
        for step, state in enumerate([*recorder.seen[1:], sequences.contents]):
            assert torch.equal(state[row, : len(places[row])], states[step])


def test_with_one_grain_the_content_transformer_sees_everything():
    """The masked model at K = 1, written anew."""
    layout = CodeLayout((16, 24), ((4, 4),), 16, 3)
    model, codes = make(layout), random_codes(layout, random_grains(layout, 5))
    labels, contents = labels_for(layout, 5), codes.indices.flatten(1)
    masked = torch.rand(contents.shape) < 0.5
    embedding, x = model.embedding, model.embedding.content(contents.masked_fill(masked, layout.codebook_size))
    x = x + embedding.position.weight[: x.shape[1]] + embedding.grain.weight[0]
    x = x + model.conditioning.table(labels)[:, None]
    x = x - x.mean(dim=-1, keepdim=True)
    x = x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    for block in model.content_transformer.blocks:
        parts = block.attention.qkv(block.norm1(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(2, (4, -1)) for part in parts)
        weights = (torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + block.attention.out(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))
        x = x + block.mlp[2](torch.nn.functional.gelu(block.mlp[0](block.norm2(x))))
    expected = model.content_transformer.norm(x) @ model.content_head.weight.T + model.content_head.bias
    ask = ConditionedLogits(model, model.conditioning(labels))
    hidden = contents.masked_fill(masked, layout.no_content)
    logits = everywhere(ask, to_sequences(codes, ends=False).slots, hidden)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", CLASSED, ids=str)
def test_logits_depend_on_neither_batch_mates_nor_padding_and_follow_a_permutation(layout, variant):
    model, codes = make(layout, **VARIANTS[variant]), random_codes(layout, random_grains(layout, 4))
    ask = ConditionedLogits(model, model.conditioning(labels_for(layout, 4)))
    tokens = to_sequences(codes, ends=False)
    masked = tokens.is_code & (torch.rand(tokens.slots.shape) < 0.4)
    contents = tokens.contents.masked_fill(masked, layout.no_content)
    together = everywhere(ask, tokens.slots, contents)
    asked, rows = ask.contents(tokens.slots, contents, masked), torch.randperm(int(masked.sum()))[:5]
    torch.testing.assert_close(asked(rows), together[masked][rows])
    for row, length in enumerate(codes.lengths.tolist()):
        one = ConditionedLogits(model, model.conditioning(labels_for(layout, 4)[[row]]))
        alone = everywhere(one, tokens.slots[[row], :length], contents[[row], :length])
        torch.testing.assert_close(alone[0], together[row, :length])
    order = torch.randperm(tokens.slots.shape[1])
    torch.testing.assert_close(everywhere(ask, tokens.slots[:, order], contents[:, order]), together[:, order])
    other = contents.clone()
    other[:, -1] = torch.where(
        tokens.is_code[:, -1] & ~masked[:, -1], (other[:, -1] + 1) % layout.codebook_size, other[:, -1]
    )
    changed = (everywhere(ask, tokens.slots, other) - together).abs().amax(dim=2)[:, 0] > 0
    assert torch.equal(changed, (other != contents).any(dim=1))  # the first code sees the last


@pytest.mark.parametrize(
    ("layout", "order"),
    [(layout, order) for layout in CLASSED for order in (ORDERS if layout.num_grains > 1 else ORDERS[:3])],
    ids=str,
)
def test_a_sample_depends_on_its_seed_index_and_label_alone(layout, order):
    model, labels = make(layout), labels_for(layout, 7)
    settings = {"order": order, "steps": 4}
    if layout.num_grains > 1:
        settings["grain_steps"] = 3
    everything = model.sample(labels, seed=5, batch_size=7, **settings)
    for batch_size in (1, 3):
        assert same(model.sample(labels, seed=5, batch_size=batch_size, **settings), everything)
    alone = model.sample(labels[6:], seed=5, first_index=6, batch_size=2, **settings)
    assert same(alone, everything[[6]])
    assert not same(model.sample(labels, seed=6, batch_size=7, **settings), everything)


@pytest.mark.parametrize("schedule", GAMMA)
@pytest.mark.parametrize("order", ORDERS)
def test_every_step_reveals_and_the_last_one_everything(order, schedule):
    layout = LAYOUTS[5]  # from 4 to 64 codes
    model = make(layout)
    given = CodeMask.of_regions(codes := random_codes(layout, random_grains(layout, 6)), torch.zeros(2, 2).bool(), True)
    for steps in (1, 3, 12, 70):
        sampler = MaskedSampler(steps=steps, mask_schedule=schedule, order=order)
        sequences, recorder = drawn(model, sampler, 6, given)
        is_code = recorder.slots != layout.pad_slot
        masked = [((contents == layout.no_content) & is_code).sum(dim=1) for contents in recorder.seen]
        masked.append(((sequences.contents == layout.no_content) & is_code).sum(dim=1))
        assert torch.equal(masked[0], codes.lengths)
        assert not masked[-1].any()
        for t, (before, after) in enumerate(pairwise(masked), start=1):
            share = GAMMA[schedule](t / steps) if t < steps else 0
            expected = torch.minimum(before - 1, (codes.lengths * share + 1e-9).long()).clamp(min=0)
            assert torch.equal(after, expected)
        assert len(recorder.seen) <= min(steps, int(codes.lengths.max()))
        for before, after in zip(recorder.seen, [*recorder.seen[1:], sequences.contents], strict=True):
            known = before != layout.no_content
            assert torch.equal(before[known], after[known])


@pytest.mark.parametrize(("order", "sign"), [("dense_first", 1), ("coarse_first", -1)])
def test_the_codes_of_one_grain_come_before_those_of_the_next(order, sign):
    layout = LAYOUTS[5]
    codes = random_codes(layout, random_grains(layout, 6))
    given = CodeMask.of_regions(codes, torch.zeros(2, 2).bool(), keep_map=True)
    _, recorder = drawn(make(layout), MaskedSampler(steps=9, order=order), 6, given)
    grain = layout.slots().grain[recorder.slots.clamp(max=layout.num_slots - 1)]
    partly = 0
    for contents in recorder.seen:
        masked = (contents == layout.no_content) & (recorder.slots != layout.pad_slot)
        shown = contents != layout.no_content
        for row in range(6):
            if masked[row].any() and shown[row].any():
                assert (sign * grain[row][shown[row]]).min() >= (sign * grain[row][masked[row]]).max()
                partly += 1
    assert partly > 10


def test_what_is_given_is_kept_whatever_comes_first():
    layout = CodeLayout((96, 32), tuple((f, f) for f in (32, 16, 8, 4, 2, 1)), 5, 1)  # more grains than regions
    codes = random_codes(layout, torch.zeros(2, 3, 1, dtype=torch.long))
    mask = CodeMask.of_regions(codes, torch.tensor([[True], [False], [False]]), keep_map=True)
    for order in ORDERS:
        found = make(layout).sample(torch.zeros(2, dtype=torch.long), batch_size=2, order=order, given=mask)
        assert torch.equal(found.indices[mask.known_cells], codes.indices[mask.known_cells])


def test_what_is_given_is_kept_where_scores_overflow():
    layout = LAYOUTS[5]
    codes = random_codes(layout, random_grains(layout, 4))
    mask = CodeMask.of_regions(codes, torch.tensor([[True, False], [False, False]]), keep_map=True)
    sampler = MaskedSampler(steps=64, choice_temperature=1e308)
    sequences, _ = drawn(make(layout), sampler, 4, mask)
    assert torch.equal(from_sequences(sequences).indices[mask.known_cells], codes.indices[mask.known_cells])


def test_information_weight_moves_dense_codes_forward():
    layout = LAYOUTS[2]
    codes = random_codes(layout, random_grains(layout, 12))[2:]
    given = CodeMask.of_regions(codes, torch.zeros(4, 4).bool(), keep_map=True)
    model, share = make(layout), {}
    for order in ("confidence", "random"):
        for weight in (-20.0, 0.0, 20.0):
            noise = {"choice_temperature": 4.5} if order == "confidence" else {}
            sampler = MaskedSampler(steps=4, order=order, information_weight=weight, **noise)
            _, recorder = drawn(model, sampler, 10, given)
            fine = layout.slots().grain[recorder.slots.clamp(max=layout.num_slots - 1)] == 1
            shown = recorder.seen[1] != layout.no_content
            share[weight] = float((shown & fine).sum() / shown.sum())
        assert share[-20.0] < share[0.0] - 0.1 < share[20.0] - 0.2


def test_halton_places_are_far_apart_and_the_same_for_all():
    layout = CodeLayout((32, 32), ((4, 4),), 16, 3)
    _, recorder = drawn(make(layout), MaskedSampler(steps=64, mask_schedule="linear", order="halton"), 2)
    shown = [(contents[0] != layout.no_content).nonzero()[:, 0].tolist() for contents in recorder.seen]
    assert torch.equal(recorder.seen[9] == layout.no_content, (recorder.seen[9] == layout.no_content)[:1].expand(2, -1))
    assert shown[1] == [0]
    assert shown[2] == [0, 4 * 8 + 2]  # (1/2, 1/3)
    assert shown[3] == [0, 2 * 8 + 5, 4 * 8 + 2]  # (1/4, 2/3)
    assert len(shown[16]) == 16
    assert len({(i // 32, i % 8 // 4) for i in shown[6]}) == 4


def test_in_halton_order_a_code_comes_with_the_first_point_in_any_of_its_cells():
    layout = CodeLayout((32, 32), ((8, 8), (4, 4)), 16, 3)
    codes = random_codes(layout, torch.tensor([[0, 1], [1, 0]]).repeat(1, 2, 2))
    given = CodeMask.of_regions(codes, torch.zeros(4, 4).bool(), keep_map=True)
    sampler = MaskedSampler(steps=40, mask_schedule="linear", order="halton")
    _, recorder = drawn(make(layout), sampler, 1, given)

    def mirrored(number, base):
        return 0.0 if number == 0 else (number % base + mirrored(number // base, base)) / base

    visits = [(int(8 * mirrored(n, 2)), int(8 * mirrored(n, 3))) for n in range(400)]
    points = []
    for slot in recorder.slots[0]:
        cells = (layout.slots().at_cell == slot).nonzero()[:, 1].tolist()
        points.append(min(visits.index(divmod(cell, 8)) for cell in cells))
    by_point = sorted(range(40), key=lambda place: points[place])
    for step, contents in enumerate(recorder.seen):
        assert set((contents[0] != layout.no_content).nonzero()[:, 0].tolist()) == set(by_point[:step])


def test_every_grain_map_can_be_drawn():
    layout = CodeLayout((8, 8), ((4, 4), (2, 2), (1, 1)), 5, 1)
    model = make(layout, parts={})
    for parameter in (model.grain_head.weight, model.grain_head.bias):
        parameter.zero_()
    maps = model.sample(torch.zeros(1500, dtype=torch.long), batch_size=500, steps=1, grain_steps=2).grains.flatten(1)
    counts = torch.bincount((maps * torch.tensor([27, 9, 3, 1])).sum(dim=1), minlength=81)
    assert int(counts.min()) > 2


def test_samples_of_independent_codes_follow_the_model():
    """With one code per step every sample comes from the model's own chain of conditionals; here, of two codes."""
    layout = CodeLayout((2, 4), ((2, 2),), 3, 1)
    model = make(layout)
    slots, label = torch.arange(2)[None], torch.zeros(1, dtype=torch.long)
    ask = ConditionedLogits(model, model.conditioning(label))
    mask = layout.no_content
    both = everywhere(ask, slots, torch.tensor([[mask, mask]])).softmax(-1)[0]
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for first, second in ((0, 1), (1, 0)):  # in random order, either comes first half of the time
        for value in range(3):
            known = torch.full((1, 2), mask)
            known[0, first] = value
            joint = 0.5 * both[first, value] * everywhere(ask, slots, known).softmax(-1)[0, second]
            expected[(value, slice(None)) if first == 0 else (slice(None), value)] += joint
    drawn = model.sample(label.repeat(4000), batch_size=1000, steps=2, order="random", mask_schedule="linear")
    counts = torch.bincount(drawn.indices.flatten(1) @ torch.tensor([3, 1]), minlength=9) / 4000
    spread = (expected.flatten() * (1 - expected.flatten()) / 4000).sqrt()
    assert float(((counts - expected.flatten()).abs() / spread.clamp(min=1e-3)).max()) < 4.5


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 2.0}, {"top_p": 0.8}], ids=str)
def test_codes_are_the_same_however_many_are_drawn_at_a_time(settings, monkeypatch):
    layout = LAYOUTS[4]
    model, labels = make(layout, block=MODERN), labels_for(layout, 5)
    together = model.sample(labels, batch_size=5, **settings)
    for rows in (1, 7):
        monkeypatch.setattr("graincode.sampling.masked._MOST_LOGITS", rows * layout.codebook_size + 1)
        assert same(model.sample(labels, batch_size=5, **settings), together)


def test_sampling_modulates_the_blocks_once():
    model, asked = make(LAYOUTS[2], block=MODERN), []
    for stack in (model.grain_transformer, model.content_transformer):
        stack.modulation.register_forward_hook(lambda module, *_: asked.append(module))
    model.sample(labels_for(LAYOUTS[2], 3), batch_size=3, guidance_scale=2.0)
    assert asked == [model.grain_transformer.modulation, model.content_transformer.modulation]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_what_is_given_is_kept_and_the_rest_is_drawn(guidance):
    layout = LAYOUTS[5]
    model, labels = make(layout), labels_for(layout, 6)
    codes = random_codes(layout, random_grains(layout, 6))
    settings = {"batch_size": 4, "guidance_scale": guidance, "steps": 5}
    nothing = model.sample(labels, **settings)
    keep = torch.zeros(2, 2, dtype=torch.bool)
    assert same(model.sample(labels, given=CodeMask.of_regions(codes, keep), **settings), nothing)
    assert same(model.sample(labels, given=CodeMask.of_regions(codes, ~keep), **settings), codes)
    keep[0, 1] = keep[1, 0] = True
    for keep_map in (False, True):
        mask = CodeMask.of_regions(codes, keep, keep_map)
        found = model.sample(labels, given=mask, **settings)
        assert torch.equal(found.grains[:, keep], codes.grains[:, keep])
        assert torch.equal(found.grains, codes.grains) == keep_map
        assert torch.equal(found.indices[mask.known_cells], codes.indices[mask.known_cells])
        assert not torch.equal(found.indices[~mask.known_cells], codes.indices[~mask.known_cells])
    pixels = torch.ones(32, 32, dtype=torch.bool)
    pixels[3, 20] = False  # a pixel that is to change changes its whole region
    touched = torch.tensor([[True, False], [True, True]])
    assert torch.equal(CodeMask.of_pixels(codes, pixels).known_regions, touched.expand(6, 2, 2))
    for wrong in (pixels[1:], pixels.expand(3, 32, 32)):
        with pytest.raises(GraincodeError, match=r"expected \(6, 32, 32\) or \(32, 32\)"):
            CodeMask.of_pixels(codes, wrong)
    with pytest.raises(GraincodeError, match=r"torch\.float32: expected \(6, 32, 32\)"):
        CodeMask.of_pixels(codes, 0.3 * torch.ones(32, 32))
    for keep in (torch.ones(2).bool(), torch.ones(3, 2, 2).bool(), torch.ones(2, 2).long()):
        with pytest.raises(GraincodeError, match=r"expected \(6, 2, 2\) or \(2, 2\), torch\.bool"):
            CodeMask.of_regions(codes, keep)


def test_beginnings_of_sequences_are_kept_as_dgit_ar_keeps_them():
    layout = LAYOUTS[5]
    model, labels = make(layout), labels_for(layout, 6)
    codes = random_codes(layout, random_grains(layout, 6))
    for count in range(layout.num_grains + 1):
        found = model.sample(labels, batch_size=4, given=CodePrefix.of_grains(codes, count))
        coarse = codes.grains < count
        assert torch.equal(found.grains < count, coarse)  # no other region becomes as coarse
        assert torch.equal(found.grains[coarse], codes.grains[coarse])
        cells = layout.expand(coarse, 0)
        assert torch.equal(found.indices[cells], codes.indices[cells])
    assert same(found, codes)
    found = model.sample(labels, batch_size=4, given=CodePrefix.of_map(codes))
    assert torch.equal(found.grains, codes.grains)
    assert not torch.equal(found.indices, codes.indices)
    prefix = CodePrefix.of_regions(codes, 2)
    found = model.sample(labels, batch_size=4, given=prefix)
    assert torch.equal(found.indices[prefix.known_cells], codes.indices[prefix.known_cells])
    assert CodeMask.of_prefix(prefix).known_regions.flatten(1).sum(dim=1).tolist() == [2] * 6


def test_an_autoregressive_generator_refuses_what_has_no_order():
    layout = LAYOUTS[2]
    model = DGiTAR(
        layout, WIDTH, HeterogeneousEmbedding(layout, WIDTH), ClassConditioning(layout, WIDTH),
        Transformer(WIDTH, 1, 4), Transformer(WIDTH, 1, 4),
    )  # fmt: skip
    codes = random_codes(layout, random_grains(layout, 2))
    with pytest.raises(GraincodeError, match=r"fixed order"):
        model.sample(labels_for(layout, 2), given=CodeMask.of_regions(codes, torch.ones(4, 4).bool()))
    with pytest.raises(GraincodeError, match=r"^sampler=masked: expected auto or autoregressive"):
        model.resolve(MaskedSampler())
    with pytest.raises(GraincodeError, match=r"^sampler=autoregressive: expected auto or masked"):
        make(layout).resolve(AutoregressiveSampler())
    shared = {"temperature": 0.5, "top_k": 3, "guidance_scale": 2.0}
    assert model.resolve(AutoSampler(**shared)) == AutoregressiveSampler(**shared)
    assert make(layout).resolve(AutoSampler(**shared)) == MaskedSampler(**shared)
    with pytest.raises(GraincodeError, match=r"^drop_finished=True: expected"):
        make(layout).sample(labels_for(layout, 2), drop_finished=True)


def test_guidance_of_scale_one_is_the_conditional_model_and_more_moves_away_from_the_unconditional():
    layout = LAYOUTS[2]
    model, labels = make(layout), labels_for(layout, 6)
    plain = model.sample(labels, batch_size=6)
    assert same(model.sample(labels, batch_size=6, guidance_scale=1.0 + 1e-13), plain)
    null = torch.full_like(labels, layout.null_class)
    condition = model.conditioning(torch.cat([labels, null]))
    sampler = MaskedSampler(guidance_scale=1e-13)
    numbers = uniforms(0, range(6), *sampler.numbers(layout))
    unguided = sampler(ConditionedLogits(model, condition), layout, numbers)
    unconditional = MaskedSampler()(ConditionedLogits(model, condition[6:]), layout, numbers)
    assert torch.equal(unguided.slots, unconditional.slots)
    assert torch.equal(unguided.contents, unconditional.contents)
    found = [
        model.sample(labels, batch_size=6, guidance_scale=8.0, guidance_schedule=schedule).indices.flatten().tolist()
        for schedule in ("constant", "linear", "cosine")
    ]
    assert len({tuple(codes) for codes in [plain.indices.flatten().tolist(), *found]}) == 4
    with pytest.raises(GraincodeError, match=r"^guidance_scale=2\.0: expected 1"):
        make(layout, NoConditioning).sample(labels, guidance_scale=2.0)


class Stub:
    """The same logits whatever is asked, for twice the batch; (2 B, L, V) contents and (2 B, R, K) grains."""

    def __init__(self, contents, grains):
        self.all_contents, self.all_grains = contents, grains

    def grains(self, values):
        return self.all_grains

    def contents(self, slots, contents, at):
        return lambda rows: self.all_contents[at][rows]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_guidance_grows_with_the_share_of_each_image_that_is_there(schedule, dtype):
    """Given codes count as there, padding does not count."""
    layout, scale, precise = LAYOUTS[2], 3.0, dtype == torch.float64
    lengths, there = torch.tensor([64, 32, 16, 40]), torch.tensor([64, 0, 4, 30])
    stub = Stub(torch.randn(8, 64, 256).to(dtype), torch.randn(8, 16, 2).to(dtype))
    ask = GuidedMaskedLogits(stub, layout, scale, schedule)
    places = torch.arange(64).expand(4, -1)
    slots = torch.where(places < lengths[:, None], places, layout.pad_slot)
    contents = torch.where(places < there[:, None], 1, layout.no_content)
    at = torch.rand(4, 64) < 0.3
    rows = torch.randperm(int(at.sum()))[:20]
    values = torch.where(torch.arange(16) < torch.tensor([16, 0, 4, 12])[:, None], 1, layout.num_grains)
    for found, logits, shares in (
        (ask.contents(slots, contents, at)(rows), stub.all_contents, [1, 0, 4 / 16, 30 / 40]),
        (ask.grains(values), stub.all_grains, [1, 0, 4 / 16, 12 / 16]),
    ):
        in_force = {
            "constant": [1, 1, 1, 1], "linear": shares, "cosine": [(1 - math.cos(math.pi * s)) / 2 for s in shares],
        }[schedule]  # fmt: skip
        strength = torch.tensor([1 + (scale - 1) * share for share in in_force], dtype=torch.float64)[:, None, None]
        conditional, unconditional = logits.double().chunk(2)
        expected = strength * conditional + (1 - strength) * unconditional
        assert found.dtype == (dtype if precise else torch.float32)
        own = expected[at][rows] if found.ndim == 2 else expected
        torch.testing.assert_close(found, own.to(found.dtype))


def test_truncation_and_settings_out_of_range():
    layout = LAYOUTS[2]
    model, labels = make(layout), labels_for(layout, 4)
    settings = {"choice_temperature": 0.0, "grain_choice_temperature": 0.0, "batch_size": 4}
    greedy = model.sample(labels, seed=1, top_k=1, grain_top_k=1, **settings)
    assert same(greedy, model.sample(labels, seed=2, top_k=1, grain_top_k=1, **settings))
    assert same(greedy, model.sample(labels, seed=2, min_p=1 - 1e-9, grain_min_p=1 - 1e-9, **settings))
    for name, value in (
        ("temperature", 0), ("grain_top_k", -1), ("grain_top_p", 1.5), ("steps", 0), ("grain_steps", 0),
        ("choice_temperature", -1), ("order", "late"), ("mask_schedule", "sine"), ("guidance_schedule", "late"),
        ("information_weight", math.nan), ("choice_temperature", math.inf), ("final_temperature", math.inf),
        ("final_temperature", 0.0), ("guidance_scale", -math.inf), ("grain_min_p", math.nan),
    ):  # fmt: skip
        with pytest.raises(GraincodeError, match=rf"^{name}={value}: expected"):
            MaskedSampler(**{name: value})
    for order, name in (
        ("halton", "information_weight"), ("dense_first", "information_weight"), ("random", "choice_temperature"),
        ("halton", "choice_temperature"),
    ):  # fmt: skip
        with pytest.raises(GraincodeError, match=rf"^{name}=2\.0: expected .* with order={order}"):
            MaskedSampler(order=order, **{name: 2.0})


@pytest.mark.parametrize("name", MASK_SCHEDULES)
def test_mask_schedules_go_from_all_to_nothing_and_know_how_many_they_mask_on_average(name):
    schedule, u = MASK_SCHEDULES[name], torch.arange(0.5, 20_000, dtype=torch.float64) / 20_000
    ends = schedule.ratio(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([1, 0], abs=1e-12)
    torch.testing.assert_close(schedule.time(schedule.ratio(u)), u)
    for codes in (1, 2, 7, 40, 64):
        found = schedule.masked(torch.full((len(u),), codes), u).double().mean()
        lengths = torch.tensor([codes, 64])
        assert float(schedule.expected(lengths, 64)[0]) == pytest.approx(float(found), abs=2e-3)
    assert bool((schedule.ratio(u).diff() < 0).all())
    lengths = torch.tensor([1, 2, 40])
    if name == "linear":  # a code at a time, where there are as many steps as codes
        for steps in range(1, 65):
            left = torch.tensor([steps])
            for step in range(1, steps + 1):
                left = schedule.remaining(left, torch.tensor([steps]), step, steps)
                assert int(left) == steps - step
    for value in (0.0, 0.3, 1 - 2**-53):
        masked = schedule.masked(lengths, torch.full((3,), value, dtype=torch.float64))
        assert ((masked >= 1) & (masked <= lengths)).all()


def test_masks_follow_beta_and_the_image_s_own_numbers():
    layout = LAYOUTS[2]
    codes = random_codes(layout, random_grains(layout, 400))[2:]
    tokens, rng = to_sequences(codes, ends=False), SampleRng(3, torch.arange(398))
    fine = (layout.slots().grain[tokens.slots.clamp(max=layout.num_slots - 1)] == 1) & tokens.is_code
    share, counts = {}, {}
    for beta in (-2.0, 0.0, 2.0):
        masked = InformationMasking(beta=beta).codes(tokens.is_code, fine.double(), rng)
        assert not (masked & ~tokens.is_code).any()
        seen = tokens.is_code & ~masked
        share[beta], counts[beta] = float((seen & fine).sum() / seen.sum()), masked.sum(dim=1)
        part = InformationMasking(beta=beta).codes(
            tokens.is_code[5:6, : codes.lengths[5]],
            fine.double()[5:6, : codes.lengths[5]],
            SampleRng(3, torch.tensor([5])),
        )
        assert torch.equal(part[0], masked[5, : codes.lengths[5]])
    overall = float(fine.sum() / tokens.is_code.sum())
    assert share[-2.0] < share[0.0] - 0.03 < share[2.0] - 0.06
    assert share[0.0] == pytest.approx(overall, abs=0.02)
    assert torch.equal(counts[0.0], counts[2.0])
    expected = InformationMasking().expected(codes.lengths, layout.max_tokens)
    assert float(counts[0.0].double().mean()) == pytest.approx(float(expected.mean()), rel=0.04)
    elastic = InformationMasking(beta=8.0, elastic=True).codes(tokens.is_code, fine.double(), rng)
    seen = tokens.is_code & ~elastic
    each = (seen & fine).sum(dim=1) / seen.sum(dim=1).clamp(min=1) - fine.sum(dim=1) / codes.lengths
    some = (seen.sum(dim=1) > 8) & (seen.sum(dim=1) < 30)
    assert float(each[some].max()) > 0.25
    assert float(each[some].min()) < -0.25
    with pytest.raises(GraincodeError, match=r"^beta=0\.0: expected"):
        InformationMasking(elastic=True)
    with pytest.raises(GraincodeError, match=r"^schedule=sine: expected one of cosine, linear, arccos"):
        InformationMasking(schedule="sine")


def test_masks_of_codes_and_of_regions_are_independent():
    every, rng = torch.ones(4000, 16, dtype=torch.long), SampleRng(3, torch.arange(4000))
    codes = InformationMasking().codes(every.bool(), torch.zeros(every.shape, dtype=torch.float64), rng).double()
    regions = InformationMasking().regions(every, rng).double()
    counts = torch.stack([codes.sum(dim=1), regions.sum(dim=1)])
    assert abs(float(torch.corrcoef(counts)[0, 1])) < 0.06
    assert float((codes * regions).mean()) == pytest.approx(float(codes.mean() * regions.mean()), abs=0.01)


@pytest.mark.parametrize("beta", [-1.5, 3.0])
def test_masks_of_training_are_those_that_a_matched_sampler_meets(beta):
    """Of contents that are all equally likely, as many are fine among those revealed."""
    layout, count, noise = CodeLayout((32, 32), ((8, 8), (4, 4)), 5, 1), 1000, 2.5
    codes = random_codes(layout, (torch.arange(16).view(1, 4, 4) < 4).long().expand(count, -1, -1))
    given = CodeMask.of_regions(codes, torch.zeros(4, 4).bool(), keep_map=True)
    settings = {"information_weight": beta * noise, "choice_temperature": noise}
    model = make(layout)
    for parameter in model.content_head.parameters():
        parameter.zero_()
    _, recorder = drawn(model, MaskedSampler(steps=4, mask_schedule="linear", **settings), count, given)
    fine = layout.slots().grain[recorder.slots[:1]] == 1

    def share(shown):
        return float((shown & fine).sum() / shown.sum())

    every = fine.expand(40_000, -1)
    rng = SampleRng(1, torch.arange(len(every)))
    masks = InformationMasking("linear", beta).codes(torch.ones_like(every), every.double(), rng)
    for contents, left in zip(recorder.seen[1:], (21, 14, 7), strict=True):
        shown = contents != layout.no_content
        assert int(shown[0].sum()) == 28 - left
        assert share(shown) == pytest.approx(share(~masks[masks.sum(dim=1) == left]), abs=0.015)


@pytest.mark.parametrize("codebook", ["shared", "per_grain"])
@pytest.mark.parametrize("grains", [((8, 8),), ((8, 8), (4, 4)), ((8, 8), (8, 4), (4, 4))], ids=str)
def test_the_loss_of_a_batch_is_that_of_its_images_and_reaches_every_weight(grains, codebook):
    layout = CodeLayout((16, 32), grains, 9, 2, codebook)
    model, codes = make(layout, block=MODERN), random_codes(layout, random_grains(layout, 6))
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


def test_what_goes_by_density_is_refused_where_all_codes_have_one():
    layout = LAYOUTS[1]
    model, labels = make(layout), labels_for(layout, 2)
    for name, value in (
        ("information_weight", -2.0), ("order", "dense_first"), ("order", "coarse_first"), ("grain_steps", 3),
        ("grain_temperature", 0.5), ("grain_choice_temperature", 0.0),
    ):  # fmt: skip
        with pytest.raises(GraincodeError, match=rf"^{name}={value}: expected .*one grain"):
            model.resolve(MaskedSampler(**{name: value}))
        with pytest.raises(GraincodeError, match=rf"^{name}={value}: expected .*one grain"):
            model.sample(labels, **{name: value})
    for masking in (InformationMasking(beta=-1.0), InformationMasking(beta=2.0, elastic=True)):
        with pytest.raises(GraincodeError, match=rf"^beta={masking.beta}: expected 0"):
            make(layout, masking=masking)


def untrained(layout):
    torch.manual_seed(0)
    return DGiTNAR(
        layout, WIDTH, HeterogeneousEmbedding(layout, WIDTH, index=False), ClassConditioning(layout, WIDTH),
        Transformer(WIDTH, 1, 4, causal=False), Transformer(WIDTH, 2, 4, causal=False),
    )  # fmt: skip


def test_an_untrained_model_pays_log_of_the_codebook():
    layout = LAYOUTS[2]
    codes = random_codes(layout, random_grains(layout, 600))
    terms = MaskedObjective()(untrained(layout)(codes, labels_for(layout, 600), SampleRng(0, torch.arange(600))))
    masked = sum(terms[f"content_{g}"].count.item() for g in (0, 1))
    assert terms["content"].total.item() / masked == pytest.approx(math.log(256), abs=0.15)
    # and what is told is the mean over what was masked
    assert terms["content"].mean.item() == pytest.approx(terms["content"].total.item() / masked, rel=0.03)
    assert terms["grains"].mean.item() == pytest.approx(math.log(2), rel=0.1)


def test_samples_of_a_trained_model_are_like_what_it_was_trained_on():
    """Every row has one fine region, and all codes follow from any one of them and the class."""
    layout = CodeLayout((16, 16), ((8, 8), (4, 4)), 4, 2)
    model = untrained(layout)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(300):
        first, labels, value = torch.randint(2, (32, 2, 1)), torch.randint(2, (32,)), torch.randint(4, (32, 1, 1))
        grains = torch.cat([first, 1 - first], dim=2)
        fine = (value + 1 + labels[:, None, None]) % 4
        indices = torch.where(layout.expand(grains, 0) == 1, fine, value)
        rng = SampleRng(0, torch.arange(32) + 32 * step)
        loss = weighted_sum(MaskedObjective()(model(GrainCodes(grains, indices, layout), labels, rng)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    labels = torch.arange(200) % 2
    codes = model.eval().sample(labels, batch_size=200, order="dense_first", grain_steps=4)
    assert float((codes.grains.sum(dim=2) == 1).all(dim=1).double().mean()) > 0.9
    fine = layout.expand(codes.grains, 0) == 1
    values = torch.where(fine, codes.indices - 1 - labels[:, None, None], codes.indices).flatten(1) % 4
    assert float((values == values[:, :1]).all(dim=1).double().mean()) > 0.7
    assert len(values[:, 0].unique()) == 4


def test_parts_that_do_not_fit_together_are_refused():
    layout = LAYOUTS[2]
    embedding = HeterogeneousEmbedding(layout, WIDTH, index=False)
    free, causal = Transformer(WIDTH, 1, 4, causal=False), Transformer(WIDTH, 1, 4)
    conditioning = NoConditioning(layout, WIDTH)
    for stacks in ((causal, free), (free, causal)):
        with pytest.raises(GraincodeError, match=r"^causal=True: expected false"):
            DGiTNAR(layout, WIDTH, embedding, conditioning, *stacks)
    with pytest.raises(GraincodeError, match=r"^index=True: expected false"):
        DGiTNAR(layout, WIDTH, HeterogeneousEmbedding(layout, WIDTH), conditioning, free, free)
    with pytest.raises(GraincodeError, match=r"^position=none: expected"):
        make(layout, parts={"position": "none"})
    with pytest.raises(GraincodeError, match=r"^adaln=True: expected false"):
        make(layout, NoConditioning, block=MODERN)
    with pytest.raises(GraincodeError, match=r"^grain_layers=0: expected 1"):
        DGiTNAR(layout, WIDTH, embedding, conditioning, Transformer(WIDTH, 0, 4, causal=False), free)
    with pytest.raises(GraincodeError, match=r"^grains_weight=-1\.0: expected"):
        MaskedObjective(-1.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_are_drawn_in_half_precision_too(variant):
    layout, steps = LAYOUTS[2], []
    model, labels = make(layout, dtype=torch.bfloat16, **VARIANTS[variant]), labels_for(layout, 4)
    tokens = to_sequences(random_codes(layout, random_grains(layout, 4)), ends=False)
    contents = tokens.contents.masked_fill(torch.rand(tokens.slots.shape) < 0.5, layout.no_content)
    values = torch.randint(layout.num_grains + 1, (4, layout.num_regions))
    found = []
    for one in (model, copy.deepcopy(model).float()):
        ask = ConditionedLogits(one, one.conditioning(labels))
        logits = everywhere(ask, tokens.slots, contents)[tokens.is_code], ask.grains(values)
        assert [part.dtype for part in logits] == [torch.float32, one.grain_head.weight.dtype]
        found.append([part.float() for part in logits])
    for half, full in zip(*found, strict=True):
        assert float((half - full).square().mean().sqrt() / full.std()) < 0.02
    for scale in (1.0, 2.0) if model.classes else (1.0,):
        assert len(model.sample(labels, batch_size=4, guidance_scale=scale, steps=3, on_step=steps.append)) == 4
    assert steps[:3] == [1, 2, 3]


def test_noise_and_draws_are_finite_for_any_number():
    numbers = torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert bool(gumbel(numbers).isfinite().all())
    assert bool((gumbel(numbers).diff() > 0).all())
    assert draw(torch.zeros(4, 3), numbers).tolist() == [0, 0, 1, 2]
