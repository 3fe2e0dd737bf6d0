"""DGiT-AR: codes one after the other, coarse regions first, the position and the content of each in turn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graincode.core.codes import CodeLayout, CodePrefix, CodeSequences, GrainCodes, from_sequences, to_sequences
from graincode.core.errors import GraincodeError
from graincode.core.logits import legal_regions
from graincode.core.rng import Draws, uniforms
from graincode.generator.embedding import ClassConditioning, HeterogeneousEmbedding, NoConditioning
from graincode.generator.transformer import KeyValueCache, Rotary, Rotation, Transformer
from graincode.sampling import AutoregressiveSampler


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


class DGiTAR(nn.Module):
    """Position and content transformers, stacked: p(next position | past) p(content | next position, past).

    The region that comes next is what a position says; the other cells of a region, and all positions of the last
    grain, are implied. Likelihood and sampling use one distribution, renormalised over the legal regions. What an image
    is conditioned on is added to every token, and modulates the blocks of transformers with `adaln`.

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
        GraincodeError: an option is unknown, or does not fit the layout.
    Source: DQ-Transformer (arXiv 2305.11718), section 3.3; regions, legality and implied positions are our reading.
    """

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
        if not next_position and layout.num_grains > 1:
            raise GraincodeError(
                f"{layout.num_grains} grains without next_position: the contents could not know their places; "
                "type generator.model.next_position=true, or train on codes of one grain"
            )
        self.layout, self.next_position = layout, next_position
        self.embedding, self.conditioning = embedding, conditioning
        self.position_transformer, self.content_transformer = position_transformer, content_transformer
        rotary = position_transformer.rotary or content_transformer.rotary
        self.rotary = Rotary(layout.coordinates(), content_transformer.head_dim) if rotary else None
        self.needs_map = grain_map == "given" and layout.num_grains > 1
        decides = layout.num_grains > 1 and not self.needs_map
        self.decided_grains = layout.num_ends + (last_positions == "modelled") if decides else 0
        self.map = nn.Embedding(layout.num_grains * layout.num_regions, width) if self.needs_map else None
        if self.map is not None:
            nn.init.normal_(self.map.weight, std=0.02)
        outputs = self.decided_grains * (layout.num_regions + 1)
        self.region_head = nn.Linear(width, outputs) if outputs else None
        self.content_head = nn.Linear(width, layout.num_entries)
        table = layout.slots()  # the grain of the token behind each slot, where that decides its region
        following = F.pad(table.grain + table.is_end, (0, 2)).clamp(max=max(self.decided_grains - 1, 0))
        self.register_buffer("next_grain", following, persistent=False)
        for head in (self.region_head, self.content_head):
            if head is not None:
                nn.init.normal_(head.weight, std=0.02)
                nn.init.zeros_(head.bias)

    @property
    def classes(self) -> int:
        """Number of classes that samples can be asked for; 0 without conditioning."""
        return self.conditioning.classes

    def forward(self, codes: GrainCodes, labels: Tensor, draws: Draws | None = None) -> SequenceLikelihood:
        """Likelihood of a batch of codes, with gradients.

        Args:
            codes: of this layout.
            labels: (B,) long classes; unused without conditioning.
            draws: random numbers of this batch, for the conditioning; taken from torch's generator if not given.
        """
        layout, table = self.layout, self.layout.slots(codes.grains.device)
        targets = to_sequences(codes)
        hidden, content_logits = self.hidden_and_contents(targets, self.condition(labels, codes.grains, draws))
        content = F.cross_entropy(
            content_logits.transpose(1, 2), targets.contents, ignore_index=layout.no_content, reduction="none"
        )
        known = targets.slots.clamp(max=layout.num_slots - 1)
        grain, is_end = table.grain[known], table.is_end[known]
        is_token = targets.slots != layout.pad_slot
        decides = is_token & (grain < self.decided_grains) & (is_end | (table.cell[known] == 0))
        position = torch.zeros_like(content)
        if self.region_head is not None:
            before = F.pad(known[:, :-1], (1, 0))
            same = F.pad((grain[:, 1:] == grain[:, :-1]) & ~is_end[:, :-1], (1, 0), value=False)
            last = torch.where(same, table.region[before], -1)[decides]
            image = decides.nonzero(as_tuple=True)[0]
            coded = codes.grains.flatten(1)[image] < grain[decides][:, None]
            free = legal_regions(coded, last)
            modelled = F.pad(torch.ones_like(coded), (0, 1), value=False)  # any region, and no end
            free = torch.where((grain[decides] == layout.num_grains - 1)[:, None], modelled, free)
            logits = self.regions_of(hidden[decides], grain[decides]).masked_fill(~free, -torch.inf)
            position[decides] = F.cross_entropy(logits, table.region[known[decides]], reduction="none").to(
                position.dtype
            )
        return SequenceLikelihood(
            content, position, targets.is_code, decides, grain, layout.num_grains, self.decided_grains
        )

    def condition(self, labels: Tensor, grains: Tensor | None, draws: Draws | None = None) -> Tensor:
        """(B, width) of (B,) labels, and of (B, H0, W0) grain maps where they are given."""
        found = self.conditioning(labels, draws)
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
            self.embedding(slots, contents) + condition[:, None],
            rotation=self.angles(self.position_transformer, slots),
            modulations=self.position_transformer.modulations(condition),
        )
        states = self.content_transformer(
            self.content_input(hidden, targets.slots),
            rotation=self.angles(self.content_transformer, targets.slots if self.next_position else slots),
            modulations=self.content_transformer.modulations(condition),
        )
        return hidden, self.contents_of(states, targets.slots)

    def angles(self, transformer: Transformer, slots: Tensor) -> Rotation | None:
        """What turns a transformer's queries and keys at (B, L) slots."""
        return self.rotary(slots) if transformer.rotary else None

    def content_input(self, hidden: Tensor, slots: Tensor) -> Tensor:
        """(B, L, width) states, and what is known of the next tokens, whose (B, L) slots they are."""
        return hidden + self.embedding.at(slots) if self.next_position else hidden

    def contents_of(self, states: Tensor, slots: Tensor) -> Tensor:
        """(..., width) states and the (...) slots of their codes to (..., V) logits over the grain's codebook."""
        logits = self.content_head(states)
        if self.layout.num_codebooks == 1:
            return logits
        grain = self.embedding.slot_grain[slots].clamp(max=self.layout.num_grains - 1)
        every = logits.unflatten(-1, (self.layout.num_codebooks, -1))
        return every.gather(-2, grain[..., None, None].expand(*grain.shape, 1, every.shape[-1]))[..., 0, :]

    def regions_of(self, hidden: Tensor, grain: Tensor) -> Tensor:
        """(N, width) states and their (N,) current grains to (N, R + 1) logits, by each grain's own head."""
        if self.region_head is None:
            return hidden.new_zeros(len(hidden), self.layout.num_regions + 1)
        logits = self.region_head(hidden).unflatten(1, (self.decided_grains, -1))
        return logits[torch.arange(len(hidden), device=hidden.device), grain.clamp(max=self.decided_grains - 1)]

    @torch.no_grad()
    def sample(
        self,
        labels: Tensor,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int = 32,
        on_step: Callable[[int], None] = lambda _: None,
        given: CodePrefix | None = None,
        **settings: Any,
    ) -> GrainCodes:
        """Draw one image's codes for each label.

        Sample i of a seed depends on (seed, first_index + i), its label and what is given of it alone; batches are
        filled up to `batch_size`, so that in float32, too, neither the other samples nor their number change it, unless
        `drop_finished` makes the batch smaller.

        Args:
            labels: (N,) long classes; without conditioning only their number matters.
            seed: of all samples, >= 0.
            first_index: index of the first sample, to go on where another call stopped.
            batch_size: samples drawn together; another size may change float32 results in the last bit.
            on_step: called with the number of tokens that the current batch has.
            given: the beginning of each sample's codes, or its map, which it keeps; nothing by default.
            settings: of `AutoregressiveSampler`.
        Returns:
            N valid codes, on the CPU.
        Raises:
            GraincodeError: a label is not a class of this generator, there are none, what is given is of another layout
                or number, or is no map where one is needed, or a setting is out of range.
        """
        if not len(labels):
            raise GraincodeError("no labels: expected one for each sample, such as torch.zeros(1).long()")
        self.conditioning.check(labels)
        if given is not None and (given.sequences.layout != self.layout or len(given.lengths) != len(labels)):
            raise GraincodeError(
                f"{len(given.lengths)} beginnings of codes for {len(labels)} samples: expected as many, of the layout "
                "that this generator was trained on"
            )
        if self.needs_map and (given is None or bool((given.positions < given.tokens).any())):
            raise GraincodeError("this generator draws the contents of given grain maps: type given.map=true")
        sampler = AutoregressiveSampler(**settings)
        guided = sampler.guidance_scale != 1
        if guided and not self.classes:
            raise GraincodeError(
                f"guidance_scale={sampler.guidance_scale}, but the generator has no classes: "
                "type sampler.guidance_scale=1"
            )
        device = self.content_head.weight.device
        parts = []
        for start in range(0, len(labels), batch_size):
            part = labels[start : start + batch_size]
            missing = batch_size - len(part)
            padded = F.pad(part, (0, missing)).to(device)
            indices = range(first_index + start, first_index + start + batch_size)
            numbers = uniforms(seed, indices, self.layout.max_tokens, 2).to(device)
            if guided:
                padded = torch.cat([padded, torch.full_like(padded, self.layout.null_class)])
            prefix = None if given is None else given[start : start + len(part)].filled(batch_size).to(device)
            grains = prefix.grains if self.needs_map else None
            if guided and grains is not None:
                grains = torch.cat([grains, grains])
            logits = CachedLogits(self, self.condition(padded, grains))
            sequences = sampler(logits, self.layout, numbers, on_step, prefix)
            parts.append(from_sequences(sequences)[: len(part)].to("cpu"))
        return GrainCodes.cat(parts)


class CachedLogits:
    """A `DGiTAR` and a condition as the questions that a sampler asks, answered with a key/value cache.

    Args:
        model: in evaluation mode.
        condition: (B, width), see `DGiTAR.condition`.
    """

    def __init__(self, model: DGiTAR, condition: Tensor) -> None:
        self.model, self.step, self.condition = model, 0, condition[:, None]
        stacks = model.position_transformer, model.content_transformer
        self.modulations = [stack.modulations(condition) for stack in stacks]
        self.caches = [KeyValueCache(stack, len(condition), model.layout.max_tokens) for stack in stacks]
        self.slots = self.hidden = torch.empty(0)

    def take(self, slots: Tensor, contents: Tensor) -> None:
        """See `AutoregressiveLogits`."""
        model, stack = self.model, self.model.position_transformer
        self.slots = slots[:, None]
        token = model.embedding(self.slots, contents[:, None], self.step) + self.condition
        self.hidden = stack(token, self.caches[0], model.angles(stack, self.slots), self.modulations[0])
        self.step += 1

    def regions(self) -> Tensor:
        """See `AutoregressiveLogits`."""
        return self.model.regions_of(self.hidden[:, 0], self.model.next_grain[self.slots[:, 0]])

    def contents(self, slots: Tensor) -> Tensor:
        """See `AutoregressiveLogits`."""
        model, stack, slots = self.model, self.model.content_transformer, slots[:, None]
        angles = model.angles(stack, slots if model.next_position else self.slots)
        states = stack(model.content_input(self.hidden, slots), self.caches[1], angles, self.modulations[1])
        return model.contents_of(states, slots)[:, 0]

    def keep(self, rows: Tensor) -> None:
        """See `AutoregressiveLogits`."""
        self.condition = self.condition[rows]
        self.modulations = [None if found is None else [part[:, rows] for part in found] for found in self.modulations]
        for cache in self.caches:
            cache.keep(rows)
