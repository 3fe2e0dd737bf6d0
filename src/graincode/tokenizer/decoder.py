"""The decoder: codes of all grains on the finest grid, with a position signal, to pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from graincode.core.errors import check, check_choice
from graincode.core.layout import CodeLayout
from graincode.tokenizer.blocks import Level, ResBlock, norm
from graincode.tokenizer.encoder import TrunkSize, middle

Position = Literal["fixed", "learned", "none"]

_WAVES = (torch.sin, torch.cos)


class PositionSignal(nn.Module):
    """Adds projected Fourier features of row and column, and a learned vector for each, to a map of `grid` cells."""

    def __init__(self, grid: tuple[int, int], dim: int, frequencies: int = 4) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(dim, grid[0], 1) * 0.02)
        self.columns = nn.Parameter(torch.randn(dim, 1, grid[1]) * 0.02)
        axes = [(torch.arange(size) + 0.5) / size * 2 - 1 for size in grid]
        row, column = torch.meshgrid(*axes, indexing="ij")
        waves = [wave(math.pi * 2**k * axis) for k in range(frequencies) for axis in (row, column) for wave in _WAVES]
        self.register_buffer("waves", torch.stack(waves)[None], persistent=False)
        self.project = nn.Conv2d(len(waves), dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) to the same."""
        return x + self.project(self.waves) + self.rows + self.columns


class LearnedPositionSignal(nn.Module):
    """Adds the sine of a learned linear map of the coordinates, and a learned vector for each row and column, to a map
    of `grid` cells. Source: CIPS (Anokhin et al., 2021), as in DQ-VAE's public code."""

    def __init__(self, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(dim, grid[0], 1) * 0.02)
        self.columns = nn.Parameter(torch.randn(dim, 1, grid[1]) * 0.02)
        y, x = torch.meshgrid(*(torch.linspace(-1, 1, size) for size in grid), indexing="ij")
        self.register_buffer("coordinates", torch.stack([x, y])[None], persistent=False)
        self.project = nn.Conv2d(2, dim, 1)
        nn.init.uniform_(self.project.weight, -math.sqrt(9 / 2), math.sqrt(9 / 2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) to the same."""
        return x + torch.sin(self.project(self.coordinates)) + self.rows + self.columns


class GrainDecoder(nn.Module):
    """Decodes the codes of all grains together, convolutionally.

    Args:
        size: of the trunk; the last convolution draws its patches.
        code_dim: dimension D of the codes.
        expand: add to each repeated coarse code learned linear maps of it, one for each finest cell that it covers.
        coarse_blocks: residual blocks of each grain but the finest, on its own grid.
        grain_embedding: add a learned vector of each cell's grain, if there are several.
        position: "fixed" or "learned" frequencies of the position signal, or "none" of it.
    """

    def __init__(
        self, layout: CodeLayout, size: TrunkSize, code_dim: int, expand: bool = False, coarse_blocks: int = 0,
        grain_embedding: bool = False, position: Position = "fixed",
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("position", position, Position)
        check("coarse_blocks", coarse_blocks, "0 or more", coarse_blocks >= 0)
        self.layout, self.patch, path = layout, size.patch, size.path(layout)
        path = path[: path.index(layout.grains[-1]) + 1]
        widths = size.widths(len(path))
        signals = {"fixed": PositionSignal, "learned": LearnedPositionSignal}
        self.position = nn.Identity() if position == "none" else signals[position](layout.grids[-1], code_dim)
        self.coarse = nn.ModuleList(
            nn.Sequential(*(ResBlock(code_dim) for _ in range(coarse_blocks))) for _ in layout.grains[:-1]
        )
        self.grain = nn.Embedding(layout.num_grains, code_dim) if grain_embedding and layout.num_grains > 1 else None
        if self.grain is not None:
            nn.init.zeros_(self.grain.weight)
        self.expand = nn.ModuleList()
        for cells in layout.codes_per_region[:-1] if expand else ():
            linear = nn.Conv2d(code_dim, code_dim * (layout.codes_per_region[-1] // cells), 1)
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
            self.expand.append(linear)
        width = widths[-1]
        self.stem = nn.Sequential(nn.Conv2d(code_dim, width, 3, padding=1), *middle(size, width))
        self.levels, self.ups, self._scales = nn.ModuleList(), nn.ModuleList(), []
        for index in reversed(range(len(path))):
            attends = layout.image_size[0] // path[index][0] in size.attention
            self.levels.append(Level(width, widths[index], size.blocks + size.extra_blocks, attends))
            width = widths[index]
            if index:
                self._scales.append(tuple(float(a // b) for a, b in zip(path[index], path[index - 1], strict=True)))
                narrowed = widths[index - 1] if size.upsampling == "next" else width
                self.ups.append(nn.Conv2d(width, narrowed, 3, padding=1))
                width = narrowed
        self.norm, self.last = norm(width), nn.Conv2d(width, 3 * size.patch**2, 3, padding=1)

    def forward(self, maps: Sequence[Tensor], grains: Tensor) -> Tensor:
        """Images (B, 3, H, W), about [-1, 1] but not clamped, of codes.

        Args:
            maps: K maps (B, D, h_g, w_g) of code vectors, coarsest first, zero where a grain has no code.
            grains: (B, H0, W0) grain maps.
        """
        x, (rows, columns) = maps[-1], self.layout.grids[-1]
        for g, codes in enumerate(maps[:-1]):
            here = self.layout.cells_at(grains, g)[:, None]
            codes = self.coarse[g](codes) * here
            x = x + self.layout.expand(codes, g)
            if self.expand:
                h, w = self.layout.grids[g]
                spread = self.expand[g](codes)
                spread = rearrange(spread, "b (d i j) h w -> b d (h i) (w j)", i=rows // h, j=columns // w)
                x = x + spread * self.layout.expand(here, g)
        if self.grain is not None:
            x = x + self.layout.expand(self.grain(grains).permute(0, 3, 1, 2), 0)
        x = self.levels[0](self.stem(self.position(x)))
        for scale, up, level in zip(self._scales, self.ups, self.levels[1:], strict=True):
            x = level(up(F.interpolate(x, scale_factor=scale, mode="nearest")))
        return F.pixel_shuffle(self.last(F.silu(self.norm(x))), self.patch)
