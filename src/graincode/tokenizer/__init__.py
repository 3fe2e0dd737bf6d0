"""Stage 1: images to variable-length codes and back."""

from graincode.tokenizer.adversary import Adversary, PatchDiscriminator
from graincode.tokenizer.codebooks import CosineQuantizer, FSQuantizer, LFQuantizer, SimVQuantizer
from graincode.tokenizer.decoder import GrainDecoder
from graincode.tokenizer.densities import (
    CodingDensity,
    EntropyDensity,
    FixedDensity,
    GradientDensity,
    Probe,
    RandomDensity,
    VarianceDensity,
)
from graincode.tokenizer.dqvae import DQVAE, Reconstruction
from graincode.tokenizer.encoder import GrainEncoder, TrunkSize
from graincode.tokenizer.fixed import MAGVIT2Decoder, MAGVIT2Encoder, MaskGITDecoder, MaskGITEncoder
from graincode.tokenizer.objective import ReconstructionObjective
from graincode.tokenizer.quantizer import EMAQuantizer, Quantized, Quantizer
from graincode.tokenizer.router import FeatureRouter, QuantileRouter, Router, Routing

__all__ = [
    "DQVAE",
    "Adversary",
    "CodingDensity",
    "CosineQuantizer",
    "EMAQuantizer",
    "EntropyDensity",
    "FSQuantizer",
    "FeatureRouter",
    "FixedDensity",
    "GradientDensity",
    "GrainDecoder",
    "GrainEncoder",
    "LFQuantizer",
    "MAGVIT2Decoder",
    "MAGVIT2Encoder",
    "MaskGITDecoder",
    "MaskGITEncoder",
    "PatchDiscriminator",
    "Probe",
    "QuantileRouter",
    "Quantized",
    "Quantizer",
    "RandomDensity",
    "Reconstruction",
    "ReconstructionObjective",
    "Router",
    "Routing",
    "SimVQuantizer",
    "TrunkSize",
    "VarianceDensity",
]
