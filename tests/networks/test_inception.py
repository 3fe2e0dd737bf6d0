"""The Inception of published metrics: its three kinds of features, and how images are resized for it."""

import pytest
import torch
from cleanfid.resize import make_resizer
from helpers import write_inception
from helpers_evaluation import photographs
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from graincode.core.errors import GraincodeError
from graincode.networks.inception import InceptionFeatures

SEEN = {}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> FeatureExtractorInceptionV3:
    """torch-fidelity's network with random weights, which notes what a layer of it gives."""
    path = write_inception(tmp_path_factory.mktemp("inception") / "inception.pth")
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(path))
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, found: SEEN.update(mixed_6=found))
    network.path = path
    return network


def test_pooled_features_and_logits_are_torch_fidelity_s_and_spatial_ones_come_from_its_sixth_mixed_layer(theirs):
    images = photographs(32, 64)[:2]
    pooled, logits = theirs(images)
    network = InceptionFeatures(str(theirs.path))
    found = network(images)
    sizes = [network.dimension, network.classes, network.spatial]
    assert [part.shape for part in found] == [(2, size) for size in sizes]
    assert sizes == [2048, 1008, 17 * 17 * 7]
    assert torch.equal(found.pooled, pooled)
    assert torch.equal(found.logits, logits)
    # rows, columns, channels, as TensorFlow has them
    expected = torch.stack([SEEN["mixed_6"][:, channel] for channel in range(7)], dim=3).flatten(1)
    assert torch.equal(found.spatial, expected)
    assert expected.std() > 0


def test_clean_resizing_has_clean_fid_s_features_and_names_of_its_own(theirs):
    images = photographs(48, 64)[:2]
    network = InceptionFeatures(str(theirs.path), resizing="clean")
    resizer = make_resizer("PIL", False, "bicubic", (299, 299))
    resized = [torch.from_numpy(resizer(image.permute(1, 2, 0).numpy())).permute(2, 0, 1) for image in images]
    x = (torch.stack(resized) - 128) / 128
    for name, layer in theirs.named_children():
        x = layer(x) if name != "fc" else x
    torch.testing.assert_close(network(images).pooled, x.flatten(1), rtol=1e-4, atol=1e-6)
    names = {"fd": "fid_clean", "sfd": "sfid_clean", "is": "is_clean", "rfd": "rfid_clean"}
    assert {metric: network.label(metric) for metric in names} == names
    published = InceptionFeatures(str(theirs.path))
    assert network.name != published.name
    assert network.weights_hash != published.weights_hash
    assert "as clean-fid's, to 299 pixels" in network.recipe
    assert "as TensorFlow 1's, to 299 pixels" in published.recipe
    with pytest.raises(GraincodeError, match="resizing=bicubic: expected one of tensorflow, clean"):
        InceptionFeatures(resizing="bicubic")
