"""How much of stage 2's batches is padding, in batches by length and in the plain stream."""

from __future__ import annotations

import numpy as np
from timing import Result

from graincode.data.loader import Schedule, Windows

WINDOWS = (4, 8, 16, 32, 64)
BATCH, STEPS, ENDS = 16, 3840, 1

# how many of the demo's 55,000 training images have 16, 19, ..., 64 codes
HISTOGRAM = (
    4, 80, 433, 636, 1832, 3207, 6570, 11826, 13788, 3966, 3748, 3199, 2889, 1662, 902, 165, 93,
)  # fmt: skip


def padding(window: int) -> Result:
    """Fashion-MNIST's sequences (codes and ends), more than an epoch of batches of 16."""
    lengths = np.repeat(np.arange(16, 65, 3) + ENDS, HISTOGRAM)
    windows = Windows(lengths, window)
    share, plain = (_share(lengths, Schedule(len(lengths), BATCH, 0, windows=chosen)) for chosen in (windows, None))
    return Result(f"padding, {window} steps", 100 * share, "% of positions", f"{100 * plain:.1f} % in plain order",
                  plain / share, "<= 5 %")  # fmt: skip


def _share(lengths: np.ndarray, schedule: Schedule) -> float:
    batches = [lengths[items] for items in schedule.batches(0, STEPS)]
    return 1 - sum(batch.sum() for batch in batches) / sum(len(batch) * batch.max() for batch in batches)
