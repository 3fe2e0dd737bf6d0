"""The encoder: one trunk, tapped at the resolution of each grain."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout
from graincode.tokenizer.blocks import Level, ResBlock, SpatialAttention, norm


def stride_path(grains: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Strides of at most 2 that lead from the pixels through every grain, finest first.

    Returns:
        cumulative factors (Fh, Fw), from (1, 1) to the coarsest grain; each grain is among them.
    Raises:
        GraincodeError: a factor between two neighbours is not a power of two.
    """
    path = [(1, 1)]
    for goal in reversed(grains):
        while path[-1] != goal:
            steps = tuple(2 if now < aim else 1 for now, aim in zip(path[-1], goal, strict=True))
            following = (path[-1][0] * steps[0], path[-1][1] * steps[1])
            if goal[0] % following[0] or goal[1] % following[1]:
                raise GraincodeError(
                    f"grain {goal[0]}x{goal[1]} is not reached by halving: expected powers of two, "
                    "such as tokenizer.grains=[[8,8],[4,4]]"
                )
            path.append(following)
    return path


def level_channels(channels: int, multipliers: Sequence[int], levels: int) -> list[int]:
    """Width of each level, finest first; levels beyond the multipliers take the last one."""
    return [channels * multipliers[min(level, len(multipliers) - 1)] for level in range(levels)]


class GrainEncoder(nn.Module):
    """A convolutional trunk with one head for each grain.

    Args:
        layout: the code layout.
        channels: width of the finest level.
        multipliers: width of each level as a multiple of `channels`, finest first; the last one repeats.
        blocks: residual blocks per level, and in each head.
        attention: heights of feature maps, in cells, that get self-attention.
        code_dim: dimension D of the vectors that are quantised.
        patch: the first convolution has this stride; the levels of finer resolution are left out.
    Raises:
        GraincodeError: the grains cannot be reached by halving, or a size is not positive.
    """

    def __init__(
        self,
        layout: CodeLayout,
        channels: int,
        multipliers: Sequence[int],
        blocks: int,
        attention: Sequence[int],
        code_dim: int,
        patch: int = 1,
    ) -> None:
        super().__init__()
        self.layout = layout
        if not multipliers or min(channels, blocks, code_dim, *multipliers) < 1:
            raise GraincodeError(
                f"channels={channels} multipliers={list(multipliers)} blocks={blocks} code_dim={code_dim}: expected 1 "
                "or more each; type for example tokenizer/size=tiny tokenizer.code_dim=16"
            )
        path = trunk_path(layout, patch)
        widths = level_channels(channels, multipliers, len(path))
        self._is_bordered = patch == 2
        self.stem = nn.Conv2d(3, widths[0], max(3, patch), stride=patch, padding=1 if patch == 1 else 0)
        self.levels, self.downs, heads = nn.ModuleList(), nn.ModuleList(), {}
        previous = widths[0]
        for index, (factor, width) in enumerate(zip(path, widths, strict=True)):
            height = layout.image_size[0] // factor[0]
            self.levels.append(Level(previous, width, blocks, height in attention))
            if factor in layout.grains:
                heads[layout.grains.index(factor)] = _head(width, blocks, code_dim)
            if index + 1 < len(path):
                stride = (path[index + 1][0] // factor[0], path[index + 1][1] // factor[1])
                self.downs.append(nn.Conv2d(width, width, 3, stride=stride, padding=1))
            previous = width
        self.heads = nn.ModuleList(heads[g] for g in range(layout.num_grains))
        self._taps = [path.index(grain) for grain in layout.grains]

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) images in [-1, 1] to K feature maps (B, D, h_g, w_g), coarsest first."""
        # with a stride of 2 the last row and column would have no cell
        x, trunk = self.stem(F.pad(images, (0, 1, 0, 1)) if self._is_bordered else images), []
        for index, level in enumerate(self.levels):
            x = level(self.downs[index - 1](x) if index else x)
            trunk.append(x)
        return [head(trunk[tap]) for head, tap in zip(self.heads, self._taps, strict=True)]


def trunk_path(layout: CodeLayout, patch: int) -> list[tuple[int, int]]:
    """`stride_path` of the layout's grains, starting at `patch` pixels.

    Raises:
        GraincodeError: no level up to the finest grain has cells of patch x patch pixels.
    """
    path = stride_path(layout.grains)
    squares = [high for high, wide in path[: path.index(layout.grains[-1]) + 1] if high == wide]
    if patch not in squares:
        raise GraincodeError(
            f"patch {patch} is not on the way from pixels to the finest grain {layout.grains[-1]}: "
            f"type tokenizer.size.patch= one of {', '.join(map(str, squares))}"
        )
    return path[path.index((patch, patch)) :]


def _head(width: int, blocks: int, code_dim: int) -> nn.Sequential:
    return nn.Sequential(
        ResBlock(width),
        SpatialAttention(width),
        *(ResBlock(width) for _ in range(blocks - 1)),
        norm(width),
        nn.SiLU(),
        nn.Conv2d(width, code_dim, 3, padding=1),
    )
