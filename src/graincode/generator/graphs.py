"""Steps of autoregressive sampling as CUDA graphs: one call of the host starts all kernels of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from graincode.generator.transformer import KeyValueCache, Transformer

Step = Callable[..., Tensor]


def cache_lengths(capacity: int) -> tuple[int, ...]:
    """How many keys attention may see: four numbers or fewer, multiples of 64, each about half of the next; the last is
    at least the capacity, the first 256 or more where the capacity is."""
    halves = {-(-capacity // 2**k) for k in range(4)}
    return tuple(-(-length // 64) * 64 for length in sorted(halves) if length >= min(256, capacity))


class GraphedSteps:
    """A generator's `states` and `contents`, recorded as CUDA graphs: one of each for each of `cache_lengths`.

    A graph is bound to the memory that it was recorded on. So batches of one size share caches and arguments, only one
    batch is drawn at a time, and the model stays on its device and in its precision. Each step takes one token, and its
    cache, of one of the `stacks` for `capacity` tokens, as the last argument; the next call overwrites its result.
    """

    def __init__(self, states: Step, contents: Step, stacks: Sequence[Transformer], capacity: int) -> None:
        def batch_of(size: int) -> tuple[list[KeyValueCache], dict[Step, _Recorded]]:
            caches = [KeyValueCache(stack, size, capacity, cache_lengths(capacity)) for stack in stacks]
            pool, results = torch.cuda.graph_pool_handle(), []  # graphs leave nothing there that others read
            return caches, {step: _Recorded(step, pool, results) for step in (states, contents)}

        self._states, self._contents, self._batch_of = states, contents, lru_cache(1)(batch_of)

    def caches(self, batch: int) -> list[KeyValueCache]:
        """Empty caches for a batch of samples."""
        caches, self._recorded = self._batch_of(batch)
        for cache in caches:
            cache.restart()
        return caches

    def states(self, *arguments: Any) -> Tensor:
        """The first step."""
        return self._recorded[self._states](*arguments)

    def contents(self, *arguments: Any) -> Tensor:
        """The second step."""
        return self._recorded[self._contents](*arguments)


class _Recorded:
    """A step, the memory of its arguments and of its result, and a graph for each cache length that was met."""

    def __init__(self, step: Step, pool: Any, results: list[Tensor]) -> None:
        self.step, self.pool, self.results = step, pool, results
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.known: list[Any] = []  # the arguments at which graphs read
        self.copied: list[tuple[Any, int]] = []  # what these were copied from, and its version

    def __call__(self, *arguments: Any) -> Tensor:
        *inputs, cache = arguments
        leaves, structure = tree_flatten(inputs)
        self._take(leaves)
        if cache.seen in self.graphs:
            self.graphs[cache.seen].replay()
            return self.result
        arguments = *tree_unflatten(self.known, structure), cache
        found = self.step(*arguments)  # not recorded, as the first use of a kernel may prepare what no graph can
        if self.graphs:
            self.result.copy_(found)
        else:
            self.result = found
            self.results.append(found)
        graph = self.graphs[cache.seen] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self.result.copy_(self.step(*arguments))
        return self.result

    def _take(self, leaves: list[Any]) -> None:
        """Copy arguments to where graphs read them, but for those that have not changed, and results of graphs."""
        if not self.known:
            self.known = [_copy(leaf, self.results) for leaf in leaves]
            self.copied = [(leaf, _version(leaf)) for leaf in leaves]
        for i, leaf in enumerate(leaves):
            source, version = self.copied[i]
            if leaf is not self.known[i] and (leaf is not source or _version(leaf) != version):
                self.known[i].copy_(leaf)
                self.copied[i] = leaf, _version(leaf)


def _copy(leaf: Any, results: list[Tensor]) -> Any:
    is_input = isinstance(leaf, Tensor) and not any(leaf is result for result in results)
    return leaf.clone() if is_input else leaf


def _version(leaf: Any) -> int:
    return leaf._version if isinstance(leaf, Tensor) else 0
