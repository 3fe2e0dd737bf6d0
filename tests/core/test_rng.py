import pytest
import torch

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


def test_random_numbers_belong_to_their_sample():
    together = uniforms(7, range(10), 3, 2)
    assert torch.equal(together[4:6], uniforms(7, [4, 5], 3, 2))
    assert not torch.equal(together[4], uniforms(8, [4], 3, 2)[0])
    assert len({float(value) for value in together.flatten()}) == 60
    assert sorted(permutation(3, 1, 100)) == list(range(100))
    assert (permutation(3, 1, 100) != permutation(3, 2, 100)).any()
