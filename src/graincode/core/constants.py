"""Numbers on a device."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=256)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(N,) numbers, made once and not to be changed: copied to a GPU in each step, they would wait for it."""
    return torch.tensor(values, dtype=dtype, device=device)
