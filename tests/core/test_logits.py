import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graincode.core.logits import draw, gumbel, legal_regions, truncate


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


def test_noise_and_draws_are_finite_for_any_number():
    numbers = torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert bool(gumbel(numbers).isfinite().all())
    assert bool((gumbel(numbers).diff() > 0).all())
    assert draw(torch.zeros(4, 3), numbers).tolist() == [0, 0, 1, 2]
