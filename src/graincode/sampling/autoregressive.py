"""Autoregressive sampling of variable-length codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from graincode.core.codes import CodeLayout, CodePrefix, CodeSequences
from graincode.core.errors import GraincodeError
from graincode.core.logits import draw, legal_regions, truncate
from graincode.sampling.guidance import SCHEDULES, GuidedLogits
from graincode.sampling.protocol import AutoregressiveLogits

_CHECK_EVERY = 16


@dataclass(frozen=True)
class AutoregressiveSampler:
    """Draws positions and contents in turn; every sample tiles its image by construction.

    All samples of a batch advance by one token a step, each in its own grain, so nothing is padded between grains.

    Attributes:
        temperature, top_k, top_p, min_p: of the contents, see `core.logits.truncate`.
        region_temperature, region_top_k, region_top_p, region_min_p: of the next region.
        guidance_scale: classifier-free guidance; 1 is the conditional model, at half the cost of any other value.
        guidance_schedule: how it comes in as an image is completed: "constant", "linear" or "cosine".
        drop_finished: go on with the samples that are not complete whenever these are half of the batch or fewer: less
            work where lengths differ. In float32 a sample may then depend in the last bit on its batch mates.
    Raises:
        GraincodeError: a setting is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    region_temperature: float = 1.0
    region_top_k: int = 0
    region_top_p: float = 1.0
    region_min_p: float = 0.0
    guidance_scale: float = 1.0
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"
    drop_finished: bool = False

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (lambda x: x > 0, "more than 0; type sampler.top_k=1 for greedy"),
            "top_k": (lambda x: x >= 0, "0 (all) or more, such as sampler.{}=100"),
            "top_p": (lambda x: 0 < x <= 1, "more than 0 and at most 1, such as sampler.{}=0.95"),
            "min_p": (lambda x: 0 <= x < 1, "0 (all) to below 1, such as sampler.{}=0.05"),
        }
        for what in ("", "region_"):
            for name, (fits, expected) in ranges.items():
                if not fits(value := getattr(self, what + name)):
                    raise GraincodeError(f"{what}{name} {value}: expected {expected.format(what + name)}")
        if self.guidance_schedule not in SCHEDULES:
            raise GraincodeError(
                f"guidance_schedule {self.guidance_schedule!r}: type sampler.guidance_schedule= one of "
                f"{', '.join(SCHEDULES)}"
            )

    @torch.no_grad()
    def __call__(
        self,
        logits: AutoregressiveLogits,
        layout: CodeLayout,
        uniforms: Tensor,
        on_step: Callable[[int], None] = lambda _: None,
        given: CodePrefix | None = None,
    ) -> CodeSequences:
        """Draw one sequence for each row of random numbers.

        Args:
            logits: the model, with whatever it is conditioned on; under guidance, for the batch with its condition and
                then again without.
            layout: of the codes that it makes.
            uniforms: (B, max_tokens, 2) in [0, 1): for each token, one number for its region and one for its content.
            on_step: called with the number of tokens drawn so far, for a progress bar.
            given: the beginning of each sequence; what follows is drawn with the numbers of its own places.
        Returns:
            sequences that `from_sequences` takes.
        """
        guided = GuidedLogits(logits, self.guidance_scale, self.guidance_schedule) if self.guidance_scale != 1 else None
        ask = logits if guided is None else guided
        batch, device, table = len(uniforms), uniforms.device, layout.slots(uniforms.device)
        last_grain = layout.num_grains - 1
        cells = torch.arange(layout.num_regions, device=device)
        rows = torch.arange(batch, device=device)  # of the results, one for each sample that is still drawn
        slot = torch.full((batch,), layout.start_slot, device=device)
        content = torch.full_like(slot, layout.no_content)
        grain, last = torch.zeros_like(slot), torch.full_like(slot, -1)
        following = torch.full_like(slot, layout.num_slots)
        coded = torch.zeros(batch, layout.num_regions, dtype=torch.bool, device=device)
        slots = torch.full((batch, layout.max_tokens), layout.pad_slot, device=device)
        contents = torch.full_like(slots, layout.no_content)
        for step in range(layout.max_tokens):
            if guided is not None:
                guided.progress = coded.double().mean(dim=1)
            scores = ask.next_region(slot, content)
            # drawn in vain within a region and in the last grain, where the next cell is implied
            free = scores.masked_fill(~legal_regions(coded, last), -torch.inf)
            free = truncate(free, self.region_temperature, self.region_top_k, self.region_top_p, self.region_min_p)
            chosen = draw(free, uniforms[rows, step, 0])
            left = ~coded & (cells > last[:, None])
            implied = torch.where(left.any(dim=1), left.int().argmax(dim=1), layout.num_regions)
            region = torch.where(grain == last_grain, implied, chosen)
            inside = following < layout.num_slots
            # in the last grain, column R of `first` is the padding slot: the sample is complete
            slot = torch.where(inside, following, table.first[grain, region])
            kept = None if given is None or step >= given.sequences.slots.shape[1] else given.lengths[rows] > step
            if kept is not None:
                slot = torch.where(kept, given.sequences.slots[rows, step], slot)
            content = draw(
                truncate(ask.next_content(slot), self.temperature, self.top_k, self.top_p, self.min_p),
                uniforms[rows, step, 1],
            )
            if kept is not None:
                content = torch.where(kept, given.sequences.contents[rows, step], content)
            done = slot == layout.pad_slot
            known = slot.clamp(max=layout.num_slots - 1)
            is_end = table.is_end[known] & ~done
            content = torch.where(is_end | done, layout.no_content, content)
            slots[rows, step], contents[rows, step] = slot, content
            following = torch.where(done, layout.num_slots, table.following[known])
            last = torch.where(
                is_end, -1, torch.where(done, last, table.region[known].clamp(max=layout.num_regions - 1))
            )
            coded |= (cells == table.region[known][:, None]) & ~(is_end | done)[:, None]
            grain = grain + is_end
            on_step(step + 1)
            if (step + 1) % _CHECK_EVERY == 0:
                unfinished = (~done).nonzero()[:, 0]
                if not len(unfinished):
                    break
                if self.drop_finished and 2 * len(unfinished) <= len(rows):
                    ask.keep(unfinished)
                    rows, slot, content, grain, last, following, coded = (
                        state[unfinished] for state in (rows, slot, content, grain, last, following, coded)
                    )
        return CodeSequences(slots[:, : step + 1], contents[:, : step + 1], layout)
