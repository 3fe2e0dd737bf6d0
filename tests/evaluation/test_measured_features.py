"""Features of images do not depend on the batches that the images come in."""

import pytest
import torch
from torch import nn

from graincode.evaluation.statistics import measure
from graincode.networks.features import Lite0Features


def images(count, size=32):
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 255
    return nn.functional.interpolate(coarse, size=size, mode="bilinear").to(torch.uint8)


@pytest.fixture(scope="module")
def lite0():
    return Lite0Features(resolution=64, batch_size=8)


def test_grouping_into_batches_does_not_matter(lite0):
    batch = images(19)
    whole = measure({"it": lite0}, [batch], 19, splits=2)["it"].tensors()
    for sizes in ([1] * 19, [7, 12], [3, 0, 16]):
        parts = measure({"it": lite0}, batch.split(sizes), 19, splits=2)["it"].tensors()
        assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


def test_features_keep_the_order_of_images_and_record_the_network(lite0):
    batch = images(19)
    forward, backward = (measure({"it": lite0}, [part], 19)["it"] for part in (batch, batch.flip(0)))
    torch.testing.assert_close(forward.subset, backward.subset.flip(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(forward.subset[:8], lite0(batch[:8])[0])
    assert forward.count == 19
    assert forward.identity == lite0.identity == f"lite0@64:{lite0.weights_hash[:12]}"


def test_features_are_ordinary_tensors(lite0):
    def batches():
        assert not torch.is_inference_mode_enabled()
        yield images(2)

    for tensor in measure({"it": lite0}, batches(), 2)["it"].tensors().values():
        assert not tensor.requires_grad
        assert not tensor.is_inference()
