import pytest
import torch

from graincode.core.schedules import MASK_SCHEDULES, ramp, warmup_cosine

"""Schedules of the learning rate and of losses."""


def test_learning_rate_rises_then_falls_to_almost_nothing():
    factors = [warmup_cosine(step, 100, 10) for step in range(1, 101)]
    assert factors[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert 0 < factors[-1] < 0.01
    assert factors[10 + 45] == pytest.approx(0.5, abs=0.01)


def test_a_ramp_rises_from_nothing_to_the_whole():
    assert [ramp(step, 10, 4) for step in (1, 10, 11, 12, 14, 100)] == [0, 0, 0.25, 0.5, 1, 1]


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
