"""Autoregressive sampling of variable-length codes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from graincode.core.layout import CodeLayout
from graincode.core.logits import draw, legal_regions, truncate
from graincode.core.prompts import CodePrefix
from graincode.core.sequences import CodeSequences
from graincode.sampling.guidance import GuidedLogits
from graincode.sampling.protocol import AutoregressiveLogits
from graincode.sampling.settings import Part, Sampler


def check_every(layout: CodeLayout, device: torch.device) -> int:
    """Steps from one look at which samples are complete to the next: each look makes the CPU wait for another device,
    and until it the rows of complete samples are idle, there for less than a quarter of the shortest sequence."""
    return 1 if device.type == "cpu" else min(max(layout.num_regions // 4, 1), 16)


@dataclass(frozen=True, kw_only=True)
class AutoregressiveSampler(Sampler):
    """Draws positions and contents in turn; every sample tiles its image by construction.

    All rows of a batch advance by one token a step, each in its own grain, so nothing is padded between grains. When a
    sample is complete, its row goes on with the next sample at once (continuous batching).

    Attributes:
        region_temperature, region_top_k, region_top_p, region_min_p: of the next region.
    Source: Orca (Yu et al., 2022), section 3: scheduling by iterations.
    """

    region_temperature: float = 1.0
    region_top_k: int = 0
    region_top_p: float = 1.0
    region_min_p: float = 0.0

    name: ClassVar[str] = "autoregressive"
    other: ClassVar[str] = "region_"

    def numbers(self, layout: CodeLayout) -> tuple[int, ...]:
        return layout.max_tokens, 2  # for each token, one for its region and one for its content

    def wrapped(self, logits: AutoregressiveLogits, layout: CodeLayout) -> AutoregressiveLogits:
        """A model's logits as they are drawn from, before guidance: for samplers that change them."""
        return logits

    def __call__(
        self,
        logits: AutoregressiveLogits,
        layout: CodeLayout,
        uniforms: Tensor,
        on_step: Callable[[int], None] = lambda _: None,
        given: CodePrefix | None = None,
    ) -> CodeSequences:
        every, count = Part(torch.arange(len(uniforms)), uniforms, given), len(uniforms)
        return next(
            self.stream(lambda *_: logits, layout, lambda _: every, count, count, lambda step, _: on_step(step))
        )

    @torch.no_grad()
    def stream(
        self,
        logits: Callable[[Tensor, Any], AutoregressiveLogits],
        layout: CodeLayout,
        part: Callable[[Tensor], Part],
        count: int,
        rows: int,
        on_step: Callable[[int, int], None] = lambda *_: None,
    ) -> Iterator[CodeSequences]:
        """See `Sampler`. What is complete waits for the samples before it: never more than `rows` times the tokens of
        the longest sequence over those of the shortest."""
        samples, begun, complete, ready = torch.arange(rows), min(rows, count), 0, 0
        state = _Rows(self, logits, layout, part(samples.clamp(max=count - 1)))
        busy = samples < count
        waiting: dict[int, Tensor] = {}
        every, shortest = check_every(layout, state.uniforms.device), layout.num_regions + layout.num_marks
        for step in itertools.count(1):
            state.step()
            look = step >= shortest and step % every == 0
            if look and len(done := (state.complete.cpu() & busy).nonzero()[:, 0]):
                waiting |= zip(samples[done].tolist(), state.drawn(done), strict=True)
                complete += len(done)
                new = done[: count - begun]
                busy[done[len(new) :]] = False  # these rows go on with padding
                if len(new):
                    samples[new] = torch.arange(begun, begun + len(new))
                    begun += len(new)
                    state.begin(new, part(samples[new]))
            on_step(step, complete)
            while waiting.keys() >= set(following := range(ready, min(ready + rows, count))):
                slots, contents = torch.stack([waiting.pop(sample) for sample in following], dim=1)
                yield CodeSequences(slots, contents, layout)
                if (ready := following.stop) == count:
                    return


class _Rows:
    """The samples that are drawn at one time, a row of B for each; `start` says what the tensors are."""

    slot: Tensor
    content: Tensor
    grain: Tensor
    last: Tensor
    index: Tensor
    next: Tensor
    coded: Tensor
    left: Tensor
    slots: Tensor
    contents: Tensor

    def __init__(
        self,
        sampler: AutoregressiveSampler,
        logits: Callable[[Tensor, Any], AutoregressiveLogits],
        layout: CodeLayout,
        first: Part,
    ) -> None:
        self.sampler, self.layout, self.uniforms, self.given = sampler, layout, first.uniforms, first.given
        model, scale = sampler.wrapped(logits(first.labels, first.given), layout), sampler.guidance_scale
        self.guided = GuidedLogits(model, scale, sampler.guidance_schedule) if scale != 1 else None
        self.model, self.rules = self.guided or model, _Rules(layout, first.uniforms.device)
        begins = self.rules.final if layout.num_grains == 1 else self.rules.undecided
        self.start: dict[str, tuple[int, int | bool]] = {
            # name: columns, 0 for none, and what a sample begins with
            "slot": (0, layout.start_slot),
            "content": (0, layout.no_content),
            "grain": (0, 0),
            "last": (0, -1),  # the region that the current grain coded last
            "index": (0, 0),  # of the next token
            "next": (0, begins),  # slot of the next token, as far as it is decided
            "coded": (layout.num_regions + 2, False),  # regions with codes; the end, never; what is no region
            "left": (self.rules.keeps.shape[1], True),  # slots of the last grain, and padding, which always is
            "slots": (layout.max_tokens + 1, layout.pad_slot),  # drawn so far; one more behind the end
            "contents": (layout.max_tokens + 1, layout.no_content),
        }
        for name, (columns, value) in self.start.items():
            shape = [len(self.uniforms), columns][: 1 + (columns > 0)]
            setattr(self, name, torch.full(shape, value, device=self.uniforms.device))

    def begin(self, rows: Tensor, part: Part) -> None:
        """Go on with other samples in (n,) long rows."""
        self.model.begin(rows, part.labels, part.given)
        rows = rows.to(self.uniforms.device)
        for name, (_, value) in self.start.items():
            getattr(self, name)[rows] = value
        self.uniforms[rows] = part.uniforms
        if self.given is not None:
            self.given.sequences.slots[rows] = part.given.sequences.slots
            self.given.sequences.contents[rows] = part.given.sequences.contents
            self.given.lengths[rows], self.given.positions[rows] = part.given.lengths, part.given.positions

    @property
    def complete(self) -> Tensor:
        """(B,) bool."""
        return self.next == self.layout.pad_slot

    def drawn(self, rows: Tensor) -> Tensor:
        """(n, 2, max_tokens) slots and contents of (n,) long rows, on the CPU."""
        rows = rows.to(self.slots.device)
        return torch.stack([self.slots[rows, :-1], self.contents[rows, :-1]], dim=1).cpu()

    def step(self) -> None:
        """Draw one token of each row; those that are complete draw padding."""
        layout, sampler, rules, regions = self.layout, self.sampler, self.rules, self.layout.num_regions
        if self.guided is not None:
            self.guided.progress = self.coded[:, :regions].double().mean(dim=1)
        self.model.take(self.slot, self.content)
        at = self.index.clamp(max=layout.max_tokens - 1)[:, None]
        for_region, for_content = self.uniforms.gather(1, at[:, :, None].expand(-1, -1, 2))[:, 0].unbind(dim=1)
        slot = self.next
        if layout.num_grains > 1:
            legal = legal_regions(self.coded[:, :regions], self.last)
            scores = self.model.regions().masked_fill(~legal, -torch.inf)
            region = draw(truncate(scores, **sampler.truncation("region_")), for_region)
            slot = torch.where(slot < rules.undecided, slot, rules.first[self.grain, region])
        if (given := self.given) is not None:
            known = self.index.clamp(max=given.sequences.slots.shape[1] - 1)[:, None]
            slot = torch.where(given.positions > self.index, given.sequences.slots.gather(1, known)[:, 0], slot)
        content = draw(truncate(self.model.contents(slot), **sampler.truncation()), for_content)
        if given is not None:
            kept = given.sequences.contents.gather(1, known)[:, 0]
            content = torch.where(given.lengths > self.index, kept, content)
        following, ends, region, codes = rules.facts[slot].unbind(dim=1)
        is_mark = region > regions
        content = content.masked_fill(is_mark, layout.no_content)
        self.slots.scatter_(1, self.index[:, None], slot[:, None])
        self.contents.scatter_(1, self.index[:, None], content[:, None])
        self.coded.scatter_(1, codes[:, None], True)
        self.left &= rules.keeps[slot]
        self.grain, self.last = self.grain + ends, region.masked_fill(is_mark, -1)
        self.slot, self.content = slot, content
        self.index = (self.index + 1).clamp_(max=layout.max_tokens)
        final = rules.final + self.left.to(torch.uint8).argmax(dim=1)  # padding, where none is left
        implied = torch.where(self.grain == layout.num_grains - 1, final, following)
        self.next = torch.where(following < rules.undecided, following, implied)


class _Rules:
    """What a layout says of the order of slots; padding and the start are slots too, the last two.

    Attributes:
        facts: (S + 2, 4) long: the slot that follows, `undecided` where that depends; whether it ends a grain; its
            region; the region that is coded with it. R + 1 is no region.
        first: of the layout's table.
        final: the first slot of the last grain, behind which are the others, and then padding.
        keeps: (S + 2, F + 1) bool, which of these are left behind a slot; padding always is.
    """

    def __init__(self, layout: CodeLayout, device: torch.device) -> None:
        table, regions, slots = layout.slots(device), layout.num_regions, layout.num_slots
        self.first, self.undecided = table.first, slots + 2
        following = F.pad(
            torch.where(table.following < slots, table.following, self.undecided), (0, 2), value=slots + 2
        )
        following[slots] = slots
        owner = F.pad(torch.where(table.is_code, table.region, regions + 1), (0, 2), value=regions + 1)
        # a region has all its codes with a slot, or a code at least where regions are not interrupted
        by_rows = layout.last_grain_order == "rows" and layout.num_grains > 1
        codes = torch.where(F.pad(table.is_last, (0, 2)), owner, regions + 1) if by_rows else owner
        self.facts = torch.stack([following, F.pad(table.is_end, (0, 2)).long(), owner, codes], dim=1)
        self.final = slots - regions * layout.codes_per_region[-1]
        every = torch.arange(slots + 2, device=device)[:, None]
        final = every[self.final : -1, 0]
        same = (owner[:, None] == owner[final]) & (owner[:, None] < regions)
        self.keeps = ~torch.where(every < self.final, same, every == final) | (final == slots)
