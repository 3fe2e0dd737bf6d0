"""Classifier-free guidance: a wrapper around logits, so that every sampler has it."""

from __future__ import annotations

import torch
from torch import Tensor

from graincode.sampling.protocol import AutoregressiveLogits


class GuidedLogits:
    """u + scale (c - u), of logits c with a condition and u without.

    Args:
        logits: of twice the batch: first all samples with their condition, then all without.
        scale: 1 is the conditional model; more exaggerates the condition.
    Source: Classifier-Free Diffusion Guidance (Ho & Salimans, 2022), eq. 6, on logits.
    """

    def __init__(self, logits: AutoregressiveLogits, scale: float) -> None:
        self.logits, self.scale = logits, scale

    def next_region(self, slots: Tensor, contents: Tensor) -> Tensor:
        """See `AutoregressiveLogits`."""
        return self._guide(self.logits.next_region(torch.cat([slots, slots]), torch.cat([contents, contents])))

    def next_content(self, slots: Tensor) -> Tensor:
        """See `AutoregressiveLogits`."""
        return self._guide(self.logits.next_content(torch.cat([slots, slots])))

    def _guide(self, logits: Tensor) -> Tensor:
        conditional, unconditional = logits.chunk(2)
        return unconditional + self.scale * (conditional - unconditional)
