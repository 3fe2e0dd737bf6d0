"""Passes over many images: of a data set, reconstructed, or drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from graincode.core.codes import GrainCodes
from graincode.core.errors import GraincodeError
from graincode.core.images import to_uint8
from graincode.core.layout import CodeLayout
from graincode.data.images import ImageDataset, ImageSource
from graincode.data.loader import in_order
from graincode.distributed import collectives
from graincode.evaluation.estimate import Estimate, mean_of
from graincode.evaluation.pairs import CodebookUsage, PairErrors, PairMean
from graincode.generator import Generator
from graincode.tokenizer import DQVAE


def evaluation_batch(layout: CodeLayout) -> int:
    """Images that are evaluated together: 250, or fewer if they are large or have many codes, for the memory's sake."""
    height, width = layout.image_size
    return max(1, min(250, 2**21 // (height * width), 2**15 // layout.max_tokens))


class ImageStream(Protocol):
    """A set of images that comes by once, each process seeing its share of it.

    Attributes:
        name: what is shown, in words.
        count: number of images, of all processes.
        batch_size: images at once.
        image_size: (height, width) in pixels.
        labels: (count,) long; None if there are none.
    """

    name: str
    count: int
    batch_size: int
    image_size: tuple[int, int]
    labels: Tensor | None

    def __iter__(self) -> Iterator[Tensor]:
        """This process's images in order, uint8 (B, 3, H, W)."""

    def metrics(self) -> dict[str, Estimate]:
        """What was counted on the way, over all processes; each of them must ask."""


class DatasetStream:
    """The images of a data set.

    Args:
        dataset: the images.
        batch_size: images at once.
        workers: processes that load images.
    """

    def __init__(self, dataset: ImageDataset, batch_size: int, workers: int = 0) -> None:
        self.dataset, self.batch_size, self.workers = dataset, batch_size, workers
        self.name, self.count = f"{dataset.name} {dataset.split}", len(dataset)
        self.image_size = dataset.image_size
        self.labels = dataset.labels if len(dataset.class_names) > 1 else None

    def __iter__(self) -> Iterator[Tensor]:
        for batch in in_order(self.dataset, self.batch_size, workers=self.workers, shared=True):
            yield to_uint8(batch.images)

    def metrics(self) -> dict[str, Estimate]:
        return {}


class PairStream(DatasetStream):
    """Images that someone else reconstructed, beside their originals.

    Args:
        dataset: the reconstructions.
        originals: as many images of the same size, in the same order.
        likeness: further measures of each pair, by the name of their figure.
        batch_size, workers: as of `DatasetStream`.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        originals: ImageDataset,
        likeness: Mapping[str, PairMean],
        batch_size: int,
        workers: int = 0,
    ) -> None:
        super().__init__(dataset, batch_size, workers)
        self.originals, self.likeness, self._errors = originals, likeness, PairErrors()

    def __iter__(self) -> Iterator[Tensor]:
        originals = in_order(self.originals, self.batch_size, workers=self.workers, shared=True)
        for made, batch in zip(super().__iter__(), originals, strict=True):
            for one in (self._errors, *self.likeness.values()):
                one.update(made, to_uint8(batch.images))
            yield made

    def metrics(self) -> dict[str, Estimate]:
        return self._errors.metrics() | {name: one.figure() for name, one in self.likeness.items()}


class ReconstructionStream:
    """Reconstructions of images, which are counted and compared as they go.

    Args:
        tokenizer: in evaluation mode.
        dataset: the images.
        batch_size: images at once.
        limit: the first so many images; None for all.
        ratios: share of regions at each grain; None for the tokenizer's own.
        psnr: in dB, instead of ratios: as few codes as reach it, for each image.
        device: where the tokenizer is.
        workers: processes that load images.
        likeness: further measures of each pair, by the name of their figure.
    """

    labels = None

    def __init__(
        self,
        tokenizer: DQVAE,
        dataset: ImageDataset,
        batch_size: int,
        limit: int | None = None,
        ratios: Sequence[float] | None = None,
        device: torch.device | str = "cpu",
        workers: int = 0,
        likeness: Mapping[str, PairMean] | None = None,
        psnr: float | None = None,
    ) -> None:
        self.tokenizer, self.dataset, self.batch_size, self.limit = tokenizer, dataset, batch_size, limit
        self.ratios, self.psnr = ratios, psnr
        self.device, self.workers, self.likeness = device, workers, likeness or {}
        self.name = f"reconstructions of {dataset.name} {dataset.split}"
        self.image_size = dataset.image_size
        self.count = len(dataset) if limit is None else min(limit, len(dataset))
        layout = tokenizer.layout
        self._errors, self._usage = PairErrors(), CodebookUsage(layout.num_entries)
        self._per_grain = [CodebookUsage(layout.codebook_size) for _ in range(layout.num_grains)]
        self._lengths = [torch.zeros(0, dtype=torch.long)]
        self._grains = torch.zeros(layout.num_grains, *layout.grids[0], dtype=torch.long)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in in_order(self.dataset, self.batch_size, self.limit, self.workers, shared=True):
            images = batch.images.to(self.device)
            codes = self.tokenizer.tokenize(images, self.ratios, self.psnr)
            made = to_uint8(self.tokenizer.detokenize(codes))
            for one in (self._errors, *self.likeness.values()):
                one.update(made, to_uint8(images))
            self._count(codes)
            yield made

    def _count(self, codes: GrainCodes) -> None:
        layout, first = codes.layout, codes.first_cells
        rows, columns = layout.region_cells[-1]
        cells = codes.grains.repeat_interleave(rows, dim=-2).repeat_interleave(columns, dim=-1)[first]
        indices = codes.indices[first]
        self._usage.update(layout.entries(indices, cells))
        for g, usage in enumerate(self._per_grain):
            usage.update(indices[cells == g])
        self._lengths.append(codes.lengths.cpu())
        self._grains += torch.stack([(codes.grains == g).sum(dim=0) for g in range(layout.num_grains)]).cpu()

    def metrics(self) -> dict[str, Estimate]:
        """MSE in [0, 1], both PSNRs in dB, further likeness, use of the codebooks, codes and bits per image, so far.

        `codebook_usage` and `codebook_perplexity` are of all codebooks together; with `_g` they are of the codes of
        grain g. `grain_map_bits` is what the grain map costs an ideal coder that knows how often each region has each
        grain; `bits_per_image` adds log2 of the codebook's size for each code.
        """
        layout, use = self.tokenizer.layout, self._usage.result()
        length = mean_of(torch.cat(self._lengths))
        counts = collectives.sum_(self._grains.clone()).double()
        map_bits = torch.special.entr(counts / counts.sum(dim=0)).sum().item() / math.log(2)
        figures = {
            **self._errors.metrics(),
            **{name: one.figure() for name, one in self.likeness.items()},
            "codebook_usage": Estimate(use.usage),
            "codebook_perplexity": Estimate(use.perplexity),
            "codes_per_image": length,
            "grain_map_bits": Estimate(map_bits),
            "bits_per_image": Estimate(length.value * math.log2(layout.codebook_size) + map_bits),
        }
        if layout.num_grains > 1:
            for g, usage in enumerate(self._per_grain):
                if float(counts[g].sum()):
                    of_grain = usage.result()
                    figures[f"codebook_usage_{g}"] = Estimate(of_grain.usage)
                    figures[f"codebook_perplexity_{g}"] = Estimate(of_grain.perplexity)
        return figures


class LikelihoodStream(DatasetStream):
    """Real images, whose codes a generator judges as they go.

    Args:
        generator, tokenizer: of one code layout, in evaluation mode.
        dataset: the images.
        batch_size, workers: as of `DatasetStream`.
        ratios, psnr: that the generator's training codes were made with, as of `DQVAE.tokenize`.
        device: where both are.
    Raises:
        GraincodeError: the generator knows classes that the data set does not have, or gives codes no likelihood.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: DQVAE,
        dataset: ImageDataset,
        batch_size: int,
        workers: int = 0,
        ratios: Sequence[float] | None = None,
        psnr: float | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(dataset, batch_size, workers)
        if not generator.has_likelihood:
            raise GraincodeError(
                f"evaluation=likelihood, but a {type(generator).__name__} gives codes no likelihood, as it fills them "
                "in in any order: type evaluation=generation"
            )
        if generator.classes not in (0, max(len(dataset.class_names), 1)):
            raise GraincodeError(
                f"the generator has {generator.classes} classes, and {dataset.name} {len(dataset.class_names)}: type "
                "data= the data set that it was trained on"
            )
        self.name = f"codes of {self.name}"
        self._generator, self._tokenizer, self._device = generator, tokenizer, device
        self._how = ratios, psnr
        self._bits: dict[str, list[Tensor]] = {}
        self._lengths = [torch.zeros(0, dtype=torch.long)]

    def __iter__(self) -> Iterator[Tensor]:
        for batch in in_order(self.dataset, self.batch_size, workers=self.workers, shared=True):
            codes = self._tokenizer.tokenize(batch.images.to(self._device), *self._how)
            with torch.no_grad():
                bits = self._generator(codes, batch.labels.to(self._device)).bits()
            for name, values in bits.items():
                self._bits.setdefault(f"bits_{name}", []).append(values.cpu())
            self._lengths.append(codes.lengths.cpu())
            yield to_uint8(batch.images)

    def metrics(self) -> dict[str, Estimate]:
        """Bits per image and their parts, `bits_content_g` and `bits_position_g` of grain g; and codes per image."""
        layout, empty = self._generator.layout, torch.zeros(0)
        names = ["bits_per_image", *(f"bits_content_{g}" for g in range(layout.num_grains))]
        names += [f"bits_position_{g}" for g in range(self._generator.decided_grains)]
        figures = {name: mean_of(torch.cat([empty, *self._bits.get(name, [])])) for name in names}
        return figures | {"codes_per_image": mean_of(torch.cat(self._lengths))}


def check_image_size(source: ImageSource, tokenizer: DQVAE) -> None:
    """Refuse a data set whose images are not of the tokenizer's size."""
    if tuple(source.image_size) != tokenizer.layout.image_size:
        wanted = list(tokenizer.layout.image_size)
        raise GraincodeError(
            f"data.image_size={list(source.image_size)}, but the tokenizer takes {wanted}: "
            f"type data.image_size={wanted} if the data set can be resized, or another tokenizer_path"
        )
