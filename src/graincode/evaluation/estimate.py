"""A number with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graincode.core.errors import GraincodeError
from graincode.distributed import collectives


@dataclass(frozen=True)
class Estimate:
    """A number and how far it can be trusted.

    Attributes:
        value: the number.
        std: its spread; None where none is defined.
        over: what the spread is of and over, in words.
    """

    value: float
    std: float | None = None
    over: str = ""


def share_of(value: float, count: int) -> Estimate:
    """A share of `count` images, with its standard error."""
    return Estimate(value, math.sqrt(value * (1 - value) / count), f"standard error over {count} images")


def mean_of(parts: Sequence[Tensor]) -> Estimate:
    """The mean over the images of all processes, and its standard error; each process must ask.

    Args:
        parts: values of this process's images, (n,) each.
    Raises:
        GraincodeError: there are none.
    """
    values = collectives.gather_rows(torch.cat([torch.zeros(0, dtype=torch.float64), *parts]))
    if not len(values):
        raise GraincodeError("the mean over 0 images: expected at least 1")
    if len(values) == 1:
        return Estimate(values.item())
    error = values.std().item() / math.sqrt(len(values))
    return Estimate(values.mean().item(), error, f"standard error over {len(values)} images")
