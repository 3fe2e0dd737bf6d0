"""The routers of imported DQ-VAEs."""

import json

import pytest
import torch
from helpers_golden import golden, images_of
from helpers_parity import import_golden, write_golden

from graincode.core.errors import GraincodeError
from graincode.interop.convert import import_tokenizer
from graincode.interop.dqvae import THRESHOLDS
from graincode.interop.names import Options


@pytest.mark.parametrize("network", ["dqvae_dual_entropy", "dqvae_dual_feature", "dqvae_triple_feature"])
def test_the_density_of_each_region_is_the_published_one(network, tmp_path):
    module, found = import_golden(network, tmp_path).module.double(), golden(network)
    with torch.no_grad():
        density = module.route(images_of(found, torch.float64)).density.double()
    wanted = found.get("density", found["gate"][:, 1:].logsumexp(dim=1) - found["gate"][:, 0])
    torch.testing.assert_close(density, wanted, rtol=0, atol=1e-5)  # ours is float32


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_golden("dqvae_dual_entropy", tmp_path_factory.mktemp("dqvae") / "last.ckpt")


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.3, 0.5, 0.7, 0.9])
def test_a_ratio_has_the_published_threshold(file, ratio):
    router = import_tokenizer("dqvae", file).module.router
    threshold = THRESHOLDS[round(100 - 100 * ratio)]
    density = torch.tensor([[[threshold * (1 - 1e-6), threshold, threshold * (1 + 1e-6)]]])
    assert router._grains(density, [1 - ratio, ratio]).tolist() == [[[0, 0, 1]]]


def test_thresholds_can_be_given_by_file_and_the_entropy_by_name(file, tmp_path):
    table = tmp_path / "table.json"
    table.write_text(json.dumps({str(percent): percent / 40 for percent in range(1, 100)}))
    found = import_tokenizer("dqvae", file, Options(thresholds=table, entropy="current"))
    assert found.module.router.quantiles[2048] == 1.25
    assert found.node["router"]["density"]["span"] == [-1.0, 1.0]
    assert import_tokenizer("dqvae", file).node["router"]["density"]["span"] == [0.0, 1.0]
    for wrong in ("no JSON", "[1, 2]", "{}", '{"0": 1}', '{"10": 2, "20": 1}'):
        table.write_text(wrong)
        with pytest.raises(GraincodeError, match=f"{table}: no percentiles"):
            import_tokenizer("dqvae", file, Options(thresholds=table))


@pytest.mark.when(
    "another image size is asked of a network that has learned its positions", "it is refused, with the size that fits"
)
def test_learned_positions_have_one_image_size(file):
    with pytest.raises(GraincodeError, match="image_size=128: expected 64"):
        import_tokenizer("dqvae", file, Options(128))
