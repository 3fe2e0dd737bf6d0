"""Embeddings of codes and classes, and the heads that predict codes."""

from __future__ import annotations

from functools import reduce
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graincode.core.errors import check, check_choice
from graincode.core.layout import CodeLayout
from graincode.core.rng import LABEL_DROPOUT, SampleRng
from graincode.generator.transformer import Transformer, normalized

Position = Literal["per_grain", "shared", "none"]


class HeterogeneousEmbedding(nn.Module):
    """Content (of the grain's codebook) + position + grain + index in the sequence; all but content are optional.

    Args:
        width: of each token.
        position: "per_grain", a vector for each cell of each grain's own grid; "shared", one for each cell of the
            finest grid, whichever grain begins there; "none", with rotary positions.
        grain, index: whether a vector of the grain, of the index in the sequence, is added.
        dropout: in [0, 1), on the tokens.
    Source: DQ-Transformer (arXiv 2305.11718), section 3.3; one position embedding per grain, each with its own end.
    """

    def __init__(
        self,
        layout: CodeLayout,
        width: int,
        position: Position = "per_grain",
        grain: bool = True,
        index: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_choice("position", position, Position)
        check("dropout", dropout, "a number from 0 to below 1", 0 <= dropout < 1)
        self.layout, table = layout, layout.slots()
        self.content = nn.Embedding(layout.num_entries + 1, width)
        rows = torch.arange(layout.num_slots + 2)
        if position == "shared":  # the finest cell that a slot begins at; then the ends, padding and starts
            cells = layout.grids[-1][0] * layout.grids[-1][1]
            marks = torch.where(table.is_end, cells, cells + 2)
            begins = torch.where(table.is_code, table.finest, marks)
            rows = torch.cat([begins, torch.tensor([cells + 1, cells + 2])])
        self.register_buffer("slot_position", rows, persistent=False)
        self.position = nn.Embedding(int(rows.max()) + 1, width) if position != "none" else None
        self.grain = nn.Embedding(layout.num_grains + 1, width) if grain else None
        self.index = nn.Embedding(layout.max_tokens + 1, width) if index else None
        self.register_buffer("slot_grain", F.pad(table.grain, (0, 2), value=layout.num_grains), persistent=False)
        self.drop = nn.Dropout(dropout)
        initialize(self.content, self.position, self.grain, self.index)

    def forward(self, slots: Tensor, contents: Tensor, condition: Tensor, start: Tensor | None = None) -> Tensor:
        """(B, L) slots and contents, under a (B, width) condition, to normalised (B, L, width) tokens: the first L of
        their sequences, or with L = 1 those at (B, 1) long `start`."""
        entries = contents  # of one codebook: `no_content` is behind its last
        if self.layout.num_codebooks > 1:
            entries = self.layout.entries(contents, self.slot_grain[slots])
            entries = entries.masked_fill(contents == self.layout.no_content, self.layout.num_entries)
        tokens = self.content(entries) + self.at(slots)
        if self.index is not None:
            places = torch.arange(slots.shape[1], device=slots.device) if start is None else start
            tokens = tokens + self.index(places)
        return self.drop(normalized(tokens + condition[:, None]))

    def check_positions(self, transformer: Transformer) -> None:
        """Refuse a transformer that has a code's position neither from this embedding nor from rotary positions."""
        has_position = self.position is not None or transformer.rotary
        check("position", "none", "per_grain or shared without rotary positions", has_position)

    def at(self, slots: Tensor) -> Tensor:
        """Position and grain of a token, without its content: (...) slots to (..., width)."""
        found = [self.position(self.slot_position[slots])] if self.position is not None else []
        found += [self.grain(self.slot_grain[slots])] if self.grain is not None else []
        if not found:
            return self.content.weight.new_zeros(*slots.shape, self.content.embedding_dim)
        return reduce(torch.add, found)


class Head(nn.Linear):
    """States to logits, in float32 at least, so that in half precision the likeliest entries do not tie."""

    def forward(self, states: Tensor) -> Tensor:
        dtype = torch.promote_types(states.dtype, torch.float32)
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(*(part.to(dtype) for part in (states, self.weight, self.bias)))


class ContentHead(Head):
    """States to logits over the codebook of each code's grain."""

    def __init__(self, layout: CodeLayout, width: int) -> None:
        super().__init__(width, layout.num_entries)
        self.codebooks = layout.num_codebooks
        # marks, padding and the start have no content; any codebook does for them
        grain = F.pad(layout.slots().grain, (0, 2), value=layout.num_grains - 1)
        self.register_buffer("slot_grain", grain, persistent=False)

    def forward(self, states: Tensor, slots: Tensor) -> Tensor:
        """(..., width) states and the (...) slots of their codes to (..., V) logits."""
        logits = super().forward(states)
        if self.codebooks == 1:
            return logits
        every = logits.unflatten(-1, (self.codebooks, -1))
        grain = self.slot_grain[slots][..., None, None]
        return every.gather(-2, grain.expand(*slots.shape, 1, every.shape[-1]))[..., 0, :]


def initialize(*parts: nn.Embedding | nn.Linear | None) -> None:
    """Small normal weights and no biases, so that a new model's predictions are nearly uniform."""
    for part in filter(None, parts):
        nn.init.normal_(part.weight, std=0.02)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)


class ClassConditioning(nn.Module):
    """A learned vector for each class of the layout, and one for its `null_class`: (B,) long labels to (B, width).

    Training replaces the share `dropout` of the labels, in [0, 1), by the null class; guidance needs some.
    """

    def __init__(self, layout: CodeLayout, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        check("dropout", dropout, "a number from 0 to below 1", 0 <= dropout < 1)
        check("conditioning", "class", "none, as the codes have no classes", layout.classes > 0)
        self.classes, self.dropout, self.null_class = layout.classes, dropout, layout.null_class
        self.table = nn.Embedding(layout.classes + 1, width)
        initialize(self.table)

    def forward(self, labels: Tensor, rng: SampleRng | None = None) -> Tensor:
        if self.training and self.dropout > 0:
            chance = torch.rand_like(labels, dtype=torch.float) if rng is None else rng.uniforms(LABEL_DROPOUT)
            labels = labels.masked_fill(chance < self.dropout, self.null_class)
        return self.table(labels)


class NoConditioning(nn.Module):
    """Unconditional generation: zeros in place of a class, whatever the labels."""

    classes = 0

    def __init__(self, layout: CodeLayout, width: int) -> None:
        super().__init__()
        self.register_buffer("nothing", torch.zeros(width), persistent=False)  # of the module's type and device

    def forward(self, labels: Tensor, rng: SampleRng | None = None) -> Tensor:
        return self.nothing.expand(len(labels), -1)


Conditioning = ClassConditioning | NoConditioning
