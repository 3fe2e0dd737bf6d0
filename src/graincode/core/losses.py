"""Losses as sums and counts, so that a mean over batches, micro-batches or processes is exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
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
    weight: float = 1.0

    @property
    def mean(self) -> Tensor:
        """total / count, 0 where nothing is counted."""
        return self.total / torch.as_tensor(self.count, device=self.total.device).clamp(min=1)


def weighted_sum(terms: Mapping[str, Term]) -> Tensor:
    """The loss: the sum of all means times their weights."""
    return sum(term.weight * term.mean for term in terms.values() if term.weight)
