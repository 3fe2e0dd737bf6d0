"""Codes to sequences and back, against Python loops over positions."""

from __future__ import annotations

import torch
from timing import Result, paired

from graincode.core.codes import GrainCodes
from graincode.core.layout import CodeLayout
from graincode.core.sequences import from_sequences, to_sequences


def sequences() -> Result:
    """16 images of 256x256 at F16/F8, half of the regions fine: to sequences and back."""
    layout = CodeLayout((256, 256), ((16, 16), (8, 8)), 1024)
    generator = torch.Generator().manual_seed(0)
    grains = torch.randint(2, (16, 16, 16), generator=generator)
    coarse, fine = (torch.randint(1024, (16, *grid), generator=generator) for grid in layout.grids)
    is_fine = layout.expand(grains, 0).bool()
    codes = GrainCodes(grains, torch.where(is_fine, fine, layout.expand(coarse, 0)), layout)
    back = from_sequences(to_sequences(codes))
    looped = loops(codes)
    assert torch.equal(back.indices, looped), "both ways must give the same"
    seconds, ratio = paired(lambda: from_sequences(to_sequences(codes)), lambda: loops(codes), 5)
    return Result(
        "codes <-> sequences", seconds * 1e3, "ms / 16 images", "Python loops over positions", ratio, ">= 500"
    )


def loops(codes: GrainCodes) -> torch.Tensor:
    """The same conversion as published code of this kind does it: one position at a time."""
    layout, rows = codes.layout, []
    for image in range(len(codes)):
        tokens = []
        for grain, (high, wide) in enumerate(layout.region_cells):
            step_h, step_w = layout.region_cells[-1][0] // high, layout.region_cells[-1][1] // wide
            for row in range(layout.grids[0][0]):
                for column in range(layout.grids[0][1]):
                    if codes.grains[image, row, column] == grain:
                        for i in range(high):
                            for j in range(wide):
                                top = (row * high + i) * step_h
                                left = (column * wide + j) * step_w
                                tokens.append((top, left, step_h, step_w, int(codes.indices[image, top, left])))
        rows.append(tokens)
    indices = torch.empty_like(codes.indices)
    for image, tokens in enumerate(rows):
        for top, left, high, wide, content in tokens:
            for i in range(high):
                for j in range(wide):
                    indices[image, top + i, left + j] = content
    return indices
