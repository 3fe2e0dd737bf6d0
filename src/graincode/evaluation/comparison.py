"""A set of images that was measured, compared with its reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from graincode.core.errors import GraincodeError
from graincode.data.images import ImageDataset, ImageSource, Subset
from graincode.distributed import collectives
from graincode.evaluation.estimate import Estimate
from graincode.evaluation.metrics import class_consistency, frechet_distance
from graincode.evaluation.modes import Distances, Generation
from graincode.evaluation.statistics import Statistics, cached_statistics
from graincode.evaluation.streams import DatasetStream, ImageStream
from graincode.networks.features import FeatureNetwork


@dataclass(frozen=True)
class RealImages:
    """Statistics of real images, gathered once and kept under a hash of the images' content.

    Attributes:
        networks: by name.
        subset: images whose features are kept.
        cache_dir: None for the usual place.
        batch_size, workers: as of `DatasetStream`.
    """

    networks: Mapping[str, FeatureNetwork]
    subset: int
    cache_dir: str | None
    batch_size: int
    workers: int

    def statistics(self, dataset: ImageDataset) -> dict[str, Statistics]:
        """In the features of each network."""
        images = DatasetStream(dataset, self.batch_size, self.workers)
        mine = collectives.items(images.count, images.batch_size)
        return cached_statistics(
            self.networks, dataset.content_hash(), lambda: images, images.count, mine, self.subset, self.cache_dir,
            images.name,
        )  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """What is compared with.

    Attributes:
        name: in words.
        identity: hash of its content.
        images: None if there are only statistics.
        known: statistics by network, where they are given.
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


@dataclass
class Comparison:
    """Figures of a set of images against a reference, and what must be known of them.

    `check` finds out what can be had before anything is computed, `gather` measures the real images, `run` compares.

    Attributes:
        mode: which figures.
        real: networks, and where statistics of real images are kept.
        source: the data set, for its training images.
        seed: of random subsets.
        images: what is measured.
        reference: what it is compared with.
        figures: by name, as they are found.
        warnings: lines for the reader of the figures.
    """

    mode: Distances
    real: RealImages
    source: ImageSource
    seed: int
    images: ImageStream
    reference: Reference
    figures: dict[str, Estimate] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Find out what can be had.

        Raises:
            GraincodeError: a figure that was asked for cannot be had.
        """
        self._without: set[str] = set()
        self._floor: ImageDataset | None = None
        self._teacher: ImageDataset | None = None
        networks = self.real.networks.values()
        if not networks:
            return
        blind = [network.name for network in networks if not network.classes]
        if self.mode.wants("is") and blind:
            if self.mode.metrics is not None and len(blind) == len(networks):
                raise GraincodeError(
                    f"{', '.join(blind)} has no classifier, so it gives no Inception score: leave is out of "
                    "evaluation.metrics"
                )
            self.warnings.append(f"is left out: {', '.join(blind)} has no classifier")
        images = None if self.reference.images is None else len(self.reference.images)
        for name, reason in self.mode.check(self.images.count, images).items():
            self._leave_out(name, reason)
        if isinstance(self.mode, Generation):
            self._choose_floor(self.mode)
            if self.mode.wants("class_consistency"):
                self._choose_teacher()

    @property
    def inputs(self) -> dict[str, str]:
        """Hashes of the training images that figures depend on; after `check`."""
        chosen = {"floor": self._floor, "classifier": self._teacher}
        return {name: images.content_hash() for name, images in chosen.items() if images is not None}

    def gather(self) -> None:
        """Measure the real images, unless that has been done."""
        needed = self.real.networks and self.mode.in_reference
        self._known = (self.reference.known or self.real.statistics(self.reference.images)) if needed else {}
        self._floor_known = {} if self._floor is None else self.real.statistics(self._floor)
        self._teacher_known = {} if self._teacher is None else self.real.statistics(self._teacher)

    def run(self, made: Mapping[str, Statistics]) -> None:
        """Fill in figures and warnings, from statistics of the images by network."""
        sizes = [tuple(self.images.image_size)]
        if self.reference.images is not None:
            sizes.append(tuple(self.reference.images.image_size))
        if made and sizes[0] != sizes[-1]:
            self.warnings.append(f"images of {sizes[0]} pixels against {sizes[1]}: figures tell that apart, too")
        for key, network in self.real.networks.items():
            known = self._known.get(key)
            if self.mode.wants("fd"):
                self._warn_of_few(network, made[key], known)
            self.figures |= self.mode.figures(network, made[key], known, self.seed, self._without)
            if self._floor is not None:
                self.figures[network.label("fd_floor")] = frechet_distance(self._floor_known[key], known)
            if self._teacher is not None:
                self._judge_classes(key, network, made[key])

    def _leave_out(self, name: str, reason: str) -> None:
        self._without.add(name)
        self.warnings.append(f"{name} left out: {reason}")

    def _warn_of_few(self, network: FeatureNetwork, made: Statistics, known: Statistics) -> None:
        fewest = min(count for count in (made.count, known.count) if count is not None)
        if fewest <= network.dimension:
            self.warnings.append(
                f"{network.name} has {network.dimension} features, and there are only {fewest} images: the Fréchet "
                "distance is too large by an amount that depends on their number; compare it with figures of as many"
            )

    def _choose_floor(self, mode: Generation) -> None:
        """As many real training images: what a perfect generator would score."""
        if not mode.wants("fd") or mode.floor is False:
            return
        if mode.floor is None and self.reference.split is None:
            self.warnings.append("no floor: evaluation.floor=true measures as many training images of data=, too")
            return
        train = self.source.split("train")
        count = min(self.images.count, len(train))
        if count < 2:
            self.warnings.append("no floor: there is only one training image")
            return
        if count < self.images.count:
            self.warnings.append(f"the floor is too high: it is of {count} images, as there are no more to train on")
        if self.reference.split == "train":
            self.warnings.append("the floor is too low: its images are among those of the reference")
        self._floor = Subset(train, count)

    def _choose_teacher(self) -> None:
        """Training images for the classifier that says whether images show the class that they were asked for."""
        classes = len(self.source.class_names) if self.reference.labels is not None else 0
        reason = ""
        if self.images.labels is None:
            reason = "the images have no classes"
        elif self.reference.labels is None:
            reason = "the reference has no labels"
        elif int(self.images.labels.max()) >= classes:
            reason = f"the images are of more classes than the {classes} of the data set"
        elif self.reference.split == "train":
            reason = "the reference is what the classifier is trained on"
        if reason and self.mode.metrics is not None:
            raise GraincodeError(f"class_consistency: {reason}; leave it out of evaluation.metrics")
        if reason:
            self._leave_out("class_consistency", reason)
            return
        train = self.source.split("train")
        self._teacher = Subset(train, min(self.real.subset, len(train)))

    def _judge_classes(self, key: str, network: FeatureNetwork, made: Statistics) -> None:
        try:
            found = class_consistency(
                self._teacher_known[key], self._teacher.labels, self._known[key], self.reference.labels, made,
                self.images.labels,
            )  # fmt: skip
        except GraincodeError as error:
            if self.mode.metrics is not None:
                raise
            self._leave_out("class_consistency", str(error))
            return
        self.figures |= {network.label(name): figure for name, figure in found.items()}
