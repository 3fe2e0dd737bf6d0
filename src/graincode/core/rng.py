"""Random numbers that depend on what they are for: (seed, index), never on a batch, a rank or what ran before.

They come from the raw stream of Philox 4x64 (Salmon et al., 2011) keyed by the pair, which no numpy version changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def uniforms(seed: int, indices: Iterable[int], *shape: int) -> Tensor:
    """(B, *shape) float64 in [0, 1); row i depends on (seed, indices[i]) alone."""
    rows = [_raw(seed, index, math.prod(shape)) for index in indices]
    raw = np.stack(rows) if rows else np.empty((0, math.prod(shape)), dtype=np.uint64)
    return torch.from_numpy((raw >> np.uint64(11)) * 2.0**-53).view(len(rows), *shape)


def permutation(seed: int, index: int, size: int) -> np.ndarray:
    """(size,) int64, a permutation of 0 .. size - 1 that depends on (seed, index) alone."""
    return np.argsort(_raw(seed, index, size), kind="stable")


def _raw(seed: int, index: int, count: int) -> np.ndarray:
    return np.random.Philox(key=np.array([seed, index], dtype=np.uint64)).random_raw(count)
