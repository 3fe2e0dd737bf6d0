"""Compiled steps of autoregressive sampling, over a key/value cache of fixed shapes."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graincode.distributed.blocks import allow_graphs
from graincode.generator.cache import KeyValueCache

if TYPE_CHECKING:
    from graincode.generator.dgit_ar import DGiTAR
    from graincode.generator.transformer import Transformer

BUCKET = 64
"""Tokens that the part of a `StaticCache` that attention sees grows by."""


class StaticCache(KeyValueCache):
    """A cache for compiled steps: shapes and all that is no tensor change with every `BUCKET` tokens alone.

    Attention sees `seen` tokens, all of the buckets that are filled or begun, under a mask; `length` is (1,) long.
    """

    length: Tensor

    def __init__(self, transformer: Transformer, batch: int, capacity: int) -> None:
        super().__init__(transformer, batch, -(-capacity // BUCKET) * BUCKET)
        self.length = torch.zeros(1, dtype=torch.long, device=next(transformer.parameters()).device)
        self.count, self.seen = 0, BUCKET
        for tensor in (self.length, *itertools.chain(*self.layers)):
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
    """`DGiTAR.states` and `contents`, compiled: a graph of each for every `BUCKET` tokens, on a GPU as CUDA graphs.

    A captured graph is bound to the memory that it was captured on, so batches of one size share their caches, and only
    one batch is drawn at a time; the model stays on its device and in its precision.
    """

    def __init__(self, model: DGiTAR) -> None:
        self._model, self._batch, self._caches = model, 0, []
        allow_graphs(4 * -(-model.layout.max_tokens // BUCKET))  # for some more batch sizes, guided or not
        mode = "reduce-overhead" if model.device.type == "cuda" else None
        self._states, self._contents = (
            torch.compile(step, dynamic=False, mode=mode) for step in (model.states, model.contents)
        )

    def caches(self, batch: int) -> list[StaticCache]:
        """See `DGiTAR.caches`."""
        if batch != self._batch:
            self._batch = batch
            self._caches = [StaticCache(stack, batch, self._model.layout.max_tokens) for stack in self._model.stacks]
        for cache in self._caches:
            cache.restart()
        return self._caches

    def states(self, *arguments: Any) -> Tensor:
        """See `DGiTAR.states`; the last argument is the cache."""
        torch.compiler.cudagraph_mark_step_begin()
        arguments[-1].reach()
        return self._states(*arguments)

    def contents(self, *arguments: Any) -> Tensor:
        """See `DGiTAR.contents`; the last argument is the cache."""
        arguments[-1].reach()
        return self._contents(*arguments)
