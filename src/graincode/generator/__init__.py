"""Stage 2: generators of variable-length codes."""

from graincode.generator.base import Generator
from graincode.generator.cache import KeyValueCache
from graincode.generator.compiled import StaticCache
from graincode.generator.dgit_ar import CachedLogits, DGiTAR, SequenceLikelihood
from graincode.generator.dgit_nar import ConditionedLogits, DGiTNAR, MaskedPredictions
from graincode.generator.embedding import ClassConditioning, ContentHead, HeterogeneousEmbedding, NoConditioning
from graincode.generator.masking import InformationMasking
from graincode.generator.objective import AutoregressiveObjective, GeneratorObjective, MaskedObjective
from graincode.generator.transformer import Transformer

__all__ = [
    "AutoregressiveObjective",
    "CachedLogits",
    "ClassConditioning",
    "ConditionedLogits",
    "ContentHead",
    "DGiTAR",
    "DGiTNAR",
    "Generator",
    "GeneratorObjective",
    "HeterogeneousEmbedding",
    "InformationMasking",
    "KeyValueCache",
    "MaskedObjective",
    "MaskedPredictions",
    "NoConditioning",
    "SequenceLikelihood",
    "StaticCache",
    "Transformer",
]
