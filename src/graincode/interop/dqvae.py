"""The checkpoints of DQ-VAE's authors (github.com/CrossmodalGroup/DynamicVectorQuantization, MIT)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from graincode.core.density import percentile_table
from graincode.core.errors import check
from graincode.interop.containers import Weights
from graincode.interop.names import Names, Options, Special, Spelling, Translation, match, tokenizer_node
from graincode.interop.vqgan import TRUNK
from graincode.tokenizer import EntropyDensity
from graincode.tokenizer.router import read_percentiles

# percentiles of the entropy of ImageNet's regions of 16 x 16 pixels, in the definition before July 2023
THRESHOLDS = {
    10: 2.947292990206026e-37, 20: 3.2971225034060525e-14, 25: 0.010697992518544197, 30: 0.5240799784660339,
    40: 1.1998910903930664, 50: 1.6777750253677368, 60: 2.0330491065979004, 70: 2.3272018432617188,
    75: 2.4625627994537354, 80: 2.5950534343719482, 90: 2.871901512145996,
}  # fmt: skip
_HEADS = {2: ("_coarse", "_fine"), 3: ("_coarse", "_median", "_fine")}
_RATIOS = {2: [0.5, 0.5], 3: [0.4, 0.3, 0.3]}
_SPANS = {"older": [0.0, 1.0], "current": [-1.0, 1.0]}
_POSITION, _CODEBOOK = "decoder.position_bias_learned.{}_embed.weight", "quantize.codebook.{}"


def translate(weights: Weights, options: Options) -> Translation:
    """The tokenizer of DQ-VAE's tensors: two grains and an entropy or feature router, or three and a feature router."""
    found = weights.tensors
    heads = _HEADS[3 if "encoder.conv_out_median.weight" in found else 2]
    spelling, ratios, learned = Spelling(heads=heads), _RATIOS[len(heads)], "encoder.router.gate.0.weight" in found
    side, finest = len(found[_POSITION.format("row")]), 2 ** (spelling.count_levels(found, 1) - 1)
    image_size = options.image_size or side * finest
    check("image_size", image_size, f"{side * finest}, as it has learned {side} rows", image_size == side * finest)
    size = spelling.size(found, image_size) | TRUNK
    (entries, dim), code_dim = found[_CODEBOOK.format("embed_ema")].shape, len(found["post_quant_conv.weight"])
    router: dict[str, Any] = {"ratios": ratios}
    special: Special = {
        "decoder.position.rows": lambda get: get(_POSITION.format("row")).T[:, :, None],
        "decoder.position.columns": lambda get: get(_POSITION.format("col")).T[:, None],
        "quantizers.0.codebook": lambda get: get(_CODEBOOK.format("weight"))[:-1],  # the last row is no code's
        "quantizers.0.counts": lambda get: get(_CODEBOOK.format("cluster_size_ema")),
        "quantizers.0.sums": lambda get: get(_CODEBOOK.format("embed_ema")),
    }
    if learned:
        options.check_unused()
        router |= {"_target_": "graincode.tokenizer.FeatureRouter", "code_dim": code_dim, "norm": "group"}
        router["budget"] = 20.0 if len(heads) == 2 else 1.0
        special["router.shares"] = lambda get: torch.tensor(ratios)
    else:
        span = _SPANS[options.entropy]
        density = {"_target_": "graincode.tokenizer.EntropyDensity", "bins": 32, "sigma": 0.01, "span": span}
        router |= {"_target_": "graincode.tokenizer.QuantileRouter", "density": density}
        file = options.thresholds
        expected = "a table of the current definition"
        check("thresholds", file, expected, file is not None or options.entropy == "older")
        rows = THRESHOLDS if file is None else read_percentiles(file, EntropyDensity(span=span))
        special["router.quantiles"] = lambda get: percentile_table({0: 0.0, **rows, 100: math.log(32)})
    quantizer = {"_target_": "graincode.tokenizer.EMAQuantizer", "decay": 0.99}
    shape, grains = (entries, dim), len(heads)
    node = tokenizer_node(size, image_size, shape, code_dim, quantizer, grains, router, projected_dim=dim)
    node["decoder"]["position"] = "learned"

    def names(module: nn.Module) -> Names:
        norms = {f"router.norms.{g}": (f"encoder.router.feature_norm{head}",) for g, head in enumerate(heads)}
        gate = {f"router.choose.{layer}": (f"encoder.router.gate.{layer}",) for layer in (0, 2)}
        return spelling.names(module) | norms | gate | {
            "decoder.position.project": ("decoder.position_bias_fourier.lff.ffm.conv",),
            "project_in": ("quant_conv",),
            "project_out": ("post_quant_conv",),
        }  # fmt: skip

    return match(node, found, names, special, ("loss.",))
