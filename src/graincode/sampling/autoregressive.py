"""Autoregressive sampling of variable-length codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from graincode.core.layout import CodeLayout
from graincode.core.logits import draw, legal_regions, truncate
from graincode.core.prompts import CodePrefix
from graincode.core.sequences import CodeSequences
from graincode.sampling.guidance import GuidedLogits
from graincode.sampling.protocol import AutoregressiveLogits
from graincode.sampling.settings import Sampler

_CHECK_EVERY = {"cpu": 1}  # steps between checks whether a batch is complete; elsewhere 16: each makes the CPU wait


@dataclass(frozen=True, kw_only=True)
class AutoregressiveSampler(Sampler):
    """Draws positions and contents in turn; every sample tiles its image by construction.

    All samples of a batch advance by one token a step, each in its own grain, so nothing is padded between grains.

    Attributes:
        region_temperature, region_top_k, region_top_p, region_min_p: of the next region.
        drop_finished: go on with the incomplete samples alone whenever they are half of the batch or fewer: less work
            where lengths differ. In float32 a sample may then depend in the last bit on the rest of its batch.
    """

    region_temperature: float = 1.0
    region_top_k: int = 0
    region_top_p: float = 1.0
    region_min_p: float = 0.0
    drop_finished: bool = False

    name: ClassVar[str] = "autoregressive"
    other: ClassVar[str] = "region_"

    def numbers(self, layout: CodeLayout) -> tuple[int, ...]:
        return layout.max_tokens, 2  # for each token, one for its region and one for its content

    @torch.no_grad()
    def __call__(
        self,
        logits: AutoregressiveLogits,
        layout: CodeLayout,
        uniforms: Tensor,
        on_step: Callable[[int], None] = lambda _: None,
        given: CodePrefix | None = None,
    ) -> CodeSequences:
        guided = GuidedLogits(logits, self.guidance_scale, self.guidance_schedule) if self.guidance_scale != 1 else None
        model = guided or logits
        batch, device, tokens = len(uniforms), uniforms.device, layout.max_tokens
        table, regions, last_grain = layout.slots(device), layout.num_regions, layout.num_grains - 1
        # of each slot, padding and the start included: what follows it, and its region
        following = F.pad(table.following, (0, 2), value=layout.num_slots)
        is_end = F.pad(table.is_end, (0, 2))
        owner = F.pad(torch.where(table.is_code, table.region, regions + 1), (0, 2), value=regions + 1)
        by_rows = layout.last_grain_order == "rows" and last_grain > 0
        # the region that has all its codes with a slot, or a code at least where regions are not interrupted
        codes_region = torch.where(F.pad(table.is_last, (0, 2)), owner, regions + 1) if by_rows else owner
        final = torch.arange(layout.num_slots, device=device)[
            -regions * layout.codes_per_region[-1] :
        ]  # of the last grain
        all_slots = torch.full((batch, tokens), layout.pad_slot, device=device)
        all_contents = torch.full_like(all_slots, layout.no_content)
        # of the samples that are still drawn, `rows` of all
        rows, slots, contents = torch.arange(batch, device=device), all_slots.clone(), all_contents.clone()
        slot = torch.full((batch,), layout.start_slot, device=device)
        content = torch.full_like(slot, layout.no_content)
        grain, last = torch.zeros_like(slot), torch.full_like(slot, -1)
        # which regions have codes; two more columns are for the end, never coded, and for what is no region
        coded = torch.zeros(batch, regions + 2, dtype=torch.bool, device=device)
        all_implied, check_every = last_grain == 0, _CHECK_EVERY.get(device.type, 16)
        for step in range(tokens):
            if guided is not None:
                guided.progress = coded[:, :regions].double().mean(dim=1)
            model.take(slot, content)
            region = coded[:, : regions + 1].int().argmin(dim=1)  # the first without codes; the end, if there is none
            if not all_implied:
                scores = model.regions().masked_fill(~legal_regions(coded[:, :regions], last), -torch.inf)
                drawn = draw(truncate(scores, **self.truncation("region_")), uniforms[:, step, 0])
                region = torch.where(grain == last_grain, region, drawn)
            # in the last grain, the end of `first` is the padding slot: the sample is complete
            begun, begins = following[slot], table.first[grain, region]
            if by_rows:
                left = ~coded[:, owner[final]] & (final > slot[:, None])
                behind = torch.where(left.any(dim=1), final[0] + left.int().argmax(dim=1), layout.num_slots)
                begins = torch.where(grain == last_grain, behind, begins)
            slot = torch.where(begun < layout.num_slots, begun, begins)
            kept = given if given is not None and step < given.sequences.slots.shape[1] else None
            if kept is not None:
                slot = torch.where(kept.positions > step, kept.sequences.slots[:, step], slot)
            content = draw(truncate(model.contents(slot), **self.truncation()), uniforms[:, step, 1])
            if kept is not None:
                content = torch.where(kept.lengths > step, kept.sequences.contents[:, step], content)
            region = owner[slot]
            content = torch.where(region > regions, layout.no_content, content)
            slots[:, step], contents[:, step] = slot, content
            coded.scatter_(1, codes_region[slot][:, None], True)
            if not all_implied:
                ends = is_end[slot]
                grain, last = grain + ends, torch.where(region > regions, -1, region)
            on_step(step + 1)
            if (step + 1) % check_every == 0:
                done = slot == layout.pad_slot
                finished, all_implied = torch.stack([done.sum(), (grain == last_grain).all()]).tolist()
                if finished == len(rows):
                    break
                if self.drop_finished and 2 * finished >= len(rows):
                    unfinished = (~done).nonzero()[:, 0]
                    all_slots[rows], all_contents[rows] = slots, contents
                    model.keep(unfinished)
                    given = None if given is None else given[unfinished]
                    rows, slots, contents, uniforms, slot, content, grain, last, coded = (
                        state[unfinished]
                        for state in (rows, slots, contents, uniforms, slot, content, grain, last, coded)
                    )
        all_slots[rows], all_contents[rows] = slots, contents
        return CodeSequences(all_slots[:, : step + 1], all_contents[:, : step + 1], layout)
