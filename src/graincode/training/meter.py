"""Means of terms over a logging interval."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from graincode.core.losses import Term, as_count
from graincode.distributed import collectives


class Meter:
    """Means of terms and frequencies over a logging interval, kept on the device.

    `flush` adds up all processes and synchronises once; until then nothing waits for the device.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._histograms: dict[str, Tensor] = {}

    def add(self, terms: Mapping[str, Term], weight: float = 1.0) -> None:
        """Take in one batch's terms; with a weight of 0, their names alone."""
        for name, term in terms.items():
            total = term.total.detach().double()
            pair = torch.stack([total, as_count(term.count, total)]) * weight
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def add_histograms(self, histograms: Mapping[str, Tensor]) -> None:
        """Take in (V,) counts of what one batch chose among V things."""
        for name, counts in histograms.items():
            counts = counts.double()
            self._histograms[name] = self._histograms[name] + counts if name in self._histograms else counts

    def flush(self) -> dict[str, float]:
        """The means since the last flush, and of each histogram the share of things chosen and the perplexity."""
        state = self.state()
        self._sums, self._histograms = {}, {}
        means = {name: float(total / max(count, 1)) for name, (total, count) in state["sums"].items()}
        for name, counts in state["histograms"].items():
            frequencies = counts / counts.sum().clamp(min=1)
            means[f"{name}_usage"] = float((counts > 0).double().mean())
            means[f"{name}_perplexity"] = math.exp(float(torch.special.entr(frequencies).sum()))
        return means

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What was taken in since the last flush, on all processes together, on the CPU."""
        parts = {"sums": self._sums, "histograms": self._histograms}
        tensors = [tensor for part in parts.values() for tensor in part.values()]
        if not tensors:
            return {name: {} for name in parts}
        joined = collectives.sum_(torch.cat([tensor.flatten() for tensor in tensors])).cpu()
        pieces = iter(joined.split([tensor.numel() for tensor in tensors]))
        return {name: {key: next(pieces) for key in part} for name, part in parts.items()}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]], device: torch.device) -> None:
        """The inverse of `state`: what all processes had taken in counts once, on process 0."""
        share = 1.0 if collectives.is_main() else 0.0
        self._sums, self._histograms = (
            {key: tensor.double().to(device) * share for key, tensor in state[name].items()}
            for name in ("sums", "histograms")
        )
