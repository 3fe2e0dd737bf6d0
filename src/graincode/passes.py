"""A tokenizer or a generator over many images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from graincode import processes
from graincode.core.codes import CodeLayout, GrainCodes
from graincode.core.errors import GraincodeError
from graincode.core.images import to_uint8
from graincode.data.images import ImageDataset, ImageSource
from graincode.data.loader import in_order
from graincode.generator import DGiTAR
from graincode.metrics.reconstruction import CodebookUsage, PairErrors
from graincode.sampling import AutoregressiveSampler
from graincode.tokenizer import DQVAE


class ReconstructionPass:
    """Reconstructs this process's share of images and keeps count as it goes; the figures are those of all processes.

    Args:
        tokenizer: in evaluation mode.
        dataset: the images.
        batch_size: images at once.
        limit: the first so many images; None for all.
        ratios: share of regions at each grain; None for the tokenizer's own.
        device: where the tokenizer is.
        workers: processes that load images.
    """

    def __init__(
        self,
        tokenizer: DQVAE,
        dataset: ImageDataset,
        batch_size: int,
        limit: int | None = None,
        ratios: Sequence[float] | None = None,
        device: torch.device | str = "cpu",
        workers: int = 0,
    ) -> None:
        self.tokenizer, self.dataset, self.batch_size, self.limit = tokenizer, dataset, batch_size, limit
        self.ratios, self.device, self.workers = ratios, device, workers
        self._errors, self._usage = PairErrors(), CodebookUsage(tokenizer.layout.codebook_size)
        self._lengths = [torch.zeros(0, dtype=torch.long)]

    def __iter__(self) -> Iterator[Tensor]:
        """Reconstructions, uint8 (B, 3, H, W), in the order of the data set."""
        for batch in in_order(self.dataset, self.batch_size, self.limit, self.workers, shared=True):
            images = batch.images.to(self.device)
            codes = self.tokenizer.tokenize(images, self.ratios)
            made = to_uint8(self.tokenizer.detokenize(codes))
            self._errors.update(to_uint8(images), made)
            self._usage.update(codes.indices[codes.first_cells])
            self._lengths.append(codes.lengths.cpu())
            yield made

    def figures(self) -> dict[str, float]:
        """MSE in [0, 1], both PSNRs in dB, use of the codebook and codes per image, so far."""
        lengths = processes.gather_rows(torch.cat(self._lengths))
        error, use = self._errors.result(), self._usage.result()
        return {
            "mse": error.mse,
            "psnr_of_mean": error.psnr_of_mean,
            "psnr_mean": error.psnr_mean,
            "codebook_usage": use.usage,
            "codebook_perplexity": use.perplexity,
            "codes_per_image": float(lengths.double().mean()),
        }


def check_image_size(source: ImageSource, tokenizer: DQVAE) -> None:
    """Refuse a data set whose images are not of the tokenizer's size."""
    if tuple(source.image_size) != tokenizer.layout.image_size:
        wanted = list(tokenizer.layout.image_size)
        raise GraincodeError(
            f"data.image_size={list(source.image_size)}, but the tokenizer takes {wanted}: "
            f"type data.image_size={wanted} if the data set can be resized, or another tokenizer_path"
        )


@dataclass(frozen=True)
class SampleBatch:
    """Attributes:
    images: (B, 3, H, W) uint8.
    codes: they were decoded from.
    labels: (B,) long.
    """

    images: Tensor
    codes: GrainCodes
    labels: Tensor


def balanced_labels(count: int, classes: int, chosen: list[int] | None) -> Tensor:
    """(count,) long labels that take the chosen classes (all by default) in turn; zeros if there are no classes.

    Raises:
        GraincodeError: a chosen class is not one of them, or none is chosen.
    """
    if chosen is not None and not classes:
        raise GraincodeError(f"classes={list(chosen)}, but the generator has no classes: type classes=null")
    if chosen is not None and (not chosen or min(chosen) < 0 or max(chosen) >= classes):
        raise GraincodeError(f"classes={list(chosen)}: expected labels from 0 to {classes - 1}, such as classes=[0]")
    labels = torch.tensor(list(chosen) if chosen is not None else range(max(classes, 1)))
    return labels[torch.arange(count) % len(labels)]


def draw(
    generator: DGiTAR, tokenizer: DQVAE, sampler: AutoregressiveSampler, labels: Tensor, seed: int, batch_size: int
) -> Iterator[SampleBatch]:
    """This process's share of the samples for (N,) labels, batch by batch; sample i depends on (seed, i) and its label
    alone, and batches are the same for any number of processes."""
    settings = dataclasses.asdict(sampler)
    device = generator.content_head.weight.device
    starts = range(0, len(labels), batch_size)
    mine = processes.share(len(starts))
    total = min(mine.stop * batch_size, len(labels)) - min(mine.start * batch_size, len(labels))
    with tqdm(
        total=total, unit=" images", desc="samples", leave=False, mininterval=1.0, disable=not processes.is_main()
    ) as bar:
        for start in starts[mine.start : mine.stop]:
            part = labels[start : start + batch_size]
            codes = generator.sample(part, seed, start, batch_size, **settings)
            images = to_uint8(tokenizer.detokenize(codes.to(device))).cpu()
            bar.update(len(part))
            yield SampleBatch(images, codes, part)


def gathered(batches: Iterator[SampleBatch], layout: CodeLayout) -> tuple[Tensor, GrainCodes]:
    """Images (N, 3, H, W) uint8 and codes of all samples of all processes, on the CPU."""
    own = list(batches)
    (h0, w0), (h, w) = layout.grids[0], layout.grids[-1]
    images = torch.cat([torch.zeros(0, 3, *layout.image_size, dtype=torch.uint8), *(b.images for b in own)])
    grains = torch.cat([torch.zeros(0, h0, w0, dtype=torch.long), *(b.codes.grains for b in own)])
    indices = torch.cat([torch.zeros(0, h, w, dtype=torch.long), *(b.codes.indices for b in own)])
    codes = GrainCodes(processes.gather_rows(grains), processes.gather_rows(indices), layout)
    return processes.gather_rows(images), codes
