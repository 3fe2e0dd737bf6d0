"""Losses as sums and counts, so that a mean over batches, micro-batches or processes is exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Term:
    """One term of a loss.

    Attributes:
        total: (), the sum over what is counted, with a gradient.
        count: () or a number, how many are summed: pixels, codes, decisions.
        weight: of the mean in the loss; 0 for what is only reported.
    """

    total: Tensor
    count: Tensor | float
    weight: float | Tensor = 1.0

    @property
    def mean(self) -> Tensor:
        """total / count, 0 where nothing is counted."""
        return self.total / (self.count.clamp(min=1) if isinstance(self.count, Tensor) else max(self.count, 1))

    @property
    def is_reported_only(self) -> bool:
        """Whether the loss leaves it out."""
        return not isinstance(self.weight, Tensor) and self.weight == 0


def as_count(count: Tensor | float, like: Tensor) -> Tensor:
    """A count as a () float64 tensor on another tensor's device, without synchronisation."""
    if isinstance(count, Tensor):
        return count.to(like.device, torch.float64)
    return torch.full((), count, dtype=torch.float64, device=like.device)


def weighted_sum(terms: Mapping[str, Term], counts: Mapping[str, Tensor | float] | None = None) -> Tensor:
    """The loss: the sum of all means times their weights, by the counts of a larger batch if they are given."""
    terms = {name: term for name, term in terms.items() if not term.is_reported_only}
    if counts is not None:
        terms = {name: replace(term, count=counts[name]) for name, term in terms.items()}
    total: Any = sum(term.weight * term.mean for term in terms.values())
    return total


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of a discriminator: (B, ...) logits of real and fake images to (B,), half the sum of both hinges.

    Source: Geometric GAN (Lim and Ye, 2017), as in VQGAN (Esser et al., 2021).
    """
    return 0.5 * (F.relu(1 - real).flatten(1).mean(1) + F.relu(1 + fake).flatten(1).mean(1))


def hinge_generator(fake: Tensor) -> Tensor:
    """Adversarial loss of a generator: (B, ...) logits of fake images to (B,), minus their mean."""
    return -fake.flatten(1).mean(1)


def lecam(real: Tensor, fake: Tensor, mean_real: Tensor, mean_fake: Tensor) -> Tensor:
    """LeCam regulariser: against real logits above the running mean of fake ones, and fake below that of real ones.

    Args:
        real, fake: (B, ...) logits of B images.
        mean_real, mean_fake: () running averages of their means, without a gradient.
    Returns:
        (B,), the sum of both squares, each averaged over an image's logits.
    Source: LeCam-GAN (Tseng et al., 2021, arXiv 2104.03310), with the rectifiers of the authors' code (lecam_reg).
    """
    above, below = F.relu(real - mean_fake).square(), F.relu(mean_real - fake).square()
    return above.flatten(1).mean(1) + below.flatten(1).mean(1)


def feature_distance(a: Tensor, b: Tensor, weights: Tensor | None = None) -> Tensor:
    """(B,) squared differences of (B, C, h, w) features scaled to length 1 at each position (0 stays 0, without a
    gradient), summed over channels, with (C,) weights if given, and averaged over positions; float32 or float64.

    Source: LPIPS (Zhang et al., 2018), eq. 1.
    """
    squares = (_unit(a) - _unit(b)).square()
    squares = squares if weights is None else squares * weights[:, None, None]
    return squares.sum(1).mean((1, 2))


def _unit(features: Tensor) -> Tensor:
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    norm = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return torch.where(norm > 1e-10, features / norm.clamp(min=1e-10), 0.0)
