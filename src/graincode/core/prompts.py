"""Codes of which some are given, to be completed by a generator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graincode.core.codes import GrainCodes
from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout
from graincode.core.sequences import CodeSequences, from_sequences, to_sequences


@dataclass(frozen=True)
class CodePrefix:
    """The beginning of each image's sequence, to be completed by a generator.

    Attributes:
        sequences: of B images, as `to_sequences` gives them.
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
        nothing = torch.zeros(len(codes), dtype=torch.long, device=codes.grains.device)
        return cls(sequences, nothing, (sequences.slots != codes.layout.pad_slot).sum(dim=1))

    @classmethod
    def of_grains(cls, codes: GrainCodes, count: int) -> CodePrefix:
        """The codes of the coarsest grains, their ends included: no other region has one of these grains.

        Args:
            codes: of B images.
            count: of grains, 0 to K.
        Raises:
            GraincodeError: there are not so many.
        """
        layout = codes.layout
        if not 0 <= count <= layout.num_grains:
            raise GraincodeError(
                f"the first {count} grains: expected 0 to {layout.num_grains}, as many as the codes have"
            )
        sequences = to_sequences(codes)
        behind = int(layout.slots().first[count, 0]) if count < layout.num_grains else layout.num_slots
        lengths = (sequences.slots < behind).sum(dim=1)
        return cls(sequences, lengths, lengths)

    @classmethod
    def of_regions(cls, codes: GrainCodes, count: int) -> CodePrefix:
        """The codes of the first regions in the order of generation, coarse ones first.

        Args:
            codes: of B images.
            count: of regions, 0 to R.
        Raises:
            GraincodeError: there are not so many.
        """
        layout, table = codes.layout, codes.layout.slots(codes.grains.device)
        if not 0 <= count <= layout.num_regions:
            raise GraincodeError(f"the first {count} regions: expected 0 to {layout.num_regions}, as many as there are")
        sequences = to_sequences(codes)
        known = sequences.slots.clamp(max=layout.num_slots - 1)
        completes = sequences.is_code & (table.following[known] == layout.num_slots)
        before = completes.cumsum(dim=1) - completes.long()
        lengths = ((before < count) & (sequences.slots != layout.pad_slot)).sum(dim=1)
        return cls(sequences, lengths, lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def layout(self) -> CodeLayout:
        """Of the codes."""
        return self.sequences.layout

    @property
    def tokens(self) -> Tensor:
        """(B,) long, tokens of each whole sequence."""
        return (self.sequences.slots != self.sequences.layout.pad_slot).sum(dim=1)

    @property
    def grains(self) -> Tensor:
        """(B, H0, W0) long, the whole grain maps; 0 where there is no sequence."""
        layout, slots = self.sequences.layout, self.sequences.slots
        table = layout.slots(slots.device)
        known = slots.clamp(max=layout.num_slots - 1)
        is_code = self.sequences.is_code
        found = torch.zeros(len(slots), layout.num_regions + 1, dtype=torch.long, device=slots.device)
        found.scatter_(1, torch.where(is_code, table.region[known], layout.num_regions), table.grain[known])
        return found[:, :-1].view(-1, *layout.grids[0])

    @property
    def known_cells(self) -> Tensor:
        """(B, H, W) bool, the cells of the finest grid whose codes are given."""
        sequences, layout = self.sequences, self.sequences.layout
        table, slots = layout.slots(sequences.slots.device), sequences.slots
        kept = (torch.arange(slots.shape[1], device=slots.device) < self.lengths[:, None]) & sequences.is_code
        active = torch.zeros(len(slots), layout.num_slots + 1, dtype=torch.bool, device=slots.device)
        active.scatter_(1, torch.where(kept, slots, layout.num_slots), True)
        return active[:, table.at_cell].any(dim=1).view(-1, *layout.grids[-1])

    def __getitem__(self, rows: slice | Tensor) -> CodePrefix:
        sequences = self.sequences
        chosen = CodeSequences(sequences.slots[rows], sequences.contents[rows], sequences.layout)
        return CodePrefix(chosen, self.lengths[rows], self.positions[rows])

    def filled(self, count: int) -> CodePrefix:
        """As many images, those that are missing with nothing given."""
        layout, missing = self.sequences.layout, count - len(self)
        slots = F.pad(self.sequences.slots, (0, 0, 0, missing), value=layout.pad_slot)
        contents = F.pad(self.sequences.contents, (0, 0, 0, missing), value=layout.no_content)
        counts = (F.pad(count, (0, missing)) for count in (self.lengths, self.positions))
        return CodePrefix(CodeSequences(slots, contents, layout), *counts)

    def to(self, device: torch.device | str) -> CodePrefix:
        """The same on another device."""
        sequences = self.sequences
        moved = CodeSequences(sequences.slots.to(device), sequences.contents.to(device), sequences.layout)
        return CodePrefix(moved, self.lengths.to(device), self.positions.to(device))


@dataclass(frozen=True)
class CodeMask:
    """Codes of which some are given, at any places, to be completed by a generator that has no order.

    Attributes:
        codes: of B images; what is not given of them is not looked at.
        known_regions: (B, H0, W0) bool, the regions whose grain is given.
        known_cells: (B, H, W) bool, the cells of the finest grid whose codes are given: whole codes, in known regions.
        least_grain: (B,) long, the coarsest grain that the other regions may have.
    """

    codes: GrainCodes
    known_regions: Tensor
    known_cells: Tensor
    least_grain: Tensor

    @classmethod
    def of_regions(cls, codes: GrainCodes, keep: Tensor, keep_map: bool = False) -> CodeMask:
        """The grains and codes of some regions.

        Args:
            codes: of B images.
            keep: (B, H0, W0) or (H0, W0) bool.
            keep_map: keep the grains of all other regions, too.
        Raises:
            GraincodeError: `keep` has another shape, or is not bool.
        """
        shape = tuple(codes.grains.shape)
        if keep.dtype != torch.bool or tuple(keep.shape) not in (shape, shape[1:]):
            raise GraincodeError(
                f"keep of shape {tuple(keep.shape)}, {keep.dtype}: expected {shape} or {shape[1:]}, torch.bool"
            )
        keep = keep.to(codes.grains.device).expand_as(codes.grains)
        known = torch.ones_like(keep) if keep_map else keep
        return cls(codes, known, codes.layout.expand(keep, 0), torch.zeros_like(codes.grains[:, 0, 0]))

    @classmethod
    def of_pixels(cls, codes: GrainCodes, keep: Tensor, keep_map: bool = False) -> CodeMask:
        """The grains and codes of the regions all of whose pixels are to be kept: (B, H, W) or (H, W) bool of pixels.

        Raises:
            GraincodeError: the mask has not the size of the images, or is not bool.
        """
        size, (high, wide) = codes.layout.image_size, codes.layout.grains[0]
        shape = (len(codes), *size)
        if keep.dtype != torch.bool or tuple(keep.shape) not in (shape, size):
            raise GraincodeError(
                f"a mask of shape {tuple(keep.shape)}, {keep.dtype}: expected {shape} or {size}, torch.bool"
            )
        regions = keep.unflatten(-1, (-1, wide)).unflatten(-3, (-1, high)).all(dim=-1).all(dim=-2)
        return cls.of_regions(codes, regions, keep_map)

    @classmethod
    def of_prefix(cls, prefix: CodePrefix) -> CodeMask:
        """What the beginnings of sequences give, whose sequences are whole."""
        sequences, layout = prefix.sequences, prefix.layout
        table, codes = layout.slots(sequences.slots.device), from_sequences(sequences)
        slots = sequences.slots.clamp(max=layout.num_slots - 1)
        begun = torch.arange(slots.shape[1], device=slots.device) < prefix.positions[:, None]
        regions = torch.zeros(len(prefix), layout.num_regions + 1, dtype=torch.bool, device=slots.device)
        regions.scatter_(1, torch.where(begun & sequences.is_code, table.region[slots], layout.num_regions), True)
        ended = (begun & table.is_end[slots] & (sequences.slots != layout.pad_slot)).sum(dim=1)
        return cls(codes, regions[:, :-1].view_as(codes.grains), prefix.known_cells, ended)

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def layout(self) -> CodeLayout:
        """Of the codes."""
        return self.codes.layout

    def __getitem__(self, rows: slice | Tensor) -> CodeMask:
        return CodeMask(self.codes[rows], self.known_regions[rows], self.known_cells[rows], self.least_grain[rows])

    def filled(self, count: int) -> CodeMask:
        """As many images, those that are missing with nothing given."""
        rows = (0, 0, 0, 0, 0, count - len(self))
        codes = GrainCodes(F.pad(self.codes.grains, rows), F.pad(self.codes.indices, rows), self.layout)
        least = F.pad(self.least_grain, rows[-2:])
        return CodeMask(codes, F.pad(self.known_regions, rows), F.pad(self.known_cells, rows), least)

    def to(self, device: torch.device | str) -> CodeMask:
        """The same on another device."""
        masks = (mask.to(device) for mask in (self.known_regions, self.known_cells, self.least_grain))
        return CodeMask(self.codes.to(device), *masks)
