"""DGiT-AR: codes one after the other, coarse regions first, the position and the content of each in turn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graincode.core.codes import GrainCodes
from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout
from graincode.core.logits import legal_regions
from graincode.core.prompts import CodeMask, CodePrefix
from graincode.core.rng import SampleRng
from graincode.core.sequences import CodeSequences, to_sequences
from graincode.distributed.blocks import allow_graphs
from graincode.generator.base import Generator
from graincode.generator.cache import BUCKET, KeyValueCache, StaticCache
from graincode.generator.embedding import (
    ClassConditioning,
    ContentHead,
    Head,
    HeterogeneousEmbedding,
    NoConditioning,
    initialize,
    normalized,
)
from graincode.generator.transformer import Rotary, Rotation, Transformer, refuse_modulation
from graincode.sampling import AutoregressiveSampler, Sampler


@dataclass(frozen=True)
class SequenceLikelihood:
    """Negative log-likelihood of every choice in a batch of sequences, in nats.

    Attributes:
        content: (B, L), 0 where there is no code.
        position: (B, L), 0 where the position is implied.
        is_code: (B, L) bool.
        is_decision: (B, L) bool, where the next region (or the end of the grain) was a choice.
        grain: (B, L) long, the grain of each token.
        num_grains: K.
        decided_grains: how many grains, from the coarsest, decide where their regions are.
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
        found = {"per_image": self.total.detach()}
        for name, values, count in (
            ("content", self.content, self.num_grains),
            ("position", self.position, self.decided_grains),
        ):
            for g in range(count):
                found[f"{name}_{g}"] = (values.detach() * (self.grain == g)).sum(dim=1)
        return {name: nats / math.log(2) for name, nats in found.items()}


class DGiTAR(Generator):
    """Position and content transformers, stacked: p(next position | past) p(content | next position, past).

    The region that comes next is what a position says; the other cells of a region, and all positions of the last
    grain, are implied. Likelihood and sampling use one distribution, renormalised over the legal regions. What an image
    is conditioned on is added to every token, and modulates the blocks of transformers with `adaln`. Both tokens and
    next positions are normalised, so that these are heard beside the states that they are added to.

    With one grain this is a decoder in raster order that is told where the next code is; without `next_position` and
    with no position layers, a plain one.

    Args:
        layout: the code layout.
        width: of each token.
        embedding, conditioning, position_transformer, content_transformer: its parts, of this width.
        last_positions: "implied" by the regions that are left, or "modelled": the last grain's regions are then
            predicted, and paid for, over all regions, as published; samples tile all the same.
        next_position: whether the content transformer is told where the next code is; needed with several grains.
        grain_map: "modelled", or "given": it is then part of the condition, as the sum of a vector for each region and
            grain, no position is predicted or paid for, and samples need a map each.
    Raises:
        GraincodeError: an option is unknown, or does not fit the layout or the other parts.
    Source: DQ-Transformer (arXiv 2305.11718), section 3.3; regions, legality and implied positions are our reading.
    """

    sampler = AutoregressiveSampler
    has_likelihood = True
    steps: CompiledSteps | None = None

    def __init__(
        self,
        layout: CodeLayout,
        width: int,
        embedding: HeterogeneousEmbedding,
        conditioning: ClassConditioning | NoConditioning,
        position_transformer: Transformer,
        content_transformer: Transformer,
        last_positions: Literal["implied", "modelled"] = "implied",
        next_position: bool = True,
        grain_map: Literal["modelled", "given"] = "modelled",
    ) -> None:
        super().__init__()
        if grain_map not in ("modelled", "given"):
            raise GraincodeError(f"grain_map {grain_map!r}: type generator.model.grain_map= one of modelled, given")
        if last_positions not in ("implied", "modelled"):
            raise GraincodeError(
                f"last_positions {last_positions!r}: type generator.model.last_positions= one of implied, modelled"
            )
        for name, transformer in (("position", position_transformer), ("content", content_transformer)):
            if not transformer.causal:
                raise GraincodeError(
                    f"a {name}_transformer that is not causal sees what it predicts: type "
                    f"generator.model.{name}_transformer.causal=true"
                )
            if layout.num_grains > 1:
                embedding.check_places(transformer)
        if not next_position and layout.num_grains > 1:
            raise GraincodeError(
                f"{layout.num_grains} grains without next_position: the contents could not know their places; "
                "type generator.model.next_position=true, or train on codes of one grain"
            )
        for name, value, plain in (
            ("last_positions", last_positions, "implied"),
            ("grain_map", grain_map, "modelled"),
        ):
            if value != plain and layout.num_grains == 1:
                raise GraincodeError(
                    f"{name}={value}, but all positions of codes of one grain are implied: type "
                    f"generator.model.{name}={plain}"
                )
        if not conditioning.classes and grain_map == "modelled":
            refuse_modulation(position_transformer, content_transformer)
        self.layout, self.next_position = layout, next_position
        self.embedding, self.conditioning = embedding, conditioning
        self.position_transformer, self.content_transformer = position_transformer, content_transformer
        rotary = position_transformer.rotary or content_transformer.rotary
        self.rotary = Rotary(layout.coordinates(), content_transformer.head_dim) if rotary else None
        self.needs_prompt = grain_map == "given"
        if self.needs_prompt and last_positions == "modelled":
            raise GraincodeError(
                "grain_map=given with last_positions=modelled: the map tells all positions; type "
                "generator.model.last_positions=implied"
            )
        decides = layout.num_grains > 1 and not self.needs_prompt
        self.decided_grains = layout.num_ends + (last_positions == "modelled") if decides else 0
        self.map = nn.Embedding(layout.num_grains * layout.num_regions, width) if self.needs_prompt else None
        if self.map is not None:
            nn.init.normal_(self.map.weight, std=0.02)
        outputs = self.decided_grains * (layout.num_regions + 1)
        self.region_head = Head(width, outputs) if outputs else None
        self.content_head = ContentHead(layout, width)
        table = layout.slots()  # the grain of the token behind each slot, where that decides its region
        following = F.pad(table.grain + table.is_end, (0, 2)).clamp(max=max(self.decided_grains - 1, 0))
        self.register_buffer("next_grain", following, persistent=False)
        initialize(self.region_head, self.content_head)

    @property
    def extra_tokens(self) -> int:
        return self.layout.num_ends

    def prompt_of(self, codes: GrainCodes) -> CodePrefix | None:
        return CodePrefix.of_map(codes) if self.needs_prompt else None

    @property
    def stacks(self) -> tuple[Transformer, Transformer]:
        """The position and the content transformer."""
        return self.position_transformer, self.content_transformer

    def forward(self, codes: GrainCodes, labels: Tensor, rng: SampleRng | None = None) -> SequenceLikelihood:
        """Likelihood of a batch of codes, with gradients.

        Args:
            codes: of this layout.
            labels: (B,) long classes; unused without conditioning.
            rng: random numbers of this batch, for the conditioning; taken from torch's generator if not given.
        """
        layout, table = self.layout, self.layout.slots(codes.grains.device)
        targets = to_sequences(codes)
        known = targets.slots.clamp(max=layout.num_slots - 1)
        grain, is_end = table.grain[known], table.is_end[known]
        is_token = targets.slots != layout.pad_slot
        decides = is_token & (grain < self.decided_grains) & (is_end | (table.cell[known] == 0))
        at = decides.nonzero(as_tuple=True)  # which a GPU is waited for: once, and before it has much to do
        hidden, content_logits = self.hidden_and_contents(targets, self.condition(labels, codes.grains, rng))
        content = F.cross_entropy(
            content_logits.flatten(0, 1), targets.contents.flatten(), ignore_index=layout.no_content, reduction="none"
        ).view_as(targets.contents)
        position = torch.zeros_like(content)
        if self.region_head is not None:
            before = F.pad(known[:, :-1], (1, 0))
            same = F.pad((grain[:, 1:] == grain[:, :-1]) & ~is_end[:, :-1], (1, 0), value=False)
            last, own = torch.where(same, table.region[before], -1)[at], grain[at]
            coded = codes.grains.flatten(1)[at[0]] < own[:, None]
            free = legal_regions(coded, last)
            modelled = F.pad(torch.ones_like(coded), (0, 1), value=False)  # any region, and no end
            free = torch.where((own == layout.num_grains - 1)[:, None], modelled, free)
            logits = self.regions_of(hidden[at], own).masked_fill(~free, -torch.inf)
            paid = F.cross_entropy(logits, table.region[known[at]], reduction="none")
            position[at] = paid.to(position.dtype)
        return SequenceLikelihood(
            content, position, targets.is_code, decides, grain, layout.num_grains, self.decided_grains
        )

    def condition(self, labels: Tensor, grains: Tensor | None, rng: SampleRng | None = None) -> Tensor:
        """(B, width) of (B,) labels, and of (B, H0, W0) grain maps where they are given."""
        found = self.conditioning(labels, rng)
        if self.map is None:
            return found
        regions = torch.arange(self.layout.num_regions, device=labels.device) * self.layout.num_grains
        return found + self.map(regions + grains.flatten(1)).sum(dim=1)

    def hidden_and_contents(self, targets: CodeSequences, condition: Tensor) -> tuple[Tensor, Tensor]:
        """States (B, L, width) that decide each token's region, and the (B, L, V) logits of its content.

        Args:
            targets: of B images.
            condition: (B, width), see `condition`.
        """
        slots = F.pad(targets.slots[:, :-1], (1, 0), value=self.layout.start_slot)
        contents = F.pad(targets.contents[:, :-1], (1, 0), value=self.layout.no_content)
        hidden = self.position_transformer(
            normalized(self.embedding(slots, contents) + condition[:, None]),
            rotation=self.angles(self.position_transformer, slots),
            modulations=self.position_transformer.modulations(condition),
        )
        states = self.content_transformer(
            self.content_input(hidden, targets.slots),
            rotation=self.angles(self.content_transformer, targets.slots if self.next_position else slots),
            modulations=self.content_transformer.modulations(condition),
        )
        return hidden, self.content_head(states, targets.slots)

    def angles(self, transformer: Transformer, slots: Tensor) -> Rotation | None:
        """What turns a transformer's queries and keys at (B, L) slots."""
        return self.rotary(slots) if transformer.rotary else None

    def content_input(self, hidden: Tensor, slots: Tensor) -> Tensor:
        """(B, L, width) states, and what is known of the next tokens, whose (B, L) slots they are."""
        return hidden + normalized(self.embedding.at(slots)) if self.next_position else hidden

    def regions_of(self, hidden: Tensor, grain: Tensor) -> Tensor:
        """(N, width) states and their (N,) current grains to (N, R + 1) logits, by each grain's own head."""
        if self.region_head is None:
            return hidden.new_zeros(len(hidden), self.layout.num_regions + 1)
        logits = self.region_head(hidden).unflatten(1, (self.decided_grains, -1))
        return logits[torch.arange(len(hidden), device=hidden.device), grain.clamp(max=self.decided_grains - 1)]

    def caches(self, batch: int) -> list[KeyValueCache]:
        """Empty caches of both transformers for a batch of samples."""
        return [KeyValueCache(stack, batch, self.layout.max_tokens) for stack in self.stacks]

    def next_state(
        self, slots: Tensor, contents: Tensor, condition: Tensor, cache: KeyValueCache, modulations: list[Tensor] | None
    ) -> Tensor:
        """(B, 1, width) state behind one more token.

        Args:
            slots, contents: (B, 1), of the token.
            condition: (B, 1, width).
            cache, modulations: of the position transformer.
        """
        stack = self.position_transformer
        token = normalized(self.embedding(slots, contents, cache.length) + condition)
        return stack(token, cache, self.angles(stack, slots), modulations)

    def next_content(
        self, hidden: Tensor, last: Tensor, slots: Tensor, cache: KeyValueCache, modulations: list[Tensor] | None
    ) -> Tensor:
        """(B, V) logits of the next content.

        Args:
            hidden: (B, 1, width), see `next_state`.
            last, slots: (B, 1), of the last token and of the next.
            cache, modulations: of the content transformer.
        """
        stack = self.content_transformer
        angles = self.angles(stack, slots if self.next_position else last)
        return self.content_head(stack(self.content_input(hidden, slots), cache, angles, modulations), slots)[:, 0]

    def accept(self, given: CodePrefix | CodeMask | None) -> CodePrefix | None:
        if isinstance(given, CodeMask):
            raise GraincodeError(
                "this generator draws codes in a fixed order, so that it can keep their beginnings alone: type "
                "given.grains=, given.regions= or given.map=true, or a generator_path of generator=dgit_nar"
            )
        if self.needs_prompt and (given is None or bool((given.positions < given.tokens).any())):
            raise GraincodeError("this generator draws the contents of given grain maps: type given.map=true")
        return given

    def compile_sampling(self) -> None:
        """Draw samples with what torch.compile makes of whole steps, see `CompiledSteps`, from now on."""
        self.steps = CompiledSteps(self)

    def check_sampler(self, sampler: Sampler) -> None:
        super().check_sampler(sampler)
        if self.steps is not None and sampler.drop_finished:
            raise GraincodeError(
                "drop_finished=true with hardware.compile=true would compile anew for each number of samples left: "
                "type sampler.drop_finished=false, or hardware.compile=false"
            )
        plain = AutoregressiveSampler().truncation("region_")
        for name, value in sampler.truncation("region_").items():
            if not self.decided_grains and value != plain[name]:
                why = "it is given grain maps" if self.needs_prompt else "all codes are of one grain"
                raise GraincodeError(
                    f"region_{name}={value}, but this generator draws no regions, as {why}: type "
                    f"sampler.region_{name}={plain[name]}"
                )

    def logits(self, labels: Tensor, given: CodePrefix | None) -> CachedLogits:
        grains = given.grains.repeat(len(labels) // len(given), 1, 1) if self.needs_prompt else None
        return CachedLogits(self, self.condition(labels, grains))


class CompiledSteps:
    """The two steps of a `DGiTAR`, compiled: a graph of each for every `BUCKET` tokens, on a GPU as CUDA graphs.

    A captured graph is bound to the memory that it was captured on, so batches of one size share their caches, and only
    one batch is drawn at a time.

    Args:
        model: on its device, in its precision.
    """

    def __init__(self, model: DGiTAR) -> None:
        self._model, self._batch, self._caches = model, 0, []
        on_gpu = model.content_head.weight.is_cuda
        allow_graphs(4 * -(-model.layout.max_tokens // BUCKET))  # for some more batch sizes, guided or not
        self._next_state, self._next_content = (
            torch.compile(step, dynamic=False, mode="reduce-overhead" if on_gpu else None)
            for step in (model.next_state, model.next_content)
        )

    def caches(self, batch: int) -> list[StaticCache]:
        """See `DGiTAR.caches`."""
        if batch != self._batch:
            self._batch = batch
            self._caches = [StaticCache(stack, batch, self._model.layout.max_tokens) for stack in self._model.stacks]
        for cache in self._caches:
            cache.restart()
        return self._caches

    def next_state(self, slots: Tensor, contents: Tensor, condition: Tensor, cache: StaticCache, *rest: Any) -> Tensor:
        """See `DGiTAR.next_state`."""
        torch.compiler.cudagraph_mark_step_begin()
        cache.reach()
        return self._next_state(slots, contents, condition, cache, *rest)

    def next_content(self, hidden: Tensor, last: Tensor, slots: Tensor, cache: StaticCache, *rest: Any) -> Tensor:
        """See `DGiTAR.next_content`."""
        cache.reach()
        return self._next_content(hidden, last, slots, cache, *rest)


class CachedLogits:
    """A `DGiTAR` and a condition as the questions that a sampler asks, answered with a key/value cache.

    Args:
        model: in evaluation mode.
        condition: (B, width), see `DGiTAR.condition`.
    """

    def __init__(self, model: DGiTAR, condition: Tensor) -> None:
        self.model, self.condition = model, condition[:, None]
        self.modulations = [stack.modulations(condition) for stack in model.stacks]
        self.steps = model.steps or model
        self.caches = self.steps.caches(len(condition))
        self.slots = self.hidden = torch.empty(0)

    def take(self, slots: Tensor, contents: Tensor) -> None:
        """See `AutoregressiveLogits`."""
        self.slots = slots[:, None]
        self.hidden = self.steps.next_state(
            self.slots, contents[:, None], self.condition, self.caches[0], self.modulations[0]
        )

    def regions(self) -> Tensor:
        """See `AutoregressiveLogits`."""
        return self.model.regions_of(self.hidden[:, 0], self.model.next_grain[self.slots[:, 0]])

    def contents(self, slots: Tensor) -> Tensor:
        """See `AutoregressiveLogits`."""
        return self.steps.next_content(self.hidden, self.slots, slots[:, None], self.caches[1], self.modulations[1])

    def keep(self, rows: Tensor) -> None:
        """See `AutoregressiveLogits`."""
        self.condition = self.condition[rows]
        self.modulations = [None if found is None else [part[:, rows] for part in found] for found in self.modulations]
        for cache in self.caches:
            cache.keep(rows)
