"""Stage 2: generators of variable-length codes."""

from graincode.generator.dgit_ar import CachedLogits, DGiTAR, SequenceLikelihood
from graincode.generator.embedding import ClassConditioning, HeterogeneousEmbedding, NoConditioning
from graincode.generator.objective import AutoregressiveObjective
from graincode.generator.transformer import KeyValueCache, Transformer

__all__ = [
    "AutoregressiveObjective",
    "CachedLogits",
    "ClassConditioning",
    "DGiTAR",
    "HeterogeneousEmbedding",
    "KeyValueCache",
    "NoConditioning",
    "SequenceLikelihood",
    "Transformer",
]
