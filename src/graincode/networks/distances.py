"""Perceptual distances: how far apart two images are in the features of a network."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from lpips import LPIPS
from torch import Tensor, nn

from graincode.core.errors import GraincodeError
from graincode.core.images import from_uint8
from graincode.core.losses import feature_distance
from graincode.networks.features import Backbone, hash_tensors, load_weights, open_lite0

URL_VGG16 = "https://download.pytorch.org/models/vgg16-397923af.pth"


class PerceptualDistance(ABC):
    """A distance of pairs of images.

    Constructing it neither reads nor downloads anything: weights are loaded at the first use.

    Args:
        device: to compute on.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self._network: nn.Module | None = None
        self._identity = ""

    @abstractmethod
    def _open(self) -> tuple[nn.Module, str]:
        """The network, frozen, and its name with 12 digits of the hash of all weights."""

    @abstractmethod
    def _distance(self, network: nn.Module, images: Tensor, reference: Tensor) -> Tensor:
        """(B,) distances of (B, 3, H, W) images in [-1, 1]."""

    @property
    def identity(self) -> str:
        """Name and 12 digits of the hash of all weights. Loads them.

        Raises:
            GraincodeError: they are not at hand or do not fit.
        """
        self._opened()
        return self._identity

    @torch.no_grad()
    def __call__(self, images: Tensor, reference: Tensor) -> Tensor:
        """(B,) distances, 0 for equal images, of two (B, 3, H, W) uint8.

        Raises:
            GraincodeError: they are not uint8, or too small.
        """
        network = self._opened()
        return self._distance(network, *(from_uint8(part.to(self.device)) for part in (images, reference)))

    def _opened(self) -> nn.Module:
        if self._network is None:
            network, self._identity = self._open()
            self._network = network.to(self.device)
        return self._network


class LPIPSDistance(PerceptualDistance):
    """LPIPS with VGG16, version 0.1.

    Args:
        weights: file `vgg16-397923af.pth` of torchvision; None downloads it (528 MB) into torch.hub's cache. The linear
            layers on top come with the package `lpips`.
        device: to compute on.
    Source: "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (Zhang et al., 2018).
    """

    def __init__(self, weights: str | None = None, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        self.weights = weights

    def _open(self) -> tuple[nn.Module, str]:
        return open_lpips(self.weights, "evaluation.lpips_weights", "leave lpips out")

    def _distance(self, network: nn.Module, images: Tensor, reference: Tensor) -> Tensor:
        return lpips_distance(network, images, reference)


class Lite0Distance(PerceptualDistance):
    """LPIPS without linear weights, in EfficientNet-Lite0, whose weights come with a Python package: it works offline.

    Images are looked at in their own resolution, of 32 pixels or more, at all five stages: the figure is what
    `tokenizer/perceptual=lite0` lowers by default.
    Source: LPIPS (Zhang et al., 2018), eq. 1 with all w = 1 (its "baseline").
    """

    def _open(self) -> tuple[nn.Module, str]:
        backbone = open_lite0()
        return backbone, f"lite0:{backbone.weights_hash[:12]}"

    def _distance(self, network: nn.Module, images: Tensor, reference: Tensor) -> Tensor:
        if min(images.shape[2:]) < 32:
            height, width = images.shape[2:]
            raise GraincodeError(
                f"images of {height} x {width} pixels are too small for lite0, which takes 32 or more: "
                "leave lite0 out of evaluation.metrics"
            )
        return stages_distance(network, images, reference)


def stages_distance(
    backbone: Backbone, images: Tensor, reference: Tensor, side: int | None = None, stages: Sequence[int] | None = None
) -> Tensor:
    """(B,) distances in the features of stages of a network, summed over stages.

    Args:
        backbone: any of timm that gives the features of its stages.
        images, reference: (B, 3, H, W) in [-1, 1].
        side: in pixels that images are resized to; None takes them at their own size.
        stages: from 0, the finest; None for all.
    Source: as of `core.losses.feature_distance`.
    """
    maps = (
        backbone.network.forward_intermediates(
            backbone.scaled((part + 1) * 127.5, side), indices=stages, intermediates_only=True
        )
        for part in (images, reference)
    )
    return sum(feature_distance(a, b) for a, b in zip(*maps, strict=True))


def open_lpips(weights: str | None, key: str, otherwise: str) -> tuple[LPIPS, str]:
    """LPIPS with VGG16, frozen, and its name with 12 digits of the hash of all weights.

    Args:
        weights: as of `LPIPSDistance`.
        key: that gives them, for errors.
        otherwise: what else the user can do.
    Raises:
        GraincodeError: they are not at hand or do not fit.
    """
    found = load_weights(weights, URL_VGG16, key, otherwise)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what lpips asks torchvision for
        network = LPIPS(net="vgg", pnet_rand=True, verbose=False).requires_grad_(False)
    own = network.net.state_dict()  # `slice2.5.weight` is `features.5.weight` of torchvision
    try:
        network.net.load_state_dict({name: found["features." + name.partition(".")[2]] for name in own})
    except (KeyError, RuntimeError):
        raise GraincodeError(
            f"{weights or URL_VGG16}: {len(found)} tensors that are not torchvision's VGG16; give "
            f"{key}=/path/to/vgg16-397923af.pth"
        ) from None
    return network.eval(), f"lpips-vgg:{hash_tensors(network.state_dict(), 'lpips 0.1')[:12]}"


def lpips_distance(network: LPIPS, images: Tensor, reference: Tensor) -> Tensor:
    """(B,) what the network's own call gives for (B, 3, H, W) images in [-1, 1], but with gradients that are finite
    where all features of a place are 0."""
    pairs = zip(*(network.net(network.scaling_layer(part)) for part in (images, reference)), strict=True)
    weights = (linear.model[-1].weight.flatten() for linear in network.lins)
    return sum(feature_distance(a, b, w) for (a, b), w in zip(pairs, weights, strict=True))
