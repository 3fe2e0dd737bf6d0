"""Averaged weights."""

import pytest
import torch

from graincode.distributed.hardware import Hardware
from graincode.training.ema import AveragedWeights


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_averaged_weights_are_used_within_a_context_and_training_is_untouched(decay):
    machine, trained = Hardware().machine(), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    trained.register_buffer("table", torch.zeros(3))
    average = AveragedWeights(trained, decay, machine)
    expected = trained[0].weight.detach().clone()
    for step in range(1, 30):
        with torch.no_grad():
            trained[0].weight += torch.randn(2, 2)
            trained.table += 1
        warm = 0.0 if step <= 1 else min(1 - step ** (-2 / 3), decay)
        expected = torch.lerp(expected, trained[0].weight.detach(), 1 - warm)
        average.update(trained, step)
    kept = trained[0].weight.detach().clone()
    with pytest.raises(RuntimeError), average.in_use(trained) as module:
        assert not module.training
        assert not torch.is_grad_enabled()
        torch.testing.assert_close(module[0].weight, expected if decay else kept)
        assert torch.equal(module.table, torch.full((3,), 29.0))  # buffers are copied
        raise RuntimeError
    assert trained.training
    assert torch.equal(trained[0].weight, kept)
