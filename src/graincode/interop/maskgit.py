"""MaskGIT's VQGAN as 1d-tokenizer has it in PyTorch."""

from __future__ import annotations

from dataclasses import replace

from graincode.interop.containers import Weights
from graincode.interop.names import FIXED, Options, Spelling, Translation, match, moving_averages, tokenizer_node

SPELLING = Spelling(resample=("", "upsample_conv"))


def translate(weights: Weights, options: Options) -> Translation:
    """The tokenizer of MaskGIT's tensors."""
    found = weights.tensors
    image_size, codebook = options.image_size or 256, "quantize.embedding.weight"
    size = SPELLING.size(found, image_size)
    spelling = replace(SPELLING, middle=tuple(f"mid.{i}" for i in range(size["blocks"])))
    how, code_dim = {"_target_": "graincode.tokenizer.EMAQuantizer"}, len(found["encoder.conv_out.weight"])
    node = tokenizer_node(size, image_size, found[codebook].shape, code_dim, how, network="MaskGIT")
    return match(node, found, spelling.names, FIXED | moving_averages(codebook))
