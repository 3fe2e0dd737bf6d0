"""What can be measured, against what, and which figures: the parts that `conf/evaluate.yaml` composes."""

from __future__ import annotations

import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from graincode.core.errors import GraincodeError, check
from graincode.evaluation.estimate import Estimate
from graincode.evaluation.metrics import (
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from graincode.evaluation.pairs import PairMean, structural_similarity
from graincode.evaluation.statistics import SUBSET, Statistics
from graincode.evaluation.subjects import Folder, Originals, Reconstructions, Samples, Split, StatisticsFile
from graincode.networks.features import FeatureNetwork
from graincode.networks.perceptual import Lite0Distance, LPIPSDistance

Distance = Literal["fd", "is", "kid", "precision_recall", "density_coverage"]

DISTANCES: tuple[str, ...] = typing.get_args(Distance)
ONE_BY_ONE = ("kid", "precision_recall", "density_coverage")
"""Figures that need single images' features, and not only statistics."""


@dataclass(frozen=True)
class Distances:
    """Figures that compare two sets of images in the features of networks; the base of both modes.

    Attributes:
        features: the networks, by name; every figure is computed in each of them.
        metrics: which figures; None for the usual ones, as far as they can be had.
        inception_splits: parts of the Inception score; None for 10, or fewer if there are fewer images.
        kid_subsets, kid_subset_size: random draws of the kernel distance, and images in each; None for 1000, or as
            many as there are.
        precision_neighbours, density_neighbours: how far an image reaches, for precision and recall and for density
            and coverage.
        subset: images whose features are kept for all of these but fd and is: the first of a fixed permutation, in
            both sets; all where there are no more.
    """

    features: Mapping[str, FeatureNetwork]
    metrics: Sequence[Distance] | None = None
    inception_splits: int | None = None
    kid_subsets: int = 100
    kid_subset_size: int | None = None
    precision_neighbours: int = 3
    density_neighbours: int = 5
    subset: int = SUBSET

    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name in ("inception_splits", "kid_subsets", "kid_subset_size", "precision_neighbours",
                     "density_neighbours", "subset"):  # fmt: skip
            value = getattr(self, name)
            check(name, value, "1 or more", value is None or value >= 1)

    def wants(self, metric: str) -> bool:
        """Whether a figure is asked for."""
        return metric in self.metrics if self.metrics is not None else metric in self.usual

    @property
    def usual(self) -> tuple[str, ...]:
        """The figures that `metrics=None` stands for."""
        return DISTANCES

    @property
    def in_features(self) -> bool:
        """Whether any figure needs a network."""
        return any(self.wants(metric) for metric in (*DISTANCES, "class_consistency"))

    def splits(self, count: int) -> int:
        """Parts of the Inception score of so many images."""
        return (self.inception_splits or min(10, count)) if self.wants("is") else 0

    @property
    def in_reference(self) -> bool:
        """Whether any figure needs the reference in the features of a network; only the Inception score does not."""
        return any(self.wants(metric) for metric in (*DISTANCES, "class_consistency") if metric != "is")

    def kid_size(self, fewest: int) -> int:
        """Images in each draw of the kernel distance, of so many."""
        return self.kid_subset_size or min(1000, fewest)

    def check(self, count: int, reference: int | None) -> dict[str, str]:
        """Which usual figures cannot be had, and why.

        Args:
            count: of the images that are measured.
            reference: images of the reference; None if there are only statistics.
        Raises:
            GraincodeError: a figure that was asked for cannot be had.
        """
        if self.wants("fd") and (count < 2 or reference == 1):
            raise GraincodeError("Fréchet distance of 1 image: expected at least 2; give more images")
        fewest = min(count, self.subset, count if reference is None else reference)
        least = {
            "kid": self.kid_size(2),
            "precision_recall": self.precision_neighbours + 1,
            "density_coverage": self.density_neighbours + 1,
        }
        reasons = {}
        for name in ONE_BY_ONE:
            if not self.wants(name):
                continue
            if reference is None:
                reasons[name] = "the reference is a file of means and covariances alone; type reference=folder"
            elif fewest < least[name]:
                reasons[name] = f"it needs {least[name]} images, and there are {fewest}; give more"
        if reasons and (self.metrics is not None or (self.kid_subset_size and "kid" in reasons)):
            name, reason = next(iter(reasons.items()))
            raise GraincodeError(f"{name}: {reason}, or leave it out of evaluation.metrics")
        return reasons

    def figures(
        self, network: FeatureNetwork, made: Statistics, real: Statistics | None, seed: int, without: Collection[str]
    ) -> dict[str, Estimate]:
        """The figures of one network, by the names that they go by in it.

        Args:
            network: that the statistics are of.
            made, real: what is measured, and against what; None where `in_reference` is false.
            seed: of random subsets.
            without: figures that cannot be had.
        """
        found: dict[str, Estimate] = {}
        wanted = {name for name in DISTANCES if self.wants(name)} - set(without)
        if "fd" in wanted:
            found["fd"] = frechet_distance(made, real)
        if "is" in wanted and len(made.split_sizes):
            found["is"] = inception_score(made)
        if "kid" in wanted:
            size = self.kid_size(min(len(made.subset), len(real.subset)))
            found["kid"] = kernel_distance(made, real, self.kid_subsets, size, seed)
        if "precision_recall" in wanted:
            found |= precision_recall(made, real, self.precision_neighbours)
        if "density_coverage" in wanted:
            found |= density_coverage(made, real, self.density_neighbours)
        return {network.label(self.prefix + name if name in ("fd", "kid") else name): f for name, f in found.items()}


@dataclass(frozen=True)
class Generation(Distances):
    """Samples, or anyone's images, against the reference of the generation task, `evaluation=generation`.

    Attributes:
        floor: whether as many real training images are measured too, which a perfect generator would equal; None where
            the reference is a split of the data set.
    """

    metrics: Sequence[Distance | Literal["class_consistency"]] | None = None
    floor: bool | None = None

    mode: ClassVar[str] = "generation"

    @property
    def usual(self) -> tuple[str, ...]:
        return (*DISTANCES, "class_consistency")


@dataclass(frozen=True)
class Reconstruction(Distances):
    """Reconstructions against the images that they were made from, `evaluation=reconstruction`.

    Squared errors and PSNR cost nothing and are always given; so are codes per image and use of the codebook where the
    images are a tokenizer's.

    Attributes:
        lpips_weights: file `vgg16-397923af.pth` of torchvision; None downloads it where lpips is asked for.
    """

    metrics: Sequence[Distance | Literal["ssim", "lpips", "lite0"]] | None = None
    lpips_weights: str | None = None

    mode: ClassVar[str] = "reconstruction"
    prefix: ClassVar[str] = "r"

    @property
    def usual(self) -> tuple[str, ...]:
        return ("fd", "is", "ssim")

    def likeness(self, device: torch.device | str) -> dict[str, PairMean]:
        """What is averaged over pairs of images, besides their errors."""
        found = {}
        if self.wants("ssim"):
            found["ssim"] = PairMean(structural_similarity)
        if self.wants("lpips"):
            found["lpips"] = PairMean(LPIPSDistance(weights=self.lpips_weights).to(device))
        if self.wants("lite0"):
            found["lite0_distance"] = PairMean(Lite0Distance().to(device))
        return found


@dataclass(frozen=True)
class Summary:
    """No comparison: means and covariances of images, for others to compare with, `evaluation=statistics`.

    Attributes:
        features: the networks, by name.
    """

    features: Mapping[str, FeatureNetwork]
    mode: ClassVar[str] = "statistics"


@dataclass(frozen=True)
class Likelihood:
    """No comparison either: what a generator makes of the codes of a split, in bits per image, `evaluation=likelihood`.

    Attributes:
        features: unused.
    """

    features: Mapping[str, FeatureNetwork]
    mode: ClassVar[str] = "likelihood"


Mode = Generation | Reconstruction | Summary | Likelihood
What = Samples | Reconstructions | Split | Folder
Against = Split | Folder | StatisticsFile | Originals


def check_modes(mode: Mode, what: What, against: Against) -> None:
    """Refuse to compare what says nothing when compared.

    Raises:
        GraincodeError: saying why.
    """
    if isinstance(mode, Distances) and mode.metrics is not None and not len(mode.metrics):
        raise GraincodeError("evaluation.metrics=[]: type evaluation.metrics=null for the usual ones, or name some")
    if isinstance(mode, Generation) and mode.floor and not mode.wants("fd"):
        raise GraincodeError("evaluation.floor=true without fd: type evaluation.floor=null, or add fd to the metrics")
    if isinstance(mode, Summary | Likelihood) and not isinstance(against, Split):
        raise GraincodeError(
            f"evaluation={mode.mode} compares with nothing, but reference={_name(against)}: leave reference out"
        )
    if isinstance(mode, Likelihood) and not isinstance(what, Split):
        raise GraincodeError(
            f"evaluation=likelihood, but images={_name(what)}: type images=split, whose codes a generator can judge"
        )
    if isinstance(mode, Reconstruction):
        if isinstance(what, Samples | Split):
            raise GraincodeError(
                f"evaluation=reconstruction, but images={_name(what)} were not made from originals: "
                "type images=reconstructions, or evaluation=generation"
            )
        fitting = Originals if isinstance(what, Reconstructions) else Folder
        if not isinstance(against, fitting):
            raise GraincodeError(
                f"rFID against reference={_name(against)}: reconstructions are measured against the very images that "
                "they were made from, and figures against any others, such as the reference of a generation task, do "
                f"not compare with published ones: type reference={_name(fitting)}, or evaluation=generation for "
                "samples"
            )
    if isinstance(mode, Generation):
        if isinstance(what, Reconstructions):
            raise GraincodeError(
                "gFID of images=reconstructions: they were made from real images, so a distance to the reference of "
                "the generation task says nothing of a generator: type evaluation=reconstruction"
            )
        if isinstance(against, Originals):
            raise GraincodeError(
                f"reference=originals, but images={_name(what)} were made from none: type reference=split"
            )
    if isinstance(against, StatisticsFile) and len(mode.features) != 1:
        raise GraincodeError(
            f"reference=statistics is a file of one network, but features={sorted(mode.features)}: choose one"
        )


def _name(part: object) -> str:
    kind = part if isinstance(part, type) else type(part)
    return {StatisticsFile: "statistics"}.get(kind, kind.__name__.lower())
