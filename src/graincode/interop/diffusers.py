"""A VQModel of diffusers: VQGAN's trunk under other names, described by a config.json."""

from __future__ import annotations

import math

from graincode.core.errors import GraincodeError
from graincode.interop import vqgan
from graincode.interop.containers import Weights
from graincode.interop.names import Options, Spelling, Translation

NEW = ("group_norm", "to_q", "to_k", "to_v", "to_out.0")
OLD = ("group_norm", "query", "key", "value", "proj_attn")


def translate(weights: Weights, options: Options) -> Translation:
    """The tokenizer of a VQModel, whose configuration tells what shapes do not."""
    config = weights.config
    if config.get("_class_name") != "VQModel":
        raise GraincodeError("expected config.json of a VQModel beside it; give the folder of the model")
    groups = config.get("norm_num_groups", 32)
    wrong = [f"{key}={config[key]}" for key, value in {"act_fn": "silu", "norm_type": "group"}.items()
             if config.get(key, value) != value]  # fmt: skip
    widths = {len(value) for name, value in weights.tensors.items() if name.endswith(".norm1.weight")}
    if any(math.gcd(32, width) != groups for width in widths):
        wrong.append(f"norm_num_groups={groups}")
    if wrong:
        raise GraincodeError(f"config.json has {', '.join(wrong)}, which no network here has")
    parts = OLD if any(".query.weight" in name for name in weights.tensors) else NEW
    middle = ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]
    if not (attends := config.get("mid_block_add_attention", True)):
        del middle[1]
    spelling = Spelling(
        ("down_blocks.{}", "up_blocks.{}"), True, "resnets.{}", "attentions.{}",
        ("downsamplers.0.conv", "upsamplers.0.conv"), tuple(middle), ("",), "conv_norm_out", "conv_shortcut", parts,
    )  # fmt: skip
    return vqgan.translate(weights, options, spelling, middle_attention=attends)
