"""The metrics of ADM's evaluation, which tables of ImageNet give, from its one reference file, `evaluation=adm`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from graincode.core.errors import GraincodeError
from graincode.evaluation.comparisons import DISTANCES, Comparison, Distance
from graincode.evaluation.estimate import Estimate
from graincode.evaluation.modes import ByNetwork, Fits, Plan
from graincode.evaluation.statistics import Statistics
from graincode.evaluation.subjects import Context, ReferenceChoice, Subject

IMAGES = 10_000
"""Images in a reference file of the field, against which precision and recall of 50,000 samples are computed."""

_PART = 5_000  # images in each part of the Inception score


@dataclass(frozen=True)
class ADM(Comparison):
    """FID and sFID from a file's statistics, precision and recall from its images, and the Inception score.

    Parts of the Inception score have 5,000 images. Unlike ADM's they are drawn at random, which differs only where
    samples come sorted by class; and distances are in float32, where ADM's are in float16.
    Source: "Diffusion Models Beat GANs on Image Synthesis" (Dhariwal and Nichol, 2021).
    """

    metrics: Sequence[Distance] | None = None
    subset: int = 50_000

    name: ClassVar[str] = "adm"
    fits: ClassVar[Fits] = dict.fromkeys(("samples", "folder", "split"), ("adm",))
    why: ClassVar[str] = "as tables of ImageNet are of samples, against a file of images and statistics"
    usual: ClassVar[tuple[str, ...]] = ("fd", "sfd", "is", "precision_recall")
    known: ClassVar[tuple[str, ...]] = DISTANCES

    def check(self, subject: Subject, reference: ReferenceChoice) -> None:
        super().check(subject, reference)
        if [network.published for network in self.features.values()] != [True]:
            names = ",".join(network.name for network in self.features.values())
            raise GraincodeError(
                f"features=[{names}]: expected inception alone, resizing as published, as the statistics are"
            )

    def plan(self, subject: Subject, reference: ReferenceChoice, context: Context) -> Plan:
        plan = super().plan(subject, reference, context)
        if not self._needs_images(plan):
            plan.subset = 0  # the memory of 50,000 features
        if plan.spatial:
            plan.spatial = ("subject",)
        for found, usual, what in (
            (plan.images.count, plan.reference.usual, "images"),
            (plan.reference.count, IMAGES, "images in the reference"),
        ):
            if found != usual:
                advice = "metrics of another number do not compare"
                plan.warnings.append(f"{found:,} {what}, where tables have {usual:,}: {advice}")
        return plan

    def estimates(self, plan: Plan, subject: ByNetwork, real: Mapping[str, ByNetwork]) -> dict[str, Estimate]:
        images, known = real.get("reference", {}), plan.reference.known
        both = {key: _with_features(known[key], images.get(key)) for key in known}
        return super().estimates(plan, subject, {"reference": both})

    def _parts(self, count: int) -> int:
        return -(-count // _PART)

    def _needs_images(self, plan: Plan) -> bool:
        return bool(self.extra or set(plan.metrics) - {"fd", "sfd", "is"})


def _with_features(statistics: Statistics, images: Statistics | None) -> Statistics:
    """Statistics with the single features of some of the images that they are of."""
    return statistics if images is None else replace(statistics, subset=images.subset, indices=images.indices)
