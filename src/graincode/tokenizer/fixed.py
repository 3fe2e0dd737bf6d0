"""Encoders and decoders of published tokenizers of fixed length: MaskGIT's and Open-MAGVIT2's.

Both are convolutions alone, without attention, and most of them without biases. Their layouts have one grain.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from graincode.core.errors import check
from graincode.core.layout import CodeLayout
from graincode.distributed.blocks import CheckpointedBlock
from graincode.tokenizer.blocks import norm
from graincode.tokenizer.encoder import TrunkSize


class UnbiasedBlock(CheckpointedBlock):
    """Two 3x3 convolutions without biases, each behind norm and SiLU, around a skip: (B, C, h, w) to (B, C', h, w).

    Where the width changes, a 1x1 convolution takes the skip's place: of the input, or, if `late`, of what the second
    convolution gives, so that nothing goes around the block; MaskGIT's weights were trained so.
    """

    def __init__(self, channels: int, out_channels: int, late: bool) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(channels), _unbiased(channels, out_channels)
        self.norm2, self.conv2 = norm(out_channels), _unbiased(out_channels, out_channels)
        self._is_late, source = late and channels != out_channels, out_channels if late else channels
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(source, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.skip(h if self._is_late else x)


class AdaptiveNorm(nn.Module):
    """Group norm without weights of (B, C, h, w), then times gamma(standard deviation) plus beta(mean) of the codes,
    (B, D, h', w'), over their cells."""

    def __init__(self, channels: int, code_dim: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm(channels).num_groups, channels, eps=1e-6, affine=False)
        self.gamma, self.beta = nn.Linear(code_dim, channels), nn.Linear(code_dim, channels)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        variance, mean = torch.var_mean(codes.flatten(2), dim=2)
        scale, shift = self.gamma((variance + 1e-6).sqrt()), self.beta(mean)
        return self.norm(x) * scale[..., None, None] + shift[..., None, None]


class _FixedEncoder(nn.Module):
    """Levels of blocks, each but the first behind `_down`, and one head: images to a list of one map (B, D, h, w)."""

    _is_late: bool

    def __init__(self, layout: CodeLayout, size: TrunkSize, code_dim: int) -> None:
        super().__init__()
        widths, self.code_dim = _widths(layout, size), code_dim
        self.stem, self.levels = _unbiased(3, widths[0]), nn.ModuleList()
        for before, width in zip([widths[0], *widths], widths, strict=False):
            self.levels.append(_blocks(before, width, size.blocks, self._is_late))
        top = widths[-1]
        blocks = _blocks(top, top, size.blocks, self._is_late)
        self.heads = nn.ModuleList([nn.Sequential(*blocks, norm(top), nn.SiLU(), nn.Conv2d(top, code_dim, 1))])

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) images in [-1, 1] to their features."""
        x = self.stem(images)
        for index, level in enumerate(self.levels):
            x = level(self._down(x, index - 1) if index else x)
        return [self.heads[0](x)]

    def _down(self, x: Tensor, index: int) -> Tensor:
        raise NotImplementedError


class _FixedDecoder(nn.Module):
    """Blocks at the codes' resolution, then levels, from each to the next through `_up`: codes to images."""

    _is_late: bool
    _spread = 1  # channels before upsampling for each after it

    def __init__(self, layout: CodeLayout, size: TrunkSize, code_dim: int) -> None:
        super().__init__()
        widths = _widths(layout, size)[::-1]
        blocks = _blocks(widths[0], widths[0], size.blocks, self._is_late)
        self.stem = nn.Sequential(nn.Conv2d(code_dim, widths[0], 3, padding=1), *blocks)
        self.levels = nn.ModuleList(
            _blocks(before, width, size.blocks, self._is_late)
            for before, width in zip([widths[0], *widths], widths, strict=False)
        )
        self.ups = nn.ModuleList(nn.Conv2d(w, w * self._spread, 3, padding=1) for w in widths[:-1])
        self.norm, self.last = norm(widths[-1]), nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, maps: Sequence[Tensor], grains: Tensor) -> Tensor:
        """Images (B, 3, H, W), about [-1, 1], of one map (B, D, h, w) of codes; all grains are 0."""
        x = self.stem(maps[0])
        for index, level in enumerate(self.levels):
            x = level(self._enter(self._up(x, index - 1) if index else x, maps[0], index))
        return self.last(F.silu(self.norm(x)))

    def _up(self, x: Tensor, index: int) -> Tensor:
        raise NotImplementedError

    def _enter(self, x: Tensor, codes: Tensor, index: int) -> Tensor:
        return x


class MaskGITEncoder(_FixedEncoder):
    """The encoder of MaskGIT's VQGAN: average pooling between levels, images in [0, 1] inside.

    Source: MaskGIT (Chang et al., 2022), in the PyTorch form of 1d-tokenizer.
    """

    _is_late = True

    def forward(self, images: Tensor) -> list[Tensor]:
        return super().forward((images + 1) / 2)

    def _down(self, x: Tensor, index: int) -> Tensor:
        return F.avg_pool2d(x, 2)


class MaskGITDecoder(_FixedDecoder):
    """The decoder of MaskGIT's VQGAN, which makes images in [0, 1] inside."""

    _is_late = True

    def forward(self, maps: Sequence[Tensor], grains: Tensor) -> Tensor:
        return super().forward(maps, grains) * 2 - 1

    def _up(self, x: Tensor, index: int) -> Tensor:
        return self.ups[index](F.interpolate(x, scale_factor=2.0, mode="nearest"))


class MAGVIT2Encoder(_FixedEncoder):
    """The encoder of Open-MAGVIT2: convolutions of stride 2 between levels.

    Source: Open-MAGVIT2 (Luo et al., 2024), arXiv 2409.04410.
    """

    _is_late = False

    def __init__(self, layout: CodeLayout, size: TrunkSize, code_dim: int) -> None:
        super().__init__(layout, size, code_dim)
        widths = _widths(layout, size)[:-1]
        self.downs = nn.ModuleList(nn.Conv2d(width, width, 3, stride=2, padding=1) for width in widths)

    def _down(self, x: Tensor, index: int) -> Tensor:
        return self.downs[index](x)


class MAGVIT2Decoder(_FixedDecoder):
    """The decoder of Open-MAGVIT2: each level begins with a norm that the codes set, each upsampling moves channels."""

    _is_late, _spread = False, 4

    def __init__(self, layout: CodeLayout, size: TrunkSize, code_dim: int) -> None:
        super().__init__(layout, size, code_dim)
        widths = _widths(layout, size)[::-1]
        self.adapt = nn.ModuleList(AdaptiveNorm(width, code_dim) for width in [widths[0], *widths[:-1]])

    def _up(self, x: Tensor, index: int) -> Tensor:
        return rearrange(self.ups[index](x), "b (i j c) h w -> b c (h i) (w j)", i=2, j=2)

    def _enter(self, x: Tensor, codes: Tensor, index: int) -> Tensor:
        return self.adapt[index](x, codes)


def _unbiased(channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)


def _blocks(channels: int, out_channels: int, count: int, late: bool) -> nn.Sequential:
    return nn.Sequential(*(UnbiasedBlock(out_channels if i else channels, out_channels, late) for i in range(count)))


def _widths(layout: CodeLayout, size: TrunkSize) -> list[int]:
    """Width of each level, finest first."""
    path = size.path(layout)
    square = layout.num_grains == 1 and all(high == wide for high, wide in path)
    check("grains", list(layout.grains), "one with equal sides, such as [[16,16]]", square)
    check("attention", size.attention, "none, []", not size.attention)
    check("patch", size.patch, "1", size.patch == 1)
    return size.widths(len(path))
