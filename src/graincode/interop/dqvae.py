"""The checkpoints of DQ-VAE's authors (github.com/CrossmodalGroup/DynamicVectorQuantization, MIT)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graincode.core.density import interpolated_table
from graincode.interop import trunk

# percentiles of the entropy of ImageNet's regions of 16 x 16 pixels, in the definition before July 2023
THRESHOLDS = {
    10: 2.947292990206026e-37, 20: 3.2971225034060525e-14, 25: 0.010697992518544197, 30: 0.5240799784660339,
    40: 1.1998910903930664, 50: 1.6777750253677368, 60: 2.0330491065979004, 70: 2.3272018432617188,
    75: 2.4625627994537354, 80: 2.5950534343719482, 90: 2.871901512145996,
}  # fmt: skip
_HEADS = {1: ("_fine",), 2: ("_coarse", "_fine"), 3: ("_coarse", "_median", "_fine")}
_RATIOS = {2: [0.5, 0.5], 3: [0.4, 0.3, 0.3]}
_NAMES = {
    "encoder.router.gate.": "router.choose.",
    "decoder.position_bias_fourier.lff.ffm.conv.": "decoder.position.project.",
    "quant_conv.": "project_in.",
    "post_quant_conv.": "project_out.",
}


def translate(weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """The node of the model that weights by their published names are of, these by ours, and the names left out.

    Raises:
        KeyError: a name that tells the size of the network is missing.
    """
    dropped = [name for name in weights if name.startswith("loss.")]
    found = trunk.fused({name: value for name, value in weights.items() if name not in dropped})
    grains = sum(f"encoder.conv_out{head}.weight" in found for head in _HEADS[3])
    heads, learned = _HEADS[grains], "encoder.router.gate.0.weight" in found
    levels, finest = trunk.levels_of(found, "encoder.down"), 2 ** (trunk.levels_of(found, "decoder.up") - 1)
    names = [f"decoder.position_bias_learned.{axis}_embed.weight" for axis in ("row", "col")]
    image_size = [found[name].shape[0] * finest for name in names]
    dim, code_dim = found["post_quant_conv.weight"].shape[:2]
    codebook = found.pop("quantize.codebook.weight")[:-1]  # the last row stands for no code
    layout = {
        "_target_": "graincode.core.layout.CodeLayout",
        "image_size": image_size,
        "grains": [[2 ** (levels - 1 - grain)] * 2 for grain in range(grains)],
        "codebook_size": len(codebook),
        "classes": 0,
        "codebook": "shared",
    }
    size = trunk.size_of(found, image_size[0])
    router = {"layout": layout, "ratios": _RATIOS[grains]}
    if learned:
        router |= {"_target_": "graincode.tokenizer.FeatureRouter", "code_dim": dim, "norm": "group"}
    else:
        density = {"_target_": "graincode.tokenizer.EntropyDensity", "bins": 32, "sigma": 0.01, "span": [0.0, 1.0]}
        router |= {"_target_": "graincode.tokenizer.QuantileRouter", "density": density}
    quantizer = {"_target_": "graincode.tokenizer.EMAQuantizer", "codebook_size": len(codebook), "decay": 0.99}
    part = {"layout": layout, "size": size, "code_dim": dim}
    node = {
        "_target_": "graincode.tokenizer.DQVAE",
        "layout": layout,
        "encoder": {"_target_": "graincode.tokenizer.GrainEncoder", **part},
        "router": router,
        "quantizer": quantizer | {"code_dim": code_dim},
        "decoder": {"_target_": "graincode.tokenizer.GrainDecoder", **part, "position": "learned"},
        "projected_dim": code_dim,
    }
    rows, columns = (found.pop(name).T for name in names)
    ours = trunk.renamed(found, heads)
    for name in list(ours):
        for published, new in _NAMES.items():
            if name.startswith(published):
                ours[name.replace(published, new, 1)] = ours.pop(name)
        for grain, head in enumerate(heads):
            published = f"encoder.router.feature_norm{head}."
            if name.startswith(published):
                ours[name.replace(published, f"router.norms.{grain}.", 1)] = ours.pop(name)
    for name in ("project_in.weight", "project_out.weight"):
        ours[name] = ours[name].flatten(1)
    ours["decoder.position.rows"], ours["decoder.position.columns"] = rows[:, :, None], columns[:, None]
    ours["quantizers.0.codebook"] = codebook
    for published, new in (("cluster_size_ema", "counts"), ("embed_ema", "sums")):
        ours[f"quantizers.0.{new}"] = ours.pop(f"quantize.codebook.{published}")
    if learned:
        ours["router.shares"] = torch.tensor(_RATIOS[grains])
    else:
        ours["router.quantiles"] = published_quantiles(THRESHOLDS)
    return node, ours, dropped


def published_quantiles(percentiles: Mapping[int, float], bins: int = 32) -> Tensor:
    """The quantile table of a router, linear between percentiles from 1 to 99, from 0 to the largest entropy."""
    rows = {0: 0.0, **percentiles, 100: math.log(bins)}
    levels = torch.tensor(sorted(rows), dtype=torch.float64)
    return interpolated_table(levels / 100, torch.tensor([rows[row] for row in sorted(rows)], dtype=torch.float64))
