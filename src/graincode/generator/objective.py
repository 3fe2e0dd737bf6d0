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

    def __call__(self, likelihood: SequenceLikelihood) -> dict[str, Term]:
        """The terms for the likelihood of a batch, in nats.

        Only reported, in bits per image: `bits_per_image`, and its parts `bits_content_g` and `bits_position_g`.
        """
        terms = {"content": Term(likelihood.content.sum(), likelihood.is_code.sum())}
        decided = likelihood.decided_grains
        for g in range(decided):
            here = likelihood.is_decision & (likelihood.grain == g)
            terms[f"position_{g}"] = Term(
                (likelihood.position * here).sum(), here.sum(), self.position_weight / decided
            )
        bits, count = likelihood.bits(), len(likelihood.content)
        for name, values in bits.items():
            terms[f"bits_{name}"] = Term(values.sum(), count, 0.0)
        return terms

    def counts(self, codes: GrainCodes, decided_grains: int) -> dict[str, Tensor | float]:
        """The counts of the terms that the loss has, known before the model has run.

        A grain's decisions are where its regions come next, and its end; the last grain, where it decides anything, has
        no end.
        """
        counts: dict[str, Tensor | float] = {"content": codes.lengths.sum()}
        for g in range(decided_grains):
            counts[f"position_{g}"] = (codes.grains == g).sum() + (len(codes) if g < codes.layout.num_ends else 0)
        return counts
