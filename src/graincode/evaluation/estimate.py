"""A number with its spread."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from graincode.core.errors import GraincodeError
from graincode.distributed import collectives


@dataclass(frozen=True)
class Estimate:
    """A number and how far it can be trusted.

    Attributes:
        value: the figure.
        std: its spread; None where none is defined.
        over: what the spread is of and over, in words.
    """

    value: float
    std: float | None = None
    over: str = ""


def share_of(value: float, count: int) -> Estimate:
    """A share of `count` images, with the standard error of a share."""
    return Estimate(value, math.sqrt(value * (1 - value) / count), f"standard error over {count} images")


def mean_of(own: Tensor) -> Estimate:
    """The mean over images and its standard error.

    Args:
        own: (n,) values of this process's images; those of all are counted, and each process must ask.
    Raises:
        GraincodeError: there are none.
    """
    values = collectives.gather_rows(own.double())
    if not len(values):
        raise GraincodeError("the mean over 0 images: expected at least 1; call update first")
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(
        values.mean().item(), error, f"standard error over {len(values)} images" if error is not None else ""
    )
