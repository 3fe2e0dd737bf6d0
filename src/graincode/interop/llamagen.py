"""LlamaGen's tokenizers: VQGAN's trunk in lists, and a codebook of unit length."""

from __future__ import annotations

from graincode.interop import vqgan
from graincode.interop.containers import Weights
from graincode.interop.names import Options, Spelling, Translation

SPELLING = Spelling(
    levels=("conv_blocks.{}", "conv_blocks.{}"), from_coarse=True, block="res.{}", middle=("mid.0", "mid.1", "mid.2")
)


def translate(weights: Weights, options: Options) -> Translation:
    """The tokenizer of LlamaGen's tensors."""
    return vqgan.translate(weights, options, SPELLING, {"unit": True}, ("quantize.codebook_used",))
