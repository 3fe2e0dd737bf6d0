"""Means of terms over a logging interval."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from graincode.core.losses import Term, as_count
from graincode.distributed import collectives


class Meter:
    """Means of terms and frequencies over a logging interval, kept on the device; only `flush` and `state` wait for it,
    once, and add up all processes."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Tensor]] = {"terms": {}, "histograms": {}}

    def add(self, terms: Mapping[str, Term], weight: float = 1.0) -> None:
        """Take in one batch's terms; with a weight of 0, their names alone."""
        for name, term in terms.items():
            total = term.total.detach().double()
            self._add("terms", name, torch.stack([total, as_count(term.count, total)]) * weight)

    def add_histograms(self, histograms: Mapping[str, Tensor]) -> None:
        """Take in (V,) counts of what one batch chose among V things."""
        for name, counts in histograms.items():
            self._add("histograms", name, counts.double())

    def _add(self, kind: str, name: str, values: Tensor) -> None:
        self._sums[kind][name] = self._sums[kind].get(name, 0) + values

    def flush(self) -> dict[str, float]:
        """The means since the last flush, and of each histogram the share of things chosen and the perplexity."""
        state = self.state()
        self._sums = {kind: {} for kind in self._sums}
        means = {name: float(total / max(count, 1)) for name, (total, count) in state["terms"].items()}
        for name, counts in state["histograms"].items():
            frequencies = counts / counts.sum().clamp(min=1)
            means[f"{name}_usage"] = float((counts > 0).double().mean())
            means[f"{name}_perplexity"] = math.exp(float(torch.special.entr(frequencies).sum()))
        return means

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What was taken in since the last flush, on all processes together, on the CPU."""
        tensors = [tensor for kept in self._sums.values() for tensor in kept.values()]
        joined = collectives.sum_(torch.cat(tensors)).cpu() if tensors else torch.zeros(0)
        pieces = iter(joined.split([len(tensor) for tensor in tensors]))
        return {kind: {name: next(pieces) for name in kept} for kind, kept in self._sums.items()}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]], device: torch.device) -> None:
        """The inverse of `state`: what all processes had taken in counts once, on process 0."""
        share = float(collectives.is_main())
        self._sums = {kind: {name: t.to(device) * share for name, t in kept.items()} for kind, kept in state.items()}
