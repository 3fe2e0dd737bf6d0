import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LAYOUTS

from graincode.core.logits import draw, legal_regions, truncate
from graincode.core.rng import permutation, uniforms
from graincode.core.sequences import from_sequences
from graincode.sampling import AutoregressiveSampler, MaskedSampler


class Indifferent:
    """Logits that do not depend on anything, plus an inclination towards the end of a grain."""

    def __init__(self, layout, end):
        self.layout, self.end = layout, end

    def take(self, slots, contents):
        self.count = len(slots)

    def regions(self):
        logits = torch.zeros(self.count, self.layout.num_regions + 1)
        logits[:, -1] = self.end
        return logits

    def contents(self, slots):
        return torch.zeros(len(slots), self.layout.codebook_size)


class Inclined(Indifferent):
    """Logits that are the same for all samples, whatever they have drawn; and what was asked of the grain map."""

    def __init__(self, layout):
        super().__init__(layout, 0.0)
        self.of_regions, self.of_contents = torch.randn(layout.num_regions + 1), torch.randn(layout.codebook_size)
        self.of_grains, self.maps = torch.randn(layout.num_regions, layout.num_grains), []

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


@given(st.sampled_from(LAYOUTS), st.integers(0, 2**31), st.floats(-8, 8))
@settings(max_examples=60, deadline=None)
def test_draws_from_the_legality_mask_tile_the_image(layout, seed, end):
    numbers = uniforms(seed, range(5), layout.max_tokens, 2)
    codes = from_sequences(AutoregressiveSampler()(Indifferent(layout, end), layout, numbers))
    assert len(codes) == 5  # from_sequences refuses what does not tile


def test_every_grain_map_can_be_drawn():
    layout = LAYOUTS[5]
    numbers = uniforms(0, range(6000), layout.max_tokens, 2)
    grains = from_sequences(AutoregressiveSampler()(Indifferent(layout, 0.0), layout, numbers)).grains
    assert {tuple(row) for row in grains.flatten(1).tolist()} == {
        (a, b, c, d) for a in range(3) for b in range(3) for c in range(3) for d in range(3)
    }


def test_legal_regions_are_later_ones_that_nobody_has_and_the_end():
    coded = torch.tensor([[True, False, False, True, False]])
    assert legal_regions(coded, torch.tensor([1])).tolist() == [[False, False, True, False, True, True]]
    assert legal_regions(coded, torch.tensor([-1])).tolist() == [[False, True, True, False, True, True]]


def test_min_p_is_a_share_of_the_likeliest():
    logits = torch.tensor([[0.5, 0.25, 0.2, 0.05], [0.05, 0.9, 0.03, 0.02]]).log()
    assert truncate(logits, min_p=0.4).isfinite().tolist() == [[True, True, True, False], [False, True, False, False]]
    assert torch.equal(truncate(logits, min_p=0.0), logits)
    # after the temperature, as the others
    assert truncate(logits, temperature=4.0, min_p=0.4).isfinite().tolist() == [[True] * 4, [True, True, True, False]]


@given(st.integers(1, 9), st.integers(0, 12), st.floats(0.05, 1.0), st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_truncation_keeps_the_likeliest(size, top_k, top_p, seed):
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    kept = truncate(logits, top_k=top_k, top_p=top_p).isfinite()
    assert kept[logits.argmax()]
    assert logits[kept].min() > logits[~kept].max() if (~kept).any() else True
    assert not top_k or kept.sum() <= top_k


def test_draw_follows_the_distribution_and_never_takes_the_impossible():
    logits = torch.tensor([-torch.inf, 0.0, 1.0, -torch.inf])
    numbers = torch.cat([torch.linspace(0, 1, 20001, dtype=torch.float64)[:-1], torch.tensor([1 - 2**-53])])
    drawn = draw(logits.expand(len(numbers), 4), numbers)
    share = torch.bincount(drawn, minlength=4) / len(drawn)
    assert share.tolist() == pytest.approx(logits.softmax(0).tolist(), abs=1e-3)
    assert share[0] == share[3] == 0


def test_random_numbers_belong_to_their_sample():
    together = uniforms(7, range(10), 3, 2)
    assert torch.equal(together[4:6], uniforms(7, [4, 5], 3, 2))
    assert not torch.equal(together[4], uniforms(8, [4], 3, 2)[0])
    assert len({float(value) for value in together.flatten()}) == 60
    assert sorted(permutation(3, 1, 100)) == list(range(100))
    assert (permutation(3, 1, 100) != permutation(3, 2, 100)).any()
