import math

import pytest
import torch
from helpers_generators import labels_for, make_nar, same
from strategies import LAYOUTS

from graincode.core.errors import GraincodeError
from graincode.core.rng import uniforms
from graincode.core.sequences import from_sequences
from graincode.sampling import AutoregressiveSampler, MaskedSampler


class Inclined:
    """Logits that are the same for all samples, whatever they have drawn; and what was asked of the grain map."""

    def __init__(self, layout):
        self.of_regions, self.of_contents = torch.randn(layout.num_regions + 1), torch.randn(layout.codebook_size)
        self.of_grains, self.maps = torch.randn(layout.num_regions, layout.num_grains), []

    def take(self, slots, contents):
        self.count = len(slots)

    def regions(self):
        return self.of_regions.expand(self.count, -1)

    def grains(self, grains):
        self.maps.append(grains)
        return self.of_grains.expand(len(grains), -1, -1)

    def contents(self, slots, contents=None, at=None):
        if at is None:
            return self.of_contents.expand(*slots.shape, -1)
        return lambda rows: self.of_contents.expand(len(rows), -1)


GREEDY = [("top_k", 1), ("temperature", 1e-4), ("top_p", 1e-6), ("min_p", 1 - 1e-6)]


@pytest.mark.parametrize(("sampler", "other"), [(AutoregressiveSampler, "region_"), (MaskedSampler, "grain_")])
@pytest.mark.parametrize(("name", "value"), GREEDY)
def test_settings_of_truncation_hold_for_what_they_name(sampler, other, name, value):
    layout = LAYOUTS[2]
    for prefix in ("", other):
        drawn = sampler(**{prefix + name: value})
        sequences = drawn(Inclined(layout), layout, uniforms(0, range(20), *drawn.numbers(layout)))
        kinds = len(sequences.contents[sequences.is_code].unique())
        maps = len(from_sequences(sequences).grains.unique(dim=0))
        assert (kinds == 1, maps == 1) == ((True, False) if prefix == "" else (False, True))


def test_the_order_of_the_grain_map_has_a_noise_of_its_own():
    layout = LAYOUTS[2]
    for noise in (0.0, 100.0):
        sampler = MaskedSampler(grain_choice_temperature=noise, grain_top_k=1, choice_temperature=50.0 - noise / 2)
        logits = Inclined(layout)
        sampler(logits, layout, uniforms(0, range(20), *sampler.numbers(layout)))
        assert (len(logits.maps[3].unique(dim=0)) == 1) == (noise == 0)


def test_truncation_and_settings_out_of_range():
    layout = LAYOUTS[2]
    model, labels = make_nar(layout), labels_for(layout, 4)
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
