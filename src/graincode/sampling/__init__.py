"""Samplers: free of any model class, they see a function that returns logits."""

from graincode.sampling.autoregressive import AutoregressiveSampler
from graincode.sampling.masked import MaskedSampler
from graincode.sampling.settings import AutoSampler, Sampler

__all__ = ["AutoSampler", "AutoregressiveSampler", "MaskedSampler", "Sampler"]
