"""How images are resized for a network: each way gives other features, so each is named where metrics are recorded."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Resizing = Literal["bilinear", "bicubic", "clean", "tensorflow"]

IN_WORDS: dict[str, str] = {
    "bilinear": "bilinear with antialias",
    "bicubic": "bicubic with antialias",
    "clean": "bicubic with antialias, clipped to 0 .. 255, as clean-fid's",
    "tensorflow": "bilinear without antialias, as TensorFlow 1's",
}
"""What a record says of each way."""


def resize(images: Tensor, side: int, how: Resizing) -> Tensor:
    """(B, 3, side, side) float images in 0 .. 255, not rounded, of float (B, 3, H, W); bicubic ones may go beyond.

    Sources: "bicubic" is EDM2's for DINOv2; "clean" equals clean-fid's by Pillow (Parmar et al., 2022) up to
    rounding of float32; "tensorflow" is that of the published FID, by torch-fidelity.
    """
    if how == "tensorflow":
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        return interpolate_bilinear_2d_like_tensorflow1x(images, size=(side, side), align_corners=False)
    if how == "clean":  # in float64, as Pillow's weights are
        images = F.interpolate(images.double(), size=(side, side), mode="bicubic", antialias=True)
        return images.clamp(0, 255).float()
    return F.interpolate(images, size=(side, side), mode=how, antialias=True)
