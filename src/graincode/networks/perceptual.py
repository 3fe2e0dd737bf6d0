"""Perceptual distances: how far apart two images are in the features of a frozen network; metrics and losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from graincode.core.errors import GraincodeError, check
from graincode.core.images import from_uint8
from graincode.core.losses import feature_distance
from graincode.networks.features import Backbone, FrozenNetwork, Loaded, check_timm_model, open_lite0, open_timm
from graincode.networks.weights import fitting, hash_tensors, load_weights

URL_VGG16 = "https://download.pytorch.org/models/vgg16-397923af.pth"


class PerceptualDistance(FrozenNetwork):
    """A distance of images, with a gradient for them and none for the network, which is in no state, export or average:
    `core.losses.feature_distance`, summed over stages.

    Args:
        name: of the network.
        weight: of the distance in a loss, above 0; a metric is without it.
        resize: side in pixels that images are resized to; None takes them at their own size.
        stages: which of the network's stages, from 0, the finest; None for all.
    Source: LPIPS (Zhang et al., 2018), eq. 1 with all w = 1 (its "baseline").
    """

    def __init__(
        self, name: str, weight: float = 1.0, resize: int | None = None, stages: Sequence[int] | None = None
    ) -> None:
        super().__init__(name)
        check("weight", weight, "a number above 0", weight > 0)
        check("resize", resize, "1 or more, or null", resize is None or resize >= 1)
        different = stages is None or (len(stages) > 0 and min(stages) >= 0 and len(set(stages)) == len(stages))
        check("stages", stages, "different numbers from 0, or null", different)
        self.weight, self.resize = weight, resize
        self.stages = None if stages is None else sorted(stages)

    def load(self, size: tuple[int, int] | None = None) -> Loaded:
        """As of any frozen network; images of that size are refused if they are too small."""
        loaded = super().load(size)
        reductions = [stage["reduction"] for stage in loaded.extractor.network.feature_info]
        stages = range(len(reductions)) if self.stages is None else self.stages
        check("stages", stages, f"some of 0 to {len(reductions) - 1}", stages[-1] < len(reductions))
        smallest = 1 if self.resize else max(reductions[stage] for stage in stages)
        if size is not None and min(size) < smallest:
            raise GraincodeError(f"images of {size} pixels are too small for {self.name}: expected {smallest} or more")
        return loaded

    def __call__(self, images: Tensor, reference: Tensor) -> Tensor:
        """(B,) distances, 0 for equal images, of (B, 3, H, W) images, in [-1, 1] or uint8, from as many others."""
        if images.shape != reference.shape or images.ndim != 4 or images.shape[1] != 3:
            shapes = f"{tuple(images.shape)} and {tuple(reference.shape)}"
            raise GraincodeError(f"images of {shapes}: expected (B, 3, H, W) twice")
        self.load((images.shape[2], images.shape[3]))
        module = self.at(images, torch.promote_types(images.dtype, torch.float32))
        pair = (from_uint8(part) if part.dtype == torch.uint8 else part for part in (images, reference))
        maps = zip(*(module.stages(part.to(*self._where), self.stages) for part in pair), strict=True)
        return sum(feature_distance(*both, getattr(module, f"linear_{i}", None)) for i, both in enumerate(maps))


class TimmDistance(PerceptualDistance):
    """The distance in the features of any model of timm; model and weights as of `TimmFeatures`."""

    def __init__(
        self, model: str, weight: float = 1.0, weights: str | None = None, resize: int | None = None,
        stages: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, weight, resize, stages)
        check_timm_model(model)
        self.weights = weights

    def _load(self, size: tuple[int, int] | None) -> Loaded:
        backbone, digest = open_timm(self.name, self.weights, self.resize, size)
        known = hasattr(backbone.network, "forward_intermediates")
        check("model", self.name, "one that gives the features of its stages, such as resnet50.a1_in1k", known)
        return Loaded(backbone, digest)


class Lite0Distance(PerceptualDistance):
    """The distance in the features of `Lite0Features`; stages 0 .. 4 have 1/2 .. 1/32 of the image's resolution."""

    def __init__(self, weight: float = 1.0, resize: int | None = None, stages: Sequence[int] | None = None) -> None:
        super().__init__("lite0", weight, resize, stages)

    def _load(self, size: tuple[int, int] | None) -> Loaded:
        return Loaded(*open_lite0(self.resize))


class LPIPSDistance(PerceptualDistance):
    """LPIPS with VGG16, version 0.1, for images of 16 pixels and more.

    Args:
        weights: file `vgg16-397923af.pth` of torchvision; None downloads it (528 MB) into torch.hub's cache.
    Source: LPIPS (Zhang et al., 2018); in tokenizers: VQGAN (Esser et al., 2021). Linear weights: lpips_vgg.md.
    """

    def __init__(self, weight: float = 1.0, weights: str | None = None) -> None:
        super().__init__("lpips-vgg", weight, stages=range(5))
        self.weights = weights

    def _load(self, size: tuple[int, int] | None) -> Loaded:
        import timm

        found = load_weights(self.weights, URL_VGG16)
        with torch.device("meta"):
            network = timm.create_model("vgg16", pretrained=False)
        # without the classifier, which is most of it, and the last pooling, which needs 32 pixels
        network.features, network.pre_logits, network.head = network.features[:-1], nn.Identity(), nn.Identity()
        with fitting(found, self.weights or URL_VGG16, f"VGG16; give torchvision's {Path(URL_VGG16).name}"):
            network.load_state_dict({k: v for k, v in found.items() if k.startswith("features.")}, assign=True)
        linear = load_file(Path(__file__).with_name("lpips_vgg.safetensors"))
        scale = (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
        module = Backbone(network, *(torch.tensor(values).view(3, 1, 1) * 255 for values in scale), None)
        for name, tensor in linear.items():  # linear_0 .. linear_4
            module.register_buffer(name, tensor)
        return Loaded(module, hash_tensors(network.state_dict() | linear, "lpips 0.1"))
