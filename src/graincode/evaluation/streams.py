"""Batches of uint8 images: of a data set, reconstructed, or of which a generator gives the likelihood."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor

from graincode.core.codes import GrainCodes
from graincode.core.errors import GraincodeError, check
from graincode.core.images import to_uint8
from graincode.core.layout import CodeLayout
from graincode.data.images import ImageBatch, ImageDataset, ImageSource
from graincode.data.loader import in_order
from graincode.distributed import collectives
from graincode.distributed.memory import fitting, peak_bytes
from graincode.evaluation.estimate import Estimate, mean_of
from graincode.evaluation.pairs import CodeMetrics, Measures, PairMetrics
from graincode.generator import Generator
from graincode.tokenizer import DQVAE

ROUNDED = "rounded to the nearest uint8"
"""Of images that networks make, by `to_uint8`."""


def evaluation_batch(layout: CodeLayout) -> int:
    """Images that are evaluated together: 250, or fewer if they are large or have many codes, for the memory's sake."""
    height, width = layout.image_size
    return max(1, min(250, 2**21 // (height * width), 2**15 // layout.max_tokens))


class ImageStream(ABC):
    """A set of images that is read once, by each process its share.

    Attributes:
        name: what is shown, in words.
        count, batch_size: images of all processes, and at once.
        image_size: (height, width) in pixels.
        labels: (count,) long; None if there are none.
        class_names: names of the labels, as far as they are known.
        shows_progress: whether it shows its own bar.
        pixels: how they became uint8, in words.
        inputs: hashes of what the images depend on, by name.
        origin: what the record says of the tokenizer besides, `Export.imported`.
        facts, warnings: more that the record says of them, and lines for readers of their metrics.
    """

    name: str
    count: int
    batch_size: int
    image_size: tuple[int, int]
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    shows_progress = False
    pixels = "uint8 as they are"
    inputs: Mapping[str, str] = MappingProxyType({})
    facts: Mapping[str, Any] = MappingProxyType({})
    origin: Mapping[str, Any] = MappingProxyType({})
    warnings: Sequence[str] = ()

    @property
    def mine(self) -> range:
        """Which of the images are this process's."""
        return collectives.items(self.count, self.batch_size)

    @abstractmethod
    def __iter__(self) -> Iterator[Tensor]:
        """This process's images in order, uint8 (B, 3, H, W)."""

    def metrics(self) -> dict[str, Estimate]:
        """What was counted on the way, over all processes. Collective: call it on all processes."""
        return {}

    def depending_on(self, origin: Mapping[str, Any] = MappingProxyType({}), **inputs: str) -> Self:
        """The stream itself, with more inputs, and the origin of its tokenizer."""
        self.inputs, self.origin = {**self.inputs, **inputs}, {**self.origin, **origin}
        return self


class DatasetStream(ImageStream):
    """The first images of a data set, all without a limit, loaded by worker processes."""

    def __init__(self, dataset: ImageDataset, batch_size: int, workers: int = 0, limit: int | None = None) -> None:
        self.dataset, self.batch_size, self.workers = dataset, batch_size, workers
        self.name, self.image_size = f"{dataset.name} {dataset.split}", dataset.image_size
        self.count = len(dataset) if limit is None else min(limit, len(dataset))
        self.labels, self.class_names = dataset.labels if dataset.labelled else None, dataset.class_names

    def batches(self) -> Iterator[ImageBatch]:
        """This process's images in order, as the data set gives them."""
        return in_order(self.dataset, self.batch_size, self.count, self.workers, shared=True)

    def __iter__(self) -> Iterator[Tensor]:
        return (batch.pixels for batch in self.batches())


class PairStream(DatasetStream):
    """Images that someone else reconstructed, compared with as many originals of their size, in the same order."""

    def __init__(self, dataset: ImageDataset, originals: ImageDataset, measures: Measures, *loading: int) -> None:
        super().__init__(dataset, *loading)
        self._originals, self._pairs = DatasetStream(originals, *loading), PairMetrics(measures)

    def __iter__(self) -> Iterator[Tensor]:
        for images, originals in zip(super().__iter__(), self._originals, strict=True):
            self._pairs.update(images, originals)
            yield images

    def metrics(self) -> dict[str, Estimate]:
        return self._pairs.metrics()


class ReconstructionStream(DatasetStream):
    """Reconstructions of images, compared with these by measures; their codes are counted.

    `loading` is as of `DatasetStream`; `how` are `ratios` and `psnr` of `DQVAE.tokenize`.
    """

    pixels = ROUNDED

    def __init__(
        self, tokenizer: DQVAE, dataset: ImageDataset, *loading: Any, measures: Measures | None = None, **how: Any
    ) -> None:
        super().__init__(dataset, *loading)
        self.name, self.labels, self.facts = f"reconstructions of {self.name}", None, how
        self._tokenizer, self._pairs, self._codes = tokenizer, PairMetrics(measures), CodeMetrics(tokenizer.layout)
        each = peak_bytes(lambda: self._reconstructed(blank(tokenizer)))
        self.batch_size = fitting(self.batch_size, each, tokenizer.device)

    def _reconstructed(self, images: Tensor) -> tuple[GrainCodes, Tensor]:
        codes = self._tokenizer.tokenize(images, **self.facts)
        return codes, to_uint8(self._tokenizer.detokenize(codes))

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.batches():
            batch = batch.to(self._tokenizer.device)
            codes, reconstructions = self._reconstructed(batch.images)
            self._pairs.update(reconstructions, batch.pixels)
            self._codes.update(codes)
            yield reconstructions

    def metrics(self) -> dict[str, Estimate]:
        return self._pairs.metrics() | self._codes.metrics()


class LikelihoodStream(DatasetStream):
    """Real images, whose codes a generator gives a likelihood; `loading` and `how` as of `ReconstructionStream`."""

    def __init__(
        self, generator: Generator, tokenizer: DQVAE, dataset: ImageDataset, *loading: int, **how: Any
    ) -> None:
        super().__init__(dataset, *loading)
        kind = type(generator).__name__
        check("generator", kind, "one with a likelihood, such as DGiT-AR", generator.has_likelihood)
        check("generator", kind, "one in evaluation mode: call generator.eval()", not generator.training)
        if generator.classes not in (0, classes := max(len(dataset.class_names), 1)):
            raise GraincodeError(f"the generator has {generator.classes} classes, and {dataset.name} has {classes}")
        self.name, self.facts = f"codes of {self.name}", how
        self._generator, self._tokenizer = generator, tokenizer
        content = [f"content_{g}" for g in range(generator.layout.num_grains)]
        position = [f"position_{g}" for g in range(generator.decided_grains)]
        self._bits: dict[str, list[Tensor]] = {name: [] for name in ("per_image", *content, *position)}
        self._lengths: list[Tensor] = []
        each = peak_bytes(lambda: tokenizer.tokenize(blank(tokenizer), **how)) + generator.bytes_of_pass()
        self.batch_size = fitting(self.batch_size, each, tokenizer.device)

    @torch.no_grad()
    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.batches():
            batch = batch.to(self._tokenizer.device)
            codes = self._tokenizer.tokenize(batch.images, **self.facts)
            bits = self._generator(codes, batch.labels).bits()
            for name, values in bits.items():
                self._bits[name].append(values.cpu())
            self._lengths.append(codes.lengths.cpu())
            yield batch.pixels

    def metrics(self) -> dict[str, Estimate]:
        """Bits per image, their parts for contents and positions of each grain, and codes per image."""
        bits = {f"bits_{name}": mean_of(values) for name, values in self._bits.items()}
        return bits | {"codes_per_image": mean_of(self._lengths)}


def blank(tokenizer: DQVAE) -> Tensor:
    """An image of the tokenizer's size, (1, 3, H, W), on its device, for counting what an image takes."""
    return torch.zeros(1, 3, *tokenizer.layout.image_size, device=tokenizer.device)


def check_size(source: ImageSource, tokenizer: DQVAE) -> None:
    """Refuse a data set whose images are not of the tokenizer's size."""
    size, wanted = tuple(source.image_size), tokenizer.layout.image_size
    check("image_size", list(size), f"{list(wanted)}, the size of the tokenizer's images", size == wanted)
