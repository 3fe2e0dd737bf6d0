"""A sampler for DGiT-AR whose contents become sharper while an image is drawn."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from graincode.core.layout import CodeLayout
from graincode.core.sequences import CodeSequences
from graincode.sampling import AutoregressiveSampler
from graincode.sampling.protocol import AutoregressiveLogits


class CoolingLogits:
    """Logits of a model, divided by a temperature that falls from 1 with every token."""

    def __init__(self, logits: AutoregressiveLogits, final: float, tokens: int) -> None:
        self.logits, self.final, self.tokens, self.step = logits, final, tokens, 0

    def take(self, slots: Tensor, contents: Tensor) -> None:
        self.step += 1
        self.logits.take(slots, contents)

    def regions(self) -> Tensor:
        return self.logits.regions()

    def contents(self, slots: Tensor) -> Tensor:
        progress = min(self.step / self.tokens, 1)
        return self.logits.contents(slots) / (1 + (self.final - 1) * progress)

    def keep(self, rows: Tensor) -> None:
        self.logits.keep(rows)


@dataclass(frozen=True, kw_only=True)
class CoolingSampler(AutoregressiveSampler):
    """Autoregressive sampling at a temperature that falls from 1 to `cooled`."""

    cooled: float = 0.7

    name: ClassVar[str] = "cooling"

    def __call__(self, logits, layout: CodeLayout, uniforms: Tensor, *args, **kwargs) -> CodeSequences:
        cooling = CoolingLogits(logits, self.cooled, layout.max_tokens)
        return super().__call__(cooling, layout, uniforms, *args, **kwargs)
