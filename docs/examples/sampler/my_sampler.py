"""A sampler for DGiT-AR whose contents become sharper while an image is drawn."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from graincode.core.layout import CodeLayout
from graincode.sampling import AutoregressiveSampler
from graincode.sampling.protocol import AutoregressiveLogits


class CoolingLogits:
    """Logits of a model, divided by a temperature that falls from 1 with every token."""

    def __init__(self, logits: AutoregressiveLogits, final: float, tokens: int) -> None:
        self.logits, self.final, self.tokens, self.steps = logits, final, tokens, None

    def begin(self, rows: Tensor, labels: Tensor, given: Any) -> None:
        self.logits.begin(rows, labels, given)
        self.steps[rows.to(self.steps.device)] = 0

    def take(self, slots: Tensor, contents: Tensor) -> None:
        self.steps = torch.ones_like(slots) if self.steps is None else self.steps + 1  # of each row
        self.logits.take(slots, contents)

    def regions(self) -> Tensor:
        return self.logits.regions()

    def contents(self, slots: Tensor) -> Tensor:
        progress = (self.steps / self.tokens).clamp(max=1)[:, None]
        return self.logits.contents(slots) / (1 + (self.final - 1) * progress)


@dataclass(frozen=True, kw_only=True)
class CoolingSampler(AutoregressiveSampler):
    """Autoregressive sampling at a temperature that falls from 1 to `cooled`."""

    cooled: float = 0.7

    name: ClassVar[str] = "cooling"

    def wrapped(self, logits: AutoregressiveLogits, layout: CodeLayout) -> AutoregressiveLogits:
        return CoolingLogits(logits, self.cooled, layout.max_tokens)
