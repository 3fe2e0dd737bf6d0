"""Keys and values of the tokens so far."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from graincode.generator.transformer import Transformer

BUCKET = 64
"""Tokens that the part of a `StaticCache` that attention sees grows by."""


class KeyValueCache:
    """Keys and values of the tokens so far, in buffers made once; attention sees the filled part alone.

    Args:
        transformer: whose layers are cached.
        batch: number of sequences.
        capacity: tokens of the longest sequence.
    Attributes:
        layers: keys and values of each, (batch, heads, capacity, d).
        length: number of tokens so far.
        mask: what attention sees of the keys; None for all of them.
    """

    length: int | Tensor
    mask: Tensor | None = None

    def __init__(self, transformer: Transformer, batch: int, capacity: int) -> None:
        weight, shape = next(transformer.parameters()), (batch, transformer.heads, capacity, transformer.head_dim)
        self.layers = [(weight.new_empty(shape), weight.new_empty(shape)) for _ in transformer.blocks]
        self.length = 0

    def advance(self) -> None:
        """Count a token that all layers have been extended by."""
        self.length += 1

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add one token's (B, heads, 1, d) keys and values, and give views of all so far, (B, heads, length, d)."""
        found = []
        for store, new in zip(self.layers[layer], (keys, values), strict=True):
            store.narrow(2, self.length, 1).copy_(new)
            found.append(store.narrow(2, 0, self.length + 1))
        return found[0], found[1]

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the sequences, (N,) long and increasing, in the memory that there is."""
        for layer in self.layers:
            for store in layer:
                store[: len(rows), :, : self.length] = store[rows, :, : self.length]
        self.layers = [(keys[: len(rows)], values[: len(rows)]) for keys, values in self.layers]


class StaticCache(KeyValueCache):
    """The same for compiled steps: its shapes, and all that is no tensor, change with every `BUCKET` tokens alone.

    Attention sees all buckets that are filled or begun, under a mask. Arguments are those of `KeyValueCache`.

    Attributes:
        length: (1,) long.
        seen: tokens that attention looks at, a multiple of `BUCKET`.
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
        """Before each token, outside of what is compiled: see as far as it."""
        self.count += 1
        self.seen = -(-self.count // BUCKET) * BUCKET

    def advance(self) -> None:
        self.length.add_(1)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for store, new in zip(self.layers[layer], (keys, values), strict=True):
            store.index_copy_(2, self.length, new)
            found.append(store.narrow(2, 0, self.seen))
        return found[0], found[1]
