"""Names of the convolutional trunk that VQGAN has, and most of what followed it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_MIDDLE = {"block_1": 0, "attn_1": 1, "block_2": 2}
_LEVEL = r"(encoder\.down|decoder\.up)\.(\d+)"


def fused(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with `qkv` in place of each `q`, `k` and `v`."""
    found = dict(weights)
    for name in weights:
        match = re.fullmatch(r"(.+)\.q\.(weight|bias)", name)
        parts = [f"{match[1]}.{part}.{match[2]}" for part in "qkv"] if match else []
        if match and all(part in found for part in parts):
            found[f"{match[1]}.qkv.{match[2]}"] = torch.cat([found.pop(part) for part in parts])
    return found


def levels_of(weights: Mapping[str, Tensor], part: str) -> int:
    """Number of levels of `encoder.down` or `decoder.up`."""
    return len({match[1] for name in weights if (match := re.match(rf"{re.escape(part)}\.(\d+)\.block\.", name))})


def size_of(weights: Mapping[str, Tensor], height: int) -> dict[str, Any]:
    """The node of `TrunkSize` that such weights have, for images of a height in pixels."""
    channels = weights["encoder.conv_in.weight"].shape[0]
    levels = range(levels_of(weights, "encoder.down"))
    widths = [weights[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in levels]
    blocks, more = (
        len({name.split(".")[4] for name in weights if name.startswith(f"{part}.0.block.")})
        for part in ("encoder.down", "decoder.up")
    )
    attended = [level for level in levels if f"encoder.down.{level}.attn.0.norm.weight" in weights]
    return {
        "_target_": "graincode.tokenizer.TrunkSize",
        "channels": channels,
        "multipliers": [width // channels for width in widths],
        "blocks": blocks,
        "attention": [height // 2**level for level in attended],
        "patch": 1,
        "extra_blocks": more - blocks,
        "middle_blocks": 2,
        "padding": "end",
        "upsampling": "own",
    }


def renamed(weights: Mapping[str, Tensor], heads: Sequence[str] = ("",)) -> dict[str, Tensor]:
    """Weights by the names of `GrainEncoder` and `GrainDecoder`; other names stay.

    Args:
        weights: by their published names, attentions `fused`.
        heads: what the names of each grain's head end in, coarsest first.
    """
    attended = {match[0] for name in weights if (match := re.match(rf"{_LEVEL}\.attn(?=\.)", name))}
    last = levels_of(weights, "decoder.up") - 1
    found = {}
    for name, value in weights.items():
        found[_renamed(name, heads, attended, last)] = value
    return found


def _renamed(name: str, heads: Sequence[str], attended: set[str], last: int) -> str:
    side, _, rest = name.partition(".")
    if match := re.match(rf"{_LEVEL}\.(block|attn)\.(\d+)\.(.+)", name):
        part, level, kind, index, rest = match.groups()
        step = 2 if f"{part}.{level}.attn" in attended else 1
        place = int(index) * step + (kind == "attn")
        return f"{_level(part, level, last)}.{place}.{_inner(rest)}"
    if match := re.match(rf"{_LEVEL}\.(?:downsample|upsample)\.conv\.(.+)", name):
        part, level, rest = match.groups()
        return f"{_level(part, level, last)}.{rest}".replace("levels", "downs" if side == "encoder" else "ups")
    if side == "encoder":
        for grain, head in enumerate(heads):
            if match := re.match(rf"mid{head}\.(\w+)\.(.+)", rest):
                return f"encoder.heads.{grain}.{_MIDDLE[match[1]]}.{_inner(match[2])}"
            for part, place in ((f"norm_out{head}", 3), (f"conv_out{head}", 5)):
                if rest.startswith(f"{part}."):
                    return f"encoder.heads.{grain}.{place}.{rest.removeprefix(f'{part}.')}"
        return re.sub(r"^encoder\.conv_in\.", "encoder.stem.", name)
    if side == "decoder":
        if match := re.match(r"mid\.(\w+)\.(.+)", rest):
            return f"decoder.stem.{_MIDDLE[match[1]] + 1}.{_inner(match[2])}"
        for part, ours in (("conv_in", "stem.0"), ("norm_out", "norm"), ("conv_out", "last")):
            if rest.startswith(f"{part}."):
                return f"decoder.{ours}.{rest.removeprefix(f'{part}.')}"
    return name


def _level(part: str, level: str, last: int) -> str:
    """Ours begins with the level that comes first."""
    return f"encoder.levels.{level}" if part == "encoder.down" else f"decoder.levels.{last - int(level)}"


def _inner(name: str) -> str:
    return name.replace("nin_shortcut", "skip").replace("proj_out", "out")
