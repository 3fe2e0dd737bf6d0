"""The cached sampler, against the same model without a cache."""

from __future__ import annotations

import time

import torch
from run import Result

from graincode.core.codes import CodeLayout, CodeSequences
from graincode.core.logits import draw
from graincode.core.rng import uniforms
from graincode.generator import CachedLogits, ClassConditioning, DGiTAR, HeterogeneousEmbedding, Transformer
from graincode.sampling import AutoregressiveSampler

BATCH = 4
PROBES = 12


class HalfFine:
    """A model's logits with the next region set, so that every sample has half of its regions fine: 640 codes."""

    def __init__(self, logits, layout: CodeLayout) -> None:
        self.logits, self.layout = logits, layout

    def next_region(self, slots, contents):
        scores = self.logits.next_region(slots, contents)
        table = self.layout.slots()
        region = table.region[slots.clamp(max=self.layout.num_slots - 1)]
        region = torch.where(slots == self.layout.start_slot, -2, region)
        following = torch.where(region + 2 < self.layout.num_regions, region + 2, self.layout.num_regions)
        return scores.scatter(1, following[:, None], 1e4)

    def next_content(self, slots):
        return self.logits.next_content(slots)


def cached_sampler() -> Result:
    """Grids of 16 and 32, half fine (640 codes), width 256, 2 + 4 layers, 8 heads, batch 4."""
    torch.manual_seed(0)
    layout, width = CodeLayout((256, 256), ((16, 16), (8, 8)), 1024, 10), 256
    model = DGiTAR(
        layout, width, HeterogeneousEmbedding(layout, width), ClassConditioning(layout, width),
        Transformer(width, 2, 8), Transformer(width, 4, 8),
    ).eval()  # fmt: skip
    labels, numbers = torch.arange(BATCH), uniforms(0, range(BATCH), layout.max_tokens, 2)
    began = time.perf_counter()
    sequences = AutoregressiveSampler()(HalfFine(CachedLogits(model, labels), layout), layout, numbers)
    seconds = time.perf_counter() - began
    tokens = int((sequences.slots[0] < layout.num_slots).sum())
    assert tokens == 641, tokens
    # without a cache step t recomputes t tokens: timed at evenly spaced steps and summed, as all would take minutes
    reference = 0.0
    for probe in range(PROBES):
        length = round((probe + 0.5) * tokens / PROBES)
        part = CodeSequences(sequences.slots[:, :length], sequences.contents[:, :length], layout)
        began = time.perf_counter()
        with torch.no_grad():
            hidden, contents = model.hidden_and_contents(part, labels)
            model.regions_of(hidden[:, -1], torch.zeros_like(labels))
            draw(contents[:, -1], numbers[:, 0, 0])
        reference += (time.perf_counter() - began) * tokens / PROBES
    return Result(
        "cached sampler",
        BATCH / seconds,
        "images/s",
        f"no cache ({PROBES} steps timed, summed)",
        reference / seconds,
        ">= 40",
    )
