"""Stage 1: images to variable-length codes and back."""

from graincode.tokenizer.adversary import Adversary, PatchDiscriminator
from graincode.tokenizer.decoder import GrainDecoder
from graincode.tokenizer.dqvae import DQVAE, Reconstruction, check_layouts
from graincode.tokenizer.encoder import GrainEncoder
from graincode.tokenizer.objective import ReconstructionObjective
from graincode.tokenizer.perceptual import Lite0Loss, LPIPSLoss, PerceptualLoss, TimmLoss
from graincode.tokenizer.quantizer import EMAQuantizer, Quantized
from graincode.tokenizer.router import EntropyDensity, QuantileRouter, RandomDensity, Routing

__all__ = [
    "DQVAE",
    "Adversary",
    "EMAQuantizer",
    "EntropyDensity",
    "GrainDecoder",
    "GrainEncoder",
    "LPIPSLoss",
    "Lite0Loss",
    "PatchDiscriminator",
    "PerceptualLoss",
    "QuantileRouter",
    "Quantized",
    "RandomDensity",
    "Reconstruction",
    "ReconstructionObjective",
    "Routing",
    "TimmLoss",
    "check_layouts",
]
