"""Samplers: free of any model class, they see a function that returns logits."""

from graincode.sampling.autoregressive import AutoregressiveSampler
from graincode.sampling.guidance import GuidedLogits
from graincode.sampling.protocol import AutoregressiveLogits

__all__ = ["AutoregressiveLogits", "AutoregressiveSampler", "GuidedLogits"]
