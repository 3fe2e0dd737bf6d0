"""The layout of variable-length codes: grains, grids, and the whole vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise, zip_longest
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from graincode.core.errors import GraincodeError, check, check_choice

Codebook = Literal["shared", "per_grain"]
LastGrainOrder = Literal["regions", "rows"]


@dataclass(frozen=True)
class SlotTable:
    """What each slot of a layout means; all tensors are (S,) long.

    Attributes:
        grain: grain index in [0, K).
        region: raster index on the coarsest grid in [0, R); R for the end or start of a grain.
        cell: raster index within the region in [0, cells of the grain); 0 for an end or start.
        finest: raster index on the finest grid of the first cell that the slot covers; 0 for an end or start.
        is_code, is_end: bool, whether the slot is a cell; whether it is the end of its grain.
        is_last: bool, whether the slot is the last cell of its region.
        following: the slot that comes next in every image, or S where the grain map decides.
        first: (K, R + 1) slot of the first cell of each region at each grain, and of the grain's end (S for the last).
        at_cell: (K, H * W) slot that covers each finest cell, at each grain.
        costs: (K,) codes of one region at each grain.
    """

    grain: Tensor
    region: Tensor
    cell: Tensor
    finest: Tensor
    is_code: Tensor
    is_end: Tensor
    is_last: Tensor
    following: Tensor
    first: Tensor
    at_cell: Tensor
    costs: Tensor


@dataclass(frozen=True)
class CodeLayout:
    """The geometry and the whole vocabulary of variable-length codes.

    Args:
        image_size: (height, width) in pixels.
        grains: downsampling factors (Fh, Fw), coarsest first; each divides the one before and the image.
        codebook_size: number of entries of a codebook.
        classes: number of image classes; 0 for unlabelled data.
        codebook: "shared" by the grains, as published, or one "per_grain": an index then means another entry at each.
        last_grain_order: "regions", one after the other, as in all other grains, or "rows" of the last grain's grid,
            over all regions that have it, as published.
        grain_starts: whether each grain but the first begins with a token of its own, as published.
    """

    image_size: tuple[int, int]
    grains: tuple[tuple[int, int], ...]
    codebook_size: int
    classes: int = 0
    codebook: Codebook = "shared"
    last_grain_order: LastGrainOrder = "regions"
    grain_starts: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", _pair("image_size", self.image_size))
        object.__setattr__(self, "grains", tuple(_pair("grains", grain) for grain in self.grains))
        check("grains", [], "at least one, such as [[8,8],[4,4]]", len(self.grains) > 0)
        check("codebook_size", self.codebook_size, "1 or more", self.codebook_size >= 1)
        check("classes", self.classes, "0 (unlabelled) or more", self.classes >= 0)
        check_choice("codebook", self.codebook, Codebook)
        check_choice("last_grain_order", self.last_grain_order, LastGrainOrder)
        check("grain_starts", self.grain_starts, "true or false", isinstance(self.grain_starts, bool))
        grains, (height, width) = [list(grain) for grain in self.grains], self.image_size
        for fh, fw in grains:
            fitting = [-(-height // fh) * fh, -(-width // fw) * fw]
            expected = f"pairs that divide image_size={[height, width]}, which could be {fitting} instead"
            check("grains", grains, expected, [height, width] == fitting)
        for coarse, fine in pairwise(grains):
            nested = coarse != fine and all(a % b == 0 for a, b in zip(coarse, fine, strict=True))
            check("grains", grains, "coarse to fine, each dividing the one before, such as [[16,16],[8,8]]", nested)

    def to_config(self) -> dict[str, Any]:
        """The arguments as lists and numbers, as exports and codes on disk keep them."""
        return asdict(self) | {"image_size": list(self.image_size), "grains": [list(grain) for grain in self.grains]}

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
        """Indices at grains, long tensors of one shape, as entries of all codebooks, in [0, num_entries)."""
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
    def num_marks(self) -> int:
        """Tokens in a sequence that are no codes: ends, and starts of grains where there are some."""
        return self.num_ends * (1 + self.grain_starts)

    @property
    def num_slots(self) -> int:
        """S, the cells of all grains and the marks. Embeddings have rows for S (padding) and S + 1 (start) too."""
        return self.num_regions * sum(self.codes_per_region) + self.num_marks

    @property
    def pad_slot(self) -> int:
        """The slot after the end of a sequence."""
        return self.num_slots

    @property
    def start_slot(self) -> int:
        """The slot before a sequence."""
        return self.num_slots + 1

    @property
    def no_content(self) -> int:
        """The content of ends, starts and padding: the entry behind the last of the codebook."""
        return self.codebook_size

    @property
    def null_class(self) -> int:
        """The label that stands for no class."""
        return self.classes

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest sequence: every region at the last grain, and the marks."""
        return self.num_regions * self.codes_per_region[-1] + self.num_marks

    def coordinates(self) -> Tensor:
        """(S + 2, 2) float64, row and column of the middle of each slot's cell, in finest cells; -1 without one."""
        table, finest = self.slots(), self.grids[-1]
        sizes = torch.tensor([(finest[0] / h, finest[1] / w) for h, w in self.grids], dtype=torch.float64)
        corner = torch.stack([table.finest // finest[1], table.finest % finest[1]], dim=1)
        middle = corner + (sizes[table.grain] - 1) / 2
        return torch.cat([torch.where(table.is_code[:, None], middle, -1.0), middle.new_full((2, 2), -1.0)])

    def slots(self, device: torch.device | str = "cpu") -> SlotTable:
        """The table of all slots, made once per layout and device."""
        return _slot_table(self, torch.device(device))

    def expand(self, values: Tensor, grain: int, onto: int = -1) -> Tensor:
        """A map on one grain's grid, repeated onto that of a finer one, by default the finest: (..., h, w)."""
        (h, w), (rows, columns) = self.grids[grain], self.grids[onto]
        return values.repeat_interleave(rows // h, dim=-2).repeat_interleave(columns // w, dim=-1)

    def corners(self, values: Tensor, grain: int) -> Tensor:
        """A (..., H, W) map on the finest grid, at the first cell of each cell of a grain: (..., h, w)."""
        (h, w), (rows, columns) = self.grids[grain], self.grids[-1]
        return values[..., :: rows // h, :: columns // w]

    def cells_at(self, grains: Tensor, grain: int) -> Tensor:
        """Which cells of one grain's grid hold a code: (B, H0, W0) grain map to (B, h, w) bool."""
        return self.expand(grains == grain, 0, grain)

    def first_cells(self, grains: Tensor) -> Tensor:
        """(B, H * W) long of grain maps: the finest cell at which the code begins that fills each finest cell."""
        table = self.slots(grains.device)
        return table.finest[table.at_cell.gather(0, self.expand(grains, 0).flatten(1))]

    def lengths(self, grains: Tensor) -> Tensor:
        """Codes per image, (B,) long, of grain maps (B, H0, W0)."""
        return self.slots(grains.device).costs[grains].sum(dim=(-2, -1))


@lru_cache(maxsize=32)
def _slot_table(layout: CodeLayout, device: torch.device) -> SlotTable:
    regions, size = layout.num_regions, layout.num_slots
    cells = torch.arange(math.prod(layout.grids[-1])).view(layout.grids[-1])
    parts, first, at_cell, start = [], [], [], 0
    for g, (rh, rw) in enumerate(layout.region_cells):
        count, is_final = rh * rw, g == layout.num_grains - 1
        if g > 0 and layout.grain_starts:
            parts.append(torch.tensor([[g], [regions], [0], [0], [size]]))
            start += 1
        finest = rearrange(layout.corners(cells, g), "(r i) (c j) -> (r c i j)", i=rh, j=rw)
        region, cell = torch.arange(regions).repeat_interleave(count), torch.arange(count).repeat(regions)
        by_rows = is_final and layout.last_grain_order == "rows"
        slot = start + (finest.argsort().argsort() if by_rows else torch.arange(regions * count))
        following = torch.where((cell == count - 1) | by_rows, size, slot + 1)
        own = torch.stack([torch.full_like(cell, g), region, cell, finest, following])
        parts.append(own[:, slot.argsort()])
        end = start + regions * count
        parts.append(torch.tensor([[g], [regions], [0], [0], [end + 1 if layout.grain_starts else size]]))
        first.append(torch.cat([slot[::count], torch.tensor([end])]))
        grid = rearrange(slot, "(r c i j) -> (r i) (c j)", c=layout.grids[0][1], i=rh, j=rw)
        at_cell.append(layout.expand(grid, g).flatten())
        start = end + 1
    grain, region, cell, finest, following = torch.cat(parts, dim=1)[:, :size]  # the end of the last grain is implied
    is_code = region < regions
    is_end = ~is_code & (F.pad(grain[1:], (0, 1), value=layout.num_grains) > grain)
    costs = torch.tensor(layout.codes_per_region)
    is_last = is_code & (costs[grain] == cell + 1)
    columns = grain, region, cell, finest, is_code, is_end, is_last, following
    return SlotTable(*(part.to(device) for part in (*columns, torch.stack(first), torch.stack(at_cell), costs)))


def other_classes(found: Sequence[str], wanted: Sequence[str]) -> str:
    """In words, which names of classes differ, each at its place; empty if none does, or either has no names."""
    pairs = [pair for pair in zip_longest(found, wanted, fillvalue="none") if len(set(pair)) > 1]
    few = [", ".join(names) for names in zip(*pairs[:3], strict=True)]
    return f"classes {few[0]} instead of {few[1]}" if pairs and found and wanted else ""


def check_layouts(found: CodeLayout, wanted: CodeLayout, codes: str, model: str) -> None:
    """Refuse codes of another layout than a model's (both in words); what codes do not depend on does not matter."""
    a, b = found.to_config(), wanted.to_config()
    same = [key for key in a if key not in ("classes", "last_grain_order", "grain_starts")]
    differing = [f"{key} {a[key]} instead of {b[key]}" for key in same if a[key] != b[key]]
    if differing:
        raise GraincodeError(f"{codes} do not fit {model}: {', '.join(differing)}; take the tokenizer that made them")


def _pair(name: str, value: Any) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    holds = len(pair) == 2 and all(isinstance(side, int) and side > 0 for side in pair)
    check(name, value, "a positive whole number or a pair [height,width] of them", holds)
    return pair
