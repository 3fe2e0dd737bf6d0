"""Information density of image regions, and the quantiles that turn it into a grain for each region."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from graincode.core.errors import GraincodeError
from graincode.core.rng import hashed_uniforms, mix


def grey(images: Tensor) -> Tensor:
    """Luma of images: (B, 3, H, W) in [-1, 1] to (B, 1, H, W) in [-1, 1]. Source: ITU-R BT.601 weights."""
    red, green, blue = images.split(1, dim=1)
    return 0.2989 * red + 0.5870 * green + 0.1140 * blue


def region_entropy(images: Tensor, region: tuple[int, int], bins: int = 32, sigma: float = 0.01) -> Tensor:
    """Entropy of the soft grey-value histogram of each region.

    Args:
        images: (B, 3, H, W) in [-1, 1]; H and W are multiples of the region's.
        region: (height, width) of a region in pixels.
        bins: number of bins, evenly spaced on [-1, 1], both ends included.
        sigma: width of the Gaussian kernel, in units of the grey value. With the published 0.01, far narrower than
            the spacing of 32 bins (0.065), a flat region scores anything from 0 to ln 2, by its grey value.
    Returns:
        (B, H / region height, W / region width) float32 in [0, ln bins], in nats. It is computed in float64 and rounded
        to 2^-20, so that the last bit, which depends on the batch, never decides whether a region ties.
    Raises:
        GraincodeError: sigma is so small that a value between two bins would reach neither.
    Source: DQ-VAE's public code (density); its use for routing in DQVAE++ is our reading.
    """
    spacing = 2 / (bins - 1)
    if sigma < spacing / 24:
        raise GraincodeError(
            f"sigma {sigma} is too narrow for {bins} bins: "
            f"type tokenizer.router.density.sigma={spacing / 24:.4f} or more"
        )
    pixels = rearrange(grey(images.double()), "b 1 (h i) (w j) -> b h w (i j)", i=region[0], j=region[1])
    nearest = ((pixels + 1) / spacing).round().long()
    histogram = pixels.new_zeros(*pixels.shape[:3], bins)
    # beyond 6 sigma a bin gets less than 2e-8 of a pixel, so a narrow kernel touches few bins, not all of them; the
    # neighbours always count, since a pixel midway between two bins belongs to both
    reach = min(max(int(6 * sigma / spacing + 0.5), 1), bins - 1)
    for offset in range(-reach, reach + 1):
        index = nearest + offset
        weight = torch.exp(-0.5 * ((pixels + 1 - index * spacing) / sigma) ** 2)
        histogram.scatter_add_(-1, index.clamp(0, bins - 1), weight * ((index >= 0) & (index < bins)))
    histogram = histogram.movedim(-1, 0)
    entropy = torch.special.entr(histogram / histogram.sum(dim=0)).sum(dim=0).clamp(0, math.log(bins))
    return ((entropy * 2**20).round() / 2**20).float()


def region_hash(images: Tensor, region: tuple[int, int]) -> Tensor:
    """A pseudo-random number for each region, a function of (image, region) alone.

    Args:
        images: (B, 3, H, W) in [-1, 1]. Equal 8-bit pixels give equal numbers.
        region: (height, width) of a region in pixels.
    Returns:
        (B, H / region height, W / region width) float32, uniform on [0, 1).
    """
    pixels = ((images + 1) * 127.5).round().long().flatten(1)
    place = torch.arange(pixels.shape[1], device=pixels.device)
    state = ((pixels + 1) * mix(place)).sum(dim=1)
    rows, columns = images.shape[-2] // region[0], images.shape[-1] // region[1]
    cell = torch.arange(rows * columns, device=pixels.device)
    return hashed_uniforms(mix(state)[:, None] + mix(cell)).float().clamp(max=1 - 2**-24).view(-1, rows, columns)


def quantile_table(densities: Tensor, size: int = 4097) -> Tensor:
    """The quantile function of densities at `size` evenly spaced levels from 0 to 1, (size,) float32, ascending."""
    ordered = densities.flatten().double().sort().values
    if not bool(torch.isfinite(ordered).all()):
        raise GraincodeError("a density is not finite: look for damaged images in the training data")
    levels = torch.linspace(0, len(ordered) - 1, size, dtype=torch.float64)
    return ordered[levels.round().long()].float()


def thresholds(table: Tensor, ratios: Sequence[float]) -> Tensor:
    """The K - 1 density thresholds that give each grain its ratio.

    Args:
        table: (n,) ascending quantile table.
        ratios: K shares of the regions, coarsest first, that add up to 1.
    Returns:
        (K - 1,) ascending; a region belongs to the grain that counts the thresholds *below* its density, so regions
        equal to a threshold stay coarse. A cumulative ratio of 0 gives -inf and one of 1 gives inf, so that all regions
        or none pass it, denser than any in the table or not.
    """
    cumulative = torch.tensor(ratios, dtype=torch.float64, device=table.device).cumsum(0)[:-1]
    limits = table[(cumulative * (len(table) - 1)).round().long().clamp(0, len(table) - 1)]
    limits = limits.masked_fill(cumulative < 1e-9, -torch.inf)
    return limits.masked_fill(cumulative > 1 - 1e-9, torch.inf)


def grains_from_density(density: Tensor, limits: Tensor) -> Tensor:
    """Grain of each region: (..., H0, W0) densities and (K - 1,) thresholds to long in [0, K)."""
    return (density[..., None] > limits).sum(dim=-1)


def check_ratios(ratios: Sequence[float], num_grains: int) -> tuple[float, ...]:
    """The ratios as a tuple, if they are K non-negative shares that add up to 1.

    Raises:
        GraincodeError: they are not.
    """
    values = tuple(float(ratio) for ratio in ratios)
    if len(values) != num_grains or min(values) < 0 or abs(sum(values) - 1) > 1e-6:
        example = ",".join(f"{1 / num_grains:.2g}" for _ in range(num_grains))
        raise GraincodeError(
            f"ratios {list(values)}: expected {num_grains} shares (one per grain, coarsest first) that add up to 1, "
            f"such as tokenizer.ratios=[{example}] in training, ratios=[{example}] when codes are extracted"
        )
    return values
