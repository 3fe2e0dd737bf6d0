"""DGiT-AR in sampling and training, against what each could cost.

Grids of 16 and 32, half of the regions fine (640 codes), width 256, 2 + 4 layers, 8 heads, batch 4.
"""

from __future__ import annotations

import time
from unittest import mock

import torch
import torch.nn.functional as F
from timing import Result, paired

from graincode.core.codes import GrainCodes
from graincode.core.layout import CodeLayout
from graincode.core.logits import draw
from graincode.core.losses import weighted_sum
from graincode.core.rng import uniforms
from graincode.core.sequences import CodeSequences
from graincode.generator import AutoregressiveObjective, ClassConditioning, DGiTAR, HeterogeneousEmbedding, Transformer
from graincode.generator.dgit_ar import CachedLogits
from graincode.generator.transformer import KeyValueCache
from graincode.sampling import AutoregressiveSampler

BATCH, WIDTH, HEADS = 4, 256, 8
PROBES = 12
LAYOUT = CodeLayout((256, 256), ((16, 16), (8, 8)), 1024, 10)
LABELS = torch.arange(BATCH)


def make() -> DGiTAR:
    """The model of all of these."""
    torch.manual_seed(0)
    stacks = (Transformer(WIDTH, layers, HEADS) for layers in (2, 4))
    return DGiTAR(
        LAYOUT, WIDTH, HeterogeneousEmbedding(LAYOUT, WIDTH), ClassConditioning(LAYOUT, WIDTH), *stacks
    ).eval()  # fmt: skip


class HalfFine:
    """A model's logits with the next region set, so that every sample has half of its regions fine: 640 codes."""

    def __init__(self, logits, layout: CodeLayout) -> None:
        self.logits, self.layout = logits, layout

    def take(self, slots, contents):
        self.slots = slots
        self.logits.take(slots, contents)

    def regions(self):
        region = self.layout.slots().region[self.slots.clamp(max=self.layout.num_slots - 1)]
        region = torch.where(self.slots == self.layout.start_slot, -2, region)
        following = torch.where(region + 2 < self.layout.num_regions, region + 2, self.layout.num_regions)
        return self.logits.regions().scatter(1, following[:, None], 1e4)

    def contents(self, slots):
        return self.logits.contents(slots)


def sampled(model: DGiTAR) -> CodeSequences:
    """A batch of samples of 640 codes."""
    numbers = uniforms(0, range(BATCH), LAYOUT.max_tokens, 2)
    sequences = AutoregressiveSampler()(
        HalfFine(CachedLogits(model, model.condition(LABELS, None)), LAYOUT), LAYOUT, numbers
    )
    tokens = int((sequences.slots[0] < LAYOUT.num_slots).sum())
    assert tokens == 641, tokens
    return sequences


def cached_sampler() -> Result:
    """Against the same model without a cache."""
    model, numbers = make(), uniforms(0, range(BATCH), 1, 1)[:, 0, 0]
    sampled(model)
    began = time.perf_counter()
    sequences = sampled(model)
    seconds, tokens = time.perf_counter() - began, 641
    # without a cache step t recomputes t tokens: timed at evenly spaced steps and summed, as all would take minutes
    reference = 0.0
    for probe in range(PROBES):
        length = round((probe + 0.5) * tokens / PROBES)
        part = CodeSequences(sequences.slots[:, :length], sequences.contents[:, :length], LAYOUT)
        began = time.perf_counter()
        with torch.no_grad():
            hidden, contents = model.hidden_and_contents(part, model.condition(LABELS, None))
            model.regions_of(hidden[:, -1], torch.zeros_like(LABELS))
            draw(contents[:, -1], numbers)
        reference += (time.perf_counter() - began) * tokens / PROBES
    what = f"no cache ({PROBES} steps timed, summed)"
    return Result("cached sampler", BATCH / seconds, "images/s", what, reference / seconds, ">= 40")


def sampler_floor() -> Result:
    """Against the linear layers and heads that every step needs, on a batch of tokens."""
    model = make()
    linears = [part for part in model.modules() if isinstance(part, torch.nn.Linear)]
    inputs = [torch.randn(BATCH, part.in_features) for part in linears]

    @torch.no_grad()
    def floor() -> None:
        for _ in range(641):
            for part, x in zip(linears, inputs, strict=True):
                F.linear(x, part.weight, part.bias)

    seconds, ratio = paired(lambda: sampled(model), floor, 3)
    return Result("sampler, its floor", BATCH / seconds, "images/s", "its linear layers alone", ratio, ">= 0.5")


def sampler_and_gpt() -> Result:
    """Per code, against a plain decoder of one stack with a cache, which draws 640 codes of one grid."""
    model = make()
    table, position, stack = (
        torch.nn.Embedding(1025, WIDTH),
        torch.nn.Embedding(640, WIDTH),
        Transformer(WIDTH, 6, HEADS),
    )
    head, generator = torch.nn.Linear(WIDTH, 1024), torch.Generator().manual_seed(0)

    @torch.no_grad()
    def plain() -> None:
        cache, code = KeyValueCache(stack, BATCH, 640), torch.full((BATCH, 1), 1024)
        for step in range(640):
            cache.reach()
            states = stack(table(code) + position.weight[step], cache)
            code = torch.multinomial(head(states[:, 0]).softmax(-1), 1, generator=generator)

    seconds, ratio = paired(lambda: sampled(model), plain, 3)
    what = "a plain cached decoder of as many layers"
    return Result("sampler, a code", seconds / 640 * 1e3, "ms", what, ratio, ">= 0.91")


def training_step() -> Result:
    """Forward and backward, against attention by explicit matrices of scores."""
    model, grains = make().train(), (torch.arange(256).view(1, 16, 16) % 2).expand(BATCH, -1, -1)
    coarse, fine = (torch.randint(1024, (BATCH, *grid)) for grid in LAYOUT.grids)
    indices = torch.where(LAYOUT.expand(grains, 0).bool(), fine, LAYOUT.expand(coarse, 0))
    codes, objective = GrainCodes(grains.contiguous(), indices, LAYOUT), AutoregressiveObjective()

    def step() -> None:
        weighted_sum(objective(model(codes, LABELS))).backward()

    def explicit_step() -> None:
        with mock.patch.object(F, "scaled_dot_product_attention", explicit_attention):
            step()

    seconds, ratio = paired(step, explicit_step, 3)
    return Result("DGiT-AR, a training step", seconds * 1e3, "ms", "explicit attention matrices", ratio, ">= 1.7")


def explicit_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False) -> torch.Tensor:
    """As it is written in a paper."""
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v
