"""Masked sampling of variable-length codes: all masked codes are drawn in every step, and the best are kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from graincode.core.codes import GrainCodes
from graincode.core.errors import check, check_choice
from graincode.core.layout import CodeLayout
from graincode.core.logits import draw, gumbel, ranks, truncate
from graincode.core.prompts import CodeMask
from graincode.core.schedules import MASK_SCHEDULES
from graincode.core.sequences import CodeSequences, to_sequences
from graincode.sampling.guidance import GuidedMaskedLogits
from graincode.sampling.protocol import MaskedLogits, RowLogits
from graincode.sampling.settings import Sampler

Order = Literal["confidence", "random", "halton", "coarse_first", "dense_first"]
Score = Callable[[float, Tensor, Tensor, Tensor], Tensor]
"""1 - t / T, and the log-probabilities, the noise and the flattened positions of N values, to what is large for those
that are kept."""

_MOST_LOGITS = 2**24  # in float64 at a time, of which a draw takes several copies
_NOT_READ_BY = {"choice_temperature": "random halton", "information_weight": "halton coarse_first dense_first"}


@dataclass(frozen=True, kw_only=True)
class MaskedSampler(Sampler):
    """Draws the grain map, then its codes, each by masked prediction.

    Step t of T draws every masked code, and keeps all but n_t = min(n_(t-1) - 1, floor(N gamma(t / T))) of them, of
    each image's own N codes that are not given; n_T = 0. Those are kept whose score

        log p(c_i) + (1 - t / T) (lambda_0 h_i + tau_0 Gumbel_i)

    is largest; p is the (guided) model's distribution before temperature and truncation, and h_i, the information
    density, is the code's grain, from 0 for the coarsest to 1 for the finest. With one grain this is MaskGIT.

    Attributes:
        steps, grain_steps: T of the contents and of the grain map, >= 1; smaller images are complete before the last.
        mask_schedule: gamma.
        order: which codes are kept first: "confidence", by the score; "random", by lambda_0 (1 - t / T) h_i + Gumbel_i;
            "halton", those that a low-discrepancy sequence of points meets first, the same for all samples;
            "coarse_first", "dense_first", grain by grain, by confidence. With random and halton, which keep unlikely
            draws, take a temperature of about 0.6. The grain map is kept by confidence.
        information_weight: lambda_0, with orders confidence and random; above 0 fine codes come earlier.
        choice_temperature, grain_choice_temperature: tau_0 of the contents (not with orders random and halton) and of
            the grain map, >= 0. MaskGIT's 4.5 is worse for contents on Fashion-MNIST.
        final_temperature: of the contents in step T, reached in equal steps; None: the temperature is constant.
        grain_temperature, grain_top_k, grain_top_p, grain_min_p: of the grains.
    Source: MaskGIT (Chang et al., 2022), section 3.2; the density's part is our reading of DGiT. Halton: Halton-MaskGIT
        (Besnier et al., 2025).
    """

    steps: int = 8
    grain_steps: int = 4
    mask_schedule: Literal["cosine", "linear", "arccos"] = "cosine"
    order: Order = "confidence"
    information_weight: float = 0.0
    choice_temperature: float = 1.0
    grain_choice_temperature: float = 4.5
    final_temperature: float | None = None
    grain_temperature: float = 1.0
    grain_top_k: int = 0
    grain_top_p: float = 1.0
    grain_min_p: float = 0.0

    name: ClassVar[str] = "masked"
    other: ClassVar[str] = "grain_"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("order", self.order, Order)
        check_choice("mask_schedule", self.mask_schedule, MASK_SCHEDULES)
        for prefix in ("", self.other):
            for name, least in (("steps", 1), ("choice_temperature", 0)):
                check(prefix + name, value := getattr(self, prefix + name), f"{least} or more", value >= least)
        last = self.final_temperature
        check("final_temperature", last, "a number above 0, or null", last is None or last > 0)
        for name, orders in _NOT_READ_BY.items():
            value, plain = getattr(self, name), getattr(MaskedSampler, name)
            holds = self.order not in orders.split() or value == plain
            check(name, value, f"{plain} with order={self.order}, which does not read it", holds)

    def numbers(self, layout: CodeLayout) -> tuple[int, ...]:
        return (sum(self._numbers(layout)),)

    def _numbers(self, layout: CodeLayout) -> tuple[int, int]:
        """How many random numbers the grain map takes, and how many the contents."""
        regions, codes = layout.num_regions, layout.codes_per_region[-1]
        return 2 * self.grain_steps * regions * (layout.num_grains > 1), 2 * self.steps * regions * codes

    @torch.no_grad()
    def __call__(
        self,
        logits: MaskedLogits,
        layout: CodeLayout,
        uniforms: Tensor,
        on_step: Callable[[int], None] = lambda _: None,
        given: CodeMask | None = None,
    ) -> CodeSequences:
        """See `Sampler`; the sequences have no ends."""
        if self.guidance_scale != 1:
            logits = GuidedMaskedLogits(logits, layout, self.guidance_scale, self.guidance_schedule)
        of_map, of_contents = uniforms.split(self._numbers(layout), dim=1)
        grains = self._grains(logits, layout, of_map, given).unflatten(1, layout.grids[0])
        blank = grains.new_zeros(len(grains), *layout.grids[-1])
        slots = to_sequences(GrainCodes(grains, blank, layout), ends=False).slots
        table, owner = layout.slots(slots.device), slots.clamp(max=layout.num_slots - 1)
        unknown, contents = slots != layout.pad_slot, torch.full_like(slots, layout.no_content)
        if given is not None:
            first = table.finest[owner]
            kept = unknown & given.known_cells.flatten(1).gather(1, first)
            contents = torch.where(kept, given.codes.indices.flatten(1).gather(1, first), contents)
            unknown = unknown & ~kept
        grain, last = table.grain[owner], layout.num_grains - 1
        density = grain.double() / max(last, 1)
        visited = _halton(layout).to(slots.device)[owner] if self.order == "halton" else None
        tier = {"dense_first": grain, "coarse_first": last - grain}.get(self.order)

        def score(cooling: float, log_p: Tensor, noise: Tensor, at: Tensor) -> Tensor:
            if visited is not None:
                return -visited.flatten()[at].double()
            weighed = self.information_weight * cooling * density.flatten()[at]
            if self.order == "random":
                return weighed + noise
            return log_p + weighed + self.choice_temperature * cooling * noise

        def logits_of(contents: Tensor, at: Tensor) -> RowLogits:
            return logits.contents(slots, contents, at)

        contents = self._reveal(logits_of, score, contents, layout.no_content, unknown, of_contents, "", tier, on_step)
        return CodeSequences(slots, contents, layout)

    def _grains(self, logits: MaskedLogits, layout: CodeLayout, uniforms: Tensor, given: CodeMask | None) -> Tensor:
        """(B, R) grains of the regions."""
        count, device = layout.num_grains, uniforms.device
        grains = torch.full((len(uniforms), layout.num_regions), count, device=device)
        if count == 1:
            return torch.zeros_like(grains)
        least = grains.new_zeros(len(grains)) if given is None else given.least_grain
        too_coarse = (torch.arange(count, device=device) < least[:, None])[:, None]
        if given is not None:
            grains = given.codes.grains.flatten(1).masked_fill(~given.known_regions.flatten(1), count)

        def logits_of(grains: Tensor, at: Tensor) -> RowLogits:
            return logits.grains(grains).masked_fill(too_coarse, -torch.inf).flatten(0, 1)[at].__getitem__

        def score(cooling: float, log_p: Tensor, noise: Tensor, at: Tensor) -> Tensor:
            return log_p + self.grain_choice_temperature * cooling * noise

        return self._reveal(logits_of, score, grains, count, grains == count, uniforms, self.other)

    def _reveal(
        self,
        logits_of: Callable[[Tensor, Tensor], RowLogits],
        score: Score,
        values: Tensor,
        mask: int,
        masked: Tensor,
        uniforms: Tensor,
        prefix: str,
        tier: Tensor | None = None,
        on_step: Callable[[int], None] = lambda _: None,
    ) -> Tensor:
        """(B, L) values with all that is masked filled in, by settings with a prefix.

        Args:
            logits_of: from values, and the flattened positions of those that are masked, the logits of these.
            values: (B, L) long below `mask`, and `mask` where they are `masked`, (B, L) bool.
            uniforms: (B, steps * 2 * L or more) in [0, 1), to draw values and for noise.
            tier: (B, L) long, 0 or more; the higher ones are kept first, whatever the scores; None: all are equal.
        """
        steps, schedule = getattr(self, prefix + "steps"), MASK_SCHEDULES[self.mask_schedule]
        numbers = uniforms.unflatten(1, (steps, 2, -1))
        tiers = torch.zeros_like(values) if tier is None else tier
        above, length = tiers.max() + 1, values.shape[1]
        left = count = masked.sum(dim=1)
        for step in range(1, steps + 1):
            at = masked.flatten().nonzero()[:, 0]  # for which a GPU makes the CPU wait, once in a step
            if not len(at):
                break
            truncation = self.truncation(prefix)
            if not prefix and self.final_temperature is not None:
                change = self.final_temperature - self.temperature
                truncation["temperature"] += (step - 1) / max(steps - 1, 1) * change
            to_draw, noise = (numbers[:, step - 1, i, :length].flatten()[at] for i in range(2))
            drawn, log_p = _draw(logits_of(values, at), to_draw, max(1, _MOST_LOGITS // mask), truncation)
            values = _put(values, at, drawn)
            scores = torch.zeros_like(values, dtype=torch.float64)
            scores = _put(scores, at, score(1 - step / steps, log_p, gumbel(noise), at))
            order = ranks(torch.where(masked, tiers, above) * length + ranks(scores))
            left = schedule.remaining(left, count, step, steps)
            masked = order < left[:, None]
            values = values.masked_fill(masked, mask)
            on_step(step)
        return values


def _put(values: Tensor, at: Tensor, new: Tensor) -> Tensor:
    """(B, L) values with others at (N,) flattened positions."""
    return values.flatten().index_put((at,), new).view_as(values)


def _draw(logits: RowLogits, numbers: Tensor, most: int, truncation: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(N,) values, drawn by N >= 1 numbers in [0, 1), and their untruncated log-probabilities, `most` at a time."""
    parts = []
    for rows in torch.arange(len(numbers), device=numbers.device).split(most):
        own = logits(rows).double()
        drawn = draw(truncate(own, **truncation), numbers[rows])
        parts.append((drawn, own.gather(1, drawn[:, None])[:, 0] - own.logsumexp(dim=1)))
    values, log_p = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(log_p)


@lru_cache(maxsize=8)
def _halton(layout: CodeLayout) -> Tensor:
    """(S,) long: when the Halton sequence of bases 2 and 3 first comes to a cell of each slot."""
    rows, columns = layout.grids[-1]
    first: dict[int, int] = {}
    for point in itertools.takewhile(lambda _: len(first) < rows * columns, itertools.count()):
        cell = int(_radical_inverse(point, 2) * rows) * columns + int(_radical_inverse(point, 3) * columns)
        first.setdefault(cell, point)
    visits = torch.tensor([first[cell] for cell in range(rows * columns)]).expand(layout.num_grains, -1).flatten()
    at_cell = layout.slots().at_cell.flatten()
    return torch.full((layout.num_slots,), point + 1).scatter_reduce(0, at_cell, visits, "amin")


def _radical_inverse(number: int, base: int) -> float:
    """In [0, 1): the digits of a number in a base, mirrored at the point."""
    scale, found = 1.0, 0.0
    while number:
        scale /= base
        found += number % base * scale
        number //= base
    return found
