"""A pass of a tokenizer over a data set, and the figures of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from graincode.core.images import to_uint8
from graincode.data.images import ImageDataset
from graincode.data.loader import in_order
from graincode.metrics import CodebookUsage, PairErrors
from graincode.tokenizer import DQVAE


class ReconstructionPass:
    """Reconstructs images and keeps count as it goes.

    Args:
        tokenizer: in evaluation mode.
        dataset: the images.
        batch_size: images at once.
        limit: the first so many images; None for all.
        ratios: share of regions at each grain; None for the tokenizer's own.
        device: where the tokenizer is.
    """

    def __init__(
        self,
        tokenizer: DQVAE,
        dataset: ImageDataset,
        batch_size: int,
        limit: int | None = None,
        ratios: Sequence[float] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.tokenizer, self.dataset, self.batch_size, self.limit = tokenizer, dataset, batch_size, limit
        self.ratios, self.device = ratios, device
        self._errors, self._usage = PairErrors(), CodebookUsage(tokenizer.layout.codebook_size)
        self.lengths = torch.zeros(0, dtype=torch.long)

    def __iter__(self) -> Iterator[Tensor]:
        """Reconstructions, uint8 (B, 3, H, W), in the order of the data set."""
        for batch in in_order(self.dataset, self.batch_size, self.limit):
            images = batch.images.to(self.device)
            codes = self.tokenizer.tokenize(images, self.ratios)
            made = to_uint8(self.tokenizer.detokenize(codes))
            self._errors.update(to_uint8(images), made)
            self._usage.update(codes.indices[codes.first_cells])
            self.lengths = torch.cat([self.lengths, codes.lengths.cpu()])
            yield made

    def figures(self) -> dict[str, float]:
        """MSE in [0, 1], both PSNRs in dB, use of the codebook and codes per image, so far."""
        error, use = self._errors.result(), self._usage.result()
        return {
            "mse": error.mse,
            "psnr_of_mean": error.psnr_of_mean,
            "psnr_mean": error.psnr_mean,
            "codebook_usage": use.usage,
            "codebook_perplexity": use.perplexity,
            "codes_per_image": float(self.lengths.double().mean()),
        }
