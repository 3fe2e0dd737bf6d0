"""Weights are named tensors from a file or a download; nothing in them is executed."""

import pickle

import pytest
import torch
from helpers_networks import Bomb
from safetensors.torch import save_file

from graincode.core.errors import GraincodeError
from graincode.networks.features import TimmFeatures
from graincode.networks.inception import InceptionFeatures
from graincode.networks.perceptual import LPIPSDistance, TimmDistance
from graincode.networks.weights import hash_tensors, read_weights

NETWORKS = {
    "inception": InceptionFeatures,
    "timm": lambda path: TimmFeatures("test_resnet", path),
    "lpips": lambda path: LPIPSDistance(weights=path),
    "timm distance": lambda path: TimmDistance("test_resnet", weights=path),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_pickle_in_place_of_weights_is_refused_and_not_executed(tmp_path, write, network, suffix):
    trace, path = tmp_path / "executed", tmp_path / f"weights.{suffix}"
    write({"features.0.weight": torch.zeros(1), "more": Bomb(trace)}, path)
    with pytest.raises(GraincodeError, match=f"{path}: refused"):
        NETWORKS[network](str(path)).load()
    assert not trace.exists()


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"a": 1}])
def test_weights_are_named_tensors_only(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(GraincodeError, match=r"weights\.pth: holds .* named tensors"):
        read_weights(tmp_path / "weights.pth")


@pytest.mark.parametrize("network", NETWORKS)
def test_weights_that_do_not_fit_or_are_not_there_are_refused(tmp_path, network):
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    for name in ("other.pth", "none.pth"):
        with pytest.raises(GraincodeError) as error:
            NETWORKS[network](str(tmp_path / name)).load()
        assert str(tmp_path / name) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("network", ["inception", "lpips"])
def test_without_a_connection_the_file_is_named_and_nothing_takes_its_place(no_network, network):
    with pytest.raises(
        GraincodeError, match=r"^weights=null: .*no route to host.*expected the path of \S+\.pth"
    ) as error:
        NETWORKS[network](None).load()
    assert "\n" not in str(error.value)


def test_the_hash_is_that_of_the_content_whatever_the_file(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(4.0)}
    save_file(tensors, tmp_path / "it.safetensors")
    torch.save(tensors, tmp_path / "it.pth")
    found = {hash_tensors(read_weights(tmp_path / name)) for name in ("it.safetensors", "it.pth")}
    assert found == {hash_tensors(tensors)}
    for other in (
        {"c": tensors["a"], "b": tensors["b"]},
        {**tensors, "a": tensors["a"].mT},
        {**tensors, "b": -tensors["b"]},
    ):
        assert hash_tensors(other) not in found
    assert hash_tensors(tensors, "salt") not in found
