"""Embeddings of variable-length codes, and of what they are conditioned on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graincode.core.codes import CodeLayout
from graincode.core.errors import GraincodeError
from graincode.core.rng import LABEL_DROPOUT, Draws


class HeterogeneousEmbedding(nn.Module):
    """Content (of the grain's codebook) + position on the grain's own grid + grain + place in the sequence.

    Args:
        layout: the code layout; it sizes all tables.
        width: of each token.
    Source: DQ-Transformer (arXiv 2305.11718), section 3.3; one position table per grain, each with its own end.
    """

    def __init__(self, layout: CodeLayout, width: int) -> None:
        super().__init__()
        self.layout = layout
        self.content = nn.Embedding(layout.num_entries + 1, width)
        self.position = nn.Embedding(layout.num_slots + 2, width)
        self.grain = nn.Embedding(layout.num_grains + 1, width)
        self.index = nn.Embedding(layout.max_tokens + 1, width)
        outside = torch.full((2,), layout.num_grains)
        self.register_buffer("slot_grain", torch.cat([layout.slots().grain, outside]), persistent=False)
        for table in (self.content, self.position, self.grain, self.index):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, slots: Tensor, contents: Tensor, start: int = 0) -> Tensor:
        """(B, L) slots and contents to (B, L, width); the first of them stands at place `start` of the sequence."""
        index = torch.arange(start, start + slots.shape[1], device=slots.device)
        known = contents != self.layout.no_content
        entries = self.layout.entries(contents, self.slot_grain[slots])
        entries = torch.where(known, entries, self.layout.num_entries)
        return self.content(entries) + self.at(slots) + self.index(index)

    def at(self, slots: Tensor) -> Tensor:
        """What is known of a token before its content is: (...) slots to (..., width)."""
        return self.position(slots) + self.grain(self.slot_grain[slots])


class ClassConditioning(nn.Module):
    """A learned vector for each class of the layout, and one for no class: (B,) long labels to (B, width).

    In training, labels are dropped by the batch's `Draws`, or by torch's generator where none are given.

    Args:
        layout: with at least one class; its `null_class` is the label for no class.
        width: of each token.
        dropout: share of the labels that training replaces by the null class, in [0, 1); guidance needs some.
    Raises:
        GraincodeError: the layout has no classes, or the dropout is out of range.
    """

    def __init__(self, layout: CodeLayout, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise GraincodeError(f"dropout={dropout}: expected 0 to 1; type generator.conditioning.dropout=0.1")
        if layout.classes == 0:
            raise GraincodeError(
                "the codes have no classes: type generator/conditioning=none, or extract labelled data"
            )
        self.classes, self.dropout, self.null_class = layout.classes, dropout, layout.null_class
        self.table = nn.Embedding(layout.classes + 1, width)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, labels: Tensor, draws: Draws | None = None) -> Tensor:
        if self.training and self.dropout > 0:
            chance = torch.rand_like(labels, dtype=torch.float) if draws is None else draws.uniforms(LABEL_DROPOUT)
            dropped = chance < self.dropout
            labels = torch.where(dropped, self.null_class, labels)
        return self.table(labels)

    def check(self, labels: Tensor) -> None:
        """Refuse labels that are no class."""
        if labels.numel() and not bool(((labels >= 0) & (labels < self.classes)).all()):
            raise GraincodeError(
                f"labels from {int(labels.min())} to {int(labels.max())}: expected 0 to {self.classes - 1}, the "
                "classes that this generator was trained with"
            )


class NoConditioning(nn.Module):
    """Unconditional generation: zeros in place of a class, whatever the labels."""

    classes = 0

    def __init__(self, layout: CodeLayout, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, labels: Tensor, draws: Draws | None = None) -> Tensor:
        return torch.zeros(len(labels), self.width, device=labels.device)

    def check(self, labels: Tensor) -> None:
        """Any labels will do."""
