"""Keys and values of the tokens so far."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from graincode.generator.transformer import Transformer


class KeyValueCache:
    """Keys and values of the tokens so far, in buffers made once; attention sees the filled part alone.

    Args:
        transformer: whose layers are cached.
        batch, capacity: number of sequences, and tokens of the longest.
    Attributes:
        layers: keys and values of each, (batch, heads, capacity, d).
        length: number of tokens so far.
        mask: which of the keys attention sees; None for all of them.
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
        """Add one token's (B, heads, 1, d) keys and values, and return views of all so far, (B, heads, length, d)."""
        store_keys, store_values = self.layers[layer]
        return self._extend(store_keys, keys), self._extend(store_values, values)

    def _extend(self, store: Tensor, new: Tensor) -> Tensor:
        store.narrow(2, self.length, 1).copy_(new)
        return store.narrow(2, 0, self.length + 1)

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the sequences, (N,) long and increasing, in the same memory."""
        for layer in self.layers:
            for store in layer:
                store[: len(rows), :, : self.length] = store[rows, :, : self.length]
        self.layers = [(keys[: len(rows)], values[: len(rows)]) for keys, values in self.layers]
