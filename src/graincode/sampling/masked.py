"""Masked sampling of variable-length codes: all of them at once, over and over, fewer masked each time."""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from graincode.core.codes import GrainCodes
from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout
from graincode.core.logits import draw, gumbel, ranks, truncate
from graincode.core.prompts import CodeMask
from graincode.core.schedules import MASK_SCHEDULES
from graincode.core.sequences import CodeSequences, to_sequences
from graincode.sampling.guidance import GuidedMaskedLogits
from graincode.sampling.protocol import MaskedLogits, RowLogits
from graincode.sampling.settings import SamplerSettings

Order = Literal["confidence", "random", "halton", "coarse_first", "dense_first"]
Places = tuple[Tensor, ...]
_MOST_LOGITS = 2**24  # in float64 at a time, of which a draw takes several copies
_ORDERS = dict.fromkeys(typing.get_args(Order))
_READ_BY = dict.fromkeys(("choice_temperature", "choice_noise_decay"), ("confidence", "coarse_first", "dense_first"))
_READ_BY |= dict.fromkeys(("information_weight", "information_decay"), ("confidence", "random"))


@dataclass(frozen=True, kw_only=True)
class MaskedSampler(SamplerSettings):
    """Draws the grain map, then the codes that it asks for, each by masked prediction.

    In step t of T every masked code is drawn anew, and then all but n_t = min(n_(t-1) - 1, floor(N gamma(t / T))) are
    revealed, of each image's own N codes that are not given; n_T = 0. Those come first whose score

        log p(c_i) + lambda_0 (1 - t / T)^a h_i + tau_0 (1 - t / T)^b Gumbel_i

    is largest; p is the model's own distribution, under guidance the guided one, before temperature and truncation, and
    h_i, the information density, is the code's grain, from 0 for the coarsest to 1 for the finest; of a model that
    predicts densities in bins, the place of its region's grain and bin among all of them, also from 0 to 1. With one
    grain and one bin, or `information_weight` 0, this is MaskGIT.

    Attributes:
        steps: T of the contents, >= 1. An image of fewer codes is complete before the last.
        grain_steps: T of the grain map, whose regions come in order of confidence.
        mask_schedule: gamma: "cosine", "linear" or "arccos".
        order: "confidence" (the score above), "random" (its second part, and noise that does not cool down),
            "halton" (in which the points of a sequence that keeps them far apart first fall into codes, the same for
            all samples; as coarse codes are larger, they come early: at 32 px, of F8 and F4, they are met by point 9
            on average, fine ones by point 35), or "coarse_first" and "dense_first" (all codes of one grain, and bin,
            before those of the next, by confidence within it). Where no confidence keeps unlikely draws back, as with
            random and halton, a temperature of about 0.6 does.
        information_weight: lambda_0, with orders confidence and random; above 0 busy regions come earlier.
        information_decay: a, >= 0; with the same orders.
        choice_temperature: tau_0, >= 0; not with orders random and halton. MaskGIT's 4.5 is worse on Fashion-MNIST.
        choice_noise_decay: b, >= 0; 1 is MaskGIT's; with the same orders.
        grain_choice_temperature: tau_0 of the grain map, where b is 1.
        remask: whether a code or grain that was revealed may be masked again, when its score, with log p as it was when
            it was drawn, is no longer among the largest; codes never are in order halton.
        final_temperature: of the contents in step T, to which the temperature goes in equal steps; None: it stays.
        grain_temperature, grain_top_k, grain_top_p, grain_min_p: of the grains.
    Raises:
        GraincodeError: a setting is out of range, or does not go with the order.
    Source: MaskGIT (Chang et al., 2022), section 3.2; the density's part is our reading of DGiT. Halton: Halton-MaskGIT
        (Besnier et al., 2025).
    """

    steps: int = 8
    grain_steps: int = 4
    mask_schedule: Literal["cosine", "linear", "arccos"] = "cosine"
    order: Order = "confidence"
    information_weight: float = 0.0
    information_decay: float = 1.0
    choice_temperature: float = 1.0
    choice_noise_decay: float = 1.0
    grain_choice_temperature: float = 4.5
    remask: bool = False
    final_temperature: float | None = None
    grain_temperature: float = 1.0
    grain_top_k: int = 0
    grain_top_p: float = 1.0
    grain_min_p: float = 0.0

    name: ClassVar[str] = "masked"
    other: ClassVar[str] = "grain_"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("order", _ORDERS)
        self.check_choice("mask_schedule", MASK_SCHEDULES)
        for name, least, example in (
            ("steps", 1, 8), ("grain_steps", 1, 4),
            ("choice_temperature", 0, 1), ("grain_choice_temperature", 0, 4.5), ("information_decay", 0, 1),
            ("choice_noise_decay", 0, 1),
        ):  # fmt: skip
            if not (value := getattr(self, name)) >= least:
                raise GraincodeError(
                    f"{name} {value}: expected {least} or more; type for example sampler.{name}={example}"
                )
        if self.final_temperature is not None and not self.final_temperature > 0:
            raise GraincodeError(
                f"final_temperature {self.final_temperature}: expected more than 0, or null; type for example "
                "sampler.final_temperature=0.5"
            )
        for name, orders in _READ_BY.items():
            value, plain = getattr(self, name), getattr(MaskedSampler, name)
            if self.order not in orders and value != plain:
                raise GraincodeError(
                    f"{name} {value} with order {self.order!r}, which does not read it: type sampler.{name}={plain:g}, "
                    f"or sampler.order= one of {', '.join(orders)}"
                )

    def numbers(self, layout: CodeLayout, density_bins: int = 1) -> tuple[int, ...]:
        """Shape of the random numbers of one sample: for each step and each place, one to draw and one to choose."""
        of_contents = 2 * self.steps * layout.num_regions * layout.codes_per_region[-1]
        return (self._map_numbers(layout, density_bins) + of_contents,)

    def _map_numbers(self, layout: CodeLayout, density_bins: int) -> int:
        return 2 * self.grain_steps * layout.num_regions if layout.num_grains * density_bins > 1 else 0

    @torch.no_grad()
    def __call__(
        self,
        logits: MaskedLogits,
        layout: CodeLayout,
        uniforms: Tensor,
        on_step: Callable[[int], None] = lambda _: None,
        given: CodeMask | None = None,
    ) -> CodeSequences:
        """Draw one image's codes for each row of random numbers.

        Args:
            logits: the model, with whatever it is conditioned on; under guidance, for the batch with its condition and
                then again without.
            layout: of the codes that it makes.
            uniforms: (B, *numbers(layout, logits.density_bins)) in [0, 1).
            on_step: called with the number of steps taken on the contents, for a progress bar.
            given: the grains and codes of each sample that are kept. Bins are drawn, those of known grains first.
        Returns:
            sequences that `from_sequences` takes, without ends.
        """
        if self.guidance_scale != 1:
            logits = GuidedMaskedLogits(logits, layout, self.guidance_scale, self.guidance_schedule)
        split = self._map_numbers(layout, logits.density_bins)
        of_map, of_contents = uniforms.split([split, uniforms.shape[1] - split], dim=1)
        values = self._values(logits, layout, of_map, given)
        return self._contents(logits, layout, values, of_contents, given, on_step)

    def _values(self, logits: MaskedLogits, layout: CodeLayout, uniforms: Tensor, given: CodeMask | None) -> Tensor:
        """(B, R) values of the regions, see `MaskedLogits`."""
        count, shape = layout.num_grains * logits.density_bins, (len(uniforms), layout.num_regions)
        if count == 1:
            return torch.zeros(shape, dtype=torch.long, device=uniforms.device)
        values = torch.full(shape, count, device=uniforms.device)
        grain = torch.arange(count, device=values.device) // logits.density_bins
        illegal, known = (grain < 0).expand(*shape, count), None
        if given is not None:
            known, own = given.known_regions.flatten(1), given.codes.grains.flatten(1)
            illegal = torch.where(known[..., None], grain != own[..., None], grain < given.least_grain[:, None, None])
            if logits.density_bins == 1:
                values = torch.where(known, own, count)

        def ask(values: Tensor, at: Tensor) -> RowLogits:
            found = logits.grains(values).masked_fill(illegal, -torch.inf)[at]
            return lambda rows: found[rows]

        def score(cooling: float, log_p: Tensor, noise: Tensor, at: Places) -> Tensor:
            return log_p + self.grain_choice_temperature * cooling * noise

        return self._reveal(
            ask, score, values, count, values == count, uniforms.unflatten(1, (self.grain_steps, 2, -1)),
            "grain_", None if known is None else known.long(),
        )  # fmt: skip

    def _contents(
        self,
        logits: MaskedLogits,
        layout: CodeLayout,
        values: Tensor,
        uniforms: Tensor,
        given: CodeMask | None,
        on_step: Callable[[int], None],
    ) -> CodeSequences:
        """The codes of regions that have (B, R) values."""
        grains = (values // logits.density_bins).unflatten(1, layout.grids[0])
        blank = GrainCodes(grains, grains.new_zeros(len(grains), *layout.grids[-1]), layout)
        slots = to_sequences(blank, ends=False).slots
        table, owner = layout.slots(slots.device), slots.clamp(max=layout.num_slots - 1)
        unknown, contents = slots != layout.pad_slot, torch.full_like(slots, layout.no_content)
        if given is not None:
            first = table.finest[owner]
            kept = unknown & given.known_cells.flatten(1).gather(1, first)
            contents = torch.where(kept, given.codes.indices.flatten(1).gather(1, first), contents)
            unknown = unknown & ~kept
        value, last = values.gather(1, table.region[owner]), layout.num_grains * logits.density_bins - 1
        density = value.double() / max(last, 1)
        visited = _halton(layout).to(slots.device)[owner] if self.order == "halton" else None
        tier = {"dense_first": value, "coarse_first": last - value}.get(self.order)

        def score(cooling: float, log_p: Tensor, noise: Tensor, at: Places) -> Tensor:
            if visited is not None:
                return -visited[at].double()
            weighed = self.information_weight * cooling**self.information_decay * density[at]
            if self.order == "random":
                return weighed + noise
            return log_p + weighed + self.choice_temperature * cooling**self.choice_noise_decay * noise

        contents = self._reveal(
            lambda values, at: logits.contents(slots, values, at), score, contents, layout.no_content, unknown,
            uniforms.unflatten(1, (self.steps, 2, -1)), "", tier, on_step,
        )  # fmt: skip
        return CodeSequences(slots, contents, layout)

    def _reveal(
        self,
        ask: Callable[[Tensor, Tensor], RowLogits],
        score: Callable[[float, Tensor, Tensor, Places], Tensor],
        values: Tensor,
        mask: int,
        unknown: Tensor,
        numbers: Tensor,
        kind: str,
        tier: Tensor | None = None,
        on_step: Callable[[int], None] = lambda _: None,
    ) -> Tensor:
        """Fill in what is unknown.

        Args:
            ask: (B, L) values, and (B, L) bool, where they are masked, to the logits of those.
            score: what of 1 - t / T, and of the log-probabilities, the noise and the places of N values, is large for
                those that are to be revealed first.
            values: (B, L) long below `mask`, and `mask` where they are unknown.
            unknown: (B, L) bool.
            numbers: (B, T, 2, L or more) in [0, 1), to draw values and for noise.
            kind: prefix of the settings of truncation.
            tier: (B, L) long, 0 or more; the higher ones come first, whatever the scores; None: all are equal.
            on_step: called with t.
        """
        steps, schedule = numbers.shape[1], MASK_SCHEDULES[self.mask_schedule]
        masked, length = unknown, values.shape[1]
        tiers = torch.zeros_like(values) if tier is None else tier
        above = tiers.max() + 1
        log_p = torch.zeros(values.shape, dtype=torch.float64, device=values.device)  # each when it was drawn
        left = count = unknown.sum(dim=1)
        for step in range(1, steps + 1):
            if not bool(masked.any()):
                break
            at = masked.nonzero(as_tuple=True)
            to_draw, truncation = numbers[at[0], step - 1, 0, at[1]], self._truncation(kind, step)
            drawn, log_p[at] = _draw(ask(values, masked), to_draw, max(1, _MOST_LOGITS // mask), truncation)
            values = values.index_put(at, drawn)
            may_be_masked = unknown if self.remask else masked
            at, scores = may_be_masked.nonzero(as_tuple=True), torch.zeros_like(log_p)
            scores[at] = score(1 - step / steps, log_p[at], gumbel(numbers[at[0], step - 1, 1, at[1]]), at)
            order = ranks(torch.where(may_be_masked, tiers, above) * length + ranks(scores))
            left = schedule.remaining(left, count, step, steps)
            masked = order < left[:, None]
            values = values.masked_fill(masked, mask)
            on_step(step)
        return values

    def _truncation(self, kind: str, step: int) -> dict[str, float]:
        found = self.truncation(kind)
        if kind == "" and self.final_temperature is not None:
            progress = (step - 1) / max(self.steps - 1, 1)
            found["temperature"] += progress * (self.final_temperature - self.temperature)
        return found


def _draw(logits: RowLogits, numbers: Tensor, most: int, truncation: dict[str, float]) -> tuple[Tensor, Tensor]:
    """(N,) values drawn with as many numbers in [0, 1), N >= 1, and their log-probabilities before truncation; so many
    rows at a time at most."""
    parts = []
    for rows in torch.arange(len(numbers), device=numbers.device).split(most):
        own = logits(rows).double()
        drawn = draw(truncate(own, **truncation), numbers[rows])
        parts.append((drawn, own.gather(1, drawn[:, None])[:, 0] - own.logsumexp(dim=1)))
    values, log_p = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(log_p)


@lru_cache(maxsize=8)
def _halton(layout: CodeLayout) -> Tensor:
    """(S,) long: when the Halton sequence of bases 2 and 3 first comes to a cell of each slot; 0 for ends."""
    rows, columns = layout.grids[-1]
    first, points = np.zeros(rows * columns, dtype=np.int64), 4 * rows * columns
    seen = np.zeros(0)
    while len(seen) < rows * columns:
        row, column = (_radical_inverse(points, base) for base in (2, 3))
        cells = (row * rows).astype(np.int64) * columns + (column * columns).astype(np.int64)
        seen, when = np.unique(cells, return_index=True)
        points *= 2
    first[seen] = when
    visits = torch.from_numpy(first).expand(layout.num_grains, -1).flatten()
    at_cell = layout.slots().at_cell.flatten()
    return torch.full((layout.num_slots,), len(cells)).scatter_reduce(0, at_cell, visits, "amin")


def _radical_inverse(count: int, base: int) -> np.ndarray:
    """(count,) float64 in [0, 1): the digits of 0, 1, ... in a base, mirrored at the point."""
    numbers, scale = np.arange(count), 1.0
    found = np.zeros(count)
    while numbers.any():
        scale /= base
        found += numbers % base * scale
        numbers //= base
    return found
