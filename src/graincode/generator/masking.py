"""Which codes training hides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from graincode.core.errors import GraincodeError
from graincode.core.logits import gumbel, ranks
from graincode.core.rng import (
    MAP_MASK_KEYS,
    MAP_MASK_RATIOS,
    MASK_KEYS,
    MASK_RATIOS,
    MASK_STRENGTHS,
    SampleRng,
    batch_uniforms,
)
from graincode.core.schedules import MASK_SCHEDULES


@dataclass(frozen=True)
class InformationMasking:
    """Masks a random share of each image's codes, which are the likelier to stay visible the denser they are.

    Of N codes, n = ceil(gamma(u) N) are masked, u uniform; the N - n with the largest keys beta h_i + Gumbel_i stay.

    Attributes:
        schedule: gamma, "cosine", "linear" or "arccos".
        beta: how much the density counts; 0 is MaskGIT. Where as much is masked, masks are like those that sampling
            meets without `remask` ("matched") if beta is the sampler's `information_weight / choice_temperature`, with
            order=confidence, `information_decay` equal to `choice_noise_decay` (both are 1 by default), and log p that
            varies little beside the noise; with order=random, if it is `information_weight`, and `information_decay`
            0.
        elastic: draw it for each image, uniformly from -beta to beta.
    Raises:
        GraincodeError: the schedule is unknown, or beta is not finite, or elastic and not positive.
    Source: MaskGIT (Chang et al., 2022), section 3.1; the density's part is our reading of DGiT.
    """

    schedule: Literal["cosine", "linear", "arccos"] = "cosine"
    beta: float = 0.0
    elastic: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in MASK_SCHEDULES:
            raise GraincodeError(
                f"schedule {self.schedule!r}: type generator.masking.schedule= one of {', '.join(MASK_SCHEDULES)}"
            )
        if not math.isfinite(self.beta) or (self.elastic and self.beta <= 0):
            raise GraincodeError(
                f"beta={self.beta}: expected a finite number, above 0 where generator.masking.elastic=true; type for "
                "example generator.masking.beta=2"
            )

    def expected(self, codes: Tensor, most: int) -> Tensor:
        """(B,) float64, how many of (B,) numbers of codes, up to `most`, are masked on average."""
        return MASK_SCHEDULES[self.schedule].expected(codes, most)

    def codes(self, is_code: Tensor, density: Tensor, rng: SampleRng | None) -> Tensor:
        """(B, L) bool, where codes are masked.

        Args:
            is_code: (B, L) bool, at least one of each image.
            density: (B, L) in [0, 1], h.
            rng: random numbers of this batch; torch's generator, if not given.
        """
        beta = self.beta
        if self.elastic:
            beta = beta * (2 * batch_uniforms(rng, MASK_STRENGTHS, is_code, 1) - 1)
        return self._mask(is_code, beta * density, rng, MASK_RATIOS, MASK_KEYS)

    def regions(self, regions: Tensor, rng: SampleRng | None) -> Tensor:
        """(B, R) bool, where the grains of (B, R) regions are masked, all of them with equal chances."""
        return self._mask(torch.ones_like(regions, dtype=torch.bool), 0.0, rng, MAP_MASK_RATIOS, MAP_MASK_KEYS)

    def _mask(self, valid: Tensor, weighed: Tensor | float, rng: SampleRng | None, ratios: int, keys: int) -> Tensor:
        u = batch_uniforms(rng, ratios, valid, 1)[:, 0]
        noise = gumbel(batch_uniforms(rng, keys, valid, valid.shape[1]))
        masked = MASK_SCHEDULES[self.schedule].masked(valid.sum(dim=1), u)
        order = ranks(torch.where(valid, weighed + noise, torch.inf))
        return order < masked[:, None]
