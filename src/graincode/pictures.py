"""Pictures of variable-length codes, for logs, files and pages."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from graincode.core.codes import GrainCodes
from graincode.core.images import to_uint8
from graincode.core.layout import CodeLayout
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
    return _coloured(torch.from_numpy(order[codes.indices.cpu().numpy()] / codes.layout.codebook_size), "turbo")


def density_maps(density: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H0, W0) densities to (B, 3, H, W) uint8, dark blue for the lowest of the batch to yellow for the highest, by
    rank: a few regions may be far denser than all others."""
    values, rank = density.unique(return_inverse=True)
    levels = rank.float() / max(len(values) - 1, 1)
    return F.interpolate(_coloured(levels, "cividis"), size=size, mode="nearest")


def error_maps(images: Tensor, made: Tensor, limit: float = 0.04) -> Tensor:
    """Where reconstructions are wrong.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        made: the same, reconstructed.
        limit: the error, squared, of pixels in [0, 1] and averaged over the colours, that has the brightest colour, as
            have all beyond. It is fixed, so that pictures of any images and steps compare.
    Returns:
        (B, 3, H, W) uint8, black where there is no error, over red to pale yellow.
    """
    difference = (to_uint8(made).cpu().float() - to_uint8(images).cpu().float()) / 255
    levels = (difference.square().mean(dim=1) / limit).clamp(max=1)
    return _coloured(levels, "inferno")


def length_histogram(lengths: Tensor, layout: CodeLayout, bars: int = 64) -> Tensor:
    """How many images have how many codes.

    Args:
        lengths: (N,) long, codes per image, N >= 1.
        layout: of the codes; its shortest and longest images are the ends of the axis.
        bars: at most so many.
    Returns:
        (3, 300, 480) uint8.
    """
    costs = layout.codes_per_region
    least, most = (layout.num_regions * cost for cost in (costs[0], costs[-1]))
    step = math.gcd(*(cost - costs[0] for cost in costs)) or 1  # between two lengths that an image can have
    width = step * math.ceil(((most - least) // step + 1) / bars)
    counts = np.bincount(((lengths.cpu() - least) // width).numpy())
    canvas = Figure(figsize=(4.8, 3.0), dpi=100, layout="constrained")
    axes = canvas.subplots()
    axes.bar(least + width * np.arange(len(counts)) + (width - step) / 2, counts, 0.9 * width, color="C0")
    mean = float(lengths.double().mean())
    axes.axvline(mean, color="C1")
    axes.set_title(f"mean {mean:.1f}", color="C1", fontsize=10)
    for place, (high, wide) in zip((layout.num_regions * cost for cost in costs), layout.grains, strict=True):
        axes.axvline(place, color="0.6", linestyle=":")
        axes.annotate(f" all {high}x{wide}", (place, 0.98), xycoords=("data", "axes fraction"), rotation=90, va="top",
                      ha="left" if place == least else "right", color="0.4", fontsize=8)  # fmt: skip
    axes.set(xlabel="codes per image", ylabel=f"images, of {len(lengths):,}", ylim=(0, 1.4 * counts.max()))
    axes.margins(x=0.04)
    return _drawn(canvas)


def grain_usage(codes: GrainCodes) -> Tensor:
    """Bars for each grain: its share of the regions, its share of the codes, the share of the codebook that it uses.

    Args:
        codes: of one image or more.
    Returns:
        (3, 300, 480) uint8.
    """
    layout = codes.layout
    used, grain = codes.indices[codes.first_cells], layout.expand(codes.grains, 0)[codes.first_cells]
    of_regions, of_codes, of_codebook = [], [], []
    for g in range(layout.num_grains):
        mine = used[grain == g]
        of_regions.append(float((codes.grains == g).double().mean()))
        of_codes.append(len(mine) / len(used))
        of_codebook.append(len(mine.unique()) / layout.codebook_size)
    canvas = Figure(figsize=(4.8, 3.0), dpi=100, layout="constrained")
    axes = canvas.subplots()
    shares = {"of the regions": of_regions, "of the codes": of_codes, "of the codebook in use": of_codebook}
    for index, (name, values) in enumerate(shares.items()):
        places = [g + 0.27 * (index - 1) for g in range(layout.num_grains)]
        bars = axes.bar(places, [100 * value for value in values], 0.25, label=name, color=f"C{index}")
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(layout.num_grains), [f"{high}x{wide}" for high, wide in layout.grains])
    axes.set(xlabel="pixels per code", ylabel="%", ylim=(0, 108))
    canvas.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return _drawn(canvas)


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


def _coloured(levels: Tensor, name: str) -> Tensor:
    """(B, H, W) in [0, 1] to (B, 3, H, W) uint8, in one of matplotlib's colour maps."""
    colours = torch.from_numpy(colormaps[name](levels.cpu().numpy())[..., :3]).permute(0, 3, 1, 2)
    return (colours * 255).round().to(torch.uint8)


def _drawn(canvas: Figure) -> Tensor:
    """A figure as (3, H, W) uint8; no display and no global state."""
    agg = FigureCanvasAgg(canvas)
    agg.draw()
    return torch.from_numpy(np.array(agg.buffer_rgba())[..., :3]).permute(2, 0, 1)
