"""DGiT-AR: codes one after the other, coarse regions first, the position and the content of each in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graincode.core.codes import CodeLayout, CodeSequences, GrainCodes, from_sequences, to_sequences
from graincode.core.errors import GraincodeError
from graincode.core.logits import legal_regions
from graincode.core.rng import Draws, uniforms
from graincode.generator.embedding import ClassConditioning, HeterogeneousEmbedding, NoConditioning
from graincode.generator.transformer import KeyValueCache, Transformer
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
    """

    content: Tensor
    position: Tensor
    is_code: Tensor
    is_decision: Tensor
    grain: Tensor

    @property
    def total(self) -> Tensor:
        """(B,) nats per image: codes and grain map together."""
        return (self.content + self.position).sum(dim=1)


class DGiTAR(nn.Module):
    """Position and content transformers, stacked: p(next position | past) p(content | next position, past).

    The region that comes next is what a position says; the other cells of a region, and all positions of the last
    grain, are implied. Likelihood and sampling use one distribution, renormalised over the legal regions. What an image
    is conditioned on is added to every token.

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
    ) -> None:
        super().__init__()
        self.layout = layout
        self.embedding, self.conditioning = embedding, conditioning
        self.position_transformer, self.content_transformer = position_transformer, content_transformer
        self.region_head = nn.Linear(width, layout.num_ends * (layout.num_regions + 1)) if layout.num_ends else None
        self.content_head = nn.Linear(width, layout.num_entries)
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
        hidden, content_logits = self.hidden_and_contents(targets, labels, draws)
        content = F.cross_entropy(
            content_logits.transpose(1, 2), targets.contents, ignore_index=layout.no_content, reduction="none"
        )
        known = targets.slots.clamp(max=layout.num_slots - 1)
        grain, is_end = table.grain[known], table.is_end[known]
        is_token = targets.slots != layout.pad_slot
        decides = is_token & (is_end | ((table.cell[known] == 0) & (grain < layout.num_ends)))
        position = torch.zeros_like(content)
        if self.region_head is not None:
            before = F.pad(known[:, :-1], (1, 0))
            same = F.pad((grain[:, 1:] == grain[:, :-1]) & ~is_end[:, :-1], (1, 0), value=False)
            last = torch.where(same, table.region[before], -1)[decides]
            image = decides.nonzero(as_tuple=True)[0]
            coded = codes.grains.flatten(1)[image] < grain[decides][:, None]
            logits = self.regions_of(hidden[decides], grain[decides])
            logits = logits.masked_fill(~legal_regions(coded, last), -torch.inf)
            position[decides] = F.cross_entropy(logits, table.region[known[decides]], reduction="none").to(
                position.dtype
            )
        return SequenceLikelihood(content, position, targets.is_code, decides, grain)

    def hidden_and_contents(
        self, targets: CodeSequences, labels: Tensor, draws: Draws | None = None
    ) -> tuple[Tensor, Tensor]:
        """States (B, L, width) that decide each token's region, and the (B, L, V) logits of its content."""
        slots = F.pad(targets.slots[:, :-1], (1, 0), value=self.layout.start_slot)
        contents = F.pad(targets.contents[:, :-1], (1, 0), value=self.layout.no_content)
        tokens = self.embedding(slots, contents)
        hidden = self.position_transformer(tokens + self.conditioning(labels, draws)[:, None])
        states = self.content_transformer(hidden + self.embedding.at(targets.slots))
        return hidden, self.contents_of(states, targets.slots)

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
        logits = self.region_head(hidden).unflatten(1, (self.layout.num_ends, -1))
        return logits[torch.arange(len(hidden), device=hidden.device), grain.clamp(max=self.layout.num_ends - 1)]

    @torch.no_grad()
    def sample(
        self,
        labels: Tensor,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int = 32,
        on_step: Callable[[int], None] = lambda _: None,
        **settings: float,
    ) -> GrainCodes:
        """Draw one image's codes for each label.

        Sample i of a seed depends on (seed, first_index + i) and its label alone; batches are filled up to
        `batch_size`, so that in float32, too, neither the other samples nor their number change it.

        Args:
            labels: (N,) long classes; without conditioning only their number matters.
            seed: of all samples, >= 0.
            first_index: index of the first sample, to go on where another call stopped.
            batch_size: samples drawn together; another size may change float32 results in the last bit.
            on_step: called with the number of tokens that the current batch has.
            settings: of `AutoregressiveSampler`.
        Returns:
            N valid codes, on the CPU.
        Raises:
            GraincodeError: a label is not a class of this generator, there are none, or a setting is out of range.
        """
        if not len(labels):
            raise GraincodeError("no labels: expected one for each sample, such as torch.zeros(1).long()")
        self.conditioning.check(labels)
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
            padded = F.pad(part, (0, batch_size - len(part))).to(device)
            indices = range(first_index + start, first_index + start + batch_size)
            numbers = uniforms(seed, indices, self.layout.max_tokens, 2).to(device)
            if guided:
                padded = torch.cat([padded, torch.full_like(padded, self.layout.null_class)])
            sequences = sampler(CachedLogits(self, padded), self.layout, numbers, on_step)
            parts.append(from_sequences(sequences)[: len(part)].to("cpu"))
        return GrainCodes.cat(parts)


class CachedLogits:
    """A `DGiTAR` and labels as the two questions that a sampler asks, answered with a key/value cache.

    Args:
        model: in evaluation mode.
        labels: (B,) long.
    """

    def __init__(self, model: DGiTAR, labels: Tensor) -> None:
        self.model, self.step = model, 0
        self.condition = model.conditioning(labels)[:, None]
        self.grain = torch.zeros_like(labels)
        capacity = model.layout.max_tokens
        self.position_cache = KeyValueCache(model.position_transformer, len(labels), capacity)
        self.content_cache = KeyValueCache(model.content_transformer, len(labels), capacity)

    def next_region(self, slots: Tensor, contents: Tensor) -> Tensor:
        """See `AutoregressiveLogits`."""
        model, table = self.model, self.model.layout.slots(slots.device)
        token = model.embedding(slots[:, None], contents[:, None], self.step)
        self.hidden = model.position_transformer(token + self.condition, self.position_cache)
        self.step += 1
        known = slots.clamp(max=model.layout.num_slots - 1)
        ended = table.is_end[known] & (slots < model.layout.num_slots)
        self.grain = self.grain + ended
        return model.regions_of(self.hidden[:, 0], self.grain)

    def next_content(self, slots: Tensor) -> Tensor:
        """See `AutoregressiveLogits`."""
        states = self.hidden + self.model.embedding.at(slots)[:, None]
        return self.model.contents_of(self.model.content_transformer(states, self.content_cache)[:, 0], slots)
