"""Information density of image regions, and the quantiles that turn it into a grain for each region."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from graincode.core.constants import constant
from graincode.core.errors import brief, check
from graincode.core.rng import hashed_uniforms, mix

_PIXELS_AT_ONCE = (2**16, 2**21)  # on a CPU and on a GPU


def grey(images: Tensor) -> Tensor:
    """Luma of images: (B, 3, H, W) to (B, H, W), in float32 or better. Source: ITU-R BT.601 weights."""
    red, green, blue = images.to(torch.promote_types(images.dtype, torch.float32)).unbind(1)
    return 0.2989 * red + 0.5870 * green + 0.1140 * blue


@torch.no_grad()
def region_entropy(
    images: Tensor, region: tuple[int, int], bins: int = 32, sigma: float = 0.01,
    span: tuple[float, float] = (-1.0, 1.0),
) -> Tensor:  # fmt: skip
    """Entropy of the soft grey-value histogram of each region.

    Args:
        images: (B, 3, H, W) in [-1, 1]; H and W are multiples of the region's.
        region: (height, width) of a region in pixels.
        bins: number of bins, evenly spaced on `span`, both ends included.
        sigma: width of the Gaussian kernel, in units of the grey value. With the published 0.01, far narrower than
            the spacing of 32 bins (0.065), a flat region scores anything from 0 to ln 2, by its grey value.
        span: of the bins, in grey values. Before July 2023 the public code had (0, 1), as though images were; greys
            below all bins then count by the kernel's last traces of them, and as nothing where there are none.
    Returns:
        (B, H / region height, W / region width) float32 in [0, ln bins], in nats; NaN where a pixel is. Rounded to
        2^-20, so that the last bit, which depends on the batch, breaks no ties.
    Raises:
        GraincodeError: with so small a sigma, a value between two bins would reach neither; or greys on a CPU lie
            beyond [-1.01, 1.01] (looking would hold up a GPU: there they make NaN).
    Source: DQ-VAE's public code (density, which adds 1e-40 to the mean weights' sum); its use
        for routing in DQVAE++ is our reading.
    """
    check("bins", bins, "2 or more", bins >= 2)
    low, high = span
    check("span", list(span), "a number and a larger one", low < high)
    spacing = (high - low) / (bins - 1)
    check("sigma", sigma, f"{spacing / 24:.4f} or more with bins={bins}", sigma >= spacing / 24)
    # only `reach` bins on each side of a pixel get a weight above 2e-8
    reach = min(math.ceil(6 * sigma / spacing), bins)
    sharpness = 0.5 * (spacing / sigma) ** 2
    batch, _, height, width = images.shape
    rows, columns = height // region[0], width // region[1]
    # a part at a time, in buffers that are reused: they fit into the cache, and new memory costs as much as the sums
    at_once = min(max(_PIXELS_AT_ONCE[images.is_cuda] // (height * width), 1), max(batch, 1))
    stride = bins + 2 * reach  # bins of a region, and those beyond the ends that a kernel reaches
    starts = torch.arange(at_once * rows * columns, device=images.device) * stride + 1  # a bin -1 is below
    starts = starts.repeat_interleave(region[0] * region[1])
    position, bin_below, weight = torch.empty(3, len(starts), dtype=torch.float64, device=images.device)
    target = torch.empty_like(starts)
    histogram = position.new_empty(at_once * rows * columns * stride + 2 * reach)
    entropy = position.new_empty(batch, rows, columns)
    for part, out in zip(images.split(at_once), entropy.split(at_once), strict=True):
        n = len(part) * height * width
        if n < len(position):
            starts, position, bin_below, weight, target = (x[:n] for x in (starts, position, bin_below, weight, target))
            histogram = histogram[: out.numel() * stride + 2 * reach]
        luma = grey(part)
        if n and images.device.type == "cpu":
            _check_range(luma)
        by_region = rearrange(luma, "b (h i) (w j) -> b h w i j", i=region[0], j=region[1])
        position.view(by_region.shape).copy_(by_region)
        if images.is_cuda:
            position.masked_fill_(position.abs() > 1.01, torch.nan)
        position.sub_(low).mul_(1 / spacing)  # in bins
        torch.floor(position, out=bin_below).clamp_(-1, bins - 1).nan_to_num_()
        target.copy_(bin_below).add_(starts)
        offset = position.sub_(bin_below)
        # weights exp(-sharpness (offset - k)^2) of bins k = 1 - reach .. reach: each is the one before times a ratio
        torch.add(offset, reach - 1, out=weight).square_().mul_(-sharpness).exp_()
        ratio = offset.mul_(2 * sharpness).exp_()
        histogram.zero_()
        for k in range(1 - reach, reach + 1):
            histogram[reach + k - 1 :].scatter_add_(0, target, weight)
            weight.mul_(ratio).mul_(math.exp(-sharpness * (2 * k + 1)))
        counts = histogram[: -2 * reach].view(*out.shape, stride)[..., reach : reach + bins]
        total = counts.sum(dim=-1, keepdim=True) + 1e-40 * region[0] * region[1]
        out.copy_(torch.special.entr(counts / total).sum(dim=-1))
    return _on_grid(entropy.clamp_(0, math.log(bins)), 2.0**-20)


def _check_range(luma: Tensor) -> None:
    lowest, highest = (float(value) for value in luma.aminmax())
    if math.isnan(lowest):  # makes no number of its region, but says nothing about others
        lowest, highest = (float(value) for value in luma.nan_to_num(0, torch.inf, -torch.inf).aminmax())
    inside = lowest >= -1.01 and highest <= 1.01
    check("images", f"from {lowest:.3g} to {highest:.3g}", "values in [-1, 1], as from_uint8 makes them", inside)


@torch.no_grad()
def region_gradient(images: Tensor, region: tuple[int, int]) -> Tensor:
    """Mean squared gradient of the grey values of each region, in [0, 8]; else as `region_entropy`, rounded to 2^-40.

    The mean squared difference between a pixel and the one right of it, plus that to the one below, where there is one.
    """
    pixels = grey(images).double()

    def mean_square(differences: Tensor, padding: tuple[int, ...]) -> Tensor:
        totals, counts = (
            reduce(F.pad(x, padding), "b (h i) (w j) -> b h w", "sum", i=region[0], j=region[1])
            for x in (differences.square(), torch.ones_like(differences[:1]))
        )
        return totals / counts.clamp(min=1)

    across, down = pixels.diff(dim=2), pixels.diff(dim=1)
    return _on_grid(mean_square(across, (0, 1)) + mean_square(down, (0, 0, 0, 1)), 2.0**-40)


@torch.no_grad()
def region_variance(images: Tensor, region: tuple[int, int]) -> Tensor:
    """Variance of the grey values of each region, in [0, 1]; else as `region_entropy`, rounded to 2^-40."""
    pixels = rearrange(grey(images).double(), "b (h i) (w j) -> b h w (i j)", i=region[0], j=region[1])
    return _on_grid((pixels - pixels.mean(dim=-1, keepdim=True)).square().mean(dim=-1), 2.0**-40)


def region_hash(images: Tensor, region: tuple[int, int]) -> Tensor:
    """A pseudo-random number on [0, 1) for each region, a function of the 8-bit image and the region alone."""
    pixels = ((images + 1) * 127.5).round().long().flatten(1)
    position = torch.arange(pixels.shape[1], device=pixels.device)
    state = ((pixels + 1) * mix(position)).sum(dim=1)
    rows, columns = images.shape[-2] // region[0], images.shape[-1] // region[1]
    cell = torch.arange(rows * columns, device=pixels.device)
    return hashed_uniforms(mix(state)[:, None] + mix(cell)).float().clamp(max=1 - 2**-24).view(-1, rows, columns)


def region_order(rows: int, columns: int) -> Tensor:
    """(rows, columns) float32 in (0, 1], larger the nearer a region is to the image's centre; a hash breaks ties."""
    down, right = ((torch.arange(size) + 0.5) / size - 0.5 for size in (rows, columns))
    distance = (down[:, None].square() + right.square()).flatten()
    ties = hashed_uniforms(mix(torch.arange(rows * columns)))
    order = (-distance.double().round(decimals=6) + 1e-7 * ties).argsort()
    rank = torch.empty(rows * columns).scatter_(0, order, torch.arange(1.0, rows * columns + 1))
    return (rank / (rows * columns)).view(rows, columns)


def coding_gains(errors: Tensor, costs: Sequence[int]) -> Tensor:
    """Decrease in error per additional code for each refinement of a region.

    Args:
        errors: (..., K) error of a region at each grain, coarsest first.
        costs: K, codes of a region at each grain, ascending.
    Returns:
        (..., K - 1) slopes of the lower convex hull of error over codes, descending: the number of gains above a price
        is the grain with the least error + price * codes.
    """

    def best(i: int, j: int) -> Tensor:  # the steepest slope from grain i to any beyond j
        slopes = [(errors[..., i] - errors[..., k]) / (costs[k] - costs[i]) for k in range(j + 1, len(costs))]
        return torch.stack(slopes).amax(dim=0)

    steps = [torch.stack([best(i, j) for i in range(j + 1)]).amin(dim=0) for j in range(len(costs) - 1)]
    return torch.stack(steps, dim=-1)


def quantile_table(densities: Tensor) -> Tensor:
    """The quantile function of densities at 4097 evenly spaced levels from 0 to 1, ascending."""
    ordered = densities.flatten().double().sort().values
    levels = torch.linspace(0, len(ordered) - 1, 4097, dtype=torch.float64, device=ordered.device)
    return ordered[levels.round().long()].to(densities.dtype)


def percentile_table(percentiles: Mapping[float, float]) -> Tensor:
    """A table as of `quantile_table`, float32, from values at two or more of 0 to 100 percent: linear between them,
    constant beyond; a percentile's own place has its value."""
    rows = torch.tensor(sorted(percentiles.items()), dtype=torch.float64)
    levels, values = rows[:, 0].contiguous() / 100, rows[:, 1]
    wanted = torch.linspace(0, 1, 4097, dtype=torch.float64)
    above = torch.searchsorted(levels, wanted, right=True).clamp(1, len(levels) - 1)
    fraction = (wanted - levels[above - 1]) / (levels[above] - levels[above - 1])
    table = values[above - 1].lerp(values[above], fraction.clamp(0, 1))
    table[(levels * (len(table) - 1)).round().long()] = values  # whose share is rounded to a place
    return table.float()


def thresholds(table: Tensor, shares: Tensor) -> Tensor:
    """(...) thresholds by a quantile table: (...) shares of the densities are at or below; -inf for 0, inf for 1."""
    limits = table[(shares.double() * (len(table) - 1)).round().long().clamp(0, len(table) - 1)]
    limits = limits.masked_fill(shares < 1e-9, -torch.inf)
    return limits.masked_fill(shares > 1 - 1e-9, torch.inf)


def length_shares(ratios: Tensor, costs: Sequence[int]) -> Tensor:
    """(..., K) ratios to (...): the share of all codes beyond the coarsest that such a mixture does without."""
    extra = constant(tuple(costs), torch.float64, ratios.device) - costs[0]
    return (1 - (ratios.double() * extra).sum(dim=-1) / max(costs[-1] - costs[0], 1)).clamp(0, 1)


def ratios_at(level: Tensor, num_grains: int) -> Tensor:
    """Mixtures from all coarse to all fine: (...) levels in [0, 1] to (..., K) ratios, binomial with K - 1 trials."""
    last = num_grains - 1
    level = level[..., None].double()
    count = torch.arange(num_grains, device=level.device)
    ways = constant(tuple(math.comb(last, g) for g in range(num_grains)), torch.long, level.device)
    return ways * level**count * (1 - level) ** (last - count)


def grains_within(density: Tensor, ratios: Tensor, costs: Sequence[int]) -> Tensor:
    """(B, H0, W0) grains by ranking the regions of each image, so that all images have one length.

    Args:
        density: (B, H0, W0), of which shares are rounded to regions, of equal ones the first in raster order refined
            last; or (B, H0, W0, K - 1) gains of `coding_gains`, of which the largest, of equal ones the first, are
            taken as long as they fit into the length that the ratios stand for.
        ratios: (K,) or (B, K) shares.
        costs: K, codes of a region at each grain.
    """
    batch, regions = len(density), density.shape[1] * density.shape[2]
    ratios = ratios.to(density.device).expand(batch, -1)
    if density.ndim == 3:
        rank = density.flatten(1).argsort(dim=1, stable=True).argsort(dim=1)
        limits = (ratios.cumsum(dim=1)[:, :-1] * regions).round()
        return (rank[..., None] >= limits[:, None]).sum(dim=-1).view(density.shape)
    each = constant(tuple(costs), torch.long, density.device).diff().repeat(regions)
    spent = ratios.double() @ constant(tuple(costs), torch.float64, density.device)
    order = density.flatten(1).argsort(dim=1, descending=True, stable=True)
    fits = each[order].cumsum(dim=1) <= ((spent - costs[0]) * regions)[:, None] + 1e-6
    return torch.zeros_like(fits).scatter_(1, order, fits).view(density.shape).sum(dim=-1)


def check_ratios(ratios: Sequence[float], num_grains: int) -> tuple[float, ...]:
    """The ratios as a tuple; refuses what is not K non-negative shares that add up to 1."""
    try:
        values = () if isinstance(ratios, str) else tuple(float(ratio) for ratio in ratios)
    except (TypeError, ValueError):  # no numbers, or no list of them
        values = ()
    example = [round(1 / num_grains, 2)] * num_grains
    holds = len(values) == num_grains and min(values) >= 0 and abs(sum(values) - 1) <= 1e-6  # which NaN fails
    expected = f"{num_grains} shares, coarsest grain first, that add up to 1, such as {example}"
    check("ratios", list(values) or brief(ratios), expected, holds)
    return values


def check_psnr(psnr: float | None) -> None:
    """Refuse what is neither None nor a number of dB that images can have."""
    is_number = isinstance(psnr, int | float) and not isinstance(psnr, bool)
    check("psnr", psnr, "a number of dB from 0 to 100, such as 25", psnr is None or (is_number and 0 <= psnr <= 100))


def _on_grid(density: Tensor, step: float) -> Tensor:
    """float64 values as float32 multiples of a power of two, so that rounding errors break no ties."""
    return ((density / step).round() * step).float()
