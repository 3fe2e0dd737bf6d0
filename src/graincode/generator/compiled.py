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
"""Tokens that the part of a `StaticCache` that attention sees grows by."""


class StaticCache(KeyValueCache):
    """A cache for compiled steps: shapes, and what is no tensor, change once in `BUCKET` tokens alone. Attention sees
    `seen` tokens under a mask: the buckets that are filled or begun. `length` is a (1,) long tensor."""

    length: Tensor

    def __init__(self, transformer: Transformer, batch: int, capacity: int) -> None:
        super().__init__(transformer, batch, -(-capacity // BUCKET) * BUCKET)
        self.length = torch.zeros(1, dtype=torch.long, device=next(transformer.parameters()).device)
        self.count, self.seen = 0, BUCKET
        for tensor in (self.length, *chain(*self.layers)):
            tensor.zero_()  # what is masked is multiplied by 0, and must be finite
            torch._dynamo.mark_static_address(tensor)  # so that CUDA graphs may write into it

    def restart(self) -> None:
        """Forget all tokens."""
        self.length.zero_()
        self.count = 0

    @property
    def mask(self) -> Tensor:
        """(1, seen) bool."""
        return (torch.arange(self.seen, device=self.length.device) <= self.length)[None]

    def reach(self) -> None:
        """Grow `seen` to hold the next token; called before each, outside of compiled code."""
        self.count += 1
        self.seen = -(-self.count // BUCKET) * BUCKET

    def advance(self) -> None:
        self.length.add_(1)

    def _extend(self, store: Tensor, new: Tensor) -> Tensor:
        store.index_copy_(2, self.length, new)
        return store.narrow(2, 0, self.seen)


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
        self._caches = lru_cache(1)(lambda batch: [StaticCache(stack, batch, capacity) for stack in stacks])

    def caches(self, batch: int) -> list[StaticCache]:
        """Empty caches for a batch of samples."""
        for cache in self._caches(batch):
            cache.restart()
        return self._caches(batch)

    def states(self, *arguments: Any) -> Tensor:
        """The first step, with a cache that has room."""
        torch.compiler.cudagraph_mark_step_begin()
        arguments[-1].reach()
        return self._states(*arguments)

    def contents(self, *arguments: Any) -> Tensor:
        """The second step, likewise."""
        arguments[-1].reach()
        return self._contents(*arguments)
