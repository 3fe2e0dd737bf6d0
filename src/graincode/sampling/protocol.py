"""What samplers ask of models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

RowLogits = Callable[[Tensor], Tensor]
"""(n,) long, some of N rows, to their (n, V) logits: those of all rows may be more than fit."""


class AutoregressiveLogits(Protocol):
    """What a sampler needs of a model: it takes in a token, and answers up to two questions about the next one."""

    def take(self, slots: Tensor, contents: Tensor) -> None:
        """Take in the last token, (B,) slots and contents."""
        ...

    def regions(self) -> Tensor:
        """(B, R + 1) logits of the region that comes next; not asked for where all of them are implied.

        The last entry is the end of the grain. Illegal regions need not be masked.
        """
        ...

    def contents(self, slots: Tensor) -> Tensor:
        """Given the (B,) slots of the next token, the (B, V) logits of its content."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the samples, (N,) long rows of those so far, increasing."""
        ...


class MaskedLogits(Protocol):
    """What a sampler needs of a model that fills in what is masked.

    Attributes:
        density_bins: n, >= 1. A region's value is n times its grain plus the bin, in [0, n), of its density; with one
            bin, its grain.
    """

    density_bins: int

    def grains(self, values: Tensor) -> Tensor:
        """(B, R) values of the regions, K n where they are masked, to their (B, R, K n) logits; not asked for if K n is
        1."""
        ...

    def contents(self, slots: Tensor, contents: Tensor, at: Tensor) -> RowLogits:
        """The logits of the contents at N of all places; asked for a part of them at a time.

        Args:
            slots: (B, L), the layout's `pad_slot` behind the end.
            contents: (B, L), the layout's `no_content` where they are masked, and behind the end.
            at: (B, L) bool, the N places, which are rows of the logits image by image.
        """
        ...
