"""Variable-length codes of images: their layout, their maps, and their sequences.

A *region* is one cell of the coarsest grid and has exactly one *grain*. A *slot* is one place where a code can stand:
a cell of one grain's grid, or the end of a grain. All slots have a fixed order (coarse grains first; within a grain,
regions in raster order; within a region, cells in raster order; after each grain but the last, its end), so the
sequence of an image is the list of those slots that its grain map makes active.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from graincode.core.errors import GraincodeError


@dataclass(frozen=True)
class SlotTable:
    """What each slot of a layout stands for; all tensors are (S,) long.

    Attributes:
        grain: grain index in [0, K).
        region: raster index on the coarsest grid in [0, R); R for the end of a grain.
        cell: raster index within the region in [0, cells of the grain); 0 for an end.
        position: raster index on the grain's own grid in [0, cells); number of cells for an end.
        finest: raster index on the finest grid of the first cell that the slot covers; 0 for an end.
        is_end: bool, whether the slot is the end of its grain.
        following: the slot of the region's next cell, or S where the region (or the grain) is complete.
        first: (K, R + 1) slot of the first cell of each region at each grain; column R is the grain's end (S for
            the last grain, which has none).
        at_cell: (K, H * W) slot that covers each finest cell, at each grain.
        first_cell: (K, H * W) raster index of the first finest cell that this slot covers.
    """

    grain: Tensor
    region: Tensor
    cell: Tensor
    position: Tensor
    finest: Tensor
    is_end: Tensor
    following: Tensor
    first: Tensor
    at_cell: Tensor
    first_cell: Tensor


@dataclass(frozen=True)
class CodeLayout:
    """The geometry and the whole vocabulary of variable-length codes.

    Args:
        image_size: (height, width) in pixels.
        grains: downsampling factors (Fh, Fw), coarsest first; each divides the one before and the image.
        codebook_size: number of entries of a codebook.
        classes: number of image classes; 0 for unlabelled data.
        codebook: "shared" by the grains, as published, or one "per_grain": an index then means another entry at each.
    Raises:
        GraincodeError: a grain does not divide the image or the grain before it, or a size is not positive.
    """

    image_size: tuple[int, int]
    grains: tuple[tuple[int, int], ...]
    codebook_size: int
    classes: int = 0
    codebook: Literal["shared", "per_grain"] = "shared"

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", _pair(self.image_size, "image size"))
        object.__setattr__(self, "grains", tuple(_pair(grain, "grain") for grain in self.grains))
        if not self.grains:
            raise GraincodeError("no grains are given: type for example tokenizer.grains=[[8,8],[4,4]]")
        if self.codebook_size < 1:
            raise GraincodeError(
                f"a codebook of {self.codebook_size} entries: type for example tokenizer.codebook_size=256"
            )
        if self.classes < 0:
            raise GraincodeError(f"{self.classes} classes: expected 0 (unlabelled) or more")
        if self.codebook not in ("shared", "per_grain"):
            raise GraincodeError(f"codebook {self.codebook!r}: type tokenizer.codebook= one of shared, per_grain")
        height, width = self.image_size
        for fh, fw in self.grains:
            if height % fh or width % fw:
                raise GraincodeError(
                    f"an image of {height}x{width} pixels cannot be cut into cells of {fh}x{fw}: "
                    f"type an image size that {fh}x{fw} divides, such as "
                    f"data.image_size=[{_round_up(height, fh)},{_round_up(width, fw)}], or other tokenizer.grains"
                )
        for coarse, fine in zip(self.grains, self.grains[1:], strict=False):
            if coarse[0] % fine[0] or coarse[1] % fine[1] or coarse == fine:
                raise GraincodeError(
                    f"grain {fine[0]}x{fine[1]} does not subdivide the one before it, {coarse[0]}x{coarse[1]}: "
                    "list grains from coarse to fine, each dividing the one before, "
                    "such as tokenizer.grains=[[16,16],[8,8]]"
                )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CodeLayout:
        """The inverse of `to_config`."""
        return cls(**config)

    def to_config(self) -> dict[str, Any]:
        """Plain lists and numbers, as they stand in an export's config and beside codes on disk."""
        return {
            "image_size": list(self.image_size),
            "grains": [list(grain) for grain in self.grains],
            "codebook_size": self.codebook_size,
            "classes": self.classes,
            "codebook": self.codebook,
        }

    @property
    def num_grains(self) -> int:
        """K."""
        return len(self.grains)

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of each grain's grid, coarsest first."""
        height, width = self.image_size
        return tuple((height // fh, width // fw) for fh, fw in self.grains)

    @property
    def region_cells(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of cells that one region has at each grain; (1, 1) for the coarsest."""
        rows, columns = self.grids[0]
        return tuple((h // rows, w // columns) for h, w in self.grids)

    @property
    def codes_per_region(self) -> tuple[int, ...]:
        """Codes that one region costs at each grain."""
        return tuple(h * w for h, w in self.region_cells)

    @property
    def num_codebooks(self) -> int:
        """1, or K with a codebook per grain."""
        return self.num_grains if self.codebook == "per_grain" else 1

    @property
    def num_entries(self) -> int:
        """Entries of all codebooks together."""
        return self.num_codebooks * self.codebook_size

    def entries(self, indices: Tensor, grains: Tensor) -> Tensor:
        """Which of the entries of all codebooks each index means, in [0, num_entries): long tensors of one shape."""
        return indices + grains * self.codebook_size if self.num_codebooks > 1 else indices

    @property
    def num_regions(self) -> int:
        """R, the cells of the coarsest grid."""
        return self.grids[0][0] * self.grids[0][1]

    @property
    def num_ends(self) -> int:
        """Ends in a sequence: one for each grain but the last, whose end is implied."""
        return self.num_grains - 1

    @property
    def num_slots(self) -> int:
        """S, the cells of all grains and the ends. Embedding tables have rows for S (padding) and S + 1 (start) too."""
        return self.num_regions * sum(self.codes_per_region) + self.num_ends

    @property
    def pad_slot(self) -> int:
        """The slot that stands behind the end of a sequence."""
        return self.num_slots

    @property
    def start_slot(self) -> int:
        """The slot that stands before a sequence."""
        return self.num_slots + 1

    @property
    def no_content(self) -> int:
        """The content of an end, the start and padding: the entry behind the last of the codebook."""
        return self.codebook_size

    @property
    def null_class(self) -> int:
        """The label that stands for no class."""
        return self.classes

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest sequence: every region at the last grain, and the ends."""
        return self.num_regions * self.codes_per_region[-1] + self.num_ends

    def coordinates(self) -> Tensor:
        """(S + 2, 2) float64, row and column of the middle of each slot's cell, in cells of the finest grid from 0.

        Ends, padding and the start stand before the first cell, at -1.
        """
        table, finest = self.slots(), self.grids[-1]
        sizes = torch.tensor([(finest[0] / h, finest[1] / w) for h, w in self.grids], dtype=torch.float64)
        corner = torch.stack([table.finest // finest[1], table.finest % finest[1]], dim=1)
        middle = corner + (sizes[table.grain] - 1) / 2
        return torch.cat([torch.where(table.is_end[:, None], -1.0, middle), middle.new_full((2, 2), -1.0)])

    def slots(self, device: torch.device | str = "cpu") -> SlotTable:
        """The table of all slots, made once per layout and device."""
        return _slot_table(self, torch.device(device))

    def expand(self, grid: Tensor, grain: int) -> Tensor:
        """A map on one grain's grid, repeated onto the finest one: (..., h, w) to (..., H, W)."""
        (h, w), (finest_h, finest_w) = self.grids[grain], self.grids[-1]
        return grid.repeat_interleave(finest_h // h, dim=-2).repeat_interleave(finest_w // w, dim=-1)

    def cells_at(self, grains: Tensor, grain: int) -> Tensor:
        """Which cells of one grain's grid hold a code: (B, H0, W0) grain map to (B, h, w) bool."""
        rows, columns = self.region_cells[grain]
        return (grains == grain).repeat_interleave(rows, dim=-2).repeat_interleave(columns, dim=-1)

    def lengths(self, grains: Tensor) -> Tensor:
        """Codes per image, (B,) long, of grain maps (B, H0, W0)."""
        return torch.tensor(self.codes_per_region, device=grains.device)[grains].sum(dim=(-2, -1))


@dataclass(frozen=True)
class GrainCodes:
    """Variable-length codes of a batch of images.

    Attributes:
        grains: (B, H0, W0) long, the grain of each region.
        indices: (B, H, W) long on the finest grid, entries of the grain's codebook in [0, codebook size); the code of a
            coarse cell fills all the finest cells that it covers.
        layout: the layout of all of them.
    Raises:
        GraincodeError: a shape or a value does not fit the layout, or a coarse code does not fill its cells.
    """

    grains: Tensor
    indices: Tensor
    layout: CodeLayout

    def __post_init__(self) -> None:
        layout, batch = self.layout, self.grains.shape[0]
        for name, value, grid, size in (
            ("grains", self.grains, layout.grids[0], layout.num_grains),
            ("indices", self.indices, layout.grids[-1], layout.codebook_size),
        ):
            if tuple(value.shape) != (batch, *grid) or value.dtype != torch.long:
                raise GraincodeError(
                    f"{name} of shape {tuple(value.shape)} and type {value.dtype}: expected {(batch, *grid)} "
                    "and torch.int64 (type codes.long(), or take the layout that these codes were made with)"
                )
            low, high = value.aminmax() if value.numel() else (0, 0)
            if low < 0 or high >= size:
                raise GraincodeError(
                    f"{name} from {int(low)} to {int(high)}: expected 0 to {size - 1}, as in the layout"
                )
        flat = self.indices.flatten(1)
        if not torch.equal(flat.gather(1, _first_cells(self.grains, layout)), flat):
            raise GraincodeError(
                "indices differ within a coarse cell: expected one code to fill all finest cells that it covers"
            )

    def __len__(self) -> int:
        return self.grains.shape[0]

    def __getitem__(self, key: slice | Tensor | Sequence[int]) -> GrainCodes:
        return GrainCodes(self.grains[key], self.indices[key], self.layout)

    @property
    def lengths(self) -> Tensor:
        """Codes per image, (B,) long."""
        return self.layout.lengths(self.grains)

    @property
    def first_cells(self) -> Tensor:
        """(B, H, W) bool on the finest grid: the first cell of each code, so that each code is counted once."""
        first = _first_cells(self.grains, self.layout)
        return (first == torch.arange(first.shape[1], device=first.device)).view_as(self.indices)

    def to(self, device: torch.device | str) -> GrainCodes:
        """The same codes on another device."""
        return GrainCodes(self.grains.to(device), self.indices.to(device), self.layout)

    @staticmethod
    def cat(parts: Sequence[GrainCodes]) -> GrainCodes:
        """The images of all parts, which share one layout, in order."""
        if any(part.layout != parts[0].layout for part in parts):
            raise GraincodeError("codes of different layouts cannot be joined: decode each with its own tokenizer")
        return GrainCodes(
            torch.cat([part.grains for part in parts]),
            torch.cat([part.indices for part in parts]),
            parts[0].layout,
        )


@dataclass(frozen=True)
class CodeSequences:
    """Codes of a batch of images as sequences, coarse grains first, padded behind.

    Attributes:
        slots: (B, L) long; the layout's `pad_slot` behind the end.
        contents: (B, L) long; the layout's `no_content` at ends and padding.
        layout: the layout of the slots.
    """

    slots: Tensor
    contents: Tensor
    layout: CodeLayout

    @property
    def is_code(self) -> Tensor:
        """(B, L) bool: a code, not an end or padding."""
        return self.contents != self.layout.no_content


def to_sequences(codes: GrainCodes, ends: bool = True) -> CodeSequences:
    """The sequences of a batch of images, padded to the longest of them.

    Raises nothing: codes are valid by construction. The inverse of `from_sequences`.

    Args:
        codes: of B images.
        ends: whether the ends of grains are among the tokens; a generator that knows the grain map needs none.
    """
    layout, device = codes.layout, codes.grains.device
    table, size = layout.slots(device), layout.num_slots
    # `gather` is three times as fast as `index_select` on a CPU
    regions = table.region.clamp(max=layout.num_regions - 1).expand(len(codes), -1)
    owner = codes.grains.flatten(1).gather(1, regions)
    active = torch.where(table.is_end, ends, owner == table.grain)
    behind = active.cumsum(dim=1)
    length = int(behind[:, -1].max()) if len(codes) else layout.max_tokens
    place = torch.where(active, behind - 1, length)  # a column behind the longest sequence takes what is not there
    contents = codes.indices.flatten(1).gather(1, table.finest.expand(len(codes), -1))
    contents.masked_fill_(table.is_end, layout.no_content)
    slots = torch.full((len(codes), length + 1), layout.pad_slot, device=device)
    sequences = torch.full_like(slots, layout.no_content).scatter_(1, place, contents)
    slots.scatter_(1, place, torch.arange(size, device=device).expand(len(codes), -1))
    return CodeSequences(slots[:, :-1], sequences[:, :-1], layout)


def from_sequences(sequences: CodeSequences) -> GrainCodes:
    """The codes that sequences stand for; the inverse of `to_sequences`.

    Raises:
        GraincodeError: the slots of an image do not tile it, each region once.
    """
    layout, slots, device = sequences.layout, sequences.slots, sequences.slots.device
    batch = len(slots)
    dense = torch.full((batch, layout.num_slots + 1), layout.no_content, device=device)
    dense = dense.scatter_(1, slots, sequences.contents)
    active, start = dense[:, :-1] != layout.no_content, 0
    grains = torch.zeros(batch, layout.num_regions, dtype=torch.long, device=device)
    whole, touched = torch.zeros_like(grains), torch.zeros_like(grains)
    for g, count in enumerate(layout.codes_per_region):
        here = active[:, start : start + layout.num_regions * count].unflatten(1, (-1, count))
        complete = here.all(dim=2)
        grains, whole, touched = grains + g * complete, whole + complete, touched + here.any(dim=2)
        start += layout.num_regions * count + 1  # behind its end
    once = sequences.is_code.sum(dim=1) == active.sum(dim=1)
    tiled = ((whole == 1) & (touched == 1)).all(dim=1) & once
    if not bool(tiled.all()):
        raise GraincodeError(
            f"the sequence of image {int((~tiled).nonzero()[0])} does not tile it: "
            "expected every region once, at one grain, with all its codes"
        )
    grains = grains.view(batch, *layout.grids[0])
    indices = dense.gather(1, layout.slots(device).at_cell.gather(0, layout.expand(grains, 0).flatten(1)))
    return GrainCodes(grains, indices.view(batch, *layout.grids[-1]), layout)


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
    Raises:
        GraincodeError: a shape does not fit, or known cells are no whole codes of known regions.
    """

    codes: GrainCodes
    known_regions: Tensor
    known_cells: Tensor
    least_grain: Tensor

    def __post_init__(self) -> None:
        codes, layout = self.codes, self.codes.layout
        for name, value, shape in (
            ("known_regions", self.known_regions, codes.grains.shape),
            ("known_cells", self.known_cells, codes.indices.shape),
            ("least_grain", self.least_grain, codes.grains.shape[:1]),
        ):
            if value.shape != shape:
                raise GraincodeError(f"{name} of shape {tuple(value.shape)}: expected {tuple(shape)}, as of the codes")
        flat = self.known_cells.flatten(1)
        whole = torch.equal(flat.gather(1, _first_cells(codes.grains, layout)), flat)
        if not whole or bool((self.known_cells & ~layout.expand(self.known_regions, 0)).any()):
            raise GraincodeError("known cells that are no whole codes of known regions: expected all cells of a code")

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


def gather_cells(maps: Sequence[Tensor], grains: Tensor, layout: CodeLayout) -> Tensor:
    """The vectors of the codes that images really have, each once.

    Args:
        maps: K feature maps (B, D, h_g, w_g), coarsest first.
        grains: (B, H0, W0) grain maps.
    Returns:
        (N, D), N the number of codes of the whole batch: grain by grain, then image by image, in raster order.
    """
    return torch.cat([m.permute(0, 2, 3, 1)[layout.cells_at(grains, g)] for g, m in enumerate(maps)])


def scatter_cells(vectors: Tensor, grains: Tensor, layout: CodeLayout) -> list[Tensor]:
    """The inverse of `gather_cells`: (N, D) vectors to K maps (B, D, h_g, w_g), zero where a grain has no code."""
    maps, start = [], 0
    for g in range(layout.num_grains):
        cells = layout.cells_at(grains, g)
        image, row, column = cells.nonzero(as_tuple=True)
        grid = vectors.new_zeros(*cells.shape, vectors.shape[1])
        grid = grid.index_put((image, row, column), vectors[start : start + len(image)])
        maps.append(grid.permute(0, 3, 1, 2))
        start += len(image)
    return maps


@lru_cache(maxsize=32)
def _slot_table(layout: CodeLayout, device: torch.device) -> SlotTable:
    regions, size = layout.num_regions, layout.num_slots
    columns = layout.grids[0][1]
    region = torch.arange(regions)
    finest_h, finest_w = layout.grids[-1]
    row, column = torch.arange(finest_h)[:, None], torch.arange(finest_w)[None, :]
    parts: dict[str, list[Tensor]] = {}
    first = torch.full((layout.num_grains, regions + 1), size)
    at_cell = torch.empty(layout.num_grains, finest_h * finest_w, dtype=torch.long)
    following = torch.arange(1, size + 1)
    start = 0

    def add(**columns_: Tensor) -> None:
        for name, value in columns_.items():
            parts.setdefault(name, []).append(value)

    for g, ((h, w), (rh, rw)) in enumerate(zip(layout.grids, layout.region_cells, strict=True)):
        count, high, wide = rh * rw, finest_h // h, finest_w // w
        cell = torch.arange(count).repeat(regions)
        owner = region.repeat_interleave(count)
        cell_row, cell_column = owner // columns * rh + cell // rw, owner % columns * rw + cell % rw
        add(
            grain=torch.full_like(cell, g),
            region=owner,
            cell=cell,
            position=cell_row * w + cell_column,
            finest=cell_row * high * finest_w + cell_column * wide,
            is_end=torch.zeros_like(cell, dtype=torch.bool),
        )
        first[g, :regions] = start + region * count
        following[start + count - 1 : start + regions * count : count] = size
        own_row, own_column = row // high, column // wide
        own_region = own_row // rh * columns + own_column // rw
        at_cell[g] = (start + own_region * count + own_row % rh * rw + own_column % rw).reshape(-1)
        start += regions * count
        if g < layout.num_ends:
            one = torch.ones(1, dtype=torch.long)
            add(
                grain=one * g,
                region=one * regions,
                cell=one * 0,
                position=one * h * w,
                finest=one * 0,
                is_end=one > 0,
            )
            first[g, regions] = start
            following[start] = size
            start += 1
    whole = {name: torch.cat(tensors) for name, tensors in parts.items()}
    table = SlotTable(**whole, following=following, first=first, at_cell=at_cell, first_cell=whole["finest"][at_cell])
    return SlotTable(**{field.name: getattr(table, field.name).to(device) for field in fields(table)})


def _first_cells(grains: Tensor, layout: CodeLayout) -> Tensor:
    """(B, H * W) finest cell at which the code begins that fills each finest cell, given grain maps."""
    return layout.slots(grains.device).first_cell.gather(0, layout.expand(grains, 0).flatten(1))


def _pair(value: Any, what: str) -> tuple[int, int]:
    values = (value, value) if isinstance(value, int) else tuple(value)
    if len(values) != 2 or not all(isinstance(v, int) and v > 0 for v in values):
        raise GraincodeError(f"{what} {value!r}: expected one positive number or a pair (height, width) of them")
    return values


def _round_up(value: int, factor: int) -> int:
    return -(-value // factor) * factor
