"""Figures of merit. Images come in as batches of uint8, and nothing here knows where they come from.

Names are imported when they are asked for: training needs none of the networks and libraries behind distances, and
every one of its processes would spend seconds on them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from graincode.metrics.figure import Figure
from graincode.metrics.reconstruction import CodebookUsage, CodebookUse, PairErrors, PairMean, structural_similarity

if TYPE_CHECKING:
    from graincode.metrics.distances import (
        class_consistency,
        density_coverage,
        frechet_distance,
        inception_score,
        kernel_distance,
        precision_recall,
    )
    from graincode.metrics.features import FeatureNetwork, InceptionFeatures, Lite0Features, TimmFeatures
    from graincode.metrics.perceptual import Lite0Distance, LPIPSDistance, PerceptualDistance
    from graincode.metrics.statistics import SUBSET, Statistics, cached_statistics, measure, read_npz, write_npz

__all__ = [
    "SUBSET",
    "CodebookUsage",
    "CodebookUse",
    "FeatureNetwork",
    "Figure",
    "InceptionFeatures",
    "LPIPSDistance",
    "Lite0Distance",
    "Lite0Features",
    "PairErrors",
    "PairMean",
    "PerceptualDistance",
    "Statistics",
    "TimmFeatures",
    "cached_statistics",
    "class_consistency",
    "density_coverage",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "measure",
    "precision_recall",
    "read_npz",
    "structural_similarity",
    "write_npz",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in ("features", "statistics", "distances", "perceptual"):
            found = vars(import_module(f"graincode.metrics.{module}"))
            if name in found:
                return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
