"""What the host asks of a GPU, counted on a pretended one (`pretended.py`): kernels that it starts, and waits.

Counted, not timed: a launch costs the host some microseconds, and a model of this size a GPU hardly more.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # which the pretended device must not import
import torch.nn.functional as F
from pretended import Pretended, Seen, pretended
from pretended_graphs import Graph, pretended_graphs
from timing import Result

from graincode.core.codes import GrainCodes
from graincode.core.layout import CodeLayout
from graincode.core.losses import weighted_sum
from graincode.core.rng import SampleRng
from graincode.generator import (
    AutoregressiveObjective,
    ClassConditioning,
    DGiTAR,
    DGiTNAR,
    HeterogeneousEmbedding,
    MaskedObjective,
    Transformer,
)

LAYOUT = CodeLayout((64, 64), ((16, 16), (8, 8)), 64, 10)
WIDTH, BATCH, PUBLISHED, TOY = 32, 4, (6, 18), (2, 2)
BLOCKS = {"gpt": {}, "modern": {"norm": "rms", "mlp": "swiglu", "qk_norm": True, "rotary": True}}
# of a step that draws a region and a content, and of both passes of training, before queries and keys were rotated
# together, numbers drawn at once and masks no longer indices
BEFORE = {"gpt": 366, "modern": 778, "DGiTAR": 495, "DGiTNAR": 769}


def model_of(kind: type, block: str, layers: tuple[int, int]) -> Any:
    """A model as deep as one of published size, and narrow."""
    stacks = (Transformer(WIDTH, count, 4, causal=kind is DGiTAR, **BLOCKS[block]) for count in layers)
    embedding = HeterogeneousEmbedding(LAYOUT, WIDTH, index=kind is DGiTAR)
    return kind(LAYOUT, WIDTH, embedding, ClassConditioning(LAYOUT, WIDTH), *stacks)


def drawn(model: Any, seen: Seen, **settings: Any) -> list[tuple[int, int]]:
    """Launches and waits of each step of one batch."""
    counts = []

    def on_step(*_: int) -> None:
        counts.append((seen.launches.total(), seen.waits.total()))

    with mock.patch.object(F, "scaled_dot_product_attention", one_kernel(seen)):
        model.sample(torch.zeros(BATCH, dtype=torch.long), batch_size=BATCH, on_step=on_step, **settings)
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(counts)]


def one_kernel(seen: Seen) -> Callable[..., torch.Tensor]:
    """Attention as one launch, which the pretended device computes by several."""
    attention = F.scaled_dot_product_attention

    def counted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any = None, *rest: Any) -> torch.Tensor:
        seen.launches["attention"] += 1
        parts = (part.inner if isinstance(part, Pretended) else part for part in (q, k, v, mask))
        return Pretended(attention(*parts, *rest))

    return counted


def one_launch(seen: Seen) -> type[Graph]:
    """Graphs of which each is one launch."""

    class Replayed(Graph):
        def replay(self) -> None:
            before = seen.launches.copy()
            super().replay()
            seen.launches.clear()
            seen.launches.update(before)
            seen.launches["graph"] += 1

    return Replayed


def decoding(block: str, goal: int) -> Result:
    """A step of DGiT-AR with 6 + 18 blocks: started one by one, and as CUDA graphs."""
    with pretended() as seen:
        model = model_of(DGiTAR, block, PUBLISHED).eval().requires_grad_(False).to("cuda")
        eager = median(launches for launches, _ in drawn(model, seen))
        with pretended_graphs(one_launch(seen)):
            model.compile_sampling()
            drawn(model, seen)
            graphs = median(launches for launches, _ in drawn(model, seen))
    what = f"{BEFORE[block]} before; {graphs:.0f} with CUDA graphs"
    return Result(f"decoding step, {block}", eager, "launches", what, BEFORE[block] / eager, f"<= {goal}")


def training(kind: type) -> Result:
    """Forward and backward pass of a toy model: launches, and waits (goal: none)."""
    objective = AutoregressiveObjective() if kind is DGiTAR else MaskedObjective()
    grains = (torch.arange(16).view(1, 4, 4) % 2).expand(BATCH, -1, -1).contiguous()
    fine, coarse = torch.randint(64, (BATCH, 8, 8)), LAYOUT.expand(torch.randint(64, (BATCH, 4, 4)), 0)
    codes = GrainCodes(grains, torch.where(LAYOUT.expand(grains, 0).bool(), fine, coarse), LAYOUT)
    with pretended() as seen:
        model = model_of(kind, "gpt", TOY).train().to("cuda")
        codes, labels = codes.to("cuda"), torch.zeros(BATCH, dtype=torch.long).to("cuda")
        rng = SampleRng(0, torch.arange(BATCH).to("cuda"))
        for _ in range(2):  # the first fills tables
            seen.clear()
            weighted_sum(objective(model(codes, labels, rng))).backward()
    launches, waits, before = seen.launches.total(), seen.waits.total(), BEFORE[kind.__name__]
    what = f"{launches} launches, before {before}"
    return Result(f"training step, {kind.__name__}", waits, "waits", what, before / launches, "<= 0")


def masked() -> Result:
    """A step of the masked sampler, guided."""
    with pretended() as seen:
        model = model_of(DGiTNAR, "gpt", TOY).eval().requires_grad_(False).to("cuda")
        steps = drawn(model, seen, guidance_scale=2.0)
    waits, launches = (max(step[i] for step in steps) for i in (1, 0))
    return Result("masked sampler, a step", waits, "waits", f"5 before; {launches} launches", 5 / waits, "<= 1")
