"""Stage 2: generators of variable-length codes."""

from graincode.generator.base import Generator
from graincode.generator.dgit_ar import DGiTAR
from graincode.generator.dgit_nar import DGiTNAR
from graincode.generator.embedding import ClassConditioning, HeterogeneousEmbedding, NoConditioning
from graincode.generator.masking import InformationMasking
from graincode.generator.objective import AutoregressiveObjective, GeneratorObjective, MaskedObjective
from graincode.generator.transformer import Transformer

__all__ = [
    "AutoregressiveObjective",
    "ClassConditioning",
    "DGiTAR",
    "DGiTNAR",
    "Generator",
    "GeneratorObjective",
    "HeterogeneousEmbedding",
    "InformationMasking",
    "MaskedObjective",
    "NoConditioning",
    "Transformer",
]
