"""The loss of stage 1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from graincode.core.errors import check, check_choice
from graincode.core.losses import Term
from graincode.networks.perceptual import PerceptualDistance
from graincode.tokenizer.dqvae import Reconstruction
from graincode.tokenizer.router import Router

Pixel = Literal["l1", "l2"]
Share = Literal["codes", "cells"]


class ReconstructionObjective:
    """Pixel error, perceptual distance and commitment.

    Args:
        pixel: "l1" or "l2", averaged over all pixels and channels in [-1, 1].
        commitment: weight of the squared distance between encoder output and codebook entry, each code counted once.
        commitment_per: what its sum over an image is divided by: the "codes" that an image is expected to have, or the
            "cells" of the finest grid (published), so that it weighs less where codes are few.
    Source: VQ-VAE (van den Oord et al., 2017), eq. 3; the codebook itself learns by moving averages.
    """

    def __init__(
        self, pixel: Pixel = "l2", commitment: float = 0.25, perceptual: PerceptualDistance | None = None,
        commitment_per: Share = "codes",
    ) -> None:  # fmt: skip
        check_choice("pixel", pixel, Pixel)
        check_choice("commitment_per", commitment_per, Share)
        check("commitment", commitment, "0 or more", commitment >= 0)
        self.pixel, self.commitment, self.perceptual = pixel, commitment, perceptual
        self.commitment_per = commitment_per

    def __call__(self, images: Tensor, reconstruction: Reconstruction, router: Router) -> dict[str, Term]:
        """The terms for (B, 3, H, W) images in [-1, 1] and their reconstruction by a tokenizer with this router, as
        sums over images: what codes are divided by is known ahead, so that a batch may be divided."""
        reconstructed, codes = reconstruction.images.to(images.dtype), reconstruction.error
        share = router.nominal_length if self.commitment_per == "codes" else math.prod(router.layout.grids[-1])
        difference = reconstructed - images
        error = difference.abs() if self.pixel == "l1" else difference.square()
        terms = {
            self.pixel: Term(error.flatten(1).mean(1).sum(), len(images)),
            "commitment": Term(codes.sum() / share, len(images), self.commitment),
            **reconstruction.routing.terms,
            "codes_per_image": Term(codes.new_full((), len(codes)), len(images), 0.0),
        }
        if self.perceptual is not None:
            distance = self.perceptual(reconstructed, images).sum()
            terms["perceptual"] = Term(distance, len(images), self.perceptual.weight)
        return terms

    def likeness(self, terms: Mapping[str, Term]) -> Term:
        """The terms that compare images, as one: an adversarial loss is weighed against it."""
        parts = [terms[name] for name in (self.pixel, "perceptual") if name in terms]
        return Term(sum(part.weight * part.total for part in parts), parts[0].count)
