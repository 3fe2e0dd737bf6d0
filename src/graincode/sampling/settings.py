"""What all samplers have in common: how contents are drawn, and guidance."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from graincode.core.errors import check, check_choice
from graincode.core.layout import CodeLayout
from graincode.core.sequences import CodeSequences
from graincode.sampling.guidance import SCHEDULES

_KINDS = {"int": ("a whole number", Integral), "float": ("a finite number", Real), "bool": ("true or false", bool)}
_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "temperature": ("a number above 0 (greedy: top_k=1)", lambda x: x > 0),
    "top_k": ("0 (all) or more", lambda x: x >= 0),
    "top_p": ("a number above 0, at most 1 (all)", lambda x: 0 < x <= 1),
    "min_p": ("a number from 0 (all), below 1", lambda x: 0 <= x < 1),
}


@dataclass(frozen=True, kw_only=True)
class AutoSampler:
    """Settings that every sampler has; `Generator.resolve` makes the sampler of a generator of them.

    Attributes:
        temperature, top_k, top_p, min_p: of the contents, see `core.logits.truncate`.
        guidance_scale: classifier-free guidance; 1 is the conditional model, at half the cost of any other value.
        guidance_schedule: how guidance grows as an image is completed.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    guidance_scale: float = 1.0
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"

    name: ClassVar[str] = "auto"  # in configurations
    other: ClassVar[str] = ""  # prefix of temperature and truncation of what is drawn besides contents

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kind, _, optional = str(field.type).partition(" | ")
            if kind in _KINDS and not (optional and value is None):
                expected, known = _KINDS[kind]
                fits = isinstance(value, known) and isinstance(value, bool) == (kind == "bool")
                check(field.name, value, expected, fits and math.isfinite(value))
        for prefix in {"", self.other}:
            for name, (expected, holds) in _RANGES.items():
                check(prefix + name, value := getattr(self, prefix + name), expected, holds(value))
        check("guidance_scale", self.guidance_scale, "0 (without the condition) or more", self.guidance_scale >= 0)
        check_choice("guidance_schedule", self.guidance_schedule, SCHEDULES)

    def truncation(self, prefix: str = "") -> dict[str, Any]:
        """The settings of `core.logits.truncate` for contents, or with a prefix for what else is drawn."""
        return {name: getattr(self, prefix + name) for name in _RANGES}


@dataclass(frozen=True)
class Part:
    """Some of the samples that are asked for.

    Attributes:
        labels: (n,) long; under guidance (2n,), of which the second half has no class.
        uniforms: (n, *numbers) in [0, 1).
        given: what each keeps; None if nothing.
    """

    labels: Tensor
    uniforms: Tensor
    given: Any


class Sampler(AutoSampler, ABC):
    """Draws codes from a function that returns logits."""

    @abstractmethod
    def numbers(self, layout: CodeLayout) -> tuple[int, ...]:
        """Shape of the random numbers that one sample takes."""

    @abstractmethod
    def __call__(
        self,
        logits: Any,
        layout: CodeLayout,
        uniforms: Tensor,
        on_step: Callable[[int], None] = lambda _: None,
        given: Any = None,
    ) -> CodeSequences:
        """Draw one image's codes for each row of random numbers, as sequences that `from_sequences` takes.

        Args:
            logits: the conditioned model; under guidance, for the batch with its condition and then again without.
            uniforms: (B, *numbers(layout)) in [0, 1).
            on_step: called with the number of steps taken so far, for a progress bar.
            given: what each sample keeps.
        """

    @torch.no_grad()
    def stream(
        self,
        logits: Callable[[Tensor, Any], Any],
        layout: CodeLayout,
        part: Callable[[Tensor], Part],
        count: int,
        rows: int,
        on_step: Callable[[int, int], None] = lambda *_: None,
    ) -> Iterator[CodeSequences]:
        """Draw samples 0 to `count` - 1 in order, `rows` at a time, each time but the last.

        Args:
            logits: labels and what is given to the conditioned model.
            part: (n,) long, some of the samples, to what is asked for; made when they begin.
            rows: samples that are drawn at one time; fewer are filled up with copies of the last.
            on_step: called with the number of steps of the batch, and of samples that are complete.
        """
        for start in range(0, count, rows):
            now = part(torch.arange(start, start + rows).clamp(max=count - 1))
            model, report = logits(now.labels, now.given), partial(_report, on_step, start)
            yield self(model, layout, now.uniforms, report, now.given)[: count - start]


def _report(on_step: Callable[[int, int], None], complete: int, step: int) -> None:
    on_step(step, complete)
