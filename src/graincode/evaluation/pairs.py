"""Errors of pairs of images, and how many codes images take, and which."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from pytorch_msssim import ssim
from torch import Tensor

from graincode.core.codes import GrainCodes
from graincode.core.errors import GraincodeError, check
from graincode.core.layout import CodeLayout
from graincode.distributed import collectives
from graincode.evaluation.estimate import Estimate, mean_of

MSE_FLOOR = (1 / 255) ** 2 / 12
"""Mean squared error of rounding to 8 bits, for pixels in [0, 1]; as a PSNR, 58.9 dB."""

Measures = Mapping[str, Callable[[Tensor, Tensor], Tensor]]
"""Functions of two (B, C, H, W) uint8, images and reference, that give (B,) values; by name."""


class PairMetrics:
    """Means over pairs of images of squared errors, whose bits do not depend on batches, and of more measures."""

    def __init__(self, measures: Measures | None = None) -> None:
        self._measures = {"mse": _squared_error, **(measures or {})}
        self._values: dict[str, list[Tensor]] = {name: [] for name in self._measures}

    @torch.no_grad()
    def update(self, images: Tensor, reference: Tensor) -> None:
        """Add pairs, uint8 of one shape (B, C, H, W)."""
        if {images.dtype, reference.dtype} != {torch.uint8} or images.shape != reference.shape or images.ndim != 4:
            found = " and ".join(f"{one.dtype} {tuple(one.shape)}" for one in (images, reference))
            raise GraincodeError(f"images of {found}: expected pairs of torch.uint8 and one shape (B, C, H, W)")
        for name, measure in self._measures.items():
            self._values[name].append(measure(images, reference).cpu())

    def metrics(self) -> dict[str, Estimate]:
        """Over the pairs of all processes so far. Collective: call it on all processes.

        `mse`: of pixels in [0, 1]; `psnr_of_mean`: PSNR in dB of `mse`, which hard images dominate; `psnr_mean`: mean
        of each image's PSNR, which papers report. Both PSNRs take an error as no smaller than `MSE_FLOOR`, so that a
        copy counts as 58.9 dB and not as infinity. Then the mean of each measure.
        """
        found, errors = {name: mean_of(values) for name, values in self._values.items()}, self._values["mse"]
        mean, psnr_mean = found["mse"], mean_of([_psnr(torch.cat(errors))] if errors else [])
        of_mean = _psnr(torch.tensor(mean.value, dtype=torch.float64)).item()
        # to first order, dB = 10 / ln 10 times the relative error
        spread = None if mean.std is None else 10 / math.log(10) * mean.std / max(mean.value, MSE_FLOOR)
        return {"mse": mean, "psnr_of_mean": Estimate(of_mean, spread, mean.over), "psnr_mean": psnr_mean} | found


def structural_similarity(images: Tensor, reference: Tensor) -> Tensor:
    """(B,) SSIM in [-1, 1] of two (B, C, H, W) uint8: Gaussian window of 11 pixels, sigma 1.5, mean over channels.

    Source: "Image Quality Assessment: From Error Visibility to Structural Similarity" (Wang et al., 2004).
    """
    size = tuple(images.shape[2:])
    check("image_size", size, "11 or more for SSIM; leave ssim out", min(size) >= 11)
    return ssim(images.float(), reference.float(), data_range=255, win_size=11, size_average=False)


def _squared_error(images: Tensor, reference: Tensor) -> Tensor:
    squares = (images.int() - reference.int()).square().flatten(1)
    return squares.sum(1).double().cpu() / (squares.shape[1] * 255**2)


def _psnr(mse: Tensor) -> Tensor:
    return -10 * mse.clamp_min(MSE_FLOOR).log10()


class CodeMetrics:
    """Lengths of codes of one layout and use of codebooks; the grouping into batches does not change a bit of it."""

    def __init__(self, layout: CodeLayout) -> None:
        self._layout = layout
        self._entries = torch.zeros(layout.num_grains, layout.codebook_size, dtype=torch.long)
        self._grains = torch.zeros(layout.num_grains, *layout.grids[0], dtype=torch.long)
        self._lengths: list[Tensor] = []

    def update(self, codes: GrainCodes) -> None:
        """Add the codes of some images."""
        layout, first = self._layout, codes.first_cells
        entries = layout.expand(codes.grains, 0)[first] * layout.codebook_size + codes.indices[first]
        self._entries += torch.bincount(entries, minlength=self._entries.numel()).view_as(self._entries).cpu()
        self._grains += torch.stack([(codes.grains == g).sum(dim=0) for g in range(layout.num_grains)]).cpu()
        self._lengths.append(codes.lengths.cpu())

    def metrics(self) -> dict[str, Estimate]:
        """Over the codes of all processes so far. Collective: call it on all processes.

        `codebook_usage` and `codebook_perplexity` are of all codebooks together, with `_g` of the codes of grain g.
        `grain_map_bits` is what the grain map costs an ideal coder that knows how often each region has each grain;
        `bits_per_image` adds log2 of the codebook's size for each code.
        """
        layout, entries = self._layout, collectives.sum_(self._entries.clone())
        length, grains = mean_of(self._lengths), collectives.sum_(self._grains.clone()).double()
        map_bits = torch.special.entr(grains / grains.sum(dim=0)).sum().item() / math.log(2)
        usage, perplexity = codebook_use(entries.flatten() if layout.num_codebooks > 1 else entries.sum(dim=0))
        found = {
            "codebook_usage": Estimate(usage),
            "codebook_perplexity": Estimate(perplexity),
            "codes_per_image": length,
            "grain_map_bits": Estimate(map_bits),
            "bits_per_image": Estimate(length.value * math.log2(layout.codebook_size) + map_bits),
        }
        for g, counts in enumerate(entries if layout.num_grains > 1 else ()):
            if bool(counts.any()):
                found[f"codebook_usage_{g}"], found[f"codebook_perplexity_{g}"] = map(Estimate, codebook_use(counts))
        return found


def codebook_use(counts: Tensor) -> tuple[float, float]:
    """The share of a codebook's entries that are used, in (0, 1], and exp of their frequencies' entropy, in [1, size].

    `counts`, (size,) long, says how often each entry is used.
    """
    frequencies = counts[counts > 0].double() / counts.sum()
    return len(frequencies) / len(counts), math.exp(torch.special.entr(frequencies).sum().item())
