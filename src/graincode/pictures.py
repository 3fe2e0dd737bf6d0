"""Pictures of variable-length codes, for logs, files and pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from matplotlib import colormaps
from torch import Tensor

from graincode.core.codes import GrainCodes
from graincode.core.images import to_uint8
from graincode.core.rng import permutation


def grid(images: Tensor, columns: int, scale: int = 1, gap: int = 2) -> Tensor:
    """(N, 3, H, W) uint8 images side by side on white, `columns` in a row, each pixel repeated `scale` times."""
    images = images.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    count, _, height, width = images.shape
    rows = -(-count // columns)
    canvas = torch.full((3, rows * (height + gap) + gap, columns * (width + gap) + gap), 255, dtype=torch.uint8)
    for index, image in enumerate(images.cpu()):
        top, left = (gap + index // columns * (height + gap), gap + index % columns * (width + gap))
        canvas[:, top : top + height, left : left + width] = image
    return canvas


def code_maps(codes: GrainCodes) -> Tensor:
    """Codes as (B, 3, H, W) uint8 on the finest grid, each codebook entry in a colour of its own."""
    order = permutation(0, 0, codes.layout.codebook_size)
    levels = order[codes.indices.cpu().numpy()] / codes.layout.codebook_size
    return torch.from_numpy(colormaps["turbo"](levels)[..., :3] * 255).round().to(torch.uint8).permute(0, 3, 1, 2)


def density_maps(density: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H0, W0) densities to (B, 3, H, W) uint8, dark blue for the lowest of the batch to yellow for the highest."""
    low, high = density.min(), density.max()
    levels = ((density - low) / (high - low).clamp(min=1e-9)).cpu()
    colours = torch.from_numpy(colormaps["cividis"](levels.numpy())[..., :3]).permute(0, 3, 1, 2)
    return F.interpolate((colours * 255).round().to(torch.uint8), size=size, mode="nearest")


def grain_maps(images: Tensor, grains: Tensor, cells: Sequence[tuple[int, int]], scale: int = 1) -> Tensor:
    """Images with the outline of every code's cell.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        grains: (B, H0, W0) long.
        cells: K pairs (Fh, Fw), the size of a code's cell in pixels at each grain.
        scale: pixels drawn per pixel of the image.
    Returns:
        (B, 3, scale * H, scale * W) uint8.
    """
    pixels = to_uint8(images).cpu().float() * 0.55
    pixels = pixels.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    batch, _, height, width = pixels.shape
    grain = F.interpolate(grains[:, None].cpu().float(), size=(height, width), mode="nearest").long()[:, 0]
    row, column = torch.arange(height)[:, None], torch.arange(width)[None, :]
    for g, (high, wide) in enumerate(cells):
        edge = (row % (high * scale) == 0) | (column % (wide * scale) == 0)
        colour = torch.tensor(colormaps["autumn_r"]((g + 1) / len(cells))[:3]) * 255 if g else torch.tensor([90.0] * 3)
        mark = (edge[None] & (grain == g))[:, None].expand(batch, 3, -1, -1)
        pixels = torch.where(mark, colour.float()[None, :, None, None].expand_as(pixels), pixels)
    return pixels.round().to(torch.uint8)
