"""Compiled steps of autoregressive sampling, over a key/value cache of fixed shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from graincode.distributed.blocks import allow_graphs
from graincode.generator.transformer import KeyValueCache, Transformer

Step = Callable[..., Tensor]
BUCKET = 64
"""Tokens that the part of a cache that attention sees grows by."""


class CompiledSteps:
    """A generator's `states` and `contents`, compiled: graphs for every `BUCKET` tokens, on a GPU CUDA graphs.

    A captured graph is bound to the memory that it was captured on, so batches of one size share their caches, and only
    one batch is drawn at a time; the model stays on its device and in its precision. Each step takes one token, and its
    cache as the last argument, of one of the `stacks` for `capacity` tokens.
    """

    def __init__(self, states: Step, contents: Step, stacks: Sequence[Transformer], capacity: int) -> None:
        allow_graphs(4 * -(-capacity // BUCKET))  # for some more batch sizes, guided or not
        mode = "reduce-overhead" if next(stacks[0].parameters()).is_cuda else None
        self._states, self._contents = (torch.compile(f, dynamic=False, mode=mode) for f in (states, contents))
        self._caches = lru_cache(1)(
            lambda batch: [_static(KeyValueCache(one, batch, capacity, BUCKET)) for one in stacks]
        )

    def caches(self, batch: int) -> list[KeyValueCache]:
        """Empty caches for a batch of samples."""
        for cache in self._caches(batch):
            cache.restart()
        return self._caches(batch)

    def states(self, *arguments: Any) -> Tensor:
        """The first step."""
        torch.compiler.cudagraph_mark_step_begin()
        return self._states(*arguments)

    def contents(self, *arguments: Any) -> Tensor:
        """The second step."""
        return self._contents(*arguments)


def _static(cache: KeyValueCache) -> KeyValueCache:
    """A cache that CUDA graphs may write into."""
    for tensor in (cache.positions, *chain(*cache.layers)):
        torch._dynamo.mark_static_address(tensor)
    return cache
