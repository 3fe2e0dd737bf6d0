"""Information density of image regions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graincode.core import density as core
from graincode.core.errors import check, check_choice
from graincode.core.layout import CodeLayout
from graincode.core.rng import SampleRng

Measure = Literal["error", "gain"]


@dataclass(eq=False)
class Probe:
    """What a router may use of a batch of images; each part is computed at its first use.

    Attributes:
        images: (B, 3, H, W) in [-1, 1].
        encode: returns `features`.
        measure: from features and a grain, what `error_at` returns.
        rng: random numbers of this batch, in training.
    """

    images: Tensor
    encode: Callable[[], list[Tensor]]
    measure: Callable[[list[Tensor], int], Tensor]
    rng: SampleRng | None = None
    _errors: dict[int, Tensor] = field(default_factory=dict, init=False)

    @cached_property
    def features(self) -> list[Tensor]:
        """K feature maps (B, D, h_g, w_g), coarsest first."""
        return self.encode()

    def error_at(self, grain: int) -> Tensor:
        """(B, H0, W0) mean squared error of pixels in [-1, 1] if all regions had this grain; without gradients."""
        if grain not in self._errors:
            self._errors[grain] = self.measure(self.features, grain)
        return self._errors[grain]


class Density(nn.Module):
    """A measure of information: a `Probe` to the (B, H0, W0) density of each region, or (B, H0, W0, K - 1) gains."""

    is_learned = False  # whether it changes with the weights, so that thresholds must follow
    has_gains = False  # whether each refinement has its own

    def forward(self, probe: Probe, layout: CodeLayout) -> Tensor:
        raise NotImplementedError


class EntropyDensity(Density):
    """`core.density.region_entropy` with its parameters."""

    def __init__(self, bins: int = 32, sigma: float = 0.01, span: Sequence[float] = (-1.0, 1.0)) -> None:
        super().__init__()
        check("span", span, "two numbers, such as [-1, 1]", len(span) == 2)
        core.region_entropy(torch.zeros(1, 3, 1, 1), (1, 1), bins, sigma, tuple(span))  # refuses what it cannot do
        self.bins, self.sigma, self.span = bins, sigma, tuple(span)

    def forward(self, probe: Probe, layout: CodeLayout) -> Tensor:
        return core.region_entropy(probe.images, layout.grains[0], self.bins, self.sigma, self.span)


class GradientDensity(Density):
    """`core.density.region_gradient`."""

    def forward(self, probe: Probe, layout: CodeLayout) -> Tensor:
        return core.region_gradient(probe.images, layout.grains[0])


class VarianceDensity(Density):
    """`core.density.region_variance`."""

    def forward(self, probe: Probe, layout: CodeLayout) -> Tensor:
        return core.region_variance(probe.images, layout.grains[0])


class RandomDensity(Density):
    """A control experiment: a random number, but the same whenever the image returns."""

    def forward(self, probe: Probe, layout: CodeLayout) -> Tensor:
        return core.region_hash(probe.images, layout.grains[0])


class FixedDensity(Density):
    """A control experiment: the middle of every image is dense, whatever it shows."""

    def forward(self, probe: Probe, layout: CodeLayout) -> Tensor:
        return _order(*layout.grids[0], probe.images.device).expand(len(probe.images), -1, -1)


@lru_cache(maxsize=8)
def _order(rows: int, columns: int, device: torch.device) -> Tensor:
    return core.region_order(rows, columns).to(device)


class CodingDensity(Density):
    """The tokenizer's own error, measured by coding the whole image at one grain after the other.

    Two measures: "error", the squared error that the coarsest grain leaves (one decode more); and "gain", what each
    refinement takes off it per code (K decodes more). With K > 2 the ratios of gains set the length alone.

    Args:
        of: what decides once the tokenizer is trained.
        in_training: what decides while it is.
    """

    is_learned = True

    def __init__(self, of: Measure = "gain", in_training: Measure = "error") -> None:
        super().__init__()
        check_choice("of", of, Measure)
        check_choice("in_training", in_training, Measure)
        self.of, self.in_training = of, in_training

    @property
    def has_gains(self) -> bool:
        return (self.in_training if self.training else self.of) == "gain"

    def forward(self, probe: Probe, layout: CodeLayout) -> Tensor:
        if layout.num_grains == 1:  # nothing to decide, so nothing is decoded; what is no pixel still makes no number
            return F.avg_pool2d(0 * probe.images.float().mean(dim=1, keepdim=True), layout.grains[0])[:, 0]
        if not self.has_gains:
            return probe.error_at(0)
        errors = torch.stack([probe.error_at(g) for g in range(layout.num_grains)], dim=-1)
        gains = core.coding_gains(errors, layout.codes_per_region)
        return gains if layout.num_grains > 2 else gains[..., 0]
