"""Routers: which grain each region of an image is coded at."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graincode import processes
from graincode.core import density as core
from graincode.core.codes import CodeLayout
from graincode.core.errors import GraincodeError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Routing:
    """Attributes:
    grains: (B, H0, W0) long, the grain of each region.
    density: (B, H0, W0) float32, what decided it.
    """

    grains: Tensor
    density: Tensor


class Density(nn.Module):
    """A measure of information: (B, 3, H, W) images in [-1, 1] to a (B, H0, W0) density of each region."""

    def definition(self) -> dict[str, float]:
        """The numbers that the measure depends on; thresholds are valid for these alone."""
        return {}

    def forward(self, images: Tensor, region: tuple[int, int]) -> Tensor:
        raise NotImplementedError


class EntropyDensity(Density):
    """`core.density.region_entropy` with its parameters."""

    def __init__(self, bins: int = 32, sigma: float = 0.01) -> None:
        super().__init__()
        self.bins, self.sigma = bins, sigma

    def definition(self) -> dict[str, float]:
        return {"bins": self.bins, "sigma": self.sigma, "low": -1.0, "high": 1.0}

    def forward(self, images: Tensor, region: tuple[int, int]) -> Tensor:
        return core.region_entropy(images, region, self.bins, self.sigma)


class GradientDensity(Density):
    """`core.density.region_gradient`."""

    def definition(self) -> dict[str, float]:
        return {"derivative": 1.0, "power": 2.0, "low": -1.0, "high": 1.0}

    def forward(self, images: Tensor, region: tuple[int, int]) -> Tensor:
        return core.region_gradient(images, region)


class VarianceDensity(Density):
    """`core.density.region_variance`."""

    def definition(self) -> dict[str, float]:
        return {"derivative": 0.0, "power": 2.0, "low": -1.0, "high": 1.0}

    def forward(self, images: Tensor, region: tuple[int, int]) -> Tensor:
        return core.region_variance(images, region)


class RandomDensity(Density):
    """The control experiment: a number that says nothing of the region, but is the same whenever the image returns."""

    def forward(self, images: Tensor, region: tuple[int, int]) -> Tensor:
        return core.region_hash(images, region)


class QuantileRouter(nn.Module):
    """Routes by comparing each region's density with quantiles of the density over the training data.

    The quantile function is a buffer and travels with the weights, together with the definition of the density, so
    that any ratio can be asked for later; weights made with another definition are refused.

    Args:
        layout: the code layout.
        density: the measure of information.
        ratios: share of regions at each grain, coarsest first, when none is asked for.
    Raises:
        GraincodeError: the ratios do not fit the layout.
    """

    quantiles: Tensor

    def __init__(self, layout: CodeLayout, density: Density, ratios: Sequence[float]) -> None:
        super().__init__()
        self.layout, self.density = layout, density
        self.ratios = core.check_ratios(ratios, layout.num_grains)
        self.register_buffer("quantiles", torch.full((4097,), torch.nan))
        described = {**density.definition(), "height": layout.grains[0][0], "width": layout.grains[0][1]}
        self._definition_names = list(described)
        self._calibrated = False
        self.register_buffer("definition", torch.tensor(list(described.values()), dtype=torch.float64))

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """Set the quantile function from training images.

        Args:
            batches: batches of (B, 3, H, W) images in [-1, 1]; with several processes, each one's share of them.
        Returns:
            for each grain g, `asked_g` and `achieved_g`: the share that was asked for and the share that the
            thresholds give on these images. They differ where many regions tie; more than 1 % is logged as a warning.
        """
        found = [self.density(images, self.layout.grains[0]).flatten().cpu() for images in batches]
        densities = processes.gather_rows(torch.cat([torch.zeros(0), *found]))
        self.quantiles.copy_(core.quantile_table(densities))
        self._calibrated = True
        limits = core.thresholds(self.quantiles.cpu(), self.ratios)
        grains = core.grains_from_density(densities, limits)
        report: dict[str, float] = {}
        for g, asked in enumerate(self.ratios):
            achieved = float((grains == g).double().mean())
            report |= {f"asked_{g}": asked, f"achieved_{g}": achieved}
            if abs(achieved - asked) > 0.01:
                log.warning(
                    "grain %d gets %.1f %% of the regions, not the %.1f %% that were asked for: regions that tie "
                    "at the threshold stay coarse; choose tokenizer.ratios away from the tie",
                    g, 100 * achieved, 100 * asked,
                )  # fmt: skip
        return report

    def forward(self, images: Tensor, ratios: Sequence[float] | None = None) -> Routing:
        """Route each region of (B, 3, H, W) images in [-1, 1].

        Raises:
            GraincodeError: the router is not calibrated, or the ratios do not fit the layout.
        """
        ratios = self.ratios if ratios is None else core.check_ratios(ratios, self.layout.num_grains)
        density = self.density(images, self.layout.grains[0])
        if self.layout.num_grains == 1:
            return Routing(torch.zeros_like(density, dtype=torch.long), density)
        if not self._calibrated:
            raise GraincodeError("the router has no thresholds yet: call calibrate(training images), or load weights")
        limits = core.thresholds(self.quantiles, ratios)
        return Routing(core.grains_from_density(density, limits), density)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        saved = state_dict.get(prefix + "definition")
        if saved is not None and not torch.equal(saved.cpu(), self.definition.cpu()):
            described = dict(zip(self._definition_names, self.definition.tolist(), strict=True))
            raise GraincodeError(
                f"these weights hold thresholds of another density definition ({saved.tolist()}) than the configured "
                f"one ({described}): type the values that they were calibrated with, or train anew"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._calibrated = not bool(self.quantiles.isnan().any())
