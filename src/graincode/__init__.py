"""Variable-length image coding and generation: DQVAE++ tokenizers and DGiT generators."""

from graincode.core.codes import GrainCodes
from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout
from graincode.core.prompts import CodeMask, CodePrefix
from graincode.export import load_generator, load_tokenizer

__all__ = ["CodeLayout", "CodeMask", "CodePrefix", "GrainCodes", "GraincodeError", "load_generator", "load_tokenizer"]
