"""Images that can be measured, `images=`, and what they can be compared with, `reference=`; options: conf/."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from graincode.core.codes import GrainCodes
from graincode.core.errors import GraincodeError, check
from graincode.core.layout import other_classes
from graincode.core.prompts import CodePrefix
from graincode.data.decoding import BACKGROUND, check_background, open_image
from graincode.data.encoded import EncodedImages
from graincode.data.images import ImageDataset, ImageSource, check_image_size
from graincode.data.loader import in_order
from graincode.data.npz import NpzImages
from graincode.data.scanning import image_files
from graincode.evaluation.pairs import Measures
from graincode.evaluation.published import BOTH, STATISTICS, read_npz
from graincode.evaluation.samples import LabelChoice, SampleStream, chosen_labels, warnings_of_classes
from graincode.evaluation.statistics import Statistics
from graincode.evaluation.streams import DatasetStream, ImageStream, PairStream, ReconstructionStream, check_size
from graincode.export import Export, load_export, load_pair
from graincode.files import sha256
from graincode.networks.features import FeatureNetwork
from graincode.sampling import AutoSampler, Sampler

SplitName = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Context:
    """What an evaluation works with besides mode, subject and reference: networks by name, the data set, what finds the
    export of a "tokenizer" or "generator", and the settings of the job."""

    networks: Mapping[str, FeatureNetwork]
    source: ImageSource
    sampler: Sampler | AutoSampler | None
    find_export: Callable[[str], Path]
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

    def load_pair(self) -> tuple[Export, Export]:
        """The generator and its tokenizer."""
        return load_pair(self.find_export("generator"), self.find_export("tokenizer"), self.device, self.precision)


@dataclass(frozen=True)
class Reference:
    """What images are compared with: name, hash of the content, images or statistics by network or both, which split,
    and how many images are usually compared with it."""

    name: str
    identity: str
    images: ImageDataset | None = None
    known: Mapping[str, Statistics] = field(default_factory=dict)
    split: str | None = None
    usual: int | None = None

    @property
    def labels(self) -> Tensor | None:
        """(N,) long of its images, if they have any."""
        return self.images.labels if self.images is not None and self.images.labelled else None

    @property
    def count(self) -> int | None:
        """Number of its images, if it is known."""
        counts = [statistics.count for statistics in self.known.values()]
        return len(self.images) if self.images is not None else next(iter(counts), None)

    @property
    def wanted(self) -> int | None:
        """How many images the field compares with it; as many as it has, if that is known and nothing else."""
        return self.usual or self.count


@dataclass(frozen=True)
class Samples:
    """Samples of a generator, `images=samples`."""

    num_samples: int | None = None
    labels: LabelChoice = "balanced"

    option: ClassVar[str] = "samples"
    reads: ClassVar[frozenset[str]] = frozenset({"sampler"})

    def __post_init__(self) -> None:
        check("num_samples", self.num_samples, "1 or more", self.num_samples is None or self.num_samples >= 1)

    def open(self, context: Context, reference: Reference | None, measures: Measures | None = None) -> ImageStream:
        """Load the generator and its tokenizer."""
        (generator, tokenizer), count = context.load_pair(), self.num_samples or (reference and reference.wanted)
        check("num_samples", count, "a number, as no reference says how many images it has", bool(count))
        module, known = generator.module, None if reference is None else reference.labels
        if context.compile:
            module.compile_sampling()
        sampler, whose, maps, given = module.resolve(context.sampler), self.labels, {}, None
        if self.labels == "reference" and known is not None:
            check_classes(generator, reference.images.class_names, context)
        labels = chosen_labels(self.labels, count, module.classes, context.seed, known)
        if module.needs_prompt:
            check("labels", whose, "balanced, as the labels are those of what is given", whose == "balanced")
            dataset = None if reference is None or reference.images is None else context.source.split("train")
            check_classes(generator, context.source.class_names, context)
            given, labels = _prompts(generator, tokenizer, dataset, count, context.batch_size)
            maps, whose = {"maps": dataset.content_hash()}, "of the training images whose maps are given"
        images = SampleStream(module, tokenizer.module, sampler, labels, context.seed, context.batch_size, given)
        whose = whose if module.classes else None
        if module.classes:
            images.class_names, images.warnings = generator.names("class_names"), warnings_of_classes(generator, labels)
        images.facts = {"sampler": asdict(sampler), "generator_precision": context.precision, "labels": whose}
        inputs = {"generator": generator.identity, "tokenizer": tokenizer.identity, **maps}
        return images.depending_on(tokenizer.imported, **inputs)


@dataclass(frozen=True)
class Reconstructions:
    """Reconstructions of a split by a tokenizer, `images=reconstructions`."""

    split: SplitName = "test"
    ratios: Sequence[float] | None = None
    psnr: float | None = None

    option: ClassVar[str] = "reconstructions"
    reads: ClassVar[frozenset[str]] = frozenset({"data"})

    def __post_init__(self) -> None:
        if self.ratios is not None and self.psnr is not None:
            raise GraincodeError(f"ratios={list(self.ratios)} and psnr={self.psnr}: expected one of them")

    def open(self, context: Context, reference: Reference | None, measures: Measures | None = None) -> ImageStream:
        """Load the tokenizer; measures compare its reconstructions with the images."""
        tokenizer = load_export(context.find_export("tokenizer"), "tokenizer", context.device)
        check_size(context.source, tokenizer.module)
        dataset = context.source.split(self.split) if reference is None else reference.images
        how = {"ratios": self.ratios, "psnr": self.psnr, "measures": measures}
        images = ReconstructionStream(tokenizer.module, dataset, *context.loading, **how)
        return images.depending_on(tokenizer.imported, tokenizer=tokenizer.identity, originals=dataset.content_hash())


@dataclass(frozen=True)
class Split:
    """A split of the data set, `images=split` or `reference=split`."""

    split: SplitName = "test"

    option: ClassVar[str] = "split"
    reads: ClassVar[frozenset[str]] = frozenset({"data"})

    def open(self, context: Context, reference: Reference | None, measures: Measures | None = None) -> ImageStream:
        """The images."""
        dataset = context.source.split(self.split)
        return DatasetStream(dataset, *context.loading).depending_on(images_hash=dataset.content_hash())

    def open_reference(self, context: Context, subject: Subject) -> Reference:
        """The images."""
        images = context.source.split(self.split)
        return Reference(f"{images.name} {self.split}", images.content_hash(), images, split=self.split)


@dataclass(frozen=True)
class Folder:
    """Images in a directory, in order of their paths, or in an .npz file, `images=folder` or `reference=folder`."""

    path: str
    image_size: int | Sequence[int] | None = None
    allow_outside: bool = False
    background: str = BACKGROUND

    option: ClassVar[str] = "folder"
    reads: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if self.image_size is not None:
            check_image_size(self.image_size)
        check_background(self.background)

    def open(self, context: Context, reference: Reference | None, measures: Measures | None = None) -> ImageStream:
        """The images; measures compare them as reconstructions with a reference of equal size and names."""
        dataset = self._dataset()
        if measures is None:
            stream = DatasetStream(dataset, *context.loading)
        else:
            _check_pairs(dataset, reference.images)
            stream = PairStream(dataset, reference.images, measures, *context.loading)
        stream.warnings = list(getattr(dataset, "warnings", ()))
        stream.facts = {"labels": _in_words(stream.labels), "resized": self.image_size}
        if any(path.lower().endswith((".jpg", ".jpeg", ".jpe", ".jfif")) for path in _paths(dataset)):
            stream.warnings.append(
                "the images were kept as JPEG, which changes them and every metric; keep them as PNG"
            )
        return stream.depending_on(images_hash=dataset.content_hash())

    def open_reference(self, context: Context, subject: Subject) -> Reference:
        """The images."""
        images = self._dataset()
        return Reference(images.name, images.content_hash(), images)

    def _dataset(self) -> ImageDataset:
        path, wanted = Path(self.path).expanduser(), self.image_size and check_image_size(self.image_size)
        if path.is_dir():
            files = image_files(path.resolve(), allow_outside=self.allow_outside)
            labels, crop = torch.zeros(len(files.paths), dtype=torch.long), "center" if wanted else "exact"
            size = wanted or open_image(files.name(0)).size[::-1]
            return EncodedImages(path.name, "images", size, files, labels, crop=crop, background=self.background)
        images = NpzImages(path)
        if STATISTICS & set(images.arrays):
            raise GraincodeError(f"{path}: {BOTH}; or save its {images.array} alone, and measure that")
        same = wanted in (None, images.image_size)
        check("image_size", self.image_size, "null, as images of an .npz are not resized", same)
        return images


@dataclass(frozen=True)
class StatisticsFile:
    """Means and covariances that someone published, `reference=statistics`: only Fréchet distances can be had."""

    path: str

    option: ClassVar[str] = "statistics"
    reads: ClassVar[frozenset[str]] = frozenset()

    def open_reference(self, context: Context, subject: Subject) -> Reference:
        """The statistics."""
        path = Path(self.path).expanduser()
        known = {name: read_npz(path, network) for name, network in context.networks.items()}
        return Reference(path.name, sha256(path), known=known)


@dataclass(frozen=True)
class ReferenceBatch:
    """A file of ADM's layout, `reference=adm`: some images, and the statistics of all that they were taken from."""

    path: str

    option: ClassVar[str] = "adm"
    reads: ClassVar[frozenset[str]] = frozenset()

    def open_reference(self, context: Context, subject: Subject) -> Reference:
        """The images and the statistics."""
        path = Path(self.path).expanduser()
        images = NpzImages(path)
        if not set(images.arrays) >= {"mu", "sigma"}:
            raise GraincodeError(f"{path}: images without mu and sigma; compare with them as reference=folder")
        known = {name: read_npz(path, network, with_images=True) for name, network in context.networks.items()}
        return Reference(path.name, sha256(path), images, known, usual=50_000)


@dataclass(frozen=True)
class Originals:
    """The images that reconstructions were made from, `reference=originals`."""

    option: ClassVar[str] = "originals"
    reads: ClassVar[frozenset[str]] = frozenset()

    def open_reference(self, context: Context, subject: Reconstructions) -> Reference:
        """The subject's split."""
        return Split(subject.split).open_reference(context, subject)


Subject = Samples | Reconstructions | Split | Folder
ReferenceChoice = Split | Folder | StatisticsFile | ReferenceBatch | Originals


def check_classes(generator: Export, names: Sequence[str], context: Context) -> None:
    """Refuse a data set whose classes are not those of a generator, name by name."""
    if generator.module.classes and (differing := other_classes(names, generator.names("class_names"))):
        line = f"{context.find_export('generator')}: the data set has {differing} of the generator"
        raise GraincodeError(f"{line}; expected the data that it was trained on")


def _prompts(
    generator: Export, tokenizer: Export, dataset: ImageDataset | None, count: int, batch_size: int
) -> tuple[CodePrefix, Tensor]:
    """What samples must be given, taken from the first training images, and the labels of these."""
    there = 0 if dataset is None else len(dataset)
    expected = f"{there} or fewer, as samples are given the grain maps of training images, with reference=split"
    check("num_samples", count, expected, count <= there)
    how = [generator.provenance.get(name) for name in ("ratios", "psnr")]
    module, batches = tokenizer.module, list(in_order(dataset, batch_size, count))
    codes = GrainCodes.cat([module.tokenize(batch.to(module.device).images, *how).to("cpu") for batch in batches])
    prompts = generator.module.prompt_of(GrainCodes(codes.grains, codes.indices, generator.module.layout))
    return prompts, torch.cat([batch.labels for batch in batches])


def _paths(dataset: ImageDataset) -> Sequence[str]:
    """Of the files of images, in order; none for images in memory."""
    return getattr(getattr(dataset, "encoded", None), "paths", ())


def _in_words(labels: Tensor | None) -> str | None:
    """How many classes images are of, and how many of each."""
    if labels is None:
        return None
    counts = labels.bincount()
    counts = counts[counts > 0]
    each = sorted({int(counts.min()), int(counts.max())})
    return f"{len(counts)} classes of {' to '.join(map(str, each))} images"


def _check_pairs(images: ImageDataset, originals: ImageDataset) -> None:
    """Refuse folders that are not pairs of images of equal sizes and names."""
    one, other = (f"{len(dataset)} images of {tuple(dataset.image_size)} pixels" for dataset in (images, originals))
    if one != other:
        raise GraincodeError(f"{one} and a reference of {other}: expected pairs of equal size")
    for a, b in zip(_paths(images), _paths(originals), strict=False):
        if Path(a).with_suffix("") != Path(b).with_suffix(""):
            raise GraincodeError(f"images have {a} where the reference has {b}: expected pairs of equal names")
