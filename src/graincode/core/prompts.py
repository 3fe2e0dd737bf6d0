"""Codes of which some are given, to be completed by a generator."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from graincode.core.codes import GrainCodes, Rows
from graincode.core.errors import GraincodeError, brief, check
from graincode.core.layout import CodeLayout
from graincode.core.sequences import CodeSequences, from_sequences, to_sequences


@dataclass(frozen=True)
class CodePrefix(Rows):
    """The beginning of each image's sequence, to be completed by a generator.

    Attributes:
        sequences: of B images, as `to_sequences` makes them.
        lengths: (B,) long, how many tokens of each are kept.
        positions: (B,) long, of how many the positions are kept; as many or more.
    """

    sequences: CodeSequences
    lengths: Tensor
    positions: Tensor

    @classmethod
    def of_map(cls, codes: GrainCodes) -> CodePrefix:
        """The grain map alone: all positions and no contents."""
        sequences = to_sequences(codes)
        tokens = sequences.is_token.sum(dim=1)
        return cls(sequences, torch.zeros_like(tokens), tokens)

    @classmethod
    def of_grains(cls, codes: GrainCodes, count: int) -> CodePrefix:
        """The codes of the `count` coarsest grains, 0 to K, and their ends: no other region has one of these grains."""
        layout, sequences = codes.layout, to_sequences(codes)
        check("grains", count, f"0 to {layout.num_grains}, as many as the codes have", 0 <= count <= layout.num_grains)
        behind = int(layout.slots().first[count, 0]) if count < layout.num_grains else layout.num_slots
        lengths = (sequences.slots < behind).sum(dim=1)
        return cls(sequences, lengths, lengths)

    @classmethod
    def of_regions(cls, codes: GrainCodes, count: int) -> CodePrefix:
        """The codes of the first `count` regions, 0 to R, in the order of generation, coarse ones first; where the last
        grain goes by rows, also what comes before the last of these codes."""
        layout, sequences = codes.layout, to_sequences(codes)
        check("regions", count, f"0 to {layout.num_regions}, as many as there are", 0 <= count <= layout.num_regions)
        completes = F.pad(layout.slots(codes.grains.device).is_last, [0, 1])[sequences.slots]
        before = completes.cumsum(dim=1) - completes.long()
        lengths = ((before < count) & sequences.is_token).sum(dim=1)
        return cls(sequences, lengths, lengths)

    def check(self) -> None:
        """Refuse what keeps more of a sequence than it has, or contents without their positions."""
        parts = [torch.zeros_like(self.tokens), self.lengths, self.positions, self.tokens]
        names = "0 or more, at most as many positions, and these at most the sequence's"
        found = [part.tolist() for part in (self.lengths, self.positions)]
        check("lengths", brief(found), names, all(bool((a <= b).all()) for a, b in pairwise(parts)))

    @property
    def layout(self) -> CodeLayout:
        """Of the codes."""
        return self.sequences.layout

    @property
    def grains(self) -> Tensor:
        """(B, H0, W0) long, the whole grain maps; 0 where there is no sequence."""
        return self.first_codes(self.tokens).int().argmax(dim=1).view(-1, *self.layout.grids[0])

    @property
    def known_cells(self) -> Tensor:
        """(B, H, W) bool, the finest cells whose codes are given."""
        at_cell = self.layout.slots(self.lengths.device).at_cell
        return self._coded(self.lengths)[:, at_cell].any(dim=1).view(-1, *self.layout.grids[-1])

    @property
    def tokens(self) -> Tensor:
        """(B,) long, tokens of each whole sequence."""
        return self.sequences.is_token.sum(dim=1)

    def first_codes(self, lengths: Tensor) -> Tensor:
        """(B, K, R) bool, whether each region's first code, at each grain, is among the first (B,) tokens."""
        return self._coded(lengths)[:, self.layout.slots(lengths.device).first[:, :-1]]

    def _coded(self, lengths: Tensor) -> Tensor:
        """(B, S + 1) bool, the slots of the codes among the first (B,) tokens of each sequence; the last is no slot."""
        slots, size = self.sequences.slots, self.layout.num_slots
        begun = torch.arange(slots.shape[1], device=slots.device) < lengths[:, None]
        coded = torch.zeros(len(slots), size + 1, dtype=torch.bool, device=slots.device)
        return coded.scatter_(1, torch.where(begun & self.sequences.is_code, slots, size), True)


@dataclass(frozen=True)
class CodeMask(Rows):
    """Codes of which some are given, anywhere, to be completed by a generator that has no order.

    Attributes:
        codes: of B images; only what is given of them is read.
        known_regions: (B, H0, W0) bool, the regions whose grain is given.
        known_cells: (B, H, W) bool, the finest cells whose codes are given: whole codes, in known regions.
        least_grain: (B,) long, the coarsest grain that the other regions may have.
    """

    codes: GrainCodes
    known_regions: Tensor
    known_cells: Tensor
    least_grain: Tensor

    @classmethod
    def of_regions(cls, codes: GrainCodes, keep: Tensor, keep_map: bool = False) -> CodeMask:
        """The grains and codes of the regions of a (B, H0, W0) or (H0, W0) bool mask; with `keep_map`, all grains."""
        _check_mask(keep, tuple(codes.grains.shape))
        keep = keep.to(codes.grains.device).expand_as(codes.grains)
        known = torch.ones_like(keep) if keep_map else keep
        return cls(codes, known, codes.layout.expand(keep, 0), torch.zeros_like(codes.grains[:, 0, 0]))

    @classmethod
    def of_pixels(cls, codes: GrainCodes, keep: Tensor, keep_map: bool = False) -> CodeMask:
        """As `of_regions`, of the regions that lie wholly in a (B, H, W) or (H, W) bool mask of pixels."""
        _check_mask(keep, (len(codes), *codes.layout.image_size))
        high, wide = codes.layout.grains[0]
        regions = keep.unflatten(-1, (-1, wide)).unflatten(-3, (-1, high)).all(dim=-1).all(dim=-2)
        return cls.of_regions(codes, regions, keep_map)

    @classmethod
    def of_prefix(cls, prefix: CodePrefix) -> CodeMask:
        """What the beginnings of whole sequences give."""
        codes, slots = from_sequences(prefix.sequences), prefix.sequences.slots
        ends = F.pad(prefix.layout.slots(slots.device).is_end, [0, 1])[slots]
        begun = torch.arange(ends.shape[1], device=ends.device) < prefix.positions[:, None]
        regions = prefix.first_codes(prefix.positions).any(dim=1).view_as(codes.grains)
        return cls(codes, regions, prefix.known_cells, (begun & ends).sum(dim=1))

    @property
    def layout(self) -> CodeLayout:
        """Of the codes."""
        return self.codes.layout


def _check_mask(keep: Tensor, shape: tuple[int, ...]) -> None:
    if keep.dtype != torch.bool or tuple(keep.shape) not in (shape, shape[1:]):
        expected = f"{shape} or {shape[1:]}, torch.bool"
        raise GraincodeError(f"a mask of shape {tuple(keep.shape)}, {keep.dtype}: expected {expected}")
