"""Variable-length image coding and generation: DQVAE++ tokenizers and DGiT generators."""

from graincode.core.codes import CodeLayout, CodeMask, CodePrefix, GrainCodes
from graincode.core.errors import GraincodeError
from graincode.export import load_generator, load_tokenizer

__all__ = ["CodeLayout", "CodeMask", "CodePrefix", "GrainCodes", "GraincodeError", "load_generator", "load_tokenizer"]
