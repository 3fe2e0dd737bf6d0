"""A number with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graincode.core.errors import check
from graincode.distributed import collectives


@dataclass(frozen=True)
class Estimate:
    """A value; its spread, None where none is defined; and what the spread is of and over, in words."""

    value: float
    std: float | None = None
    over: str = ""


def share_of(value: float, count: int) -> Estimate:
    """A share of `count` images, with its standard error."""
    return Estimate(value, math.sqrt(value * (1 - value) / count), f"standard error over {count} images")


def mean_of(parts: Sequence[Tensor]) -> Estimate:
    """The mean of (n,) parts on each process, and its standard error. Collective: call it on all processes."""
    values = collectives.gather_rows(torch.cat([torch.zeros(0, dtype=torch.float64), *parts]))
    check("count", len(values), "the mean over 1 image or more", len(values) > 0)
    if len(values) == 1:
        return Estimate(values.item())
    error = values.std().item() / math.sqrt(len(values))
    return Estimate(values.mean().item(), error, f"standard error over {len(values)} images")
