"""Means over a logging interval."""

import pytest
import torch

from graincode.core.losses import Term, weighted_sum
from graincode.training.monitors import Meter

CPU = torch.device("cpu")


def test_means_of_terms_are_exact_whatever_the_batches():
    meter = Meter()
    values = torch.randn(12)
    for part in (values[:1], values[1:5], values[5:]):
        meter.add({"x": Term(part.sum(), len(part), 2.0)})
    assert meter.flush()["x"] == pytest.approx(float(values.mean()), rel=1e-5)
    assert meter.flush() == {}
    terms = {
        "a": Term(torch.tensor(6.0), 3, 0.5),
        "b": Term(torch.tensor(9.0), 0, 1.0),
        "c": Term(torch.tensor(1.0), 1, 0.0),
    }
    assert float(weighted_sum(terms)) == 10.0


def test_a_meter_goes_on_from_its_state():
    whole, first, second = Meter(), Meter(), Meter()
    for index in range(4):
        terms = {"x": Term(torch.tensor(float(index)), index)}
        seen = {"codebook": torch.bincount(torch.tensor([index, 0]), minlength=5)}
        for meter in (whole, first if index < 2 else second):
            if meter is second and index == 2:
                second.load_state(first.state(), CPU)
            meter.add(terms)
            meter.add_histograms(seen)
    figures = whole.flush()
    assert figures == second.flush()
    assert figures["x"] == 1.0
    assert figures["codebook_usage"] == 0.8
