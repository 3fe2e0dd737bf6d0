"""Stage 1: images to variable-length codes and back."""

from graincode.tokenizer.adversary import Adversary, PatchDiscriminator
from graincode.tokenizer.decoder import GrainDecoder
from graincode.tokenizer.dqvae import DQVAE, Reconstruction, check_layouts
from graincode.tokenizer.encoder import GrainEncoder
from graincode.tokenizer.library import CosineQuantizer, FSQuantizer, LFQuantizer, SimVQuantizer
from graincode.tokenizer.objective import ReconstructionObjective
from graincode.tokenizer.perceptual import Lite0Loss, LPIPSLoss, PerceptualLoss, TimmLoss
from graincode.tokenizer.quantizer import EMAQuantizer, Quantized, Quantizer
from graincode.tokenizer.router import (
    CodingDensity,
    EntropyDensity,
    FeatureRouter,
    FixedDensity,
    GradientDensity,
    Probe,
    QuantileRouter,
    RandomDensity,
    Router,
    Routing,
    VarianceDensity,
)

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
    "LPIPSLoss",
    "Lite0Loss",
    "PatchDiscriminator",
    "PerceptualLoss",
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
    "TimmLoss",
    "VarianceDensity",
    "check_layouts",
]
