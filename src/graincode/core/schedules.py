"""Schedules: stateless functions of the step."""

from __future__ import annotations

import math


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Factor on the base learning rate: linear from 0 over `warmup` steps, then a half cosine down to 0.

    Args:
        step: 1-based step about to be taken, 1 <= step <= steps.
        steps: of the whole training.
        warmup: steps of the linear part, 0 <= warmup.
    Returns:
        a factor in (0, 1].
    """
    if step <= warmup:
        return step / max(warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / max(steps - warmup, 1)))


def ramp(step: int, start: int, length: int) -> float:
    """Factor on a loss that comes in late: 0 up to step `start`, then linear up to 1 over `length` steps (>= 0).

    Args:
        step: 1-based step about to be taken.
    """
    return min(max(step - start, 0) / max(length, 1), 1.0)
