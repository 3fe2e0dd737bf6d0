"""Open-MAGVIT2's tokenizer."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from graincode.core.errors import check
from graincode.interop.containers import Weights
from graincode.interop.names import FIXED, Names, Options, Special, Spelling, Translation, match, tokenizer_node

SPELLING = Spelling(resample=("downsample", "upsample.conv1"))


def translate(weights: Weights, options: Options) -> Translation:
    """The tokenizer of Open-MAGVIT2's tensors. Its bit d weighs 2^d, that of our quantiser 2^(D - 1 - d): channels of
    codes are reversed, so that indices are the published ones."""
    found = weights.tensors
    image_size, bits = options.image_size or 256, len(found["encoder.conv_out.weight"])
    check("codes", f"2^{bits}", "2^24 or fewer, as all stand in memory", bits <= 24)
    size = SPELLING.size(found, image_size)
    levels = len(size["multipliers"])
    spelling = replace(SPELLING, middle=tuple(f"mid_block.{i}" for i in range(size["blocks"])))
    # without entropies, which would compare all entries with each vector
    how = {"_target_": "graincode.tokenizer.LFQuantizer", "entropy_weight": 0.0}
    node = tokenizer_node(size, image_size, (2**bits, bits), bits, how, network="MAGVIT2")

    def names(module: nn.Module) -> Names:
        adaptive = {
            f"decoder.adapt.{level}.{part}": (f"decoder.adaptive.{levels - 1 - level}.{part}",)
            for level in range(levels)
            for part in ("gamma", "beta")
        }
        return spelling.names(module) | adaptive

    head = f"encoder.heads.0.{size['blocks'] + 2}"
    special: Special = FIXED | {
        "quantizers.0.average": lambda get: torch.full((2**bits,), 0.5**bits),
        "quantizers.0.library.mask": lambda get: 2 ** torch.arange(bits - 1, -1, -1),
        f"{head}.weight": lambda get: get("encoder.conv_out.weight").flip(0),
        f"{head}.bias": lambda get: get("encoder.conv_out.bias").flip(0),
        "decoder.stem.0.weight": lambda get: get("decoder.conv_in.weight").flip(1),
    }
    for level in range(levels):
        for part in ("gamma", "beta"):
            theirs = f"decoder.adaptive.{levels - 1 - level}.{part}.weight"
            special[f"decoder.adapt.{level}.{part}.weight"] = lambda get, name=theirs: get(name).flip(1)
    return match(node, found, names, special, ("loss.",))
