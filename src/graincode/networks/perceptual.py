"""Perceptual losses: how far apart two images are in the features of a frozen network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from graincode.core.errors import GraincodeError

_KEY = "tokenizer.perceptual"


class PerceptualLoss(ABC):
    """A distance of images, with a gradient for them and none for the network behind it.

    Constructing one neither reads nor downloads anything: weights are loaded by `load` or at the first use, and follow
    the images to their device. It is no module, so that its network is in no state, export or average.

    Args:
        weight: of the distance in the loss.
    Raises:
        GraincodeError: the weight is not positive.
    """

    def __init__(self, weight: float = 1.0) -> None:
        if weight <= 0:
            raise GraincodeError(
                f"{_KEY}.weight={weight}: expected more than 0; type {_KEY}.weight=1, or tokenizer/perceptual=none"
            )
        self.weight = weight
        self._network: nn.Module | None = None
        self._identity = ""
        self._place: tuple[torch.device, torch.dtype] | None = None

    @abstractmethod
    def _load(self, size: tuple[int, int]) -> tuple[nn.Module, str]:
        """The network, in evaluation mode and without gradients, and its identity; the images have that size."""

    @abstractmethod
    def _smallest(self, network: nn.Module) -> int:
        """The least height and width of images that it can be used on."""

    @abstractmethod
    def _distance(self, network: nn.Module, images: Tensor, reference: Tensor) -> Tensor:
        """(B,) distances of (B, 3, H, W) images in [-1, 1]."""

    @property
    def identity(self) -> str:
        """Name and 12 digits of the hash of the weights, once they are loaded."""
        return self._identity

    def load(self, size: tuple[int, int]) -> nn.Module:
        """The network, which is loaded once, ready for images of this (height, width).

        Raises:
            GraincodeError: the weights are not at hand or do not fit, or such images are too small.
        """
        if self._network is None:
            self._network, self._identity = self._load(size)
        if min(size) < (smallest := self._smallest(self._network)):
            raise GraincodeError(
                f"images of {size[0]} x {size[1]} pixels are too small for {self._identity.partition(':')[0]}, which "
                f"takes {smallest} or more: type data.image_size={smallest}, or tokenizer/perceptual=none"
            )
        return self._network

    def __call__(self, images: Tensor, reference: Tensor) -> Tensor:
        """(B,) distances >= 0, and 0 for equal images, of (B, 3, H, W) images in [-1, 1] from as many others.

        Raises:
            GraincodeError: as `load`, or they have another shape.
        """
        if images.shape != reference.shape or images.ndim != 4 or images.shape[1] != 3:
            raise GraincodeError(
                f"images of {tuple(images.shape)} and {tuple(reference.shape)}: expected (B, 3, H, W) twice; "
                "type expand(-1, 3, -1, -1) for grey images"
            )
        network = self.load((images.shape[2], images.shape[3]))
        place = images.device, torch.promote_types(images.dtype, torch.float32)
        if place != self._place:
            network.to(*place)
            self._place = place
        return self._distance(network, images.to(place[1]), reference.to(*place))


class LPIPSLoss(PerceptualLoss):
    """LPIPS with VGG16, version 0.1: the same network and figure as `graincode.networks.distances.LPIPSDistance`.

    Args:
        weight: of the distance in the loss.
        weights: file `vgg16-397923af.pth` of torchvision; None downloads it (528 MB) into torch.hub's cache.
    Source: "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (Zhang et al., 2018); as a loss of
        tokenizers: VQGAN (Esser et al., 2021).
    """

    def __init__(self, weight: float = 1.0, weights: str | None = None) -> None:
        super().__init__(weight)
        self.weights = weights

    def _load(self, size: tuple[int, int]) -> tuple[nn.Module, str]:
        from graincode.networks.distances import open_lpips

        return open_lpips(self.weights, f"{_KEY}.weights", "type tokenizer/perceptual=lite0")

    def _smallest(self, network: nn.Module) -> int:
        return 16  # four poolings

    def _distance(self, network: nn.Module, images: Tensor, reference: Tensor) -> Tensor:
        from graincode.networks.distances import lpips_distance

        return lpips_distance(network, images, reference)


class TimmLoss(PerceptualLoss):
    """The distance of LPIPS without its learned linear weights, in the features of any model of timm: features of
    several stages, brought to length 1 at each place; squared differences are summed over channels, averaged over
    places, and summed over stages.

    Args:
        model: its name in timm, such as `vgg16.tv_in1k` or `resnet50.a1_in1k`.
        weight: of the distance in the loss.
        weights: a file of named tensors, .safetensors or .pth; None has timm download what belongs to the name.
        resize: side in pixels that images are resized to; None takes them at their own size.
        stages: which of the model's stages, from 0, the finest; None for all.
    Raises:
        GraincodeError: timm has no such model, or a number is not positive.
    Source: LPIPS (Zhang et al., 2018), eq. 1 with all w = 1 (its "baseline").
    """

    def __init__(
        self,
        model: str,
        weight: float = 1.0,
        weights: str | None = None,
        resize: int | None = None,
        stages: Sequence[int] | None = None,
    ) -> None:
        super().__init__(weight)
        if resize is not None and resize < 1:
            raise GraincodeError(f"{_KEY}.resize={resize}: expected 1 or more; type {_KEY}.resize=null or 112")
        if stages is not None and (not stages or min(stages) < 0 or len(set(stages)) < len(stages)):
            raise GraincodeError(
                f"{_KEY}.stages={list(stages)}: expected different numbers from 0; type {_KEY}.stages=null or [0,1,2]"
            )
        self.model, self.weights, self.resize = model, weights, resize
        self.stages = None if stages is None else sorted(stages)
        self._check()

    def _check(self) -> None:
        from graincode.networks.features import check_timm_model

        check_timm_model(self.model, f"{_KEY}.model")

    def _open(self, size: tuple[int, int]) -> nn.Module:
        from graincode.networks.features import open_timm

        return open_timm(self.model, self.weights, size, f"{_KEY}.weights", f"{_KEY}.resize")

    def _load(self, size: tuple[int, int]) -> tuple[nn.Module, str]:
        backbone = self._open(size if self.resize is None else (self.resize, self.resize))
        if not hasattr(backbone.network, "forward_intermediates"):
            raise GraincodeError(
                f"timm's {self.model} does not give the features of its stages: type {_KEY}.model=resnet50.a1_in1k"
            )
        count = len(backbone.network.feature_info)
        if self.stages is not None and self.stages[-1] >= count:
            raise GraincodeError(
                f"{_KEY}.stages={self.stages}: {self.model} has {count} stages; "
                f"type {_KEY}.stages={list(range(count))}, or some of them"
            )
        return backbone, f"{self.model}:{backbone.weights_hash[:12]}"

    def _smallest(self, network: nn.Module) -> int:
        if self.resize is not None:
            return 1
        found = [stage["reduction"] for stage in network.network.feature_info]
        return max(found if self.stages is None else (found[stage] for stage in self.stages))

    def _distance(self, network: nn.Module, images: Tensor, reference: Tensor) -> Tensor:
        from graincode.networks.distances import stages_distance

        return stages_distance(network, images, reference, self.resize, self.stages)


class Lite0Loss(TimmLoss):
    """As `TimmLoss`, with EfficientNet-Lite0, whose weights come with a Python package: it works offline, on CPUs.

    Args:
        weight: of the distance in the loss.
        resize: side in pixels that images are resized to; None takes them at their own size.
        stages: some of 0 .. 4, whose features have 1/2 .. 1/32 of the image's resolution; None for all.
    Source: as of `TimmLoss`; network and input scaling are those of `graincode.networks.features.Lite0Features`.
    """

    def __init__(self, weight: float = 1.0, resize: int | None = None, stages: Sequence[int] | None = None) -> None:
        super().__init__("lite0", weight, None, resize, stages)

    def _check(self) -> None:
        pass

    def _open(self, size: tuple[int, int]) -> nn.Module:
        from graincode.networks.features import open_lite0

        return open_lite0()
