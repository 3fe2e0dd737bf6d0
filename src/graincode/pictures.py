"""Pictures of variable-length codes: pixels for logs and files, and charts that pages take as SVG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from graincode.core.codes import GrainCodes
from graincode.core.images import to_uint8
from graincode.core.layout import CodeLayout
from graincode.core.rng import permutation

if TYPE_CHECKING:  # matplotlib is imported by what draws
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, PALE = "#1f77b4", "#ff7f0e", "#666666", "#dddddd"
STYLE: dict[str, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
    **{"axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": PALE},
    **{"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 10},
    **{"svg.fonttype": "none", "svg.hashsalt": "graincode"},
}


def grid(images: Tensor, columns: int, scale: int = 1, gap: int = 2) -> Tensor:
    """(N, 3, H, W) uint8 images side by side on white, `columns` in a row, each pixel repeated `scale` times."""
    images = F.pad(_enlarged(images.cpu(), scale), (gap, 0, gap, 0), value=255)
    images = torch.cat([images, images.new_full((-len(images) % columns, *images.shape[1:]), 255)])
    rows = images.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2, 3)
    return F.pad(rows, (0, gap, 0, gap), value=255)


def code_maps(codes: GrainCodes) -> Tensor:
    """Codes as (B, 3, H, W) uint8 on the finest grid, each codebook entry in a colour of its own."""
    order = permutation(0, 0, codes.layout.codebook_size)
    return _coloured(torch.from_numpy(order[codes.indices.cpu().numpy()] / codes.layout.codebook_size), "turbo")


def density_maps(density: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H0, W0) densities to (B, 3, H, W) uint8, dark blue for the lowest of the batch to yellow for the highest, by
    rank: a few regions may be far denser than all others."""
    values, rank = density.unique(return_inverse=True)
    return F.interpolate(_coloured(rank.float() / max(len(values) - 1, 1), "cividis"), size=size, mode="nearest")


def error_maps(images: Tensor, reconstructions: Tensor, limit: float = 0.04) -> Tensor:
    """Where reconstructions of (B, 3, H, W) images in [-1, 1] are wrong: as many uint8, from black over red to yellow;
    squared errors of pixels in [0, 1], averaged over the colours, are brightest from `limit`, whatever the images."""
    difference = (to_uint8(reconstructions).cpu().float() - to_uint8(images).cpu().float()) / 255
    return _coloured((difference.square().mean(dim=1) / limit).clamp(max=1), "inferno")


def grain_maps(images: Tensor, grains: Tensor, cells: Sequence[tuple[int, int]], scale: int = 1) -> Tensor:
    """(B, 3, H, W) images in [-1, 1] with the outline of every code's cell, for (B, H0, W0) long grains and K pairs
    (Fh, Fw), the pixels of a cell at each grain: (B, 3, scale * H, scale * W) uint8."""
    pixels = _enlarged(to_uint8(images).cpu().float() * 0.55, scale)
    height, width = pixels.shape[-2:]
    grain = F.interpolate(grains[:, None].cpu().float(), size=(height, width), mode="nearest")
    row, column = torch.arange(height)[:, None], torch.arange(width)
    for g, (high, wide) in enumerate(cells):
        edge = (row % (high * scale) == 0) | (column % (wide * scale) == 0)
        colour = _coloured(torch.full((1, 1, 1), (g + 1) / len(cells)), "autumn_r").float() if g else torch.tensor(90.0)
        pixels = torch.where(edge & (grain == g), colour, pixels)
    return pixels.round().to(torch.uint8)


def length_histogram(lengths: Tensor, layout: CodeLayout, bars: int = 64) -> Figure:
    """A histogram of codes per image, (N,) integers, N >= 1, over all lengths of a layout, in at most so many bars."""
    costs = layout.codes_per_region
    fixed = [layout.num_regions * cost for cost in costs]
    step = math.gcd(*(cost - costs[0] for cost in costs)) or 1  # between two lengths that an image can have
    width = step * math.ceil(((fixed[-1] - fixed[0]) // step + 1) / bars)
    counts = np.bincount(((lengths.cpu() - fixed[0]) // width).numpy())
    figure, axes = chart()
    axes.bar(fixed[0] + width * np.arange(len(counts)) + (width - step) / 2, counts, 0.85 * width, color=BLUE)
    mean = float(lengths.double().mean())
    axes.axvline(mean, color=ORANGE)
    axes.set_title(f"mean {mean:.1f}", color=ORANGE)
    for length, (high, wide) in zip(fixed, layout.grains, strict=True):
        side, shift = ("left", 4) if length == fixed[0] else ("right", -4)
        axes.axvline(length, color=GREY, linestyle=":")
        axes.annotate(f"all {high}x{wide}: {length}", (length, 0.99), (shift, 0), ("data", "axes fraction"),
                      "offset points", va="top", ha=side, color=GREY)  # fmt: skip
    axes.set(xlabel="codes per image", ylabel=f"images, of {len(lengths):,}", ylim=(0, 1.25 * counts.max()))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.margins(x=0.04)
    return figure


def grain_usage(codes: GrainCodes) -> Figure:
    """A chart of each grain's shares of regions and codes, and the share of the codebook that it uses."""
    layout = codes.layout
    used, grain = codes.indices[codes.first_cells], layout.expand(codes.grains, 0)[codes.first_cells]
    mine = [used[grain == g] for g in range(layout.num_grains)]
    shares = {
        "of the regions": [float((codes.grains == g).double().mean()) for g in range(layout.num_grains)],
        "of the codes": [len(indices) / len(used) for indices in mine],
        "of the codebook in use": [len(indices.unique()) / layout.codebook_size for indices in mine],
    }
    figure, axes = chart()
    for index, (name, values) in enumerate(shares.items()):
        centres = np.arange(layout.num_grains) + 0.27 * (index - 1)
        bars = axes.bar(centres, [100 * value for value in values], 0.25, label=name, color=f"C{index}")
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(layout.num_grains), [f"{high}x{wide}" for high, wide in layout.grains])
    axes.set(xlabel="pixels per code", ylabel="%", ylim=(0, 108))
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def chart() -> tuple[Figure, Axes]:
    """An empty chart of 480 by 300 pixels, without display or global state."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(4.8, 3.0), dpi=100, layout="constrained")
        return figure, figure.subplots()


def to_pixels(figure: Figure) -> Tensor:
    """A chart as (3, H, W) uint8."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with rc_context(STYLE):
        canvas.draw()
    return torch.from_numpy(np.array(canvas.buffer_rgba())[..., :3]).permute(2, 0, 1)


def to_svg(figure: Figure, title: str) -> str:
    """A chart as an element of a page, whose --blue, --red, --muted and --line are the colours if it defines them."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context(STYLE):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    box, content = re.search(r'<svg[^>]*(viewBox="[^"]*")[^>]*>(.*)', file.getvalue(), re.DOTALL).groups()
    content = re.sub(r"<style.*?</style>", "", content, flags=re.DOTALL).replace("xlink:href", "href")
    content = re.sub(r'(font: [\d.]+px) [^;"]*', r"\1 system-ui, sans-serif", content)
    for name, colour in {"blue": BLUE, "red": ORANGE, "muted": GREY, "line": PALE}.items():
        content = content.replace(colour, f"var(--{name}, {colour})")
    return f'<svg {box} role="img" aria-label="{escape(title)}">{content}'


def _enlarged(images: Tensor, scale: int) -> Tensor:
    return images.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)


def _coloured(levels: Tensor, name: str) -> Tensor:
    """(B, H, W) in [0, 1] to (B, 3, H, W) uint8, in one of matplotlib's colour maps."""
    from matplotlib import colormaps

    colours = torch.from_numpy(colormaps[name](levels.cpu().numpy())[..., :3]).permute(0, 3, 1, 2)
    return (colours * 255).round().to(torch.uint8)
