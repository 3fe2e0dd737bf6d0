"""Samplers: free of any model class, they see a function that returns logits."""

from graincode.sampling.autoregressive import AutoregressiveLogits, AutoregressiveSampler

__all__ = ["AutoregressiveLogits", "AutoregressiveSampler"]
