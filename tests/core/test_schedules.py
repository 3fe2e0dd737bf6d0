"""Schedules of the learning rate and of losses."""

import pytest

from graincode.core.schedules import ramp, warmup_cosine


def test_learning_rate_rises_then_falls_to_almost_nothing():
    factors = [warmup_cosine(step, 100, 10) for step in range(1, 101)]
    assert factors[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert 0 < factors[-1] < 0.01
    assert factors[10 + 45] == pytest.approx(0.5, abs=0.01)


def test_a_ramp_rises_from_nothing_to_the_whole():
    assert [ramp(step, 10, 4) for step in (1, 10, 11, 12, 14, 100)] == [0, 0, 0.25, 0.5, 1, 1]
