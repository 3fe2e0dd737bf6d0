"""Images that can be measured, `images=`, and what they can be compared with, `reference=`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from graincode.core.codes import GrainCodes
from graincode.core.errors import GraincodeError, check
from graincode.core.prompts import CodePrefix
from graincode.data.encoded import EncodedImages, Files
from graincode.data.folders import image_files
from graincode.data.images import ImageDataset, ImageSource, TensorImages, check_image_size, open_image
from graincode.data.loader import in_order
from graincode.evaluation.pairs import Measure
from graincode.evaluation.samples import LabelChoice, SampleStream, chosen_labels, draw
from graincode.evaluation.statistics import Statistics, read_npz
from graincode.evaluation.streams import DatasetStream, ImageStream, PairStream, ReconstructionStream
from graincode.evaluation.streams import check_image_size as check_size_of
from graincode.export import Export
from graincode.files import open_npz
from graincode.networks.features import FeatureNetwork
from graincode.sampling import AutoSampler, Sampler

SplitName = Literal["train", "val", "test"]
Measures = Mapping[str, Measure]


@dataclass(frozen=True)
class Context:
    """What an evaluation works with besides its mode, subject and reference.

    Attributes:
        networks: by name.
        source: the data set.
        sampler: of samples.
        load_tokenizer, load_pair: give the tokenizer, or the generator and its tokenizer.
        device: where these and the networks are.
        precision: of the generator, for the record.
        compile: whether to sample with compiled blocks.
        seed: of samples and of random subsets.
        batch_size: images at once.
        workers: processes that load images.
        cache_dir: of statistics of real images; None for the usual place.
    """

    networks: Mapping[str, FeatureNetwork]
    source: ImageSource
    sampler: Sampler | AutoSampler | None
    load_tokenizer: Callable[[], Export]
    load_pair: Callable[[], tuple[Export, Export]]
    device: torch.device
    precision: str = "float32"
    compile: bool = False
    seed: int = 0
    batch_size: int = 250
    workers: int = 0
    cache_dir: str | None = None

    @property
    def loading(self) -> tuple[int, int]:
        """How `DatasetStream` loads images."""
        return self.batch_size, self.workers


@dataclass(frozen=True)
class Opened:
    """A subject, ready to be measured.

    Attributes:
        images: all of it.
        inputs: hashes of what it depends on, by name; they are part of the run's identity.
        facts: what else the record tells.
        warnings: lines for readers of the metrics.
    """

    images: ImageStream
    inputs: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Reference:
    """What images are compared with.

    Attributes:
        name: in words.
        identity: hash of its content.
        images: None if there are only statistics.
        known: statistics by network, where there are only these.
        split: of the data set that it is, if it is one.
    """

    name: str
    identity: str
    images: ImageDataset | None = None
    known: Mapping[str, Statistics] = field(default_factory=dict)
    split: str | None = None

    @property
    def labels(self) -> Tensor | None:
        """(N,) long of its images, if they have any."""
        return self.images.labels if self.images is not None and len(self.images.class_names) > 1 else None

    @property
    def count(self) -> int | None:
        """Number of its images, if it is known."""
        if self.images is not None:
            return len(self.images)
        return next((statistics.count for statistics in self.known.values()), None)


@dataclass(frozen=True)
class Samples:
    """Samples of a generator, `images=samples`.

    Attributes:
        num_samples: None for as many as the reference has images.
        labels: "balanced" takes all classes in turn, "drawn" draws each uniformly, "reference" takes those of the
            reference images, for data sets whose classes differ in size.
    """

    num_samples: int | None = None
    labels: LabelChoice = "balanced"

    option: ClassVar[str] = "samples"
    reads: ClassVar[frozenset[str]] = frozenset({"sampler"})

    def __post_init__(self) -> None:
        check("num_samples", self.num_samples, "1 or more", self.num_samples is None or self.num_samples >= 1)

    def open(self, context: Context, reference: Reference | None, measures: Measures | None = None) -> Opened:
        """Load the generator and its tokenizer.

        Raises:
            GraincodeError: they do not fit each other, the sampler, the labels or the reference.
        """
        generator, tokenizer = context.load_pair()
        module, count = generator.module, self.num_samples or (reference and reference.count)
        check("num_samples", count, "a number, as no reference says how many images it has", bool(count))
        if context.compile:
            module.compile_sampling()
        sampler = module.resolve(context.sampler)
        inputs, whose = {"generator": generator.identity, "tokenizer": tokenizer.identity}, self.labels
        known = None if reference is None else reference.labels
        labels, given = chosen_labels(self.labels, count, module.classes, context.seed, known), None
        if module.needs_prompt:
            check("labels", self.labels, "balanced, as the labels are those of what is given", whose == "balanced")
            dataset = context.source.split("train") if reference is not None and reference.images is not None else None
            given, labels = _prompts(generator, tokenizer, dataset, count, context.batch_size)
            inputs["maps"], whose = dataset.content_hash(), "of the training images whose maps are given"
        batches = draw(module, tokenizer.module, sampler, labels, context.seed, context.batch_size, given)
        facts = {
            "sampler": asdict(sampler),
            "precision": context.precision,
            "labels": whose if module.classes else None,
        }
        return Opened(SampleStream(batches, labels, context.batch_size, module), inputs, facts)


@dataclass(frozen=True)
class Reconstructions:
    """Reconstructions of a split by a tokenizer, `images=reconstructions`.

    Attributes:
        split: of the data set.
        ratios: share of regions at each grain; None for the tokenizer's own.
        psnr: in dB, instead of ratios: as few codes as reach it, for each image.
    """

    split: SplitName = "test"
    ratios: Sequence[float] | None = None
    psnr: float | None = None

    option: ClassVar[str] = "reconstructions"
    reads: ClassVar[frozenset[str]] = frozenset({"data"})

    def __post_init__(self) -> None:
        if self.ratios is not None and self.psnr is not None:
            raise GraincodeError(f"ratios={list(self.ratios)} and psnr={self.psnr}: expected one of them")

    def open(self, context: Context, reference: Reference | None, measures: Measures | None = None) -> Opened:
        """Load the tokenizer.

        Raises:
            GraincodeError: the images are not of its size.
        """
        tokenizer = context.load_tokenizer()
        check_size_of(context.source, tokenizer.module)
        dataset = context.source.split(self.split) if reference is None else reference.images
        images = ReconstructionStream(
            tokenizer.module, dataset, context.batch_size, None, context.workers, self.ratios, self.psnr, measures
        )
        inputs = {"tokenizer": tokenizer.identity, "originals": dataset.content_hash()}
        return Opened(images, inputs, {"ratios": self.ratios, "psnr": self.psnr})


@dataclass(frozen=True)
class Split:
    """A split of the data set: `images=split`, or a generation's usual reference, `reference=split`.

    Attributes:
        split: which.
    """

    split: SplitName = "test"

    option: ClassVar[str] = "split"
    reads: ClassVar[frozenset[str]] = frozenset({"data"})

    def open(self, context: Context, reference: Reference | None, measures: Measures | None = None) -> Opened:
        """The real images themselves."""
        dataset = context.source.split(self.split)
        return Opened(DatasetStream(dataset, *context.loading), {"images_hash": dataset.content_hash()})

    def open_reference(self, context: Context, subject: Subject) -> Reference:
        """The split."""
        images = context.source.split(self.split)
        return Reference(f"{images.name} {images.split}", images.content_hash(), images, split=images.split)


@dataclass(frozen=True)
class Folder:
    """Images in a directory or in an .npz file, `images=folder` or `reference=folder`.

    Attributes:
        path: of a directory, in which all image files at any depth are taken in the order of their paths, or of an
            .npz with uint8 images (N, H, W, 3) as `arr_0`, as the field shares samples, or as `images`.
        image_size: side of a square or (height, width) in pixels that files are resized and cropped to; None takes
            them as they are, which must be of one size.
    """

    path: str
    image_size: int | Sequence[int] | None = None

    option: ClassVar[str] = "folder"
    reads: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if self.image_size is not None:
            check_image_size(self.image_size)

    def open(self, context: Context, reference: Reference | None, measures: Measures | None = None) -> Opened:
        """The images; with measures, as reconstructions of the reference, of equal size and names.

        Raises:
            GraincodeError: there are no images, or no pairs.
        """
        dataset = self.dataset()
        lossy = any(path.lower().endswith((".jpg", ".jpeg")) for path in _paths(dataset))
        warnings = ["the images were kept as JPEG, which changes them and every metric; keep them as PNG"] * lossy
        if measures is None:
            stream = DatasetStream(dataset, *context.loading)
        else:
            _check_pairs(dataset, reference.images)
            stream = PairStream(dataset, reference.images, measures, *context.loading)
        return Opened(stream, {"images_hash": dataset.content_hash()}, warnings=warnings)

    def open_reference(self, context: Context, subject: Subject) -> Reference:
        """The images.

        Raises:
            GraincodeError: there are none.
        """
        images = self.dataset()
        return Reference(images.name, images.content_hash(), images)

    def dataset(self) -> ImageDataset:
        """The images.

        Raises:
            GraincodeError: there are none.
        """
        path = Path(self.path).expanduser()
        if path.is_dir():
            files = Files(path.resolve(), tuple(image_files(path)))
            size, crop = open_image(files.name(0)).size[::-1], "exact"
            if self.image_size is not None:
                size, crop = check_image_size(self.image_size), "center"
            labels = torch.zeros(len(files), dtype=torch.long)
            return EncodedImages(path.name, "images", size, files, labels, crop=crop)
        try:
            with open_npz(path) as arrays:
                found = next((arrays[name] for name in ("arr_0", "images") if name in arrays.files), None)
        except ValueError as error:
            raise GraincodeError(f"{self.path}: no directory of images, and {error}") from None
        if found is None or found.dtype != np.uint8 or found.ndim != 4 or found.shape[3] != 3 or not len(found):
            shape = "none of them; mu and sigma are statistics" if found is None else f"{found.dtype} {found.shape}"
            raise GraincodeError(f"{self.path}: expected arr_0 or images, uint8 of (N, H, W, 3), but found {shape}")
        if self.image_size is not None:
            same = check_image_size(self.image_size) == found.shape[1:3]
            check("image_size", self.image_size, "null, as images of an .npz are not resized", same)
        images = torch.from_numpy(found).permute(0, 3, 1, 2)
        return TensorImages(path.name, "images", images, torch.zeros(len(images), dtype=torch.long))


@dataclass(frozen=True)
class StatisticsFile:
    """Means and covariances that someone published, `reference=statistics`: only Fréchet distances can be had.

    Attributes:
        path: of an .npz with `mu` (D,) and `sigma` (D, D).
    """

    path: str

    option: ClassVar[str] = "statistics"
    reads: ClassVar[frozenset[str]] = frozenset()

    def open_reference(self, context: Context, subject: Subject) -> Reference:
        """The statistics.

        Raises:
            GraincodeError: as `read_npz`.
        """
        path = Path(self.path).expanduser()
        known = {name: read_npz(path, network) for name, network in context.networks.items()}
        return Reference(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), known=known)


@dataclass(frozen=True)
class Originals:
    """The images that reconstructions were made from, `reference=originals`."""

    option: ClassVar[str] = "originals"
    reads: ClassVar[frozenset[str]] = frozenset()

    def open_reference(self, context: Context, subject: Reconstructions) -> Reference:
        """The subject's split."""
        return Split(subject.split).open_reference(context, subject)


Subject = Samples | Reconstructions | Split | Folder
ReferenceChoice = Split | Folder | StatisticsFile | Originals


def _prompts(
    generator: Export, tokenizer: Export, dataset: ImageDataset | None, count: int, batch_size: int
) -> tuple[CodePrefix, Tensor]:
    """What samples must be given, of the first training images, not those of the reference; and their labels."""
    there = 0 if dataset is None else len(dataset)
    expected = f"{there} or fewer, as samples are given the grain maps of training images, with reference=split"
    check("num_samples", count, expected, count <= there)
    how = [generator.provenance.get(name) for name in ("ratios", "psnr")]
    batches = list(in_order(dataset, batch_size, count))
    device = tokenizer.module.device
    codes = GrainCodes.cat([tokenizer.module.tokenize(batch.images.to(device), *how).to("cpu") for batch in batches])
    prompts = generator.module.prompt_of(GrainCodes(codes.grains, codes.indices, generator.module.layout))
    return prompts, torch.cat([batch.labels for batch in batches])


def _paths(dataset: ImageDataset) -> Sequence[str]:
    """Of the files of images, in order; none for images in memory."""
    return getattr(getattr(dataset, "encoded", None), "paths", ())


def _check_pairs(images: ImageDataset, originals: ImageDataset) -> None:
    """Refuse folders that are not pairs of images of equal names."""
    sets = [(len(one), tuple(one.image_size)) for one in (images, originals)]
    if sets[0] != sets[1]:
        raise GraincodeError(
            f"{sets[0][0]} reconstructions of {sets[0][1]} pixels and {sets[1][0]} originals of {sets[1][1]}: expected "
            "pairs of equal size"
        )
    for a, b in zip(_paths(images), _paths(originals), strict=False):
        if Path(a).with_suffix("") != Path(b).with_suffix(""):
            raise GraincodeError(f"images have {a} where the reference has {b}: expected pairs of equal names")
