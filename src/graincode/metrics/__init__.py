"""Figures of merit. Images come in as batches of uint8, and nothing here knows where they come from."""

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
    default_cache_dir,
)
from graincode.metrics.protocols import Generation, Reconstruction
from graincode.metrics.reconstruction import CodebookUsage, CodebookUse, PairErrors, ReconstructionError

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
    "default_cache_dir",
    "frechet_distance",
    "inception_score",
]
