"""Variable-length codes of images.

A *region* is one cell of the coarsest grid and has exactly one *grain*. A *slot* is a position that a token can have:
a cell of one grain's grid, or a mark: the end of a grain, or its start where the layout has those. All slots have a
fixed order (coarse grains first; within a grain, regions in raster order; within a region, cells in raster order; the
last grain may go by the rows of its grid instead; after each grain but the last, its end), so the sequence of an image
is the list of those slots that its grain map makes active.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout


class Rows:
    """A dataclass whose tensors have a row for each image of a batch; the first field is one of them."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def _map(self, change: Callable[[Any], Any]) -> Self:
        parts = {name: value for name, value in vars(self).items() if isinstance(value, Tensor | Rows)}
        return replace(self, **{name: change(part) for name, part in parts.items()})

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> Self:
        return self._map(lambda part: part[rows])

    def to(self, device: torch.device | str) -> Self:
        """The same on another device; from pinned memory to a GPU without waiting."""
        return self._map(lambda part: _moved(part, device))

    def pin_memory(self) -> Self:
        """The same in memory that a GPU copies from directly."""
        return self._map(lambda part: part.pin_memory())

    def filled(self, count: int) -> Self:
        """As many images; those that are missing have zeros."""
        return self._map(lambda part: _filled(part, count))


def _moved(part: Tensor | Rows, device: torch.device | str) -> Tensor | Rows:
    return part.to(device) if isinstance(part, Rows) else part.to(device, non_blocking=part.is_pinned())


def _filled(part: Tensor | Rows, count: int) -> Tensor | Rows:
    if isinstance(part, Rows):
        return part.filled(count)
    return F.pad(part, [0] * (2 * part.ndim - 1) + [count - len(part)])


class Counts(NamedTuple):
    """Numbers of a batch of codes that the host must know before it can say what a GPU is to compute.

    Attributes:
        longest: codes of the image that has most.
        regions: of all images together, at each grain.
    """

    longest: int
    regions: tuple[int, ...]


@dataclass(frozen=True)
class GrainCodes(Rows):
    """Variable-length codes of a batch of images; take `GrainCodes.checked` for codes of your own.

    Attributes:
        grains: (B, H0, W0) long, the grain of each region.
        indices: (B, H, W) long in [0, codebook size), on the finest grid: a coarse code fills all cells that it covers.
        layout: the layout of all of them.
        counted: their `counts`, where they were taken on the CPU before the codes went to a GPU.
    """

    grains: Tensor
    indices: Tensor
    layout: CodeLayout
    counted: Counts | None = field(default=None, compare=False)

    @classmethod
    def checked(cls, grains: Tensor, indices: Tensor, layout: CodeLayout) -> GrainCodes:
        """Codes from disk or from a user, on the CPU.

        Raises:
            GraincodeError: a shape, type or value does not fit the layout, or a coarse code does not fill its cells.
        """
        for name, value, grid, size in (
            ("grains", grains, layout.grids[0], layout.num_grains),
            ("indices", indices, layout.grids[-1], layout.codebook_size),
        ):
            shape, expected = tuple(value.shape), (len(grains), *grid)
            if shape != expected or value.dtype != torch.long:
                raise GraincodeError(f"{name} of shape {shape}, {value.dtype}: expected {expected}, torch.int64")
            low, high = value.aminmax() if value.numel() else (0, 0)
            if low < 0 or high >= size:
                raise GraincodeError(f"{name} from {int(low)} to {int(high)}: expected 0 to {size - 1}")
        flat = indices.flatten(1)
        if not torch.equal(flat.gather(1, layout.first_cells(grains)), flat):
            raise GraincodeError("indices differ within a coarse cell: expected one code in all cells that it covers")
        return cls(grains, indices, layout)

    def _map(self, change: Callable[[Any], Any]) -> Self:
        return replace(super()._map(change), counted=None)

    def to(self, device: torch.device | str) -> Self:
        moved, on_cpu = super().to(device), self.grains.device.type == "cpu"
        return replace(moved, counted=self.counts if on_cpu and moved.grains.device.type != "cpu" else self.counted)

    @property
    def counts(self) -> Counts:
        """Numbers for the host; taking them waits for a GPU, unless the codes came from the CPU."""
        if self.counted is not None:
            return self.counted
        regions = [(self.grains == g).sum() for g in range(self.layout.num_grains)]
        found = [self.lengths.max(), *regions] if len(self) else [self.grains.new_zeros(())] * (len(regions) + 1)
        longest, *each = torch.stack(found).tolist()
        return Counts(longest, tuple(each))

    @property
    def lengths(self) -> Tensor:
        """Codes per image, (B,) long."""
        return self.layout.lengths(self.grains)

    @property
    def first_cells(self) -> Tensor:
        """(B, H, W) bool, the first of the finest cells of each code, so that each code is counted once."""
        first = self.layout.first_cells(self.grains)
        return (first == torch.arange(first.shape[1], device=first.device)).view_as(self.indices)

    @staticmethod
    def cat(parts: Sequence[GrainCodes]) -> GrainCodes:
        """The images of all parts, which share one layout, in order."""
        if any(part.layout != parts[0].layout for part in parts):
            raise GraincodeError("codes of different layouts cannot be joined: decode each with its own tokenizer")
        grains, indices = (torch.cat([getattr(part, name) for part in parts]) for name in ("grains", "indices"))
        return GrainCodes(grains, indices, parts[0].layout)


@dataclass(frozen=True)
class CodeCells:
    """Where the codes of grain maps are; made once for each batch, as the host waits for a GPU to count them.

    Attributes:
        places: of each grain, (n,) long: cells of the grids of all images, in raster order.
        shapes: of each grain, (B, h_g, w_g).
        layout: of the grain maps.
    """

    places: tuple[Tensor, ...]
    shapes: tuple[torch.Size, ...]
    layout: CodeLayout

    @classmethod
    def of(cls, grains: Tensor, layout: CodeLayout) -> CodeCells:
        """Those of (B, H0, W0) grain maps."""
        cells = [layout.cells_at(grains, g) for g in range(layout.num_grains)]
        one = layout.num_grains == 1  # all cells have codes
        sizes = [cells[0].numel()] if one else torch.stack([own.sum() for own in cells]).tolist()
        places = [true_places(own.flatten(), size) for own, size in zip(cells, sizes, strict=True)]
        return cls(tuple(places), tuple(own.shape for own in cells), layout)

    def gather(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """For each codebook, the (N, D) vectors of the codes that images really have.

        Args:
            maps: K feature maps (B, D, h_g, w_g), coarsest first.
        Returns:
            one tensor, or K with a codebook per grain: grain by grain, then image by image, in raster order.
        """
        pairs = zip(maps, self.places, strict=True)
        parts = [m.permute(0, 2, 3, 1).flatten(0, 2)[places] for m, places in pairs]
        return parts if self.layout.num_codebooks > 1 else [torch.cat(parts)]

    def scatter(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of `gather`: K maps (B, D, h_g, w_g), zero where a grain has no code."""
        own = parts if len(parts) > 1 else parts[0].split([len(places) for places in self.places])
        maps = []
        for vectors, places, shape in zip(own, self.places, self.shapes, strict=True):
            filled = vectors.new_zeros(shape.numel(), vectors.shape[1]).index_put((places,), vectors)
            maps.append(filled.view(*shape, vectors.shape[1]).permute(0, 3, 1, 2))
        return maps


def true_places(mask: Tensor, count: int) -> Tensor:
    """(count,) long, where a (N,) bool mask with so many true values has them, ascending; `nonzero` waits for a GPU."""
    rank = (mask.cumsum(0) - 1).masked_fill(~mask, count)  # the others share a place behind all
    found = rank.new_empty(count + 1).scatter_(0, rank, torch.arange(len(mask), device=mask.device))
    return found[:count]
