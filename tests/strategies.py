"""Random layouts and codes for property-based tests."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from graincode.core.codes import GrainCodes
from graincode.core.layout import CodeLayout

LAYOUTS = (
    CodeLayout((32, 32), ((8, 8),), 16),
    CodeLayout((32, 32), ((4, 8),), 16, 3),
    CodeLayout((32, 32), ((8, 8), (4, 4)), 256, 10),
    CodeLayout((32, 64), ((16, 16), (8, 4)), 7, 2),
    CodeLayout((64, 32), ((32, 16), (16, 16), (4, 8)), 300, 5),
    CodeLayout((32, 32), ((16, 16), (8, 8), (4, 4)), 5, 1),
    CodeLayout((32, 64), ((16, 16), (8, 4)), 7, 2, last_grain_order="rows"),
    CodeLayout((32, 32), ((16, 16), (8, 8)), 16, 3, grain_starts=True),
    CodeLayout((32, 48), ((16, 16), (8, 16), (8, 8), (2, 4)), 5, 2, "per_grain", "rows", True),
)


def random_codes(layout: CodeLayout, grains: torch.Tensor, seed: int = 0) -> GrainCodes:
    """Codes with given (B, H0, W0) grain maps and random contents."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.zeros(len(grains), *layout.grids[-1], dtype=torch.long)
    for g, grid in enumerate(layout.grids):
        values = torch.randint(layout.codebook_size, (len(grains), *grid), generator=generator)
        here = layout.expand(layout.cells_at(grains, g).long(), g).bool()
        indices = torch.where(here, layout.expand(values, g), indices)
    return GrainCodes(grains, indices, layout)


def random_grains(layout: CodeLayout, batch: int, seed: int = 0) -> torch.Tensor:
    """Grain maps, the first all-coarse and the second all-fine."""
    grains = torch.randint(layout.num_grains, (batch, *layout.grids[0]), generator=torch.Generator().manual_seed(seed))
    grains[0] = 0
    if batch > 1:
        grains[1] = layout.num_grains - 1
    return grains


@st.composite
def grain_codes(draw: st.DrawFn) -> GrainCodes:
    """Codes of any of the layouts, with any grain maps."""
    layout = draw(st.sampled_from(LAYOUTS))
    batch = draw(st.integers(1, 4))
    flat = draw(
        st.lists(
            st.integers(0, layout.num_grains - 1),
            min_size=batch * layout.num_regions,
            max_size=batch * layout.num_regions,
        )
    )
    return random_codes(layout, torch.tensor(flat).view(batch, *layout.grids[0]), draw(st.integers(0, 2**20)))
