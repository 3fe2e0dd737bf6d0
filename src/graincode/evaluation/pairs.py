"""Figures of reconstructed images and of the codes between: accumulators that take batches of any size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pytorch_msssim import ssim
from torch import Tensor

from graincode.core.errors import GraincodeError
from graincode.distributed import collectives
from graincode.evaluation.estimate import Estimate, mean_of

MSE_FLOOR = (1 / 255) ** 2 / 12
"""Mean squared error of rounding to 8 bits, for pixels in [0, 1]; as a PSNR, 58.9 dB."""


_SSIM_WINDOW = 11


class PairErrors:
    """How far images are from their originals; the grouping into batches does not change a bit of it."""

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
        _check_pairs(images, reference)
        squares = (images.int() - reference.int()).square().flatten(1)
        self._mse.append(squares.sum(1).double().cpu() / (squares.shape[1] * 255**2))

    def metrics(self) -> dict[str, Estimate]:
        """Of all pairs so far, of all processes; each of them must ask.

        `mse`: mean squared error over all images, of pixels in [0, 1]; `psnr_of_mean`: PSNR in dB of `mse`, which hard
        images dominate; `psnr_mean`: mean over images of each one's PSNR in dB, which papers report. Both PSNRs take
        an error as no smaller than `MSE_FLOOR`, so an exact copy counts as 58.9 dB and not as infinity.

        Raises:
            GraincodeError: there are none.
        """
        mse = torch.cat([torch.zeros(0, dtype=torch.float64), *self._mse])
        mean = mean_of(mse)
        of_mean = _psnr(torch.tensor(mean.value, dtype=torch.float64)).item()
        # to first order, dB = 10 / ln 10 times the relative error
        spread = None if mean.std is None else 10 / math.log(10) * mean.std / max(mean.value, MSE_FLOOR)
        return {"mse": mean, "psnr_of_mean": Estimate(of_mean, spread, mean.over), "psnr_mean": mean_of(_psnr(mse))}


class PairMean:
    """The mean over pairs of images of a measure of likeness.

    Args:
        measure: two (B, C, H, W) uint8 to (B,).
    """

    def __init__(self, measure: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.measure = measure
        self._values = [torch.zeros(0)]

    def update(self, images: Tensor, reference: Tensor) -> None:
        """Add pairs of images, as `PairErrors` takes them."""
        _check_pairs(images, reference)
        with torch.no_grad():
            self._values.append(self.measure(images, reference).float().cpu())

    def figure(self) -> Estimate:
        """Of all pairs so far, of all processes; each of them must ask."""
        return mean_of(torch.cat(self._values))


def structural_similarity(images: Tensor, reference: Tensor) -> Tensor:
    """(B,) SSIM in [-1, 1] of two (B, C, H, W) uint8: Gaussian window of 11 pixels, sigma 1.5, mean over channels.

    Raises:
        GraincodeError: the images are smaller than the window.
    Source: "Image Quality Assessment: From Error Visibility to Structural Similarity" (Wang et al., 2004).
    """
    if min(images.shape[2:]) < _SSIM_WINDOW:
        raise GraincodeError(
            f"SSIM of images of {tuple(images.shape[2:])} pixels: expected {_SSIM_WINDOW} or more; "
            "leave ssim out of evaluation.metrics"
        )
    return ssim(images.float(), reference.float(), data_range=255, win_size=_SSIM_WINDOW, size_average=False)


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
        counts = collectives.sum_(self._counts.clone())
        count = int(counts.sum())
        if count == 0:
            raise GraincodeError("codebook usage of 0 codes: expected at least 1; call update first")
        frequencies = counts[counts > 0].double() / count
        return CodebookUse(
            usage=len(frequencies) / len(self._counts),
            perplexity=math.exp(torch.special.entr(frequencies).sum().item()),
            count=count,
        )


def _check_pairs(images: Tensor, reference: Tensor) -> None:
    shapes = f"{images.dtype} {tuple(images.shape)} and {reference.dtype} {tuple(reference.shape)}"
    if {images.dtype, reference.dtype} != {torch.uint8}:
        raise GraincodeError(f"images of {shapes}: expected torch.uint8; see to_uint8")
    if images.shape != reference.shape or images.ndim != 4:
        raise GraincodeError(f"images of {shapes}: expected pairs of one shape (B, C, H, W)")


def _psnr(mse: Tensor) -> Tensor:
    return -10 * mse.clamp_min(MSE_FLOOR).log10()
