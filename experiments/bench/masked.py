"""DGiT-NAR in sampling: 8 steps, width 256, 6 layers, 8 heads, batch 4."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timing import Result, paired
from torch import Tensor

from graincode.core.layout import CodeLayout
from graincode.core.rng import uniforms
from graincode.core.schedules import MASK_SCHEDULES
from graincode.generator import ClassConditioning, DGiTNAR, HeterogeneousEmbedding, Transformer
from graincode.sampling import MaskedSampler

BATCH, WIDTH, HEADS, LAYERS, STEPS = 4, 256, 8, 6, 8
SHORT = CodeLayout((256, 256), ((16, 16),), 1024, 10)
FIXED = CodeLayout((256, 256), ((8, 8),), 1024, 10)
DUAL = CodeLayout((256, 256), ((16, 16), (8, 8)), 1024, 10)
LABELS = torch.arange(BATCH)


def make(layout: CodeLayout) -> DGiTNAR:
    """A model; that of a grain map has two of its layers."""
    torch.manual_seed(0)
    of_map, of_contents = (2, LAYERS - 2) if layout.num_grains > 1 else (0, LAYERS)
    stacks = (Transformer(WIDTH, layers, HEADS, causal=False) for layers in (of_map, of_contents))
    embedding = HeterogeneousEmbedding(layout, WIDTH, index=False)
    return DGiTNAR(layout, WIDTH, embedding, ClassConditioning(layout, WIDTH), *stacks).eval()


class HalfFine:
    """A model's logits with every other region coarse, so that every sample has 640 codes."""

    def __init__(self, logits) -> None:
        self.logits, self.contents = logits, logits.contents

    def grains(self, grains: Tensor) -> Tensor:
        wanted = torch.arange(grains.shape[1]) % 2
        return self.logits.grains(grains) + 1e4 * F.one_hot(wanted, 2)


def sampled(model: DGiTNAR, codes: int) -> None:
    """A batch of samples of so many codes."""
    sampler, logits = MaskedSampler(steps=STEPS, grain_steps=STEPS), model.logits(LABELS, None)
    numbers = uniforms(0, range(BATCH), *sampler.numbers(model.layout))
    if model.layout.num_grains > 1:
        logits = HalfFine(logits)
    lengths = sampler(logits, model.layout, numbers).is_code.sum(dim=1)
    assert lengths.tolist() == [codes] * BATCH, lengths


def masked_floor() -> Result:
    """Against the matrix products that every step needs; logits are needed of what is still masked alone."""
    model, codes = make(SHORT), 256
    linears = [part for part in model.modules() if isinstance(part, torch.nn.Linear) and part is not model.content_head]
    inputs = [torch.randn(BATCH, codes, part.in_features) for part in linears]
    masked, total = torch.tensor([codes]), torch.tensor([codes])
    heads = []
    for step in range(1, STEPS + 1):
        heads.append(torch.randn(BATCH, int(masked), WIDTH))
        masked = MASK_SCHEDULES["cosine"].remaining(masked, total, step, STEPS)
    q, k, v = torch.randn(3, BATCH, HEADS, codes, WIDTH // HEADS)

    @torch.no_grad()
    def floor() -> None:
        for states in heads:
            for part, x in zip(linears, inputs, strict=True):
                F.linear(x, part.weight, part.bias)
            F.linear(states, model.content_head.weight, model.content_head.bias)
            for _ in range(LAYERS):
                (q @ k.transpose(-1, -2)) @ v

    seconds, ratio = paired(lambda: sampled(model, codes), floor, 5)
    return Result("masked sampler", BATCH / seconds, "images/s", "its matrix products alone", ratio, ">= 0.77")


def variable_length() -> Result:
    """640 variable-length codes against 1024 fixed-length ones, by as many layers."""
    dual, fixed = make(DUAL), make(FIXED)
    seconds, ratio = paired(lambda: sampled(dual, 640), lambda: sampled(fixed, 1024), 3)
    return Result("masked, 640 codes", seconds / BATCH, "s/image", "1024 codes of fixed length", ratio, "")
