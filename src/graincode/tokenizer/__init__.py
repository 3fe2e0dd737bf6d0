"""Stage 1: images to variable-length codes and back."""

from graincode.tokenizer.adversary import Adversary, PatchDiscriminator
from graincode.tokenizer.decoder import GrainDecoder
from graincode.tokenizer.dqvae import DQVAE, Reconstruction, check_layouts
from graincode.tokenizer.encoder import GrainEncoder
from graincode.tokenizer.library import CosineQuantizer, FSQuantizer, LFQuantizer, SimVQuantizer
from graincode.tokenizer.objective import ReconstructionObjective
from graincode.tokenizer.quantizer import EMAQuantizer, Quantized, Quantizer
from graincode.tokenizer.router import EntropyDensity, QuantileRouter, RandomDensity, Routing

__all__ = [
    "DQVAE",
    "Adversary",
    "CosineQuantizer",
    "EMAQuantizer",
    "EntropyDensity",
    "FSQuantizer",
    "GrainDecoder",
    "GrainEncoder",
    "LFQuantizer",
    "PatchDiscriminator",
    "QuantileRouter",
    "Quantized",
    "Quantizer",
    "RandomDensity",
    "Reconstruction",
    "ReconstructionObjective",
    "Routing",
    "SimVQuantizer",
    "check_layouts",
]
