"""Figures of reconstructed images and of the codes between: accumulators that take batches of any size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from graincode import processes
from graincode.core.errors import GraincodeError

MSE_FLOOR = (1 / 255) ** 2 / 12
"""Mean squared error of rounding to 8 bits, for pixels in [0, 1]; as a PSNR, 58.9 dB."""


@dataclass(frozen=True)
class ReconstructionError:
    """How far images are from their originals, for pixels in [0, 1].

    Attributes:
        mse: mean squared error over all images.
        psnr_of_mean: PSNR in dB of `mse`, which hard images dominate.
        psnr_mean: mean over images of each one's PSNR in dB, which papers report.
        count: number of images.

    Both PSNRs take an error as no smaller than `MSE_FLOOR`, so an exact copy counts as 58.9 dB and not as infinity.
    """

    mse: float
    psnr_of_mean: float
    psnr_mean: float
    count: int


class PairErrors:
    """Accumulates `ReconstructionError`; the grouping into batches does not change a bit of it."""

    def __init__(self) -> None:
        self._mse: list[Tensor] = []

    def update(self, images: Tensor, reference: Tensor) -> None:
        """Add pairs of images.

        Args:
            images: (B, C, H, W) uint8.
            reference: the same.
        Raises:
            GraincodeError: they are not both uint8 and of one shape with four dimensions.
        """
        shapes = f"{images.dtype} {tuple(images.shape)} and {reference.dtype} {tuple(reference.shape)}"
        if {images.dtype, reference.dtype} != {torch.uint8}:
            raise GraincodeError(f"images of {shapes}: expected torch.uint8; see to_uint8")
        if images.shape != reference.shape or images.ndim != 4:
            raise GraincodeError(f"images of {shapes}: expected pairs of one shape (B, C, H, W)")
        squares = (images.int() - reference.int()).square().flatten(1)
        self._mse.append(squares.sum(1).double().cpu() / (squares.shape[1] * 255**2))

    def result(self) -> ReconstructionError:
        """The figures of all pairs so far, of all processes; each of them must ask.

        Raises:
            GraincodeError: there are none.
        """
        mse = processes.gather_rows(torch.cat([torch.zeros(0, dtype=torch.float64), *self._mse]))
        if len(mse) == 0:
            raise GraincodeError("reconstruction error of 0 images: expected at least 1; call update first")
        return ReconstructionError(
            mse=mse.mean().item(),
            psnr_of_mean=_psnr(mse.mean()).item(),
            psnr_mean=_psnr(mse).mean().item(),
            count=len(mse),
        )


@dataclass(frozen=True)
class CodebookUse:
    """How much of a codebook is in use.

    Attributes:
        usage: share in (0, 1] of entries that were used at least once.
        perplexity: exp of the entropy of the entries' frequencies; in [1, size], and `size` if all are as frequent.
        count: number of codes.
    """

    usage: float
    perplexity: float
    count: int


class CodebookUsage:
    """Accumulates `CodebookUse`; the grouping into batches does not change a bit of it.

    Args:
        size: number of entries of the codebook.
    Raises:
        GraincodeError: the size is not positive.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise GraincodeError(f"codebook size {size}: expected at least 1; give the layout's codebook_size")
        self._counts = torch.zeros(size, dtype=torch.long)

    def update(self, indices: Tensor) -> None:
        """Add codes.

        Args:
            indices: integers of any shape in [0, size); each counts once, so leave out the copies on finer grids.
        Raises:
            GraincodeError: an index is out of range or not an integer.
        """
        size = len(self._counts)
        if indices.is_floating_point():
            raise GraincodeError(f"indices of {indices.dtype}: expected integers; give indices.long()")
        if not indices.numel():
            return
        flat = indices.long().flatten()
        low, high = flat.min().item(), flat.max().item()
        if low < 0 or high >= size:
            raise GraincodeError(
                f"indices from {low} to {high}: expected 0 to {size - 1}; give indices of this codebook, without "
                "masks or end codes"
            )
        self._counts += torch.bincount(flat, minlength=size).cpu()

    def result(self) -> CodebookUse:
        """The figures of all codes so far, of all processes; each of them must ask.

        Raises:
            GraincodeError: there are none.
        """
        counts = processes.sum_(self._counts.clone())
        count = int(counts.sum())
        if count == 0:
            raise GraincodeError("codebook usage of 0 codes: expected at least 1; call update first")
        frequencies = counts[counts > 0].double() / count
        return CodebookUse(
            usage=len(frequencies) / len(self._counts),
            perplexity=math.exp(torch.special.entr(frequencies).sum().item()),
            count=count,
        )


def _psnr(mse: Tensor) -> Tensor:
    return -10 * mse.clamp_min(MSE_FLOOR).log10()
