"""What an evaluation does with its images, `evaluation=`: what all modes share, and modes without a reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from graincode.core.errors import GraincodeError, check
from graincode.data.images import ImageDataset
from graincode.evaluation.estimate import Estimate
from graincode.evaluation.published import write_npz
from graincode.evaluation.statistics import Statistics
from graincode.evaluation.streams import ImageStream, LikelihoodStream, check_size
from graincode.evaluation.subjects import Context, Reference, ReferenceChoice, Subject, check_classes
from graincode.networks.features import FeatureNetwork

ByNetwork = Mapping[str, Statistics]
"""Statistics of a set of images in the features of each network."""
Fits = Mapping[str, tuple[str, ...]]
"""References, by the subjects that can be compared with them."""


@dataclass
class Plan:
    """What is measured, found out beforehand.

    Attributes:
        settings: what metrics are computed with.
        splits, subset: parts of the Inception score, and images whose features are kept.
        warnings: lines for readers of the metrics.
        metrics, real: names of those that features allow, and the real images that they need, by purpose.
        spatial: of which sets of images spatial features are gathered: "subject" or a purpose.
    """

    context: Context
    images: ImageStream
    reference: Reference | None
    settings: dict[str, Any]
    warnings: list[str]
    splits: int = 0
    subset: int = 0
    metrics: list[str] = field(default_factory=list)
    real: dict[str, ImageDataset] = field(default_factory=dict)
    spatial: tuple[str, ...] = ()

    @property
    def inputs(self) -> dict[str, str]:
        """Hashes of all images that the result depends on, and of what made them, by name."""
        real = {f"{name}_hash": images.content_hash() for name, images in self.real.items()}
        return {**self.images.inputs, **real} | ({"reference_hash": self.reference.identity} if self.reference else {})

    @property
    def identity(self) -> dict[str, str]:
        """Those and the networks': part of the run's identity."""
        return self.inputs | {f"features_{name}": net.identity for name, net in self.context.networks.items()}


@dataclass(frozen=True)
class Mode:
    """The base of all modes: images are counted, and compared with nothing; feature networks by name."""

    features: Mapping[str, FeatureNetwork]

    name: ClassVar[str]
    fits: ClassVar[Fits]
    why: ClassVar[str] = "as it compares with nothing"
    compares: ClassVar[bool] = False

    @property
    def networks(self) -> Mapping[str, FeatureNetwork]:
        """Those in whose features images are measured."""
        return self.features

    def reads(self, subject: Subject, reference: ReferenceChoice) -> frozenset[str]:
        """Which of the keys `data`, `sampler` and `reference` matter to the result."""
        return subject.reads

    def check(self, subject: Subject, reference: ReferenceChoice) -> None:
        """Refuse a subject or reference that this mode cannot use."""
        fitting = self.fits.get(subject.option, ())
        for name, option, options in ("images", subject.option, self.fits), ("reference", reference.option, fitting):
            check(name, option, f"{' or '.join(', '.join(options).rsplit(', ', 1))}, {self.why}", option in options)
        for path in (part.path for part in (subject, reference) if hasattr(part, "path")):
            check("path", path, "a path where something is", Path(path).expanduser().exists())

    def open(self, subject: Subject, reference: Reference | None, context: Context) -> ImageStream:
        """The images, ready to be measured."""
        return subject.open(context, reference)

    def plan(self, subject: Subject, reference: ReferenceChoice, context: Context) -> Plan:
        """Load all that is needed, and find out what can be computed; raises if a named metric cannot be."""
        known = reference.open_reference(context, subject) if self.compares else None
        images = self.open(subject, known, context)
        for network in context.networks.values():  # last, for it may have to be downloaded
            network.load()
        settings = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "features"}
        return Plan(context, images, known, settings, list(images.warnings))

    def estimates(self, plan: Plan, subject: ByNetwork, real: Mapping[str, ByNetwork]) -> dict[str, Estimate]:
        """Metrics of the subject against the plan's real images, by name; more warnings go to the plan."""
        return {}

    def write(self, plan: Plan, subject: ByNetwork, folder: Path) -> None:
        """Write what the mode leaves in the run's folder besides the record."""


@dataclass(frozen=True)
class Summary(Mode):
    """Means and covariances of images as files, for others to compare with, `evaluation=statistics`."""

    name: ClassVar[str] = "statistics"
    fits: ClassVar[Fits] = dict.fromkeys(("samples", "reconstructions", "split", "folder"), ("split",))

    def plan(self, subject: Subject, reference: ReferenceChoice, context: Context) -> Plan:
        plan = super().plan(subject, reference, context)
        plan.spatial = ("subject",)
        return plan

    def write(self, plan: Plan, subject: ByNetwork, folder: Path) -> None:
        about = {f"{key.removesuffix('_hash')}_identity": value for key, value in plan.identity.items()}
        for key, network in self.networks.items():
            write_npz(path := folder / f"statistics-{network.name}.npz", subject[key], images=plan.images.name, **about)
            print(f"statistics: {path}")


@dataclass(frozen=True)
class Likelihood(Mode):
    """Bits per image of the codes of a split under a generator, `evaluation=likelihood`; without networks."""

    name: ClassVar[str] = "likelihood"
    fits: ClassVar[Fits] = {"split": ("split",)}
    why: ClassVar[str] = "as it measures the codes of real images alone"
    networks: ClassVar[Mapping[str, FeatureNetwork]] = {}

    def open(self, subject: Subject, reference: Reference | None, context: Context) -> ImageStream:
        real, (generator, tokenizer) = super().open(subject, reference, context), context.load_pair()
        check_size(context.source, tokenizer.module)
        check_classes(generator, context.source.class_names, context)
        how = {name: generator.provenance.get(name) for name in ("ratios", "psnr")}
        try:
            images = LikelihoodStream(generator.module, tokenizer.module, real.dataset, *context.loading, **how)
        except GraincodeError as error:
            raise GraincodeError(f"{context.find_export('generator')}: {error.line}") from error
        inputs = {"generator": generator.identity, "tokenizer": tokenizer.identity, **real.inputs}
        return images.depending_on(tokenizer.imported, **inputs)
