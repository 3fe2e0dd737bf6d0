"""DGiT-AR: codes one after the other, coarse regions first, the position and the content of each in turn."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graincode.core.codes import GrainCodes, true_places
from graincode.core.errors import GraincodeError, check, check_choice
from graincode.core.layout import CodeLayout
from graincode.core.logits import legal_regions
from graincode.core.prompts import CodeMask, CodePrefix
from graincode.core.rng import SampleRng
from graincode.core.sequences import CodeSequences, to_sequences
from graincode.generator.base import Generator
from graincode.generator.embedding import Conditioning, ContentHead, Head, HeterogeneousEmbedding, initialize
from graincode.generator.graphs import GraphedSteps
from graincode.generator.transformer import KeyValueCache, Rotary, Transformer, normalized, refuse_modulation
from graincode.sampling import AutoregressiveSampler

LastPositions = Literal["implied", "modelled"]
GrainMap = Literal["modelled", "given"]


@dataclass(frozen=True)
class SequenceLikelihood:
    """Negative log-likelihood of a batch of sequences, in nats.

    Attributes:
        content, position: (B, L), of each content and position; 0 where there is none, or it is implied.
        is_code: (B, L) bool, where there is a code. is_decision: likewise, where the next region or end was a choice.
        grain: (B, L) long, of each token.
        num_grains, decided_grains: K, and number of grains, from the coarsest, whose positions are predicted.
    """

    content: Tensor
    position: Tensor
    is_code: Tensor
    is_decision: Tensor
    grain: Tensor
    num_grains: int
    decided_grains: int

    @property
    def total(self) -> Tensor:
        """(B,) nats per image: codes and grain map together."""
        return (self.content + self.position).sum(dim=1)

    def bits(self) -> dict[str, Tensor]:
        """(B,) bits of each image, without gradients: `per_image`, and its parts `content_g` and `position_g`."""
        content, position = self.content.detach(), self.position.detach()
        nats = {"per_image": (content + position).sum(dim=1)}
        nats |= {f"content_{g}": (content * (self.grain == g)).sum(dim=1) for g in range(self.num_grains)}
        nats |= {f"position_{g}": (position * (self.grain == g)).sum(dim=1) for g in range(self.decided_grains)}
        return {name: values / math.log(2) for name, values in nats.items()}


class DGiTAR(Generator):
    """Position and content transformers, stacked: p(next position | past) p(content | next position, past).

    A position is the region that comes next; the other cells of a region, and all positions of the last grain, are
    implied. Likelihood and sampling use one distribution, renormalised over the legal regions. The condition is added
    to every token, and modulates the blocks of transformers with `adaln`.

    With one grain this is a decoder in raster order that is given the position of the next code; without
    `next_position` and position layers, a plain one.

    Args:
        width: of each token, in all parts.
        last_positions: "implied" by the regions that are left, or "modelled": the last grain's regions are then
            predicted over all regions and counted in bits, as published; samples tile all the same.
        next_position: whether the content transformer gets the position of the next code; needed with several grains.
        grain_map: "modelled", or "given" with each sample: it is then part of the condition, as the sum of a vector for
            each region and grain, and no position is predicted.
    Raises:
        GraincodeError: the parts or options do not fit each other or the layout.
    Source: DQ-Transformer (arXiv 2305.11718), section 3.3; regions, legality and implied positions are our reading.
    """

    sampler = AutoregressiveSampler
    has_likelihood = True
    steps: GraphedSteps | None = None

    def __init__(
        self,
        layout: CodeLayout,
        width: int,
        embedding: HeterogeneousEmbedding,
        conditioning: Conditioning,
        position_transformer: Transformer,
        content_transformer: Transformer,
        last_positions: LastPositions = "implied",
        next_position: bool = True,
        grain_map: GrainMap = "modelled",
    ) -> None:
        super().__init__()
        many, given = layout.num_grains > 1, grain_map == "given"
        check_choice("grain_map", grain_map, GrainMap)
        check_choice("last_positions", last_positions, LastPositions)
        for transformer in (position_transformer, content_transformer):
            check("causal", transformer.causal, "true, or codes would see what they predict", transformer.causal)
            if many:
                embedding.check_positions(transformer)
        check("next_position", next_position, "true, or codes of one grain", next_position or not many)
        check("grain_map", grain_map, "modelled with one grain", many or not given)
        implied, chosen = last_positions == "implied", many and not given
        check("last_positions", last_positions, "implied with one grain or a given map", implied or chosen)
        if not conditioning.classes and not given:
            refuse_modulation(position_transformer, content_transformer)
        self.layout, self.next_position = layout, next_position
        self.embedding, self.conditioning = embedding, conditioning
        self.position_transformer, self.content_transformer = position_transformer, content_transformer
        rotary = position_transformer.rotary or content_transformer.rotary
        self.rotary = Rotary(layout.coordinates(), content_transformer.head_dim) if rotary else None
        self.needs_prompt, self.extra_tokens = given, layout.num_marks
        self.decided_grains = layout.num_ends + (not implied) if chosen else 0
        self.map = nn.Embedding(layout.num_grains * layout.num_regions, width) if given else None
        initialize(self.map)
        outputs = self.decided_grains * (layout.num_regions + 1)
        self.region_head = Head(width, outputs) if outputs else None
        self.content_head = ContentHead(layout, width)
        initialize(self.region_head, self.content_head)

    def prompt_of(self, codes: GrainCodes) -> CodePrefix | None:
        return CodePrefix.of_map(replace(codes, layout=self.layout)) if self.needs_prompt else None

    @property
    def stacks(self) -> tuple[Transformer, Transformer]:
        """The position and the content transformer."""
        return self.position_transformer, self.content_transformer

    def forward(self, codes: GrainCodes, labels: Tensor, rng: SampleRng | None = None) -> SequenceLikelihood:
        """Likelihood of a batch of codes, given (B,) labels; label dropout draws from `rng`, or torch's generator."""
        layout, table = self.layout, self.layout.slots(codes.grains.device)
        codes = replace(codes, layout=layout, counted=codes.counts)
        targets = to_sequences(codes)
        known = targets.slots.clamp(max=layout.num_slots - 1)
        grain, is_code = table.grain[known], targets.is_code
        begins = table.is_end[known] | (is_code & (table.cell[known] == 0))
        decides = targets.is_token & (grain < self.decided_grains) & begins
        hidden, content_logits = self.hidden_and_contents(targets, self.condition(labels, codes.grains, rng))
        logits, entries = content_logits.flatten(0, 1), targets.contents.flatten()
        content = F.cross_entropy(logits, entries, ignore_index=layout.no_content, reduction="none")
        content = content.view_as(targets.contents)
        position = torch.zeros_like(content)
        if self.region_head is not None:
            before = F.pad(known[:, :-1], (1, 0))
            same = F.pad((grain[:, 1:] == grain[:, :-1]) & is_code[:, :-1], (1, 0), value=False)
            count = sum(codes.counts.regions[: self.decided_grains])
            at = true_places(decides.flatten(), count + len(codes) * min(self.decided_grains, layout.num_ends))
            last, own = torch.where(same, table.region[before], -1).flatten()[at], grain.flatten()[at]
            coded = codes.grains.flatten(1)[at // decides.shape[1]] < own[:, None]
            any_region = F.pad(torch.ones_like(coded), (0, 1), value=False)  # where the last grain is modelled
            free = torch.where((own == layout.num_grains - 1)[:, None], any_region, legal_regions(coded, last))
            logits = self.regions_of(hidden.flatten(0, 1)[at], own).masked_fill(~free, -torch.inf)
            losses = F.cross_entropy(logits, table.region[known.flatten()[at]], reduction="none")
            position = position.flatten().index_put((at,), losses.to(position.dtype)).view_as(position)
        counts = layout.num_grains, self.decided_grains
        return SequenceLikelihood(content, position, is_code, decides, grain, *counts)

    def condition(self, labels: Tensor, grains: Tensor | None, rng: SampleRng | None = None) -> Tensor:
        """The (B, width) condition of (B,) labels and, where they are given, (B, H0, W0) grain maps."""
        found = self.conditioning(labels, rng)
        if self.map is None:
            return found
        regions = torch.arange(self.layout.num_regions, device=labels.device) * self.layout.num_grains
        return found + self.map(regions + grains.flatten(1)).sum(dim=1)

    def hidden_and_contents(self, targets: CodeSequences, condition: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, width) states that predict each token's region, and the (B, L, V) logits of its content."""
        slots = F.pad(targets.slots[:, :-1], (1, 0), value=self.layout.start_slot)
        contents = F.pad(targets.contents[:, :-1], (1, 0), value=self.layout.no_content)
        hidden = self.states(slots, contents, condition)
        return hidden, self.contents(hidden, slots, targets.slots, condition)

    def states(
        self, slots: Tensor, contents: Tensor, condition: Tensor, modulations: Any = None, cache: Any = None
    ) -> Tensor:
        """(B, L, width) states of the position transformer after each token, (B, L) slots and contents, under a
        (B, width) condition, whose `modulations` may be computed already. With a cache of the tokens before, L = 1."""
        stack, start = self.position_transformer, None if cache is None else cache.positions[:, None]
        tokens = self.embedding(slots, contents, condition, start)
        return self.transform(stack, tokens, slots, condition, modulations, cache=cache)

    def contents(
        self, hidden: Tensor, last: Tensor, slots: Tensor, condition: Tensor, modulations: Any = None, cache: Any = None
    ) -> Tensor:
        """(B, L, V) logits of the content of the token after each of L tokens.

        Args:
            hidden: (B, L, width), what `states` returns for the L tokens.
            last, slots: (B, L) slots of the L tokens, and of those that follow them.
            modulations, cache: as of `states`, but of the content transformer.
        """
        tokens = hidden + normalized(self.embedding.at(slots)) if self.next_position else hidden
        at = slots if self.next_position else last
        states = self.transform(self.content_transformer, tokens, at, condition, modulations, cache=cache)
        return self.content_head(states, slots)

    def regions_of(self, hidden: Tensor, grain: Tensor) -> Tensor:
        """(N, R + 1) logits of (N, width) states and their (N,) current grains, by each grain's own head."""
        if self.region_head is None:
            return hidden.new_zeros(len(hidden), self.layout.num_regions + 1)
        logits = self.region_head(hidden).unflatten(1, (self.decided_grains, -1))
        return logits[torch.arange(len(hidden), device=hidden.device), grain.clamp(max=self.decided_grains - 1)]

    def caches(self, batch: int) -> list[KeyValueCache]:
        """Empty caches of both transformers for a batch of samples."""
        return [KeyValueCache(stack, batch, self.layout.max_tokens) for stack in self.stacks]

    def accept(self, given: CodePrefix | CodeMask | None) -> CodePrefix | None:
        if isinstance(given, CodeMask):
            raise GraincodeError("this generator has a fixed order: expected first grains, regions or a grain map")
        if self.needs_prompt and (given is None or bool((given.positions < given.tokens).any())):
            raise GraincodeError("this generator draws contents alone: expected a grain map to be given")
        own = "those of dataclasses.replace(codes, layout=generator.layout), in this generator's order"
        check("given", "codes of other classes or order", own, given is None or given.layout == self.layout)
        return given

    def compile_sampling(self) -> None:
        """Draw samples by CUDA graphs from now on, on the GPU that the model is on; nothing changes on a CPU."""
        if self.device.type == "cuda":
            self.steps = GraphedSteps(self.states, self.contents, self.stacks, self.layout.max_tokens)

    def fixed(self, sampler: AutoregressiveSampler) -> dict[str, str]:
        found = super().fixed(sampler)
        if not self.decided_grains:
            why = "it is given grain maps" if self.needs_prompt else "all codes are of one grain"
            found |= {f"region_{name}": why for name in sampler.truncation()}
        return found

    def logits(self, labels: Tensor, given: CodePrefix | None) -> CachedLogits:
        return CachedLogits(self, self.asked(labels, given))

    def asked(self, labels: Tensor, given: CodePrefix | None) -> Tensor:
        """The (B, width) condition of samples, of (B,) labels; what is given may be of the first part of them alone."""
        grains = given.grains.repeat(len(labels) // len(given), 1, 1) if self.needs_prompt else None
        return self.condition(labels, grains)


class CachedLogits:
    """`AutoregressiveLogits` of a `DGiTAR` in evaluation mode and a (B, width) condition, with key/value caches."""

    def __init__(self, model: DGiTAR, condition: Tensor) -> None:
        self.model, self.condition = model, condition.contiguous()
        self.modulations = [stack.modulations(condition) for stack in model.stacks]
        self.steps = model.steps or model
        self.caches = self.steps.caches(len(condition))
        table = model.layout.slots(condition.device)
        self.next_grain = F.pad(table.grain + table.is_end, (0, 2))  # of the token after each slot

    def take(self, slots: Tensor, contents: Tensor) -> None:
        self.caches[0].reach()
        self.slots, known = slots[:, None], (self.condition, self.modulations[0], self.caches[0])
        self.hidden = self.steps.states(self.slots, contents[:, None], *known)

    def regions(self) -> Tensor:
        return self.model.regions_of(self.hidden[:, 0], self.next_grain[self.slots[:, 0]])

    def contents(self, slots: Tensor) -> Tensor:
        self.caches[1].reach()
        known = self.condition, self.modulations[1], self.caches[1]
        return self.steps.contents(self.hidden, self.slots, slots[:, None], *known)[:, 0]

    def begin(self, rows: Tensor, labels: Tensor, given: CodePrefix | None) -> None:
        for cache in self.caches:
            cache.restart(rows)
        rows, condition = rows.to(labels.device), self.model.asked(labels, given)
        self.condition[rows] = condition
        for stack, parts in zip(self.model.stacks, self.modulations, strict=True):
            for part, new in zip(parts or (), stack.modulations(condition) or (), strict=True):
                part[:, rows] = new
