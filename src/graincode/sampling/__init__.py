"""Samplers: free of any model class, they see a function that returns logits."""

from graincode.sampling.autoregressive import AutoregressiveSampler
from graincode.sampling.guidance import GuidedLogits, GuidedMaskedLogits
from graincode.sampling.masked import MaskedSampler
from graincode.sampling.protocol import AutoregressiveLogits, MaskedLogits, RowLogits
from graincode.sampling.settings import AutoSampler, Sampler

__all__ = [
    "AutoSampler",
    "AutoregressiveLogits",
    "AutoregressiveSampler",
    "GuidedLogits",
    "GuidedMaskedLogits",
    "MaskedLogits",
    "MaskedSampler",
    "RowLogits",
    "Sampler",
]
