"""Figures of merit. Images come in as batches of uint8, and nothing here knows where they come from.

Names are imported when they are asked for: training needs none of the networks and libraries behind distances, and
every one of its processes would spend seconds on them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from graincode.metrics.reconstruction import CodebookUsage, CodebookUse, PairErrors, ReconstructionError

if TYPE_CHECKING:
    from graincode.metrics.distances import (
        ClassConsistency,
        InceptionScore,
        class_consistency,
        frechet_distance,
        inception_score,
    )
    from graincode.metrics.features import (
        FeatureNetwork,
        Features,
        InceptionFeatures,
        Lite0Features,
        cached_features,
    )
    from graincode.metrics.protocols import Generation, Reconstruction

__all__ = [
    "ClassConsistency",
    "CodebookUsage",
    "CodebookUse",
    "FeatureNetwork",
    "Features",
    "Generation",
    "InceptionFeatures",
    "InceptionScore",
    "Lite0Features",
    "PairErrors",
    "Reconstruction",
    "ReconstructionError",
    "cached_features",
    "class_consistency",
    "frechet_distance",
    "inception_score",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in ("distances", "features", "protocols"):
            found = vars(import_module(f"graincode.metrics.{module}"))
            if name in found:
                return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
