"""Random numbers that depend on what they are for: (seed, index), never on a batch, a rank or what ran before."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def uniforms(seed: int, indices: Iterable[int], *shape: int) -> Tensor:
    """(B, *shape) float64 in [0, 1); row i depends on (seed, indices[i]) alone.

    Source: Philox 4x64 (Salmon et al., 2011), keyed by the pair.
    """
    rows = [_philox(seed, index).random(shape) for index in indices]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, *shape, dtype=torch.float64)


def permutation(seed: int, index: int, size: int) -> np.ndarray:
    """(size,) int64, a permutation of 0 .. size - 1 that depends on (seed, index) alone."""
    return _philox(seed, index).permutation(size)


def _philox(seed: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))
