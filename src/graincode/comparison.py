"""A set of images that was measured, compared with its reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from graincode import processes
from graincode.core.errors import GraincodeError
from graincode.data.images import ImageDataset, ImageSource, Subset
from graincode.evaluation import Distances, Generation
from graincode.metrics import (
    FeatureNetwork,
    Figure,
    Statistics,
    cached_statistics,
    class_consistency,
    frechet_distance,
)
from graincode.passes import DatasetPass, Pass


@dataclass(frozen=True)
class RealImages:
    """Statistics of real images, gathered once and kept under a hash of the images' content.

    Attributes:
        networks: by name.
        subset: images whose features are kept.
        cache_dir: None for the usual place.
        batch_size, workers: as of `DatasetPass`.
    """

    networks: Mapping[str, FeatureNetwork]
    subset: int
    cache_dir: str | None
    batch_size: int
    workers: int

    def statistics(self, dataset: ImageDataset) -> dict[str, Statistics]:
        """In the features of each network."""
        images = DatasetPass(dataset, self.batch_size, self.workers)
        mine = processes.items(images.count, images.batch_size)
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

    Attributes:
        mode: which figures.
        real: networks, and where statistics of real images are kept.
        source: the data set, for its training images.
        seed: of random subsets.
        figures: by name, as they are found.
        warnings: lines for the reader of the figures.
    """

    mode: Distances
    real: RealImages
    source: ImageSource
    seed: int
    figures: dict[str, Figure] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    _one_by_one: bool = True
    _by_class: bool = False

    def check(self, images: Pass, reference: Reference) -> None:
        """Find out before the work what can be had.

        Raises:
            GraincodeError: a figure that was asked for cannot be had.
        """
        if not self.real.networks:
            return
        if left_out := self.mode.check(images.count, len(reference.images) if reference.images is not None else 0):
            self.warnings.append(left_out)
            self._one_by_one = False
        if not self.mode.wants("class_consistency"):
            return
        classes = len(self.source.class_names) if reference.labels is not None else 0
        reason = ""
        if images.labels is None:
            reason = "the images have no classes"
        elif reference.labels is None:
            reason = "the reference has no labels"
        elif int(images.labels.max()) >= classes:
            reason = f"the images are of more classes than the {classes} of the data set"
        if reason and self.mode.metrics is not None:
            raise GraincodeError(f"class_consistency: {reason}; leave it out of evaluation.metrics")
        if reason:
            self.warnings.append(f"class_consistency left out: {reason}")
        self._by_class = not reason

    def run(self, images: Pass, made: Mapping[str, Statistics], reference: Reference) -> None:
        """Fill in figures and warnings; `check` comes first.

        Args:
            images: what was measured.
            made: its statistics by network.
            reference: what it is compared with.
        """
        networks = self.real.networks
        if not networks:
            return
        if reference.images is not None and tuple(reference.images.image_size) != tuple(images.image_size):
            self.warnings.append(
                f"images of {tuple(images.image_size)} pixels against {tuple(reference.images.image_size)}: figures "
                "tell that apart, too"
            )
        known = reference.known or self.real.statistics(reference.images)
        for key, network in networks.items():
            self._warn_of_few(network, made[key], known[key])
            self.figures |= self.mode.figures(network, made[key], known[key], self.seed, self._one_by_one)
        if isinstance(self.mode, Generation):
            self._floor(self.mode, images, known, reference)
            if self._by_class:
                self._classes(images, made, known, reference)

    def _warn_of_few(self, network: FeatureNetwork, made: Statistics, known: Statistics) -> None:
        fewest = min(count for count in (made.count, known.count) if count is not None)
        if self.mode.wants("fd") and fewest <= network.dimension:
            self.warnings.append(
                f"{network.name} has {network.dimension} features, and there are only {fewest} images: the Fréchet "
                "distance is too large by an amount that depends on their number; compare it with figures of as many"
            )
        if self.mode.wants("is") and not network.classes:
            self.warnings.append(f"is left out: {network.name} has no classifier")

    def _floor(self, mode: Generation, images: Pass, known: Mapping[str, Statistics], reference: Reference) -> None:
        """The distance of as many real training images: what a perfect generator would score."""
        has_floor = mode.floor if mode.floor is not None else reference.split is not None
        if not mode.wants("fd") or mode.floor is False:
            return
        if not has_floor:
            self.warnings.append("no floor: evaluation.floor=true measures as many training images of data=, too")
            return
        train = self.source.split("train")
        if reference.split == "train":
            self.warnings.append("the floor is too low: its images are among those of the reference")
        floor = self.real.statistics(Subset(train, min(images.count, len(train))))
        for key, network in self.real.networks.items():
            self.figures[network.label("fd_floor")] = frechet_distance(floor[key], known[key])

    def _classes(
        self, images: Pass, made: Mapping[str, Statistics], known: Mapping[str, Statistics], reference: Reference
    ) -> None:
        """Whether generated images show the class that they were asked for."""
        split = self.source.split("train")
        train = Subset(split, min(self.real.subset, len(split)))
        teacher = self.real.statistics(train)
        for key, network in self.real.networks.items():
            found = class_consistency(
                teacher[key], train.labels, known[key], reference.labels, made[key], images.labels
            )
            self.figures |= {network.label(name): figure for name, figure in found.items()}
