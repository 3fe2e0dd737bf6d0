"""LPIPS: the distance of two images in the features of a network that saw what people find alike."""

from __future__ import annotations

import warnings

import torch
from lpips import LPIPS
from torch import Tensor

from graincode.core.errors import GraincodeError
from graincode.core.images import from_uint8
from graincode.core.losses import feature_distance
from graincode.metrics.features import hash_tensors, load_weights

URL_VGG16 = "https://download.pytorch.org/models/vgg16-397923af.pth"


class PerceptualDistance:
    """LPIPS with VGG16, version 0.1.

    Constructing it neither reads nor downloads anything: weights are loaded at the first use.

    Args:
        weights: file `vgg16-397923af.pth` of torchvision; None downloads it (528 MB) into torch.hub's cache. The linear
            layers on top come with the package `lpips`.
        device: to compute on.
    Source: "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (Zhang et al., 2018).
    """

    def __init__(self, weights: str | None = None, device: torch.device | str = "cpu") -> None:
        self.weights, self.device = weights, device
        self._network: LPIPS | None = None
        self._identity = ""

    @property
    def identity(self) -> str:
        """Name and 12 digits of the hash of all weights. Loads them.

        Raises:
            GraincodeError: they are not at hand or do not fit.
        """
        self._opened()
        return self._identity

    def __call__(self, images: Tensor, reference: Tensor) -> Tensor:
        """(B,) distances, 0 for equal images, of two (B, 3, H, W) uint8."""
        network = self._opened()
        return lpips_distance(network, *(from_uint8(part.to(self.device)) for part in (images, reference)))

    def _opened(self) -> LPIPS:
        if self._network is None:
            network, self._identity = open_lpips(self.weights, "evaluation.lpips_weights", "leave lpips out")
            self._network = network.to(self.device)
        return self._network


def open_lpips(weights: str | None, key: str, otherwise: str) -> tuple[LPIPS, str]:
    """LPIPS with VGG16, frozen, and its name with 12 digits of the hash of all weights.

    Args:
        weights: as of `PerceptualDistance`.
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
