"""Passes over many images: of a data set, reconstructed, or drawn."""

from __future__ import annotations

import dataclasses
import math
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from graincode import processes
from graincode.core.codes import CodeLayout, CodeMask, CodePrefix, GrainCodes
from graincode.core.errors import GraincodeError
from graincode.core.images import to_uint8
from graincode.core.rng import LABELS, Draws
from graincode.data.images import ImageDataset, ImageSource
from graincode.data.loader import in_order
from graincode.files import replacing
from graincode.generator import Generator
from graincode.metrics.figure import Figure, mean_of
from graincode.metrics.reconstruction import CodebookUsage, PairErrors, PairMean
from graincode.sampling import Sampler
from graincode.tokenizer import DQVAE


class Pass(Protocol):
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

    def figures(self) -> dict[str, Figure]:
        """What was counted on the way, over all processes; each of them must ask."""


class DatasetPass:
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

    def figures(self) -> dict[str, Figure]:
        return {}


class PairPass(DatasetPass):
    """Images that someone else reconstructed, beside their originals.

    Args:
        dataset: the reconstructions.
        originals: as many images of the same size, in the same order.
        likeness: further measures of each pair, by the name of their figure.
        batch_size, workers: as of `DatasetPass`.
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

    def figures(self) -> dict[str, Figure]:
        return self._errors.figures() | {name: one.figure() for name, one in self.likeness.items()}


class ReconstructionPass:
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

    def figures(self) -> dict[str, Figure]:
        """MSE in [0, 1], both PSNRs in dB, further likeness, use of the codebooks, codes and bits per image, so far.

        `codebook_usage` and `codebook_perplexity` are of all codebooks together; with `_g` they are of the codes of
        grain g. `grain_map_bits` is what the grain map costs an ideal coder that knows how often each region has each
        grain; `bits_per_image` adds log2 of the codebook's size for each code.
        """
        layout, use = self.tokenizer.layout, self._usage.result()
        length = mean_of(torch.cat(self._lengths))
        counts = processes.sum_(self._grains.clone()).double()
        map_bits = torch.special.entr(counts / counts.sum(dim=0)).sum().item() / math.log(2)
        figures = {
            **self._errors.figures(),
            **{name: one.figure() for name, one in self.likeness.items()},
            "codebook_usage": Figure(use.usage),
            "codebook_perplexity": Figure(use.perplexity),
            "codes_per_image": length,
            "grain_map_bits": Figure(map_bits),
            "bits_per_image": Figure(length.value * math.log2(layout.codebook_size) + map_bits),
        }
        if layout.num_grains > 1:
            for g, usage in enumerate(self._per_grain):
                if float(counts[g].sum()):
                    of_grain = usage.result()
                    figures[f"codebook_usage_{g}"] = Figure(of_grain.usage)
                    figures[f"codebook_perplexity_{g}"] = Figure(of_grain.perplexity)
        return figures


class LikelihoodPass(DatasetPass):
    """Real images, whose codes a generator judges as they go.

    Args:
        generator, tokenizer: of one code layout, in evaluation mode.
        dataset: the images.
        batch_size, workers: as of `DatasetPass`.
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

    def figures(self) -> dict[str, Figure]:
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


def chosen_labels(
    how: Literal["balanced", "drawn", "reference"], count: int, classes: int, seed: int, reference: Tensor | None
) -> Tensor:
    """(count,) long labels for samples; label i does not depend on the count.

    Args:
        how: "balanced" takes all classes in turn; "drawn" draws each uniformly, from (seed, i); "reference" takes
            those of the reference images in turn.
        count: number of samples.
        classes: of the generator; 0 for none.
        seed: of the draws.
        reference: (N,) long labels of the reference images; None if it has none.
    Raises:
        GraincodeError: the reference has no labels or others, or the generator no classes.
    """
    if how == "reference":
        if not classes or reference is None or int(reference.max()) >= classes:
            raise GraincodeError(
                f"images.labels=reference, but the generator has {classes} classes and the reference no such labels: "
                "type images.labels=balanced"
            )
        return reference[torch.arange(count) % len(reference)]
    if how == "drawn" and classes:
        places = torch.arange(count)
        return (Draws(seed, places).uniforms(LABELS, 1)[:, 0] * classes).long()
    return balanced_labels(count, classes, None)


def draw(
    generator: Generator,
    tokenizer: DQVAE,
    sampler: Sampler,
    labels: Tensor,
    seed: int,
    batch_size: int,
    given: CodePrefix | CodeMask | None = None,
) -> Iterator[SampleBatch]:
    """This process's share of the samples for (N,) labels, batch by batch; sample i depends on (seed, i), its label and
    what is given of it alone, and batches are the same for any number of processes.

    No batch is larger than N: fewer samples than `batch_size` take less work, and may in float32 differ in the last bit
    from the first of many.
    """
    settings = dataclasses.asdict(sampler)
    device = generator.content_head.weight.device
    batch_size = min(batch_size, len(labels))
    mine = processes.items(len(labels), batch_size)
    quiet = not processes.is_main()
    with tqdm(
        total=len(mine), unit=" images", desc="samples", leave=False, mininterval=1.0, miniters=0, disable=quiet
    ) as bar:

        def on_step(step: int) -> None:
            bar.set_postfix(step=step, refresh=False)
            bar.update(0)  # which shows it once in a while

        for start in mine[::batch_size]:
            part = labels[start : start + batch_size]
            begun = None if given is None else given[start : start + len(part)]
            codes = generator.sample(part, seed, start, batch_size, on_step, begun, **settings)
            images = to_uint8(tokenizer.detokenize(codes.to(device))).cpu()
            bar.update(len(part))
            yield SampleBatch(images, codes, part)


class SamplePass:
    """Samples, whose codes are counted as they go; arguments are those of `draw`."""

    name = "samples"

    def __init__(
        self,
        generator: Generator,
        tokenizer: DQVAE,
        sampler: Sampler,
        labels: Tensor,
        seed: int,
        batch_size: int,
        given: CodePrefix | CodeMask | None = None,
    ) -> None:
        self._draw = lambda: draw(generator, tokenizer, sampler, labels, seed, batch_size, given)
        self.count, self.batch_size, self.image_size = len(labels), batch_size, generator.layout.image_size
        self.labels = labels if generator.classes > 1 else None
        self._lengths = [torch.zeros(0, dtype=torch.long)]

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._draw():
            self._lengths.append(batch.codes.lengths.cpu())
            yield batch.images

    def figures(self) -> dict[str, Figure]:
        return {"codes_per_image": mean_of(torch.cat(self._lengths))}


def keep_images(images: Pass, folder: Path, form: str | None) -> Iterator[Tensor]:
    """A pass whose images are also written down, without loss.

    Args:
        images: as they come by; each process writes its own.
        folder: of the run, which all processes see.
        form: "png" for files `images/000000.png`, "npz" for `images.npz` with uint8 (N, H, W, 3) as `arr_0` and labels
            as `arr_1`, None to keep nothing.
    """
    if form is None:
        yield from images
        return
    place, raw = processes.items(images.count, images.batch_size).start, folder / "images.npy"
    shape = (images.count, *images.image_size, 3)
    if form == "png":
        processes.on_main(lambda: (folder / "images").mkdir(exist_ok=True))
    else:
        processes.on_main(lambda: np.lib.format.open_memmap(raw, "w+", np.uint8, shape).flush())
    for batch in images:
        pixels = batch.permute(0, 2, 3, 1).cpu().numpy()
        if form == "png":
            for index, image in enumerate(pixels, place):
                Image.fromarray(image).save(folder / "images" / f"{index:06d}.png")
        else:
            written = np.load(raw, mmap_mode="r+")
            written[place : place + len(pixels)] = pixels
            written.flush()
        place += len(pixels)
        yield batch
    processes.sum_(torch.zeros(1))  # all have written
    if form == "npz":
        processes.on_main(lambda: _pack(raw, images.labels))


def _pack(raw: Path, labels: Tensor | None) -> None:
    """Move images from an .npy into an .npz beside it."""
    with replacing(raw.with_suffix(".npz")) as partial, zipfile.ZipFile(partial, "w") as archive:
        # entries without the time of day, so that equal images make equal files
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file, raw.open("rb") as images:
            shutil.copyfileobj(images, file)
        if labels is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
                np.lib.format.write_array(file, labels.numpy(), allow_pickle=False)
    raw.unlink()


def gathered(batches: Iterable[SampleBatch], layout: CodeLayout) -> tuple[Tensor, GrainCodes]:
    """Images (N, 3, H, W) uint8 and codes of all samples of all processes, on the CPU."""
    own = list(batches)
    (h0, w0), (h, w) = layout.grids[0], layout.grids[-1]
    images = torch.cat([torch.zeros(0, 3, *layout.image_size, dtype=torch.uint8), *(b.images for b in own)])
    grains = torch.cat([torch.zeros(0, h0, w0, dtype=torch.long), *(b.codes.grains for b in own)])
    indices = torch.cat([torch.zeros(0, h, w, dtype=torch.long), *(b.codes.indices for b in own)])
    codes = GrainCodes(processes.gather_rows(grains), processes.gather_rows(indices), layout)
    return processes.gather_rows(images), codes
