"""What samplers ask of models."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class AutoregressiveLogits(Protocol):
    """What a sampler needs of a model: two questions for each token, asked in turn."""

    def next_region(self, slots: Tensor, contents: Tensor) -> Tensor:
        """Take in the last token, (B,) slots and contents, and give (B, R + 1) logits of the region that comes next.

        The last entry is the end of the grain. Illegal regions need not be masked.
        """
        ...

    def next_content(self, slots: Tensor) -> Tensor:
        """Given the (B,) slots of the next token, give the (B, V) logits of its content."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the samples, (N,) long rows of those so far."""
        ...
