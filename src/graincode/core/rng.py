"""Random numbers as functions of (seed, index), never of a batch, a rank or what ran before.

Samples take them from the raw stream of Philox 4x64 (Salmon et al., 2011) keyed by the pair, which no numpy version
changes; training from an integer hash on the device, which is fast for the few numbers that an item needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

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
        ready: (B, n) numbers of some purposes, as `uniforms` returns them.
    """

    seed: int
    sample_ids: Tensor
    ready: Mapping[int, Tensor] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def uniforms(self, purpose: int, *shape: int) -> Tensor:
        """(B, *shape) float64 in [0, 1), other numbers for every purpose."""
        count = math.prod(shape)
        found = self.ready[purpose] if purpose in self.ready else self._drawn({purpose: count})
        return found[:, :count].view(len(self.sample_ids), *shape)

    def ahead(self, counts: Mapping[int, int]) -> SampleRng:
        """The same, with so many numbers of some purposes drawn at once: by as few kernels of a GPU as of one."""
        parts = self._drawn(counts).split(list(counts.values()), dim=1)
        return replace(self, ready=dict(zip(counts, parts, strict=True)))

    def _drawn(self, counts: Mapping[int, int]) -> Tensor:
        """(B, n) numbers of all purposes, one after the other."""
        purposes, owner, places = _places(self.seed, tuple(counts.items()), self.sample_ids.device)
        items = mix(purposes + self.sample_ids[:, None])
        return hashed_uniforms((items if len(counts) == 1 else items[:, owner]) + places)


@lru_cache(maxsize=64)
def _places(seed: int, counts: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Hashes of the P purposes, (P,); of n numbers whose each is, (n,), and hashes of their places there, (n,)."""
    purposes = torch.tensor([seed * 64 + purpose for purpose, _ in counts])
    owner = torch.cat([torch.full((count,), i) for i, (_, count) in enumerate(counts)])
    places = torch.cat([torch.arange(count) for _, count in counts])
    return mix(purposes).to(device), owner.to(device), mix(places).to(device)


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
