"""VQGAN of taming-transformers, and what has its trunk."""

from __future__ import annotations

from typing import Any

from torch import nn

from graincode.interop.containers import Weights
from graincode.interop.names import FIXED, Names, Options, Spelling, Translation, match, moving_averages, tokenizer_node

TAMING = Spelling()
TRUNK = {"padding": "end", "upsampling": "own", "middle_blocks": 2}  # of all families that have VQGAN's


def translate(
    weights: Weights, options: Options, spelling: Spelling = TAMING, quantizer: dict[str, Any] | None = None,
    drop: tuple[str, ...] = ("loss.",), **trunk: Any,
) -> Translation:  # fmt: skip
    """The tokenizer of VQGAN's tensors, or of those of a family that spells them otherwise.

    Args:
        quantizer: its arguments; None: entries as they are, the nearest one chosen.
        trunk: more arguments of the `TrunkSize`.
    """
    found = weights.tensors
    image_size, codebook = options.image_size or 256, "quantize.embedding.weight"
    size = spelling.size(found, image_size) | TRUNK | trunk
    (entries, dim), code_dim = found[codebook].shape, len(found["encoder.conv_out.weight"])
    how = {"_target_": "graincode.tokenizer.EMAQuantizer", **(quantizer or {})}
    node = tokenizer_node(size, image_size, (entries, dim), code_dim, how, projected_dim=dim)
    node["decoder"]["position"] = "none"

    def names(module: nn.Module) -> Names:
        return spelling.names(module) | {"project_in": ("quant_conv",), "project_out": ("post_quant_conv",)}

    return match(node, found, names, FIXED | moving_averages(codebook), drop)
