"""Embeddings of variable-length codes, and of what they are conditioned on."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout
from graincode.core.rng import LABEL_DROPOUT, SampleRng
from graincode.generator.transformer import Transformer


class HeterogeneousEmbedding(nn.Module):
    """Content (of the grain's codebook) + position + grain + place in the sequence; each part but content can go.

    Args:
        layout: the code layout; it sizes all tables.
        width: of each token.
        position: "per_grain", a vector for each cell of each grain's own grid; "shared", one for each cell of the
            finest grid, whichever grain begins there; "none", where rotary positions do it alone.
        grain: whether a vector of the grain is added.
        index: whether a vector of the place in the sequence is added.
    Raises:
        GraincodeError: the position is none of these.
    Source: DQ-Transformer (arXiv 2305.11718), section 3.3; one position table per grain, each with its own end.
    """

    def __init__(
        self,
        layout: CodeLayout,
        width: int,
        position: Literal["per_grain", "shared", "none"] = "per_grain",
        grain: bool = True,
        index: bool = True,
    ) -> None:
        super().__init__()
        if position not in ("per_grain", "shared", "none"):
            raise GraincodeError(
                f"position {position!r}: type generator.model.embedding.position= one of per_grain, shared, none"
            )
        self.layout = layout
        self.content = nn.Embedding(layout.num_entries + 1, width)
        rows = _positions(layout) if position == "shared" else torch.arange(layout.num_slots + 2)
        self.register_buffer("slot_position", rows, persistent=False)
        self.position = nn.Embedding(int(rows.max()) + 1, width) if position != "none" else None
        self.grain = nn.Embedding(layout.num_grains + 1, width) if grain else None
        self.index = nn.Embedding(layout.max_tokens + 1, width) if index else None
        outside = torch.full((2,), layout.num_grains)
        self.register_buffer("slot_grain", torch.cat([layout.slots().grain, outside]), persistent=False)
        for table in (self.content, self.position, self.grain, self.index):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)

    def forward(self, slots: Tensor, contents: Tensor, start: int | Tensor = 0) -> Tensor:
        """(B, L) slots and contents to (B, L, width); the first of them stands at place `start` of the sequence."""
        known = contents != self.layout.no_content
        entries = self.layout.entries(contents, self.slot_grain[slots])
        tokens = self.content(torch.where(known, entries, self.layout.num_entries)) + self.at(slots)
        if self.index is not None:
            tokens = tokens + self.index(start + torch.arange(slots.shape[1], device=slots.device))
        return tokens

    def check_places(self, transformer: Transformer) -> None:
        """Refuse a transformer that neither this embedding nor rotary positions would tell where a code is."""
        if self.position is None and not transformer.rotary:
            raise GraincodeError(
                "position 'none' without rotary positions: nothing tells where a code is; type "
                "generator.block.rotary=true, or generator.model.embedding.position=per_grain"
            )

    def at(self, slots: Tensor) -> Tensor:
        """What is known of a token before its content is: (...) slots to (..., width)."""
        width = self.content.embedding_dim
        found = self.content.weight.new_zeros(*slots.shape, width)
        if self.position is not None:
            found = self.position(self.slot_position[slots])
        return found if self.grain is None else found + self.grain(self.slot_grain[slots])


def normalized(tokens: Tensor) -> Tensor:
    """(..., width) tokens of mean 0 and variance 1.

    Tables begin small, so that they learn fast; beside states of unit variance they would not be heard.
    """
    return F.layer_norm(tokens, tokens.shape[-1:])


def _positions(layout: CodeLayout) -> Tensor:
    """(S + 2,) the finest cell that each slot begins at; behind them the end of a grain, padding and the start."""
    table, cells = layout.slots(), layout.grids[-1][0] * layout.grids[-1][1]
    return torch.cat([torch.where(table.is_end, cells, table.finest), torch.tensor([cells + 1, cells + 2])])


class Head(nn.Linear):
    """States to logits, in float32 at least: halved weights are multiplied exactly, and no likeliest entries tie."""

    def forward(self, states: Tensor) -> Tensor:
        """(..., width) states to logits."""
        dtype = torch.promote_types(states.dtype, torch.float32)
        return F.linear(*(part.to(dtype) for part in (states, self.weight, self.bias)))


class ContentHead(Head):
    """States to logits over the codebook of each code's grain.

    Args:
        layout: the code layout.
        width: of the states.
    """

    def __init__(self, layout: CodeLayout, width: int) -> None:
        super().__init__(width, layout.num_entries)
        self.codebooks = layout.num_codebooks
        # ends, padding and the start have no content; any codebook does for them
        grain = torch.cat([layout.slots().grain, torch.full((2,), layout.num_grains - 1)])
        self.register_buffer("slot_grain", grain, persistent=False)

    def forward(self, states: Tensor, slots: Tensor) -> Tensor:
        """(..., width) states and the (...) slots of their codes to (..., V) logits."""
        logits = super().forward(states)
        if self.codebooks == 1:
            return logits
        every = logits.unflatten(-1, (self.codebooks, -1))
        grain = self.slot_grain[slots][..., None, None]
        return every.gather(-2, grain.expand(*slots.shape, 1, every.shape[-1]))[..., 0, :]


def initialize(*heads: nn.Linear | None) -> None:
    """Small normal weights and no biases, so that a new model's predictions are nearly uniform."""
    for head in heads:
        if head is not None:
            nn.init.normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)


class ClassConditioning(nn.Module):
    """A learned vector for each class of the layout, and one for no class: (B,) long labels to (B, width).

    In training, labels are dropped by the batch's `SampleRng`, or by torch's generator where none are given.

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
            raise GraincodeError(f"dropout={dropout}: expected 0 to below 1; type generator.conditioning.dropout=0.1")
        if layout.classes == 0:
            raise GraincodeError(
                "the codes have no classes: type generator/conditioning=none, or extract labelled data"
            )
        self.classes, self.dropout, self.null_class = layout.classes, dropout, layout.null_class
        self.table = nn.Embedding(layout.classes + 1, width)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, labels: Tensor, rng: SampleRng | None = None) -> Tensor:
        if self.training and self.dropout > 0:
            chance = torch.rand_like(labels, dtype=torch.float) if rng is None else rng.uniforms(LABEL_DROPOUT)
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
        self.register_buffer("nothing", torch.zeros(width), persistent=False)  # of the module's type and device

    def forward(self, labels: Tensor, rng: SampleRng | None = None) -> Tensor:
        return self.nothing.expand(len(labels), -1)

    def check(self, labels: Tensor) -> None:
        """Any labels will do."""
