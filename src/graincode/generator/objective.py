"""Losses of stage 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from graincode.core.codes import GrainCodes
from graincode.core.errors import check
from graincode.core.losses import Term
from graincode.generator.base import Generator
from graincode.generator.dgit_ar import DGiTAR, SequenceLikelihood
from graincode.generator.dgit_nar import DGiTNAR, MaskedPredictions


class GeneratorObjective(Protocol):
    """The loss of a kind of generator."""

    def __call__(self, output: Any) -> dict[str, Term]:
        """The terms for a generator's output for a batch."""

    def counts(self, codes: GrainCodes, module: Generator) -> dict[str, Tensor | float]:
        """The counts of the terms that the loss has, known before the model has run."""

    def judge(self, metrics: Mapping[str, float]) -> float:
        """The number that compares generators, less is better, from the means of the terms on validation codes."""


class AutoregressiveObjective:
    """Mean loss per code: minus the log-likelihood of contents and positions.

    A `position_weight` >= 0 is that of the mean over all K grains of the mean position loss per decision, added to the
    mean content loss per code; 1 as published. Of the last grain it is 0 where its positions are implied.
    Source: DQ-Transformer (arXiv 2305.11718), section 3.3.
    """

    def __init__(self, position_weight: float | None = None) -> None:
        check("position_weight", position_weight, "0 or more, or null", position_weight is None or position_weight >= 0)
        self.position_weight = position_weight

    def __call__(self, likelihood: SequenceLikelihood) -> dict[str, Term]:
        """The terms for a likelihood, in nats; only reported: `bits_per_image`, `bits_content_g`, `bits_position_g`."""
        codes, decided, images = likelihood.is_code.sum(), likelihood.decided_grains, len(likelihood.content)
        terms = {"content": Term(likelihood.content.sum(), codes)}
        for g in range(decided):
            here = likelihood.is_decision & (likelihood.grain == g)
            shared = (
                (codes,) if self.position_weight is None else (here.sum(), self.position_weight / likelihood.num_grains)
            )
            terms[f"position_{g}"] = Term((likelihood.position * here).sum(), *shared)
        return terms | {f"bits_{k}": Term(bits.sum(), images, 0.0) for k, bits in likelihood.bits().items()}

    def counts(self, codes: GrainCodes, module: DGiTAR) -> dict[str, Tensor | float]:
        """See `GeneratorObjective`. A grain's decisions are its regions, and its end, which the last grain has not."""
        total, grains = codes.lengths.sum(), range(module.decided_grains)
        counts = [total for _ in grains]
        if self.position_weight is not None:
            counts = [(codes.grains == g).sum() + len(codes) * (g < codes.layout.num_ends) for g in grains]
        return {"content": total} | {f"position_{g}": count for g, count in enumerate(counts)}

    def judge(self, metrics: Mapping[str, float]) -> float:
        """Bits per image."""
        return metrics["bits_per_image"]


class MaskedObjective:
    """Mean loss per masked code + `grains_weight` >= 0 times that per masked region; with one grain, of codes alone.

    Sums are divided by how many are masked on average, so that each masked code counts alike whatever share of its
    image is masked, and the count is known before the model has run.
    """

    def __init__(self, grains_weight: float = 1.0) -> None:
        check("grains_weight", grains_weight, "0 or more", grains_weight >= 0)
        self.grains_weight = grains_weight

    def __call__(self, predictions: MaskedPredictions) -> dict[str, Term]:
        """The terms for the predictions of a batch, in nats. Only reported, over what was masked: `content_g` and
        `accuracy_g` of the contents at each grain, `content_at_25` and `accuracy_at_25` (50, 75, 100) where up to 25
        per cent of the image was masked; `accuracy_grains` of the grain map. An accuracy of 7 per cent is normal: many
        entries of a large codebook look nearly alike."""
        found, grains = predictions.contents, predictions.grains
        terms = {"content": Term(found.loss.sum(), predictions.counts["content"])}
        if grains is not None:
            terms["grains"] = Term(grains.loss.sum(), predictions.counts["grains"], self.grains_weight)
            terms["accuracy_grains"] = Term(grains.correct.sum(), (grains.grain >= 0).sum(), 0.0)
        groups = {str(g): found.grain == g for g in range(predictions.num_grains)}
        quarter = (4 * found.ratio).ceil()
        groups |= {f"at_{25 * q}": quarter == q for q in range(1, 5)}
        for name, here in groups.items():
            count = here.sum()
            terms[f"content_{name}"] = Term(torch.where(here, found.loss.detach(), 0).sum(), count, 0.0)
            terms[f"accuracy_{name}"] = Term((found.correct & here).sum(), count, 0.0)
        return terms

    def counts(self, codes: GrainCodes, module: DGiTNAR) -> dict[str, Tensor | float]:
        """See `GeneratorObjective`."""
        return module.expected(codes)

    def judge(self, metrics: Mapping[str, float]) -> float:
        """The loss, in nats."""
        return metrics["content"] + self.grains_weight * metrics.get("grains", 0.0)
