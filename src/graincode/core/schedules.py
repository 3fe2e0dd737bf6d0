"""Schedules: stateless functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Factor on the learning rate of a 1-based step: linear from 0 over `warmup` steps, then a half cosine to 0."""
    if step <= warmup:
        return step / max(warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / max(steps - warmup, 1)))


def ramp(step: int, start: int, length: int) -> float:
    """Factor on a loss at a 1-based step: 0 up to step `start`, then linear up to 1 over `length` steps (>= 0)."""
    return min(max(step - start, 0) / max(length, 1), 1.0)


@dataclass(frozen=True)
class MaskSchedule:
    """The share of an image's codes that is masked after a share u of the time: from 1 at u = 0 down to 0 at u = 1.

    Attributes:
        ratio: float64 tensor of u in [0, 1] to as many in [0, 1].
        time: its inverse, the u of a share.
    """

    ratio: Callable[[Tensor], Tensor]
    time: Callable[[Tensor], Tensor]

    def masked(self, codes: Tensor, u: Tensor) -> Tensor:
        """(B,) long, how many of (B,) N >= 1 codes a training step masks, ceil(ratio(u) N), for (B,) u in [0, 1).

        Source: MaskGIT (Chang et al., 2022), section 3.1, applied to each image's own length.
        """
        return (self.ratio(u) * codes).ceil().long().clamp(min=1).minimum(codes)

    def expected(self, codes: Tensor, most: int) -> Tensor:
        """(B,) float64, the mean of `masked` over all u for (B,) N of 1 to `most` codes.

        More than k codes are masked up to the u whose share is k / N.
        """
        share = torch.arange(most, device=codes.device) / codes[:, None].double()
        return self.time(share.clamp(max=1)).masked_fill(share >= 1, 0).sum(dim=1)

    def remaining(self, masked: Tensor, codes: Tensor, step: int, steps: int) -> Tensor:
        """(B,) long, how many codes stay masked after a 1-based step of sampling: fewer than before, and 0 at the last.

        Args:
            masked, codes: (B,) long, how many were masked before it, and before the first step.
        Source: MaskGIT (Chang et al., 2022), eq. 3, applied to each image's own length.
        """
        if step == steps:
            return torch.zeros_like(masked)
        share = self.ratio(torch.tensor(step / steps, dtype=torch.float64)).item()
        # a product that is whole but for rounding, such as 10 (1 - 9 / 10), counts as whole
        left = (codes.double() * share + 1e-9).floor().long()
        return torch.minimum(masked - 1, left).clamp(min=0)


MASK_SCHEDULES = {
    "cosine": MaskSchedule(lambda u: (math.pi / 2 * u).cos(), lambda x: 2 / math.pi * x.acos()),
    "linear": MaskSchedule(lambda u: 1 - u, lambda x: 1 - x),
    "arccos": MaskSchedule(lambda u: 2 / math.pi * u.acos(), lambda x: (math.pi / 2 * x).cos()),
}
"""By name. Source: MaskGIT (Chang et al., 2022), section 3.3; arccos: valeoai/Maskgit-pytorch (Besnier, 2023)."""
