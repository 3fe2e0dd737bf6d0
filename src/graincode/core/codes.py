"""Variable-length codes of images.

A *region* is one cell of the coarsest grid and has exactly one *grain*. A *slot* is a position that a token can have:
a cell of one grain's grid, or a mark: the end of a grain, or its start where the layout has those. All slots have a
fixed order (coarse grains first; within a grain, regions in raster order; within a region, cells in raster order; the
last grain may go by the rows of its grid instead; after each grain but the last, its end), so the sequence of an image
is the list of those slots that its grain map makes active.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

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

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        rows = {name: value._map(change) for name, value in vars(self).items() if isinstance(value, Rows)}
        tensors = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **rows, **tensors)

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> Self:
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pin_memory(self) -> Self:
        """The same in memory that a GPU copies from directly."""
        return self._map(Tensor.pin_memory)

    def filled(self, count: int) -> Self:
        """As many images; those that are missing have zeros."""
        return self._map(lambda tensor: F.pad(tensor, [0] * (2 * tensor.ndim - 1) + [count - len(self)]))


@dataclass(frozen=True)
class GrainCodes(Rows):
    """Variable-length codes of a batch of images; take `GrainCodes.checked` for codes of your own.

    Attributes:
        grains: (B, H0, W0) long, the grain of each region.
        indices: (B, H, W) long in [0, codebook size), on the finest grid: a coarse code fills all cells that it covers.
        layout: the layout of all of them.
    """

    grains: Tensor
    indices: Tensor
    layout: CodeLayout

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


def gather_cells(maps: Sequence[Tensor], grains: Tensor, layout: CodeLayout) -> list[Tensor]:
    """For each codebook, the (N, D) vectors of the codes that images really have.

    Args:
        maps: K feature maps (B, D, h_g, w_g), coarsest first.
        grains: (B, H0, W0) grain maps.
    Returns:
        one tensor, or K with a codebook per grain: grain by grain, then image by image, in raster order.
    """
    parts = [m.permute(0, 2, 3, 1)[layout.cells_at(grains, g)] for g, m in enumerate(maps)]
    return parts if layout.num_codebooks > 1 else [torch.cat(parts)]


def scatter_cells(parts: Sequence[Tensor], grains: Tensor, layout: CodeLayout) -> list[Tensor]:
    """The inverse of `gather_cells`: K maps (B, D, h_g, w_g), zero where a grain has no code."""
    maps, vectors = [], torch.cat(list(parts))
    for g in range(layout.num_grains):
        cells = layout.cells_at(grains, g)
        positions = cells.nonzero(as_tuple=True)
        own, vectors = vectors.tensor_split([len(positions[0])])
        maps.append(vectors.new_zeros(*cells.shape, vectors.shape[1]).index_put(positions, own).permute(0, 3, 1, 2))
    return maps
