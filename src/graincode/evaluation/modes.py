"""What an evaluation does with its images, `evaluation=`: what all modes share, and modes without a reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from graincode.core.errors import GraincodeError
from graincode.data.images import ImageDataset, ImageSource
from graincode.evaluation.estimate import Estimate
from graincode.evaluation.statistics import Statistics, write_npz
from graincode.evaluation.streams import ImageStream, LikelihoodStream, check_size
from graincode.evaluation.subjects import Context, Opened, Reference, ReferenceChoice, Subject
from graincode.networks.features import FeatureNetwork

Estimates = dict[str, Estimate]
ByNetwork = Mapping[str, Statistics]
"""Statistics of a set of images in the features of each network."""


@dataclass
class Plan:
    """What is measured, found out beforehand: metrics that can be had in features, the sets of real images that they
    need, by what for, and lines for readers of the metrics."""

    images: ImageStream
    reference: Reference | None = None
    metrics: list[str] = field(default_factory=list)
    real: dict[str, ImageDataset] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Mode:
    """The base of all modes: images go by and are counted, and compared with nothing; networks by name."""

    features: Mapping[str, FeatureNetwork]

    name: ClassVar[str]
    compares: ClassVar[bool] = False
    prefix: ClassVar[str] = ""
    kept: ClassVar[int] = 0

    @property
    def networks(self) -> Mapping[str, FeatureNetwork]:
        """Those in whose features images are measured."""
        return self.features

    def reads(self, subject: Subject, reference: ReferenceChoice) -> frozenset[str]:
        """Which of the keys `data`, `sampler` and `reference` matter to the result."""
        return subject.reads

    def check(self, subject: Subject, reference: ReferenceChoice) -> None:
        """Refuse parts that say nothing together."""
        if reference.option != "split":
            raise GraincodeError(f"reference={reference.option}: expected none, as {self.name} compares with nothing")

    def open(self, subject: Subject, reference: Reference | None, context: Context) -> Opened:
        """The images, ready to be measured."""
        return subject.open(context, reference)

    def splits(self, count: int) -> int:
        """Parts of the Inception score of so many images; 0 without it."""
        return 0

    def plan(self, images: ImageStream, reference: Reference | None, source: ImageSource) -> Plan:
        """What can be computed; an error where something was asked for by name and cannot be."""
        return Plan(images, reference)

    def estimates(self, plan: Plan, subject: ByNetwork, real: Mapping[str, ByNetwork], seed: int) -> Estimates:
        """Metrics of the subject against the plan's real images, by name; more warnings go to the plan."""
        return {}

    def settings(self, plan: Plan) -> dict[str, Any]:
        """What metrics are computed with."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "features"}

    def write(self, folder: Path, name: str, subject: ByNetwork, inputs: Mapping[str, str]) -> None:
        """Write what the mode leaves in the run's folder besides the record."""


@dataclass(frozen=True)
class Summary(Mode):
    """Means and covariances of images as files, for others to compare with, `evaluation=statistics`."""

    name: ClassVar[str] = "statistics"

    def write(self, folder: Path, name: str, subject: ByNetwork, inputs: Mapping[str, str]) -> None:
        about = {f"{key.removesuffix('_hash')}_identity": value for key, value in inputs.items()}
        for key, network in self.networks.items():
            write_npz(path := folder / f"statistics-{network.name}.npz", subject[key], images=name, **about)
            print(f"statistics: {path}")


@dataclass(frozen=True)
class Likelihood(Mode):
    """What a generator makes of the codes of a split, in bits per image, `evaluation=likelihood`; without networks."""

    name: ClassVar[str] = "likelihood"
    networks: ClassVar[Mapping[str, FeatureNetwork]] = {}

    def check(self, subject: Subject, reference: ReferenceChoice) -> None:
        super().check(subject, reference)
        if subject.option != "split":
            raise GraincodeError(f"images={subject.option}: expected split, whose codes a generator can judge")

    def open(self, subject: Subject, reference: Reference | None, context: Context) -> Opened:
        opened, (generator, tokenizer) = super().open(subject, reference, context), context.load_pair()
        check_size(context.source, tokenizer.module)
        how = {name: generator.provenance.get(name) for name in ("ratios", "psnr")}
        images = LikelihoodStream(generator.module, tokenizer.module, opened.images.dataset, *context.loading, **how)
        return Opened(images, {"generator": generator.identity, "tokenizer": tokenizer.identity} | opened.inputs, how)
