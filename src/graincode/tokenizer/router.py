"""Routers: which grain each region of an image is coded at."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graincode.core import density as core
from graincode.core.constants import constant
from graincode.core.errors import GraincodeError, brief, check, check_choice
from graincode.core.layout import CodeLayout
from graincode.core.losses import Term
from graincode.core.rng import GATES, LENGTHS
from graincode.distributed import collectives
from graincode.files import file_size
from graincode.tokenizer.blocks import ExactLinear
from graincode.tokenizer.blocks import norm as group_norm
from graincode.tokenizer.densities import Density, Probe

log = logging.getLogger(__name__)

Ratios = Sequence[float] | Tensor
Scope = Literal["dataset", "image"]
Norm = Literal["layer", "group"]


@dataclass(frozen=True)
class Routing:
    """The grains of a batch of images, and what comes with them.

    Attributes:
        grains: (B, H0, W0) long, the grain of each region.
        density: (B, H0, W0) float32, what decided it; (B, H0, W0, K - 1) where each refinement has its own.
        gates: (B, H0, W0), all 1, with the gradient of the decision; None if it has none.
        terms: of the loss, from the router itself.
    """

    grains: Tensor
    density: Tensor
    gates: Tensor | None = None
    terms: Mapping[str, Term] = field(default_factory=dict)

    @property
    def shown(self) -> Tensor:
        """(B, H0, W0) one number for each region, for pictures."""
        return self.density if self.density.ndim == 3 else self.density[..., 0]


class Router(nn.Module):
    """The base of all routers; `ratios` are the default shares of regions at each grain, coarsest first."""

    is_learned = False  # whether thresholds follow the weights, so that those evaluated or exported need calibration

    def __init__(self, layout: CodeLayout, ratios: Sequence[float]) -> None:
        super().__init__()
        self.layout = layout
        self.ratios = core.check_ratios(ratios, layout.num_grains)

    @property
    def nominal_length(self) -> float:
        """Codes per image that the ratios stand for."""
        each = zip(self.ratios, self.layout.codes_per_region, strict=True)
        return self.layout.num_regions * sum(share * cost for share, cost in each)

    def forward(self, probe: Probe, ratios: Ratios | None = None) -> Routing:
        """Route each region of a batch; `ratios` are K shares, or (B, K) of them.

        Raises:
            GraincodeError: there are no thresholds yet, or the ratios do not fit the layout.
        """
        raise NotImplementedError

    def calibrate(self, probes: Iterable[Probe]) -> dict[str, float]:
        """Learn thresholds from training images; returns the shares wanted and achieved, if there are thresholds."""
        return {}

    def update(self, routings: Sequence[Routing]) -> None:
        """After an optimizer step, learn from the routings of its micro-batches."""


class QuantileRouter(Router):
    """Routes by comparing each region's density with quantiles of the density.

    The quantile function over the training data is a buffer and travels with the weights, so that any ratio can be
    asked for later; training sets it anew, whatever weights it starts from.

    Args:
        density: the measure of information.
        ratios: as of `Router`.
        scope: quantiles over the "dataset", so that busy images get more codes, or over each "image".
        elastic: draw a mixture of grains for each training image (`core.ratios_at`), so that one tokenizer serves every
            length; `ratios` are then only the default afterwards.
        decay: of the running quantiles of a density that changes with the weights, in [0, 1).
        thresholds: a file of percentiles of the density (see `read_percentiles`), in place of those that calibration
            would find; None: calibrate.
    """

    def __init__(
        self, layout: CodeLayout, density: Density, ratios: Sequence[float], scope: Scope = "dataset",
        elastic: bool = False, decay: float = 0.95, thresholds: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(layout, ratios)
        check_choice("scope", scope, Scope)
        check("decay", decay, "0 to below 1", 0 <= decay < 1)
        expected = "null for a density that changes with the weights"
        check("thresholds", thresholds, expected, thresholds is None or not density.is_learned)
        self.density, self.scope, self.elastic, self.decay = density, scope, elastic, decay
        self.thresholds = thresholds
        self.is_learned = density.is_learned and layout.num_grains > 1
        self.register_buffer("quantiles", torch.full((4097,), torch.nan))
        self._calibrated = False

    @torch.no_grad()
    def calibrate(self, probes: Iterable[Probe]) -> dict[str, float]:
        """Set the quantile function from training images, of which each process has its share; returns `asked_g` and
        `achieved_g`, the shares of each grain g on these images, which differ where many regions tie."""
        if self.layout.num_grains == 1:  # nothing to decide: no image is read
            self.quantiles.zero_()
            return {"asked_0": 1.0, "achieved_0": 1.0}
        given = None if self.thresholds is None else read_percentiles(Path(self.thresholds), self.density)
        found = [self.density(probe, self.layout).cpu() for probe in probes]
        gains = (self.layout.num_grains - 1,) if self.density.has_gains and self.layout.num_grains > 2 else ()
        densities = collectives.gather_rows(torch.cat([torch.zeros(0, *self.layout.grids[0], *gains), *found]))
        if not bool(densities.isfinite().all()):
            raise GraincodeError("a density is not finite: look for damaged images in the training data")
        table = core.quantile_table(self._weighted(densities)) if given is None else core.percentile_table(given)
        self.quantiles.copy_(table)
        grains = self._grains(densities, self.ratios)
        shares = [float((grains == g).double().mean()) for g in range(self.layout.num_grains)]
        length = float(self.layout.lengths(grains).double().mean())
        if abs(length / self.nominal_length - 1) > 0.01:
            log.warning(
                "images get %.1f codes on average, not the %.1f that were asked for: regions that tie at a threshold "
                "stay coarse, and an image has %d regions to divide; choose other ratios",
                length, self.nominal_length, self.layout.num_regions,
            )  # fmt: skip
        found = {"asked": self.ratios, "achieved": shares}
        return {f"{name}_{g}": share for name, values in found.items() for g, share in enumerate(values)}

    def forward(self, probe: Probe, ratios: Ratios | None = None) -> Routing:
        if isinstance(ratios, Tensor):
            self._check(ratios, len(probe.images))
        elif ratios is not None:
            ratios = core.check_ratios(ratios, self.layout.num_grains)
        density = self.density(probe, self.layout)
        if self.layout.num_grains == 1:
            return Routing(torch.zeros_like(density, dtype=torch.long), density)
        if not self._calibrated:  # read once, as reading waits for the device
            self._calibrated = not bool(self.quantiles.isnan().any())
            if not self._calibrated:
                raise GraincodeError("the router has no thresholds yet: call calibrate(training images) first")
        if ratios is None and self.elastic and self.training:
            level = torch.rand(len(density)) if probe.rng is None else probe.rng.uniforms(LENGTHS)
            ratios = core.ratios_at(level.to(density.device), self.layout.num_grains)
        return Routing(self._grains(density, self.ratios if ratios is None else ratios), density)

    @torch.no_grad()
    def update(self, routings: Sequence[Routing]) -> None:
        """Move the quantiles of a density that changes with the weights towards those of the step."""
        if not self.is_learned:
            return
        seen = collectives.gather_rows(torch.cat([routing.density for routing in routings]), equal=True)
        self.quantiles.lerp_(core.quantile_table(self._weighted(seen)).to(self.quantiles), 1 - self.decay)

    def _check(self, ratios: Tensor, images: int) -> None:
        num_grains = self.layout.num_grains
        if tuple(ratios.shape) not in ((num_grains,), (images, num_grains)):
            expected = f"({num_grains},) or ({images}, {num_grains})"
            raise GraincodeError(f"ratios of shape {tuple(ratios.shape)}: expected {expected}")
        for shares in sorted({tuple(shares) for shares in ratios.reshape(-1, num_grains).tolist()}):
            core.check_ratios(shares, num_grains)

    def _grains(self, density: Tensor, ratios: Ratios) -> Tensor:
        """(B, H0, W0[, K - 1]) densities and K or (B, K) ratios to (B, H0, W0) long."""
        if not isinstance(ratios, Tensor):
            ratios = constant(tuple(ratios), torch.float64, density.device)
        ratios, costs = ratios.to(density.device), self.layout.codes_per_region
        if self.scope == "image":
            return core.grains_within(density, ratios, costs)
        if density.ndim == 4:
            shares = core.length_shares(ratios, costs)[..., None]
        else:
            shares, density = ratios.cumsum(dim=-1)[..., :-1], density[..., None]
        limits = core.thresholds(self.quantiles.to(density.device), shares)
        return (density > (limits if limits.ndim == 1 else limits[:, None, None])).sum(dim=-1)

    def _weighted(self, density: Tensor) -> Tensor:
        """All densities, each refinement as often as it costs codes."""
        if density.ndim == 3:
            return density.flatten()
        costs = [fine - coarse for coarse, fine in pairwise(self.layout.codes_per_region)]
        times = [g for g, cost in enumerate(costs) for _ in range(cost // math.gcd(*costs))]
        return density.flatten(0, 2)[:, constant(tuple(times), torch.long, density.device)].flatten()


def budget_pull(gates: Tensor, shares: Tensor, ratios: Sequence[float], weights: Sequence[float]) -> Tensor:
    """() sum over images, with the gradient of sum_g w_g (share_g - ratio_g)^2 over the K - 1 finer grains at (K,)
    `shares`, with respect to (B, H0, W0, K) gates. Source: DQ-VAE (arXiv 2305.11718), eq. 6, and its public code."""
    pulls = gates[..., 1:].mean(dim=(1, 2)) * (shares - constant(tuple(ratios), gates.dtype, gates.device))[1:]
    return sum(2 * weight * pull.sum() for weight, pull in zip(weights, pulls.unbind(1), strict=True))


def read_percentiles(path: Path, density: nn.Module) -> dict[float, float]:
    """Percentiles of a density in a JSON file: from percent, such as "50", to value, as DQ-VAE's public code has them.

    A file may say by "definition" what they are of, such as {"bins": 32, "sigma": 0.01, "span": [0, 1]}.

    Raises:
        GraincodeError: the file does not hold that, or its definition is not the density's.
    """
    advice = 'expected {"1": value, ..., "99": value}, ascending'
    try:
        file_size(path)  # which refuses a pipe: reading it would wait
        content = json.loads(path.read_text(encoding="utf-8"))
        definition = content.pop("definition", {}).items()
        found = {float(percent): float(content[percent]) for percent in sorted(content, key=float)}
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise GraincodeError(f"{path}: no percentiles ({brief(error)}); {advice}") from error
    values = list(found.values())
    rising = len(values) > 1 and all(low <= high for low, high in pairwise(values))  # which NaN fails
    if not rising or not all(0 <= percent <= 100 for percent in found) or not all(map(math.isfinite, values)):
        raise GraincodeError(f"{path}: no percentiles; {advice}")
    limit = math.log(getattr(density, "bins", math.inf))
    if limit < math.inf and not -1e-6 <= values[0] <= values[-1] <= limit + 1e-6:  # rounding
        raise GraincodeError(f"{path}: no percentiles of an entropy; expected values of 0 to {limit:.6f}")
    for name, value in definition:
        own = getattr(density, name, None)
        own = list(own) if isinstance(own, tuple) else own
        if own != value:
            raise GraincodeError(f"{path}: percentiles of {name}={value}, but the density has {own}; give it theirs")
    return found


class FeatureRouter(Router):
    """A small network chooses by the features of all grains; the decision is learned with everything else.

    In training each region draws its grain (Gumbel-softmax, straight through), and its codes are multiplied by its
    gate, which is 1 but has the gradient of the decision; afterwards the likeliest grain is taken. A budget term, with
    the gradient of its square at the shares of the step before, holds the mean share of each finer grain near its
    ratio; no other length can be chosen afterwards.

    Args:
        layout: the code layout, with two grains or more.
        code_dim: dimension D of the features.
        ratios: share of regions at each grain that the budget aims at.
        budget: weight of the sum over the finer grains of (share - ratio)^2, or one for each finer grain; published: 20
            for two grains, 1 for three.
        temperature: of the Gumbel-softmax, above 0.
        norm: of the features: "layer", over all channels, or "group", as everywhere in the encoder (published).
    Source: DQ-VAE (arXiv 2305.11718), section 3.2 and its public code.
    """

    def __init__(
        self, layout: CodeLayout, code_dim: int, ratios: Sequence[float],
        budget: float | Sequence[float] = 20.0,
        temperature: float = 1.0, norm: Norm = "layer",
    ) -> None:  # fmt: skip
        super().__init__(layout, ratios)
        check("grains", layout.grains, "two or more for a router that learns", layout.num_grains > 1)
        weights = [budget] * (layout.num_grains - 1) if isinstance(budget, int | float) else list(budget)
        holds = len(weights) == layout.num_grains - 1 and min(weights) >= 0
        check("budget", budget, "a number of 0 or more, or one for each grain but the coarsest", holds)
        check("temperature", temperature, "a number above 0", temperature > 0)
        self.budget, self.temperature = weights, temperature
        check_choice("norm", norm, Norm)
        self.norms = nn.ModuleList(
            nn.GroupNorm(1, code_dim) if norm == "layer" else group_norm(code_dim) for _ in layout.grains
        )
        width = layout.num_grains * code_dim
        self.choose = nn.Sequential(ExactLinear(width, width), nn.SiLU(), ExactLinear(width, layout.num_grains))
        self.register_buffer("shares", torch.tensor(self.ratios))

    def forward(self, probe: Probe, ratios: Ratios | None = None) -> Routing:
        """As any router, without ratios; the density is the log-odds of all finer grains against the coarsest."""
        if ratios is not None:
            raise GraincodeError("the router obeys no other ratios than it learned: leave ratios and psnr out")
        grid = self.layout.grids[0]
        pooled = [F.adaptive_avg_pool2d(norm(x), grid) for norm, x in zip(self.norms, probe.features, strict=True)]
        logits = self.choose(torch.cat(pooled, dim=1).permute(0, 2, 3, 1)).float()
        density = logits[..., 1:].logsumexp(dim=-1) - logits[..., 0]
        if not self.training:
            return Routing(logits.argmax(dim=-1), density.detach())
        chance = torch.rand_like(logits) if probe.rng is None else probe.rng.uniforms(GATES, *logits.shape[1:])
        gumbel = -torch.log(-torch.log(chance.to(logits).clamp(1e-7, 1 - 1e-7)))
        soft = ((logits + gumbel) / self.temperature).softmax(dim=-1)
        grains = soft.argmax(dim=-1)
        hard = F.one_hot(grains, self.layout.num_grains) + (soft - soft.detach())
        pull = budget_pull(hard, self.shares, self.ratios, self.budget)
        gates = hard.gather(-1, grains[..., None])[..., 0]
        return Routing(grains, density.detach(), gates, {"budget": Term(pull, len(grains))})

    @torch.no_grad()
    def update(self, routings: Sequence[Routing]) -> None:
        """Set the shares to those of this step, of all processes."""
        grains = torch.cat([routing.grains.flatten() for routing in routings])
        counts = collectives.sum_(torch.stack([(grains == g).sum() for g in range(self.layout.num_grains)]).double())
        self.shares.copy_(counts / counts.sum())
