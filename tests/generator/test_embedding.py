"""What generators predict with."""

import pytest
import torch
from helpers_generators import make_ar, make_nar
from strategies import LAYOUTS

LAYOUT = LAYOUTS[2]


@pytest.mark.parametrize("head", ["content", "region", "grain"])
def test_logits_are_float32_whatever_the_states_and_autocast_are(head):
    make = make_nar if head == "grain" else make_ar
    model = make(LAYOUT, dtype=torch.float32)
    layer = getattr(model, f"{head}_head")
    states = torch.randn(7, layer.in_features).bfloat16()
    more = (torch.zeros(7, dtype=torch.long),) if head == "content" else ()
    exact = layer(states.float(), *more)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(states, *more)
    assert found.dtype == torch.float32
    assert torch.equal(found, exact)
    assert layer.bfloat16()(states, *more).dtype == torch.float32
    assert layer.double()(states.double(), *more).dtype == torch.float64
