import math
from itertools import pairwise

import pytest
import torch
from helpers_generators import MODERN, labels_for, make_nar, same
from strategies import LAYOUTS, random_codes, random_grains

from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout
from graincode.core.prompts import CodeMask
from graincode.core.rng import SampleRng, uniforms
from graincode.core.sequences import from_sequences
from graincode.generator import (
    InformationMasking,
)
from graincode.generator.dgit_nar import ConditionedLogits
from graincode.sampling import MaskedSampler

ORDERS = ("confidence", "random", "halton", "coarse_first", "dense_first")


GAMMA = {
    "cosine": lambda u: math.cos(math.pi / 2 * u),
    "linear": lambda u: 1 - u,
    "arccos": lambda u: 2 / math.pi * math.acos(u),
}


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
        masked = (contents == layout.no_content) & (slots != layout.pad_slot)
        assert torch.equal(at, masked.flatten().nonzero()[:, 0])
        return self.logits.contents(slots, contents, at)


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
    model, labels = make_nar(layout), labels_for(layout, 4)
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
    model, labels = make_nar(layout), labels_for(layout, count)
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
    model, labels = make_nar(layout), labels_for(layout, 4)
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


@pytest.mark.parametrize("schedule", GAMMA)
@pytest.mark.parametrize("order", ORDERS)
def test_every_step_reveals_and_the_last_one_everything(order, schedule):
    layout = LAYOUTS[5]  # from 4 to 64 codes
    model = make_nar(layout)
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
    _, recorder = drawn(make_nar(layout), MaskedSampler(steps=9, order=order), 6, given)
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


def test_given_codes_are_kept_in_every_order():
    layout = CodeLayout((96, 32), tuple((f, f) for f in (32, 16, 8, 4, 2, 1)), 5, 1)  # more grains than regions
    codes = random_codes(layout, torch.zeros(2, 3, 1, dtype=torch.long))
    mask = CodeMask.of_regions(codes, torch.tensor([[True], [False], [False]]), keep_map=True)
    for order in ORDERS:
        found = make_nar(layout).sample(torch.zeros(2, dtype=torch.long), batch_size=2, order=order, given=mask)
        assert torch.equal(found.indices[mask.known_cells], codes.indices[mask.known_cells])


def test_given_codes_are_kept_where_scores_overflow():
    layout = LAYOUTS[5]
    codes = random_codes(layout, random_grains(layout, 4))
    mask = CodeMask.of_regions(codes, torch.tensor([[True, False], [False, False]]), keep_map=True)
    sampler = MaskedSampler(steps=64, choice_temperature=1e308)
    sequences, _ = drawn(make_nar(layout), sampler, 4, mask)
    assert torch.equal(from_sequences(sequences).indices[mask.known_cells], codes.indices[mask.known_cells])


def test_information_weight_moves_dense_codes_forward():
    layout = LAYOUTS[2]
    codes = random_codes(layout, random_grains(layout, 12))[2:]
    given = CodeMask.of_regions(codes, torch.zeros(4, 4).bool(), keep_map=True)
    model, share = make_nar(layout), {}
    for order in ("confidence", "random"):
        for weight in (-20.0, 0.0, 20.0):
            noise = {"choice_temperature": 4.5} if order == "confidence" else {}
            sampler = MaskedSampler(steps=4, order=order, information_weight=weight, **noise)
            _, recorder = drawn(model, sampler, 10, given)
            fine = layout.slots().grain[recorder.slots.clamp(max=layout.num_slots - 1)] == 1
            shown = recorder.seen[1] != layout.no_content
            share[weight] = float((shown & fine).sum() / shown.sum())
        assert share[-20.0] < share[0.0] - 0.1 < share[20.0] - 0.2


def test_halton_positions_are_far_apart_and_the_same_for_all_samples():
    layout = CodeLayout((32, 32), ((4, 4),), 16, 3)
    _, recorder = drawn(make_nar(layout), MaskedSampler(steps=64, mask_schedule="linear", order="halton"), 2)
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
    _, recorder = drawn(make_nar(layout), sampler, 1, given)

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
    model = make_nar(layout, parts={})
    for parameter in (model.grain_head.weight, model.grain_head.bias):
        parameter.zero_()
    maps = model.sample(torch.zeros(1500, dtype=torch.long), batch_size=500, steps=1, grain_steps=2).grains.flatten(1)
    counts = torch.bincount((maps * torch.tensor([27, 9, 3, 1])).sum(dim=1), minlength=81)
    assert int(counts.min()) > 2


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 2.0}, {"top_p": 0.8}], ids=str)
def test_codes_are_the_same_however_many_are_drawn_at_a_time(settings, monkeypatch):
    layout = LAYOUTS[4]
    model, labels = make_nar(layout, block=MODERN), labels_for(layout, 5)
    together = model.sample(labels, batch_size=5, **settings)
    for rows in (1, 7):
        monkeypatch.setattr("graincode.sampling.masked._MOST_LOGITS", rows * layout.codebook_size + 1)
        assert same(model.sample(labels, batch_size=5, **settings), together)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_given_codes_are_kept_and_the_rest_is_drawn(guidance):
    layout = LAYOUTS[5]
    model, labels = make_nar(layout), labels_for(layout, 6)
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


@pytest.mark.parametrize("beta", [-1.5, 3.0])
def test_masks_of_training_are_those_that_a_matched_sampler_meets(beta):
    """Of contents that are all equally likely, as many are fine among those revealed."""
    layout, count, noise = CodeLayout((32, 32), ((8, 8), (4, 4)), 5, 1), 1000, 2.5
    codes = random_codes(layout, (torch.arange(16).view(1, 4, 4) < 4).long().expand(count, -1, -1))
    given = CodeMask.of_regions(codes, torch.zeros(4, 4).bool(), keep_map=True)
    settings = {"information_weight": beta * noise, "choice_temperature": noise}
    model = make_nar(layout)
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
