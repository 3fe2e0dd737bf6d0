import numpy as np
import pytest
import torch

from graincode.core.errors import GraincodeError
from graincode.core.rng import SampleRng, permutation, uniforms

"""Random numbers by seed, index and purpose."""


def test_numbers_depend_on_seed_sample_id_and_purpose_alone():
    together = SampleRng(3, torch.arange(100)).uniforms(0, 4, 5)
    assert torch.equal(SampleRng(3, torch.arange(50, 60)).uniforms(0, 4, 5), together[50:60])
    assert not torch.equal(SampleRng(3, torch.arange(100)).uniforms(1, 4, 5), together)
    assert not torch.equal(SampleRng(4, torch.arange(100)).uniforms(0, 4, 5), together)
    many = SampleRng(0, torch.arange(2000)).uniforms(2, 50).flatten()
    assert len(many.unique()) == len(many)
    assert float(many.mean()) == pytest.approx(0.5, abs=0.01)
    assert 0 <= many.min() <= many.max() < 1
    assert float(torch.corrcoef(torch.stack([many[:-1], many[1:]]))[0, 1]) == pytest.approx(0, abs=0.02)


def test_numbers_drawn_ahead_are_the_same_whatever_else_is_drawn_with_them():
    plain = SampleRng(3, torch.arange(40, 50))
    ahead = plain.ahead({4: 1, 0: 30, 7: 12})
    assert torch.equal(ahead.uniforms(4), plain.uniforms(4))
    assert torch.equal(ahead.uniforms(0, 5, 4), plain.uniforms(0, 5, 4))  # the first of them
    assert torch.equal(ahead.uniforms(7, 12), plain.uniforms(7, 12))
    assert torch.equal(ahead.uniforms(2, 3), plain.uniforms(2, 3))  # not drawn ahead
    # as ever, so that runs go on with their own numbers
    assert plain.uniforms(0, 2)[0].tolist() == [0.718813757411214, 0.8980803575867369]


def test_random_numbers_belong_to_their_sample():
    together = uniforms(7, range(10), 3, 2)
    assert torch.equal(together[4:6], uniforms(7, [4, 5], 3, 2))
    assert not torch.equal(together[4], uniforms(8, [4], 3, 2)[0])
    assert len({float(value) for value in together.flatten()}) == 60
    assert sorted(permutation(3, 1, 100)) == list(range(100))
    assert (permutation(3, 1, 100) != permutation(3, 2, 100)).any()


@pytest.mark.when("a seed is not a whole number from 0 to 2^57 - 1", "it is refused, in Python as on the command line")
@pytest.mark.parametrize("seed", [0.7, 1.0, -1, 2**57, True, "1", None, torch.tensor(1.5)])
def test_seeds_are_refused(seed):
    with pytest.raises(GraincodeError, match=r"^seed="):
        SampleRng(seed, torch.arange(2))


@pytest.mark.parametrize("seed", [2**32, 2**57 - 1, np.int64(3)])
def test_seeds_hold_beyond_32_bits(seed):
    drawn = torch.cat([SampleRng(own, torch.arange(2)).uniforms(10, 4) for own in (seed, seed - 1)])
    assert len(drawn.unique()) == 16
    assert not torch.equal(uniforms(seed, [0], 4), uniforms(seed - 1, [0], 4))
