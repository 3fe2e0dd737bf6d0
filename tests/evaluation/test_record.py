"""What becomes of metrics."""

from types import SimpleNamespace

import pytest
import torch

from graincode.core.errors import GraincodeError
from graincode.data.images import TensorImages
from graincode.evaluation.estimate import Estimate
from graincode.evaluation.modes import Plan
from graincode.evaluation.record import evaluate
from graincode.evaluation.streams import DatasetStream


@pytest.mark.when("a metric is NaN or infinite", "it is named, and nothing is recorded")
@pytest.mark.parametrize("estimate", [Estimate(float("nan")), Estimate(float("-inf")), Estimate(1.0, float("nan"))])
def test_a_metric_that_is_not_finite_is_refused(tmp_path, estimate):
    images = TensorImages("them", "test", torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2).long())
    context = SimpleNamespace(networks={}, seed=0, batch_size=2, cache_dir=None, device="cpu", loading=(2, 0))
    mode = SimpleNamespace(name="mine", write=lambda *_: None, estimates=lambda *_: {"fd_mine": estimate})
    with pytest.raises(GraincodeError, match=r"^fd_mine=.*: expected a finite number"):
        evaluate(mode, Plan(context, DatasetStream(images, 2), None, {}, []), tmp_path, None)
    assert not any(tmp_path.iterdir())
    mode.estimates = lambda *_: {"fd_mine": Estimate(1.0)}
    assert evaluate(mode, Plan(context, DatasetStream(images, 2), None, {}, []), tmp_path, None)["count"] == 2
