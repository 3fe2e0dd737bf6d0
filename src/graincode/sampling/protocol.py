"""What samplers need of models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

RowLogits = Callable[[Tensor], Tensor]
"""(n,) long, some of N rows, to their (n, V) logits: those of all rows may be more than fit."""


class AutoregressiveLogits(Protocol):
    """A model that takes in one token after the other and predicts the next."""

    def take(self, slots: Tensor, contents: Tensor) -> None:
        """Take in the last token, (B,) slots and contents."""

    def regions(self) -> Tensor:
        """(B, R + 1) logits of the next region or the end, illegal ones included; not called where it is implied."""

    def contents(self, slots: Tensor) -> Tensor:
        """Given the (B,) slots of the next token, the (B, V) logits of its content."""

    def begin(self, rows: Tensor, labels: Tensor, given: Any) -> None:
        """Let some rows, (n,) long on the CPU, go on with other samples, from their start; these have (n,) long labels,
        and what is given of them."""


class MaskedLogits(Protocol):
    """A model that predicts what is masked."""

    def grains(self, grains: Tensor) -> Tensor:
        """(B, R) grains of the regions, K where they are masked, to (B, R, K) logits; not called with one grain."""

    def contents(self, slots: Tensor, contents: Tensor, at: Tensor) -> RowLogits:
        """The logits of the contents at N of the flattened (B, L) positions, (N,) long and increasing; (B, L) slots are
        the layout's `pad_slot` behind the end, contents `no_content` there and where they are masked."""
