"""Random numbers as functions of (seed, index), never of a batch, a rank or what ran before.

Samples take them from the raw stream of Philox 4x64 (Salmon et al., 2011) keyed by the pair, which no numpy version
changes; training from an integer hash on the device, which is fast for the few numbers that an item needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graincode.core.errors import check_seed


def uniforms(seed: int, indices: Iterable[int], *shape: int) -> Tensor:
    """(B, *shape) float64 in [0, 1); row i depends on (seed, indices[i]) alone."""
    raw = np.array([_raw(seed, index, math.prod(shape)) for index in indices], dtype=np.uint64)
    return torch.from_numpy((raw >> np.uint64(11)) * 2.0**-53).view(len(raw), *shape)


def permutation(seed: int, index: int, size: int) -> np.ndarray:
    """(size,) int64, a permutation of 0 .. size - 1 that depends on (seed, index) alone."""
    return np.argsort(_raw(seed, index, size), kind="stable")


def mix(values: Tensor) -> Tensor:
    """A one-to-one hash of int64 values. Source: the finaliser of SplitMix64 (Steele et al., 2014)."""
    values = values + _GOLDEN
    values = (values ^ _shift(values, 30)) * _FIRST
    values = (values ^ _shift(values, 27)) * _SECOND
    return values ^ _shift(values, 31)


def hashed_uniforms(values: Tensor) -> Tensor:
    """int64 values to float64 in [0, 1), by `mix`."""
    return _shift(mix(values), 11).double() * 2.0**-53


@dataclass(frozen=True)
class SampleRng:
    """The random numbers of one batch in training, functions of the seed and of each item's id alone.

    Attributes:
        seed: of the run, 0 or more, below 2^57.
        sample_ids: (B,) long, each item's index in the endless stream of training items.
    """

    seed: int
    sample_ids: Tensor

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def uniforms(self, purpose: int, *shape: int) -> Tensor:
        """(B, *shape) float64 in [0, 1), other numbers for every purpose."""
        items = mix(mix(torch.full_like(self.sample_ids, self.seed * 64 + purpose)) + self.sample_ids)
        each = torch.arange(math.prod(shape), device=self.sample_ids.device)
        return hashed_uniforms(items[:, None] + mix(each)).view(len(self.sample_ids), *shape)


def batch_uniforms(rng: SampleRng | None, purpose: int, like: Tensor, *shape: int) -> Tensor:
    """`SampleRng.uniforms` of a batch, or of torch's generator without one; `like` is any (B, ...) tensor of it."""
    if rng is not None:
        return rng.uniforms(purpose, *shape)
    return torch.rand(len(like), *shape, dtype=torch.float64, device=like.device)


# purposes of the numbers of `SampleRng`
(
    LABEL_DROPOUT, RESTARTS, AUGMENTATION, LABELS, LENGTHS, GATES,
    MASK_RATIOS, MASK_KEYS, MASK_STRENGTHS, MAP_MASK_RATIOS, MAP_MASK_KEYS,
) = range(11)  # fmt: skip

_GOLDEN, _FIRST, _SECOND = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift(values: Tensor, bits: int) -> Tensor:
    """Right shift that fills with zeros; `>>` on int64 repeats the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _raw(seed: int, index: int, count: int) -> np.ndarray:
    return np.random.Philox(key=np.array([seed, index], dtype=np.uint64)).random_raw(count)
