"""Which images each training step sees: a function of (seed, step) alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from graincode.core.rng import permutation


class StepSampler(Sampler[list[int]]):
    """The index lists of steps `start` + 1 to `stop`.

    Training is one endless stream of indices, epoch after epoch, each epoch a permutation of the whole data set; step
    s takes the s-th `batch_size` of them. A resumed run therefore sees just what it would have seen.

    Args:
        size: images in the data set.
        batch_size: images in each step.
        seed: of the permutations.
        start: steps done before.
        stop: steps of the whole training.
    """

    def __init__(self, size: int, batch_size: int, seed: int, start: int, stop: int) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.start, self.stop = start, stop

    def __len__(self) -> int:
        return max(self.stop - self.start, 0)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.start, self.stop):
            batch: list[int] = []
            position = step * self.batch_size
            while len(batch) < self.batch_size:
                if position // self.size != epoch:
                    epoch = position // self.size
                    order = permutation(self.seed, epoch, self.size)
                offset = position % self.size
                part = order[offset : offset + self.batch_size - len(batch)]
                batch += part.tolist()
                position += len(part)
            yield batch


def training_loader(
    dataset: Dataset[Any], batch_size: int, seed: int, start: int, stop: int, workers: int, pin_memory: bool
) -> DataLoader[Any]:
    """A loader of whole batches for steps `start` + 1 to `stop`."""
    return DataLoader(
        dataset,
        sampler=StepSampler(len(dataset), batch_size, seed, start, stop),
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=False,
    )


def in_order(dataset: Dataset[Any], batch_size: int, limit: int | None = None, workers: int = 0) -> Iterator[Any]:
    """Batches of the first `limit` items (all by default), in order."""
    count = len(dataset) if limit is None else min(limit, len(dataset))
    parts = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    yield from DataLoader(dataset, sampler=parts, batch_size=None, num_workers=workers)
