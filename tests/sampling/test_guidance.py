import math

import pytest
import torch
from helpers_generators import labels_for, make_ar, make_nar, same
from strategies import LAYOUTS

from graincode.core.errors import GraincodeError
from graincode.core.rng import uniforms
from graincode.core.sequences import from_sequences, to_sequences
from graincode.generator import (
    NoConditioning,
)
from graincode.generator.dgit_ar import CachedLogits
from graincode.generator.dgit_nar import ConditionedLogits
from graincode.sampling import AutoregressiveSampler, MaskedSampler
from graincode.sampling.guidance import SCHEDULES, GuidedLogits, GuidedMaskedLogits


def test_guidance_of_scale_one_is_the_conditional_model_and_more_moves_away_from_the_unconditional():
    layout = LAYOUTS[2]
    model, labels = make_ar(layout, dtype=torch.float64), labels_for(layout, 6)
    plain = model.sample(labels, batch_size=6)
    assert torch.equal(model.sample(labels, batch_size=6, guidance_scale=1.0 + 1e-13).indices, plain.indices)
    null = torch.full_like(labels, layout.null_class)
    unguided = AutoregressiveSampler(guidance_scale=1e-13)(
        CachedLogits(model, model.condition(torch.cat([labels, null]), None)),
        layout,
        uniforms(0, range(6), layout.max_tokens, 2),
    )
    unconditional = AutoregressiveSampler()(
        CachedLogits(model, model.condition(null, None)), layout, uniforms(0, range(6), layout.max_tokens, 2)
    )
    assert torch.equal(from_sequences(unguided).indices, from_sequences(unconditional).indices)
    assert not torch.equal(model.sample(labels, batch_size=6, guidance_scale=3.0).indices, plain.indices)
    with pytest.raises(GraincodeError, match=r"^guidance_scale=2\.0: expected 1"):
        make_ar(layout, NoConditioning).sample(labels, guidance_scale=2.0)


def test_guidance_of_scale_one_is_the_conditional_model_of_masked_codes_too():
    layout = LAYOUTS[2]
    model, labels = make_nar(layout), labels_for(layout, 6)
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
        make_nar(layout, NoConditioning).sample(labels, guidance_scale=2.0)


def test_guidance_of_logits_in_half_precision_is_not_rounded():
    class Stub:
        everything = torch.randn(6, 50).bfloat16()

        def regions(self):
            return self.everything[:, :17]

        def contents(self, slots):
            return self.everything

    ask = GuidedLogits(Stub(), 7.0, "linear")
    ask.progress = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    conditional, unconditional = Stub.everything.double().chunk(2)
    expected = unconditional + torch.tensor([[1.0], [2.5], [7.0]]) * (conditional - unconditional)
    torch.testing.assert_close(ask.contents(torch.zeros(3).long()), expected.float())
    torch.testing.assert_close(ask.regions(), expected[:, :17].float())


def test_guidance_comes_in_as_an_image_is_completed():
    layout = LAYOUTS[2]
    model, labels = make_ar(layout, dtype=torch.float64), labels_for(layout, 6)

    def first_codes(**settings):
        return to_sequences(model.sample(labels, batch_size=6, **settings)).contents[:, 0]

    plain = first_codes()
    for schedule in ("linear", "cosine"):
        assert torch.equal(first_codes(guidance_scale=8.0, guidance_schedule=schedule), plain)
    assert not torch.equal(first_codes(guidance_scale=8.0), plain)
    drawn = [
        model.sample(labels, batch_size=6, guidance_scale=8.0, guidance_schedule=schedule).indices
        for schedule in ("constant", "linear", "cosine")
    ]
    assert len({tuple(codes.flatten().tolist()) for codes in drawn}) == 3
    assert [float(share(torch.tensor(1.0))) for share in SCHEDULES.values()] == pytest.approx([1, 1, 1])


class Stub:
    """The same logits whatever is asked, for twice the batch; (2 B, L, V) contents and (2 B, R, K) grains."""

    def __init__(self, contents, grains):
        self.all_contents, self.all_grains = contents, grains

    def grains(self, values):
        return self.all_grains

    def contents(self, slots, contents, at):
        return lambda rows: self.all_contents.flatten(0, 1)[at][rows]


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
    at = (torch.rand(4, 64) < 0.3).flatten().nonzero()[:, 0]
    rows = torch.randperm(len(at))[:20]
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
        own = expected.flatten(0, 1)[at][rows] if found.ndim == 2 else expected
        torch.testing.assert_close(found, own.to(found.dtype))
