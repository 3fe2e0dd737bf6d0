"""Classifier-free guidance: a wrapper around logits, so that every sampler has it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graincode.core.layout import CodeLayout
from graincode.sampling.protocol import AutoregressiveLogits, MaskedLogits, RowLogits

SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": torch.ones_like,
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1 - (math.pi * progress).cos()) / 2,
}
"""Completed share of the image, in [0, 1], to the share of guidance that is applied."""


class Guidance:
    """u + s (c - u), of logits c with a condition and u without; s goes from 1 to the scale as an image is completed.

    Computed in float32, or float64 if the logits are: half precision would round the difference.

    The logits are of twice the batch: first all samples with their condition, then all without.
    Source: classifier-free guidance (Ho & Salimans, 2022), eq. 6, of logits; schedules: MUSE (Chang et al., 2023).
    """

    def __init__(self, logits: Any, scale: float, schedule: str = "constant") -> None:
        self.logits, self.scale, self._share = logits, scale, SCHEDULES[schedule]

    def _guide(self, logits: Tensor, progress: Tensor) -> Tensor:
        """(2 N, ...) logits of images of which an (N,) share is completed, to (N, ...)."""
        conditional, unconditional = logits.to(torch.promote_types(logits.dtype, torch.float32)).chunk(2)
        scale = 1 + (self.scale - 1) * self._share(progress).to(conditional.dtype).view(-1, *[1] * (logits.ndim - 1))
        return unconditional + scale * (conditional - unconditional)


class GuidedLogits(Guidance):
    """Guided `AutoregressiveLogits`; the sampler sets `progress`, (B,) float64, the completed share of each image."""

    logits: AutoregressiveLogits
    progress: Tensor

    def take(self, slots: Tensor, contents: Tensor) -> None:
        self.logits.take(_twice(slots), _twice(contents))

    def regions(self) -> Tensor:
        return self._guide(self.logits.regions(), self.progress)

    def contents(self, slots: Tensor) -> Tensor:
        return self._guide(self.logits.contents(_twice(slots)), self.progress)

    def begin(self, rows: Tensor, labels: Tensor, given: Any) -> None:
        self.logits.begin(torch.cat([rows, rows + len(self.progress)]), labels, given)


class GuidedMaskedLogits(Guidance):
    """Guided `MaskedLogits` of a layout; the completed share shows in the arguments."""

    logits: MaskedLogits

    def __init__(self, logits: MaskedLogits, layout: CodeLayout, scale: float, schedule: str = "constant") -> None:
        super().__init__(logits, scale, schedule)
        self.layout = layout

    def grains(self, grains: Tensor) -> Tensor:
        progress = (grains < self.layout.num_grains).double().mean(dim=1)
        return self._guide(self.logits.grains(_twice(grains)), progress)

    def contents(self, slots: Tensor, contents: Tensor, at: Tensor) -> RowLogits:
        known, codes = contents != self.layout.no_content, slots != self.layout.pad_slot
        progress = known.sum(dim=1).double() / codes.sum(dim=1)
        logits = self.logits.contents(_twice(slots), _twice(contents), torch.cat([at, at + slots.numel()]))
        image = at // slots.shape[1]
        return lambda rows: self._guide(logits(torch.cat([rows, rows + len(image)])), progress[image[rows]])


def _twice(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows])
