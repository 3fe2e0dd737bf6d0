"""Which codes training masks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from graincode.core import rng as purpose
from graincode.core.errors import check, check_choice
from graincode.core.layout import CodeLayout
from graincode.core.logits import gumbel, ranks
from graincode.core.rng import SampleRng, batch_uniforms
from graincode.core.schedules import MASK_SCHEDULES


@dataclass(frozen=True)
class InformationMasking:
    """Masks a random share of each image's codes; with beta above 0, fine codes more often stay visible.

    Of N codes, n = ceil(gamma(u) N) are masked, u uniform; the N - n with the largest keys beta h_i + Gumbel_i stay,
    h_i being the code's grain, from 0 for the coarsest to 1 for the finest.

    Attributes:
        schedule: gamma.
        beta: finite; 0 is MaskGIT. Masks match those of sampling where beta is the sampler's information_weight /
            choice_temperature (with order=confidence, and log p that varies little beside the noise).
        elastic: draw it for each image, uniformly from -beta to beta, beta > 0.
    Source: MaskGIT (Chang et al., 2022), section 3.1; the density's part is our reading of DGiT.
    """

    schedule: Literal["cosine", "linear", "arccos"] = "cosine"
    beta: float = 0.0
    elastic: bool = False

    def __post_init__(self) -> None:
        check_choice("schedule", self.schedule, MASK_SCHEDULES)
        check("beta", self.beta, "a finite number", math.isfinite(self.beta))
        check("beta", self.beta, "a number above 0 with elastic=true", not self.elastic or self.beta > 0)

    def expected(self, codes: Tensor, most: int) -> Tensor:
        """(B,) float64, how many of (B,) numbers of codes, up to `most`, are masked on average."""
        return MASK_SCHEDULES[self.schedule].expected(codes, most)

    def ahead(self, layout: CodeLayout, rng: SampleRng | None) -> SampleRng | None:
        """The random numbers of a training step, drawn at once, that of the labels included."""
        codes, regions = layout.max_tokens, layout.num_regions
        counts = {purpose.LABEL_DROPOUT: 1, purpose.MASK_RATIOS: 1, purpose.MASK_KEYS: codes}
        counts |= {purpose.MASK_STRENGTHS: 1} if self.elastic else {}
        if layout.num_grains > 1:
            counts |= {purpose.MAP_MASK_RATIOS: 1, purpose.MAP_MASK_KEYS: regions}
        return None if rng is None else rng.ahead(counts)

    def codes(self, is_code: Tensor, density: Tensor, rng: SampleRng | None) -> Tensor:
        """(B, L) bool, which codes are masked, of those in (B, L) `is_code`, by their (B, L) densities h."""
        beta = self.beta
        if self.elastic:
            beta = beta * (2 * batch_uniforms(rng, purpose.MASK_STRENGTHS, is_code, 1) - 1)
        return self._mask(is_code, beta * density, rng, purpose.MASK_RATIOS, purpose.MASK_KEYS)

    def regions(self, regions: Tensor, rng: SampleRng | None) -> Tensor:
        """(B, R) bool, where the grains of (B, R) regions are masked, all of them with equal chances."""
        every = torch.ones_like(regions, dtype=torch.bool)
        return self._mask(every, 0.0, rng, purpose.MAP_MASK_RATIOS, purpose.MAP_MASK_KEYS)

    def _mask(self, valid: Tensor, weighed: Tensor | float, rng: SampleRng | None, ratios: int, keys: int) -> Tensor:
        u = batch_uniforms(rng, ratios, valid, 1)[:, 0]
        noise = gumbel(batch_uniforms(rng, keys, valid, valid.shape[1]))
        masked = MASK_SCHEDULES[self.schedule].masked(valid.sum(dim=1), u)
        return ranks((weighed + noise).masked_fill(~valid, torch.inf)) < masked[:, None]
