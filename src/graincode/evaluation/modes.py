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
from graincode.evaluation.streams import ImageStream, LikelihoodStream, check_image_size
from graincode.evaluation.subjects import Context, Opened, Reference, ReferenceChoice, Subject
from graincode.networks.features import FeatureNetwork

ByNetwork = Mapping[str, Statistics]
"""Statistics of a set of images in the features of each network."""


@dataclass
class Plan:
    """What is measured and computed, found out beforehand.

    Attributes:
        images: the subject's.
        reference: None where a mode has none.
        metrics: that can be had in the features of networks.
        real: sets of real images whose statistics are needed, by what for.
        warnings: lines for readers of the metrics.
    """

    images: ImageStream
    reference: Reference | None = None
    metrics: list[str] = field(default_factory=list)
    real: dict[str, ImageDataset] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Mode:
    """The base of all modes: images are streamed, and nothing is compared.

    Attributes:
        features: networks by name.
    """

    features: Mapping[str, FeatureNetwork]

    name: ClassVar[str]
    compares: ClassVar[bool] = False
    prefix: ClassVar[str] = ""
    subset: ClassVar[int] = 0

    @property
    def networks(self) -> Mapping[str, FeatureNetwork]:
        """Those in whose features images are measured."""
        return self.features

    def reads(self, subject: Subject, reference: ReferenceChoice) -> frozenset[str]:
        """Which of the keys `data`, `sampler` and `reference` matter to the result."""
        return subject.reads

    def check(self, subject: Subject, reference: ReferenceChoice) -> None:
        """Refuse parts that say nothing together.

        Raises:
            GraincodeError: saying why.
        """
        if reference.option != "split":
            raise GraincodeError(
                f"reference={reference.option}: expected none, as evaluation={self.name} compares with nothing"
            )

    def open(self, subject: Subject, reference: Reference | None, context: Context) -> Opened:
        """The images, ready to be measured."""
        return subject.open(context, reference)

    def splits(self, count: int) -> int:
        """Parts of the Inception score of so many images; 0 without it."""
        return 0

    def plan(self, images: ImageStream, reference: Reference | None, source: ImageSource) -> Plan:
        """What can be computed.

        Raises:
            GraincodeError: a metric that was asked for cannot be.
        """
        return Plan(images, reference)

    def metrics_of(
        self, plan: Plan, generated: ByNetwork, real: Mapping[str, ByNetwork], seed: int
    ) -> dict[str, Estimate]:
        """Metrics in the features of networks, by the names that they go by in them; more warnings go to the plan.

        Args:
            plan: as of `plan`.
            generated: of the subject's images.
            real: of the plan's sets.
            seed: of random subsets.
        """
        return {}

    def settings(self, plan: Plan) -> dict[str, Any]:
        """What metrics are computed with."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "features"}

    def write(self, folder: Path, name: str, generated: ByNetwork, inputs: Mapping[str, str]) -> None:
        """Write what the mode leaves in the run's folder besides the record."""


@dataclass(frozen=True)
class Summary(Mode):
    """Means and covariances of images as files, for others to compare with, `evaluation=statistics`."""

    name: ClassVar[str] = "statistics"

    def write(self, folder: Path, name: str, generated: ByNetwork, inputs: Mapping[str, str]) -> None:
        about = {f"{key.removesuffix('_hash')}_identity": value for key, value in inputs.items()}
        for key, network in self.networks.items():
            path = folder / f"statistics-{network.name}.npz"
            write_npz(path, generated[key], images=name, **about)
            print(f"statistics: {path}")


@dataclass(frozen=True)
class Likelihood(Mode):
    """What a generator makes of the codes of a split, in bits per image, `evaluation=likelihood`; without networks."""

    name: ClassVar[str] = "likelihood"

    @property
    def networks(self) -> Mapping[str, FeatureNetwork]:
        return {}

    def check(self, subject: Subject, reference: ReferenceChoice) -> None:
        super().check(subject, reference)
        if subject.option != "split":
            raise GraincodeError(f"images={subject.option}: expected split, whose codes a generator can judge")

    def open(self, subject: Subject, reference: Reference | None, context: Context) -> Opened:
        opened = super().open(subject, reference, context)
        generator, tokenizer = context.load_pair()
        check_image_size(context.source, tokenizer.module)
        how = {name: generator.provenance.get(name) for name in ("ratios", "psnr")}
        images = LikelihoodStream(generator.module, tokenizer.module, opened.images.dataset, *context.loading, **how)
        models = {"generator": generator.identity, "tokenizer": tokenizer.identity}
        return Opened(images, models | opened.inputs, how)
