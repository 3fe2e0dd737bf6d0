"""What stage 2 minimises."""

from __future__ import annotations

from torch import Tensor

from graincode.core.codes import GrainCodes
from graincode.core.losses import Term
from graincode.generator.dgit_ar import SequenceLikelihood


class AutoregressiveObjective:
    """Mean content loss per code + mean over the grains of the mean position loss per decision.

    Args:
        position_weight: of the position losses.
    Source: DQ-Transformer (arXiv 2305.11718), section 3.3.
    """

    def __init__(self, position_weight: float = 1.0) -> None:
        self.position_weight = position_weight

    def __call__(self, likelihood: SequenceLikelihood, num_grains: int) -> dict[str, Term]:
        """The terms for the likelihood of a batch, in nats; `nats_per_image` is only reported."""
        terms = {"content": Term(likelihood.content.sum(), likelihood.is_code.sum())}
        for g in range(num_grains - 1):  # the positions of the last grain are implied
            here = likelihood.is_decision & (likelihood.grain == g)
            terms[f"position_{g}"] = Term(
                (likelihood.position * here).sum(), here.sum(), self.position_weight / (num_grains - 1)
            )
        terms["nats_per_image"] = Term(likelihood.total.detach().sum(), len(likelihood.content), 0.0)
        return terms

    def counts(self, codes: GrainCodes) -> dict[str, Tensor | float]:
        """The counts of the terms that the loss has, known before the model has run.

        A grain's decisions are where its regions come next, and its end.
        """
        counts: dict[str, Tensor | float] = {"content": codes.lengths.sum()}
        for g in range(codes.layout.num_grains - 1):
            counts[f"position_{g}"] = (codes.grains == g).sum() + len(codes)
        return counts
