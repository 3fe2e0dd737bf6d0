"""From logits to a choice: legality, temperature, truncation, and draws with given uniform numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def legal_regions(coded: Tensor, last: Tensor) -> Tensor:
    """(..., R + 1) bool, which regions may come next within a grain; the last entry is its end, which always may.

    Any legal choices tile the image, for any number of grains, when the last grain takes what is left.

    Args:
        coded: (..., R) bool, regions that coarser grains hold already.
        last: (...,) long, the region that this grain coded last; -1 before its first.
    """
    regions = torch.arange(coded.shape[-1], device=coded.device)
    legal = ~coded & (regions > last[..., None])
    return torch.nn.functional.pad(legal, (0, 1), value=True)


def truncate(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Logits divided by the temperature, with all but the likeliest entries at -inf.

    Args:
        logits: (..., V).
        temperature: > 0.
        top_k: entries that stay, and those that tie with the last of them; 0 or more than V keeps all.
        top_p: the smallest set of entries whose probability reaches this share stays; 1 keeps all.
        min_p: entries stay whose probability is at least this share of the likeliest one's; 0 keeps all.
    Source: min_p: Nguyen et al., 2024.
    """
    if temperature != 1:
        logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    if min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """(...,) long, the entry at which the cumulative distribution passes a uniform number; none of probability 0.

    Args:
        logits: (..., V), at least one finite.
        uniform: (...,) in [0, 1), one number for each draw.
    """
    cumulative = logits.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    total = cumulative[..., -1]
    aim = torch.minimum(uniform.double() * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, aim[..., None], right=True)[..., 0]


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise of uniform numbers in [0, 1), of which 0 counts as the smallest above it."""
    return -(-uniform.clamp(min=2.0**-54).log()).log()


def ranks(keys: Tensor) -> Tensor:
    """(..., L) keys to (..., L) long, the rank of each in ascending order; of equal ones the first comes first."""
    return keys.argsort(dim=-1, stable=True).argsort(dim=-1)
