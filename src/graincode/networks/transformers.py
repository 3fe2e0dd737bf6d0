"""Vision transformers that recent papers measure distances in: DINOv2 and CLIP."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graincode.networks.features import Backbone, FeatureNetwork, Loaded, open_timm

_SIDE = 224


class TransformerFeatures(FeatureNetwork):
    """The base of both: a model of timm, of images resized to 224 pixels by bicubic with antialias, not rounded.

    Args:
        weights: a file of the model's published tensors, .safetensors or .pth; None has timm download them.
    """

    model: ClassVar[str]
    title: ClassVar[str]

    def __init__(self, weights: str | None = None, batch_size: int = 32) -> None:
        super().__init__(self.title, batch_size)
        self.weights = weights

    def _load(self, size: tuple[int, int] | None) -> Loaded:
        backbone, digest = open_timm(self.model, self.weights, _SIDE, resizing="bicubic", prepare=self._prepare)
        features, _ = (network := self._wrapped(backbone))(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
        return Loaded(network, digest, features.shape[1], recipe=f"{backbone.recipe}; {_SIDE} pixels")

    def _prepare(self, network: nn.Module) -> None:
        """Change a network before its weights are hashed."""

    def _wrapped(self, backbone: Backbone) -> nn.Module:
        return backbone


class DINOv2Features(TransformerFeatures):
    """The class token of DINOv2's ViT-L/14: 1024 features, no logits.

    Source: FD in DINOv2 features (Stein et al., 2023), computed as by EDM2 (Karras et al., 2024).
    """

    model: ClassVar[str] = "vit_large_patch14_dinov2.lvd142m"
    title: ClassVar[str] = "dinov2"

    def _prepare(self, network: nn.Module) -> None:
        """Resample position embeddings as DINOv2's own code does, which timm's differs from."""
        positions, side = network.pos_embed, _SIDE // 14
        first, grid = positions[:, :1], math.isqrt(positions.shape[1] - 1)
        maps = positions[:, 1:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
        # a tenth is what it adds, lest the size be rounded down; it moves the points that are interpolated at
        scale = (side + 0.1) / grid
        maps = F.interpolate(maps, scale_factor=(scale, scale), mode="bicubic")
        network.set_input_size(img_size=(_SIDE, _SIDE))
        network.pos_embed = nn.Parameter(torch.cat([first, maps.flatten(2).mT], dim=1))


class CLIPFeatures(TransformerFeatures):
    """The image embedding of OpenAI's CLIP ViT-B/32: 512 features, no logits.

    Source: FID in CLIP features (Kynkäänniemi et al., 2023), the model of clean-fid's `clip_vit_b_32`.
    """

    model: ClassVar[str] = "vit_base_patch32_clip_quickgelu_224.openai"
    title: ClassVar[str] = "clip-vit-b-32"

    def _wrapped(self, backbone: Backbone) -> nn.Module:
        return Projected(backbone)


class Projected(nn.Module):
    """What stands for logits in a backbone, as features."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D) and no logits (B, 0)."""
        _, projected = self.backbone(images)
        return projected, projected[:, :0]
