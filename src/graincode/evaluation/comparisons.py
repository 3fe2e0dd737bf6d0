"""Modes that compare images with a reference: generation and reconstruction; options: conf/evaluation."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from graincode.core.errors import GraincodeError, check, check_choice
from graincode.core.layout import other_classes
from graincode.data.images import Subset
from graincode.evaluation import metrics as of
from graincode.evaluation.estimate import Estimate
from graincode.evaluation.modes import ByNetwork, Fits, Mode, Plan
from graincode.evaluation.pairs import structural_similarity
from graincode.evaluation.statistics import SUBSET, Statistics
from graincode.evaluation.streams import ImageStream
from graincode.evaluation.subjects import Context, Reference, ReferenceChoice, Subject
from graincode.networks.features import FeatureNetwork
from graincode.networks.perceptual import Lite0Distance, LPIPSDistance

Distance = Literal["fd", "sfd", "is", "kid", "precision_recall", "density_coverage"]
DISTANCES = typing.get_args(Distance)
IN_FEATURES = (*DISTANCES, "class_consistency")
"""Metrics that are computed in the features of each network."""


@dataclass(frozen=True)
class Comparison(Mode):
    """The base of modes that compare two sets of images in the features of networks.

    `extra` are metrics of one's own, by name: of the statistics of subject and reference in each network.
    """

    metrics: Sequence[Distance] | None = None
    inception_splits: int | None = None
    kid_subsets: int = 100
    kid_subset_size: int | None = None
    precision_neighbours: int = 3
    density_neighbours: int = 5
    subset: int = SUBSET
    extra: Mapping[str, Callable[[Statistics, Statistics], Estimate]] | None = None

    compares: ClassVar[bool] = True
    usual: ClassVar[tuple[str, ...]] = tuple(name for name in IN_FEATURES if name != "sfd")
    known: ClassVar[tuple[str, ...]] = IN_FEATURES
    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        counts = ("inception_splits", "kid_subsets", "kid_subset_size", "precision_neighbours", "density_neighbours")
        for name in (*counts, "subset"):
            value = getattr(self, name)
            check(name, value, "1 or more", value is None or value >= 1)
        check("metrics", self.metrics, "null for the usual ones, or some names", self.metrics is None or self.metrics)
        for metric in self.metrics or ():
            check_choice("metrics", metric, self.known)

    def wants(self, metric: str) -> bool:
        """Whether a metric is asked for."""
        return metric in (self.usual if self.metrics is None else self.metrics)

    @property
    def networks(self) -> Mapping[str, FeatureNetwork]:
        return self.features if self.extra or any(map(self.wants, IN_FEATURES)) else {}

    def reads(self, subject: Subject, reference: ReferenceChoice) -> frozenset[str]:
        return subject.reads | reference.reads | {"reference"}

    def plan(self, subject: Subject, reference: ReferenceChoice, context: Context) -> Plan:
        plan = super().plan(subject, reference, context)
        count, real = plan.images.count, plan.reference.images
        fewest = min(filter(None, (count, plan.reference.count)))
        there, plan.subset = min(fewest, self.subset), self.subset
        plan.splits = (self.inception_splits or self._parts(count)) if self.wants("is") else 0
        plan.settings |= {"inception_splits": plan.splits, "extra": list(self.extra or ())}
        if real is not None:
            plan.settings["kid_subset_size"] = self._kid_size(there)
        if not self.networks:
            return plan
        plan.metrics = [name for name in IN_FEATURES if self.wants(name)]
        for name, part in ("is", "classes"), ("sfd", "spatial"):
            lacking = [network.name for network in self.networks.values() if not getattr(network, part)]
            reason = f"{', '.join(lacking)} has no {'classifier' if name == 'is' else 'spatial features'}"
            if 0 < len(lacking) < len(self.networks) and name in plan.metrics:
                plan.warnings.append(f"{name} is left out in some features: {reason}")
            elif lacking:
                self._leave_out(plan, name, reason)
        for name, known in plan.reference.known.items():
            if known.identity is None and not (network := self.networks[name]).published:
                unsaid = f"{plan.reference.name} does not say which features its statistics are of"
                plan.warnings.append(f"{unsaid}: the distance means nothing if they are not those of {network.name}")
        if not all(len(known.spatial_mean) for known in plan.reference.known.values()):
            self._leave_out(plan, "sfd", "the reference has no mu_s and sigma_s")
        plan.spatial = ("subject", "reference") if "sfd" in plan.metrics else ()
        check("num_samples", fewest, "2 images or more for a Fréchet distance", "fd" not in plan.metrics or fewest >= 2)
        for network in self.networks.values() if "fd" in plan.metrics else ():
            if fewest <= network.dimension:
                few = f"{network.name} has {network.dimension} features, and there are only {fewest} images"
                advice = "by an amount that depends on their number; compare it with ones of as many"
                plan.warnings.append(f"{few}: the Fréchet distance is too large {advice}")
        for name, needed in (
            ("kid", self._kid_size(2)),
            ("precision_recall", self.precision_neighbours + 1),
            ("density_coverage", self.density_neighbours + 1),
        ):
            if real is None:
                self._leave_out(plan, name, "the reference is a file of means and covariances alone")
            elif there < needed:
                self._leave_out(plan, name, f"it needs {needed} images, and there are {there}")
        if real is not None:
            size, other = tuple(plan.images.image_size), tuple(real.image_size)
            if differing := other_classes(plan.images.class_names, real.class_names):
                plan.warnings.append(f"the images are of {differing} of the reference: metrics tell that apart, too")
            if size != other:
                plan.warnings.append(f"images of {size} pixels against {other}: metrics tell that apart, too")
            if self._needs_images(plan):
                plan.real["reference"] = real
        return plan

    def _parts(self, count: int) -> int:
        """In how many parts images are divided for the Inception score."""
        return min(10, count)

    def _needs_images(self, plan: Plan) -> bool:
        """Whether the reference's images are to be measured."""
        return bool(self.extra or set(plan.metrics) - {"is"})

    def estimates(self, plan: Plan, subject: ByNetwork, real: Mapping[str, ByNetwork]) -> dict[str, Estimate]:
        sets, found = {"reference": plan.reference.known} | real, {}
        for key, network in self.networks.items():
            known = {name: statistics.get(key) for name, statistics in sets.items()}
            own = self._in_features(plan, subject[key], known)
            found |= {network.label(name): estimate for name, estimate in own.items()}
        return found

    def _in_features(self, plan: Plan, subject: Statistics, known: Mapping[str, Statistics]) -> dict[str, Estimate]:
        """The metrics of one network."""
        real, found = known["reference"], {}
        if "fd" in plan.metrics:
            found[f"{self.prefix}fd"] = of.frechet_distance(subject, real)
        if "sfd" in plan.metrics and len(subject.spatial_mean):
            found[f"{self.prefix}sfd"] = of.spatial_distance(subject, real)
        if "is" in plan.metrics and len(subject.split_sizes):
            found["is"] = of.inception_score(subject)
        if "kid" in plan.metrics:
            size = self._kid_size(min(len(subject.subset), len(real.subset)))
            found[f"{self.prefix}kid"] = of.kernel_distance(subject, real, self.kid_subsets, size, plan.context.seed)
        if "precision_recall" in plan.metrics:
            found |= of.precision_recall(subject, real, self.precision_neighbours)
        if "density_coverage" in plan.metrics:
            found |= of.density_coverage(subject, real, self.density_neighbours)
        return found | {name: metric(subject, real) for name, metric in (self.extra or {}).items()}

    def _leave_out(self, plan: Plan, name: str, reason: str) -> None:
        """Leave a metric out, with a warning; raises if it was named in the settings."""
        if name in plan.metrics:
            if self.metrics is not None or (name == "kid" and self.kid_subset_size is not None):
                raise GraincodeError(f"metrics={name}: {reason}; leave it out")
            plan.metrics.remove(name)
            plan.warnings.append(f"{name} left out: {reason}")

    def _kid_size(self, fewest: int) -> int:
        return self.kid_subset_size or min(1000, fewest)


@dataclass(frozen=True)
class Generation(Comparison):
    """Samples, or anyone's images, against the reference of the generation task, `evaluation=generation`."""

    metrics: Sequence[Distance | Literal["class_consistency"]] | None = None
    floor: bool | None = None

    name: ClassVar[str] = "generation"
    fits: ClassVar[Fits] = dict.fromkeys(("samples", "split", "folder"), ("split", "folder", "statistics"))
    why: ClassVar[str] = "as distances of reconstructions, or to originals, say nothing of a generator"

    def __post_init__(self) -> None:
        super().__post_init__()
        check("floor", self.floor, "null without fd among the metrics", not self.floor or self.wants("fd"))

    def reads(self, subject: Subject, reference: ReferenceChoice) -> frozenset[str]:
        return super().reads(subject, reference) | ({"data"} if self.floor else set())

    def check(self, subject: Subject, reference: ReferenceChoice) -> None:
        only = "another, as such a file is compared with by evaluation=adm"
        check("reference", reference.option, only, reference.option != "adm")
        super().check(subject, reference)
        if reference.option == "statistics" and len(self.features) != 1:
            names = ",".join(self.features)
            raise GraincodeError(f"features=[{names}]: expected one, as reference=statistics is of one network")

    def plan(self, subject: Subject, reference: ReferenceChoice, context: Context) -> Plan:
        plan = super().plan(subject, reference, context)
        if "fd" in plan.metrics and self.floor is not False:
            self._add_floor(plan)
        if "class_consistency" in plan.metrics:
            self._add_classifier(plan)
        return plan

    def _add_floor(self, plan: Plan) -> None:
        """As many real training images: what a perfect generator would score."""
        if self.floor is None and plan.reference.split is None:
            plan.warnings.append("no floor: floor=true measures as many training images of the data set, too")
            return
        train = plan.context.source.split("train")
        count = min(plan.images.count, len(train))
        if count < 2:
            plan.warnings.append("no floor: there is only one training image")
            return
        if count < plan.images.count:
            plan.warnings.append(f"the floor is too high: it is of {count} images, as there are no more to train on")
        if plan.reference.split == "train":
            plan.warnings.append("the floor is too low: its images are among those of the reference")
        plan.real["floor"] = Subset(train, count)

    def _add_classifier(self, plan: Plan) -> None:
        """Training images for the classifier that says whether images show the class that they were asked for."""
        classes, labels = len(plan.context.source.class_names), plan.images.labels
        more = labels is not None and int(labels.max()) >= classes
        differing = other_classes(plan.images.class_names, plan.context.source.class_names)
        reasons = {
            "the images have no classes": labels is None,
            "the reference is no split of a data set, to train a classifier on": plan.reference.split is None,
            "the reference has no labels": plan.reference.labels is None,
            f"the images are of more classes than the {classes} of the data set": more,
            f"the images are of {differing} of the data set": bool(differing),
            "the reference is what the classifier is trained on": plan.reference.split == "train",
        }
        if reason := next((reason for reason, holds in reasons.items() if holds), None):
            self._leave_out(plan, "class_consistency", reason)
        else:
            train = plan.context.source.split("train")
            plan.real["classifier"] = Subset(train, min(self.subset, len(train)))

    def _in_features(self, plan: Plan, subject: Statistics, known: Mapping[str, Statistics]) -> dict[str, Estimate]:
        found = super()._in_features(plan, subject, known)
        if "floor" in known:
            found["fd_floor"] = of.frechet_distance(known["floor"], known["reference"])
        if "class_consistency" in plan.metrics:
            training = known["classifier"], plan.real["classifier"].labels
            real = known["reference"], plan.reference.labels
            try:
                found |= of.class_consistency(*training, *real, subject, plan.images.labels)
            except GraincodeError as error:
                self._leave_out(plan, "class_consistency", str(error))
        return found


@dataclass(frozen=True)
class Reconstruction(Comparison):
    """Reconstructions against the images that they were made from, `evaluation=reconstruction`.

    Squared errors and PSNR are always given; so are codes per image and use of the codebook of a tokenizer's images.
    """

    metrics: Sequence[Distance | Literal["ssim", "lpips", "lite0"]] | None = None
    lpips_weights: str | None = None

    name: ClassVar[str] = "reconstruction"
    fits: ClassVar[Fits] = {"reconstructions": ("originals",), "folder": ("folder",)}
    why: ClassVar[str] = "as reconstructions are compared with the images that they were made from"
    prefix: ClassVar[str] = "r"
    usual: ClassVar[tuple[str, ...]] = ("fd", "is", "ssim")
    known: ClassVar[tuple[str, ...]] = (*DISTANCES, "ssim", "lpips", "lite0")

    def open(self, subject: Subject, reference: Reference, context: Context) -> ImageStream:
        measures = {"ssim": structural_similarity} if self.wants("ssim") else {}
        networks = {"lpips": LPIPSDistance(weights=self.lpips_weights)} if self.wants("lpips") else {}
        networks |= {"lite0_distance": Lite0Distance()} if self.wants("lite0") else {}
        networks = {name: network.to(context.device) for name, network in networks.items()}
        images = subject.open(context, reference, measures | networks)
        return images.depending_on(**{name: network.identity for name, network in networks.items()})
