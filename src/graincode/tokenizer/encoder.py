"""The encoder: one trunk, tapped at the resolution of each grain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from graincode.core.errors import check, check_choice
from graincode.core.layout import CodeLayout
from graincode.tokenizer.blocks import Level, ResBlock, SpatialAttention, norm

Padding = Literal["all", "end"]
Upsampling = Literal["next", "own"]


@dataclass(frozen=True)
class TrunkSize:
    """Shape of the trunk that encoder and decoder have.

    Attributes:
        channels: width of the finest level.
        multipliers: width of each level as a multiple of `channels`, finest first; the last one repeats.
        blocks: residual blocks per level, and in each head.
        attention: heights of feature maps, in cells, that get self-attention, after each block.
        patch: pixels per cell of the finest level, in height and width; the levels of finer resolution are left out.
        extra_blocks: residual blocks that a level of the decoder has more than one of the encoder.
        middle_blocks: residual blocks in each head and where the decoder starts, an attention behind the first one;
            None: `blocks`.
        middle_attention: whether that attention is there.
        padding: where a convolution with a stride meets zeros: on "all" sides, or at the "end", right and below.
        upsampling: width of the convolution behind an upsampling: that of the "next" level, or its "own" level's, which
            the next level's first block changes.
    """

    channels: int
    multipliers: Sequence[int]
    blocks: int
    attention: Sequence[int]
    patch: int = 1
    extra_blocks: int = 0
    middle_blocks: int | None = None
    middle_attention: bool = True
    padding: Padding = "all"
    upsampling: Upsampling = "next"

    def __post_init__(self) -> None:
        check("channels", self.channels, "1 or more", self.channels >= 1)
        several = len(self.multipliers) > 0 and min(self.multipliers) >= 1
        check("multipliers", self.multipliers, "a list of numbers of 1 or more", several)
        check("blocks", self.blocks, "1 or more", self.blocks >= 1)
        check("extra_blocks", self.extra_blocks, "0 or more", self.extra_blocks >= 0)
        none = self.middle_blocks is None
        check("middle_blocks", self.middle_blocks, "null, or 1 or more", none or self.middle_blocks >= 1)
        check_choice("padding", self.padding, Padding)
        check_choice("upsampling", self.upsampling, Upsampling)

    def widths(self, levels: int) -> list[int]:
        """Width of each level, finest first."""
        return [self.channels * self.multipliers[min(level, len(self.multipliers) - 1)] for level in range(levels)]

    def path(self, layout: CodeLayout) -> list[tuple[int, int]]:
        """Cumulative factors (Fh, Fw) of strides of at most 2, from the patch through every grain to the coarsest.

        Raises:
            GraincodeError: neighbours differ by no power of two, or the patch is not on the way to the finest grain.
        """
        path = [(1, 1)]
        for goal in reversed(layout.grains):
            while path[-1] != goal:
                path.append(tuple(2 * now if now < aim else now for now, aim in zip(path[-1], goal, strict=True)))
                reached = all(aim % now == 0 for now, aim in zip(path[-1], goal, strict=True))
                check("grains", list(layout.grains), "powers of two, such as [[8,8],[4,4]]", reached)
        squares = [high for high, wide in path[: path.index(layout.grains[-1]) + 1] if high == wide]
        options = f"one of {', '.join(map(str, squares))}, on the way to the finest grain {layout.grains[-1]}"
        check("patch", self.patch, options, self.patch in squares)
        return path[path.index((self.patch, self.patch)) :]


class Downsampling(nn.Conv2d):
    """A 3x3 convolution with a stride of 1 or 2 along each axis: (B, C, h, w) to (B, C, h / stride, w / stride)."""

    def __init__(self, channels: int, stride: tuple[int, int], padding: Padding) -> None:
        super().__init__(channels, channels, 3, stride, padding=1 if padding == "all" else 0)
        # left, right, above, below; an axis that keeps its length has a cell on both sides
        self._border = [cell for step in reversed(stride) for cell in (int(step == 1), 1)] if padding == "end" else None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self._border is None else F.pad(x, self._border))


def middle(size: TrunkSize, width: int) -> list[nn.Module]:
    """The blocks of a head, and of the decoder's start."""
    more = (size.middle_blocks or size.blocks) - 1
    parts = [ResBlock, *[SpatialAttention] * size.middle_attention, *[ResBlock] * more]
    return [part(width) for part in parts]  # made in order, as their random weights follow from it


class GrainEncoder(nn.Module):
    """A convolutional trunk with one head for each grain, for vectors of dimension D = `code_dim`."""

    def __init__(self, layout: CodeLayout, size: TrunkSize, code_dim: int) -> None:
        super().__init__()
        check("code_dim", code_dim, "1 or more", code_dim >= 1)
        self.layout, self.code_dim, patch, path = layout, code_dim, size.patch, size.path(layout)
        widths = size.widths(len(path))
        self._is_bordered = patch == 2
        self.stem = nn.Conv2d(3, widths[0], max(3, patch), stride=patch, padding=1 if patch == 1 else 0)
        self.levels, self.downs, heads = nn.ModuleList(), nn.ModuleList(), []
        previous = widths[0]
        for index, (factor, width) in enumerate(zip(path, widths, strict=True)):
            attends = layout.image_size[0] // factor[0] in size.attention
            self.levels.append(Level(previous, width, size.blocks, attends))
            if factor in layout.grains:
                blocks = middle(size, width)
                heads.append(nn.Sequential(*blocks, norm(width), nn.SiLU(), nn.Conv2d(width, code_dim, 3, padding=1)))
            if index + 1 < len(path):
                stride = (path[index + 1][0] // factor[0], path[index + 1][1] // factor[1])
                self.downs.append(Downsampling(width, stride, size.padding))
            previous = width
        self.heads = nn.ModuleList(reversed(heads))
        self._taps = [path.index(grain) for grain in layout.grains]

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) images in [-1, 1] to K feature maps (B, D, h_g, w_g), coarsest first."""
        # with a stride of 2 the last row and column would have no cell
        trunk = [self.levels[0](self.stem(F.pad(images, (0, 1, 0, 1)) if self._is_bordered else images))]
        for down, level in zip(self.downs, self.levels[1:], strict=True):
            trunk.append(level(down(trunk[-1])))
        return [head(trunk[tap]) for head, tap in zip(self.heads, self._taps, strict=True)]
