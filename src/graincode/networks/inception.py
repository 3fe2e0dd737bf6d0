"""The Inception v3 of published FID, sFID and IS."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from graincode.core.errors import check_choice
from graincode.networks.features import FeatureNetwork, Loaded
from graincode.networks.resizing import IN_WORDS, resize
from graincode.networks.weights import fitting, hash_tensors, load_weights

_SIDE = 299
_SPATIAL = 7 * 17 * 17  # the first 7 of 192 channels of 17 x 17 places


class Inception(nn.Module):
    """torch-fidelity's Inception layer by layer, of (B, 3, H, W) uint8 images."""

    def __init__(self, layers: nn.Module, resizing: Literal["tensorflow", "clean"]) -> None:
        super().__init__()
        self.layers, self.resizing = layers, resizing

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pooled features (B, 2048), logits without their bias (B, 1008), and spatial features (B, 2023)."""
        x = (resize(images.float(), _SIDE, self.resizing) - 128) / 128
        for name, layer in self.layers.named_children():
            if name == "Mixed_6d":  # TensorFlow's mixed_6/conv, whose places come first and channels last
                spatial = layer.branch1x1(x)[:, :7].permute(0, 2, 3, 1).flatten(1)
            if name != "fc":
                x = layer(x)
        pooled = x.flatten(1)
        return pooled, pooled.mm(self.layers.fc.weight.T), spatial


class InceptionFeatures(FeatureNetwork):
    """The Inception v3 of published FID and IS: 2048 features, 1008 logits without their bias, 2023 spatial features.

    Args:
        weights: file `weights-inception-2015-12-05-6726825d.pth`; None downloads it (91 MB) into torch.hub's cache.
        resizing: "tensorflow" as published, or "clean" as clean-fid does, whose metrics have names of their own.
    Source: torch-fidelity's port of the network of Heusel et al., 2017 (FID); spatial features as in ADM's evaluation
    of sFID (Nash et al., 2021).
    """

    def __init__(
        self, weights: str | None = None, batch_size: int = 32, resizing: Literal["tensorflow", "clean"] = "tensorflow"
    ) -> None:
        check_choice("resizing", resizing, ("tensorflow", "clean"))
        super().__init__("inception-v3-compat" + ("-clean" if resizing == "clean" else ""), batch_size)
        self.weights, self.resizing, self.published = weights, resizing, resizing == "tensorflow"

    def label(self, metric: str) -> str:
        """What a metric is called: `fid`, `sfid`, `is`; with clean-fid's resizing `fid_clean`."""
        return metric.replace("fd", "fid") + ("" if self.published else "_clean")

    def _load(self, size: tuple[int, int] | None) -> Loaded:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        weights, wanted = load_weights(self.weights, URL_INCEPTION_V3), ["2048", "logits_unbiased"]
        # torch-fidelity unpickles whatever path it is given: hand it these proven tensors, never the file
        proven = io.BytesIO()
        torch.save(weights, proven)
        proven.seek(0)
        with fitting(weights, self.weights or URL_INCEPTION_V3, f"{self.name}; give {Path(URL_INCEPTION_V3).name}"):
            layers = FeatureExtractorInceptionV3(self.name, wanted, feature_extractor_weights_path=proven)
        clean = "" if self.resizing == "tensorflow" else "; clean-fid's resizing"
        # a hash of its own, as it stood before there was a choice of resizing
        digest = hash_tensors(weights, f"torch-fidelity inception-v3-compat; 2048; logits_unbiased{clean}")
        recipe = f"torch-fidelity's port; {IN_WORDS[self.resizing]}, to {_SIDE} pixels; (x - 128) / 128; pool_3"
        return Loaded(Inception(layers, self.resizing), digest, 2048, 1008, _SPATIAL, recipe)
