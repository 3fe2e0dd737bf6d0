"""A metric of two sets of images: how far apart their mean features are."""

from dataclasses import dataclass

from graincode.evaluation.estimate import Estimate
from graincode.evaluation.statistics import Statistics


@dataclass(frozen=True)
class MeanDistance:
    """Distance of the mean features, relative to the reference's spread; 0 for equal sets."""

    def __call__(self, subject: Statistics, reference: Statistics) -> Estimate:
        distance = (subject.mean - reference.mean).norm()
        return Estimate(float(distance / reference.covariance.trace().sqrt()))
