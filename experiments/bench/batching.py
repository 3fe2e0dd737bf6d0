"""Continuous batching of variable-length codes against raster order, which has one length, by process time.

The layouts and the model of the study on Fashion-MNIST (`generator/size=tiny`) with random weights; grain maps of 16 to
48 codes, 32 on average, are given, so that lengths are not those of an untrained model.
"""

from __future__ import annotations

import time

import torch
from timing import Result, paired

from graincode.core.codes import GrainCodes
from graincode.core.layout import CodeLayout
from graincode.core.prompts import CodePrefix
from graincode.generator import ClassConditioning, DGiTAR, HeterogeneousEmbedding, Transformer

SAMPLES, BATCH, WIDTH, HEADS = 2000, 250, 128, 4
LABELS = torch.arange(SAMPLES) % 10


def _make(*grains: tuple[int, int]) -> DGiTAR:
    torch.manual_seed(0)
    layout = CodeLayout((32, 32), grains, 256, 10, last_grain_order="rows")
    block = {"norm": "rms", "mlp": "swiglu", "qk_norm": True, "rotary": True}
    stacks = (Transformer(WIDTH, 2, HEADS, **block) for _ in range(2))
    return DGiTAR(
        layout, WIDTH, HeterogeneousEmbedding(layout, WIDTH), ClassConditioning(layout, WIDTH), *stacks
    ).eval()  # fmt: skip


def _maps(layout: CodeLayout) -> CodePrefix:
    """Grain maps of 0 to 10 or 11 fine regions of 16, as many images of each number, at random places."""
    generator = torch.Generator().manual_seed(0)
    fine = torch.linspace(0, 32 / 3, SAMPLES)[torch.randperm(SAMPLES, generator=generator)].round()
    rank = torch.rand(SAMPLES, layout.num_regions, generator=generator).argsort(dim=1)
    grains = (rank < fine[:, None]).long().view(SAMPLES, *layout.grids[0])
    return CodePrefix.of_map(GrainCodes(grains, torch.zeros(SAMPLES, *layout.grids[-1]).long(), layout))


def _against(grain: tuple[int, int], what: str, goal: str) -> Result:
    ours, raster = _make((8, 8), (4, 4)), _make(grain)
    given = _maps(ours.layout)
    seconds, ratio = paired(
        lambda: ours.sample(LABELS, batch_size=BATCH, given=given),
        lambda: raster.sample(LABELS, batch_size=BATCH),
        3,
        time.process_time,
    )
    return Result(f"continuous batching, {what}", SAMPLES / seconds, "images/s", f"raster order, {what}", ratio, goal)


def equal_length() -> Result:
    """32 codes on average, against 32 codes."""
    return _against((8, 4), "32 codes", ">= 0.9")


def finest() -> Result:
    """32 codes on average, against the 64 of the finest grid."""
    return _against((4, 4), "64 codes", ">= 1.9")
