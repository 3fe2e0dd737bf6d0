"""Autoregressive sampling of variable-length codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from graincode.core.codes import CodeLayout, CodeSequences
from graincode.core.errors import GraincodeError
from graincode.core.logits import draw, legal_regions, truncate
from graincode.sampling.guidance import GuidedLogits
from graincode.sampling.protocol import AutoregressiveLogits

_CHECK_EVERY = 16


@dataclass(frozen=True)
class AutoregressiveSampler:
    """Draws positions and contents in turn; every sample tiles its image by construction.

    All samples of a batch advance by one token a step, each in its own grain, so nothing is padded between grains.

    Attributes:
        temperature, top_k, top_p: of the contents; 0 or 1 means no truncation.
        region_temperature, region_top_k: of the next region.
        guidance_scale: classifier-free guidance; 1 is the conditional model, at half the cost of any other value.
    Raises:
        GraincodeError: a setting is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    region_temperature: float = 1.0
    region_top_k: int = 0
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "region_temperature"):
            if not getattr(self, name) > 0:
                raise GraincodeError(
                    f"{name} {getattr(self, name)}: expected more than 0; type sampler.top_k=1 for greedy"
                )
        for name in ("top_k", "region_top_k"):
            if getattr(self, name) < 0:
                raise GraincodeError(
                    f"{name} {getattr(self, name)}: expected 0 (all) or more, such as sampler.{name}=100"
                )
        if not 0 < self.top_p <= 1:
            raise GraincodeError(f"top_p {self.top_p}: expected more than 0 and at most 1, such as sampler.top_p=0.95")

    @torch.no_grad()
    def __call__(
        self,
        logits: AutoregressiveLogits,
        layout: CodeLayout,
        uniforms: Tensor,
        on_step: Callable[[int], None] = lambda _: None,
    ) -> CodeSequences:
        """Draw one sequence for each row of random numbers.

        Args:
            logits: the model, with whatever it is conditioned on; under guidance, for the batch with its condition and
                then again without.
            layout: of the codes that it makes.
            uniforms: (B, max_tokens, 2) in [0, 1): for each token, one number for its region and one for its content.
            on_step: called with the number of tokens drawn so far, for a progress bar.
        Returns:
            sequences that `from_sequences` takes.
        """
        if self.guidance_scale != 1:
            logits = GuidedLogits(logits, self.guidance_scale)
        batch, device, table = len(uniforms), uniforms.device, layout.slots(uniforms.device)
        last_grain = layout.num_grains - 1
        cells = torch.arange(layout.num_regions, device=device)
        slot = torch.full((batch,), layout.start_slot, device=device)
        content = torch.full_like(slot, layout.no_content)
        grain, last = torch.zeros_like(slot), torch.full_like(slot, -1)
        following = torch.full_like(slot, layout.num_slots)
        coded = torch.zeros(batch, layout.num_regions, dtype=torch.bool, device=device)
        slots = torch.full((batch, layout.max_tokens), layout.pad_slot, device=device)
        contents = torch.full_like(slots, layout.no_content)
        for step in range(layout.max_tokens):
            scores = logits.next_region(slot, content)
            # drawn in vain within a region and in the last grain, where the next cell is implied
            free = scores.masked_fill(~legal_regions(coded, last), -torch.inf)
            chosen = draw(truncate(free, self.region_temperature, self.region_top_k), uniforms[:, step, 0])
            left = ~coded & (cells > last[:, None])
            implied = torch.where(left.any(dim=1), left.int().argmax(dim=1), layout.num_regions)
            region = torch.where(grain == last_grain, implied, chosen)
            inside = following < layout.num_slots
            # in the last grain, column R of `first` is the padding slot: the sample is complete
            slot = torch.where(inside, following, table.first[grain, region])
            content = draw(
                truncate(logits.next_content(slot), self.temperature, self.top_k, self.top_p), uniforms[:, step, 1]
            )
            done = slot == layout.pad_slot
            known = slot.clamp(max=layout.num_slots - 1)
            is_end = table.is_end[known] & ~done
            content = torch.where(is_end | done, layout.no_content, content)
            slots[:, step], contents[:, step] = slot, content
            following = torch.where(done, layout.num_slots, table.following[known])
            last = torch.where(
                is_end, -1, torch.where(done, last, table.region[known].clamp(max=layout.num_regions - 1))
            )
            coded |= (cells == table.region[known][:, None]) & ~(is_end | done)[:, None]
            grain = grain + is_end
            on_step(step + 1)
            if (step + 1) % _CHECK_EVERY == 0 and bool(done.all()):
                break
        return CodeSequences(slots[:, : step + 1], contents[:, : step + 1], layout)
