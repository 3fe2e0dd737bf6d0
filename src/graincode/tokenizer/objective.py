"""What stage 1 minimises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from graincode.core.errors import GraincodeError
from graincode.core.losses import Term
from graincode.networks.perceptual import PerceptualDistance
from graincode.tokenizer.dqvae import Reconstruction


class ReconstructionObjective:
    """Pixel error, perceptual distance and commitment.

    Args:
        pixel: "l1" or "l2", averaged over all pixels and channels in [-1, 1].
        commitment: weight of the squared distance between encoder output and codebook entry, each code counted once.
        perceptual: a distance to add, with its weight, or None.
    Raises:
        GraincodeError: there is no such pixel error, or the weight is negative.
    Source: VQ-VAE (van den Oord et al., 2017), eq. 3; the codebook itself learns by moving averages.
    """

    def __init__(
        self, pixel: Literal["l1", "l2"] = "l2", commitment: float = 0.25, perceptual: PerceptualDistance | None = None
    ) -> None:
        if pixel not in ("l1", "l2"):
            raise GraincodeError(
                f"pixel loss {pixel!r}: type tokenizer.objective.pixel=l1 or tokenizer.objective.pixel=l2"
            )
        if commitment < 0:
            raise GraincodeError(
                f"commitment={commitment}: expected 0 or more; type tokenizer.objective.commitment=0.25"
            )
        self.pixel, self.commitment, self.perceptual = pixel, commitment, perceptual

    def __call__(self, images: Tensor, reconstruction: Reconstruction, nominal_length: float) -> dict[str, Term]:
        """The terms for (B, 3, H, W) images in [-1, 1] and their reconstruction.

        All are sums over images, whose number is known ahead; so the errors of codes are divided by the number of
        codes that an image is expected to have, not by the one that it has.
        """
        made = reconstruction.images.to(images.dtype)
        difference = made - images
        error = difference.abs() if self.pixel == "l1" else difference.square()
        codes = reconstruction.quantized.error
        terms = {
            self.pixel: Term(error.flatten(1).mean(1).sum(), len(images)),
            "commitment": Term(codes.sum() / nominal_length, len(images), self.commitment),
            **reconstruction.routing.terms,
            "codes_per_image": Term(codes.new_tensor(float(len(codes))), len(images), 0.0),
        }
        if self.perceptual is not None:
            terms["perceptual"] = Term(self.perceptual(made, images).sum(), len(images), self.perceptual.weight)
        return terms

    def likeness(self, terms: Mapping[str, Term]) -> Term:
        """What an adversarial loss is weighed against: all terms that compare images, as one."""
        parts = [terms[name] for name in (self.pixel, "perceptual") if name in terms]
        return Term(sum(part.weight * part.total for part in parts), parts[0].count)
