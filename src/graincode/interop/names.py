"""From published names and shapes to ours."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graincode.core.errors import GraincodeError, check
from graincode.export import build_node
from graincode.tokenizer.blocks import SpatialAttention

Names = dict[str, tuple[str, ...]]
"""The published modules or tensors of each module or tensor of ours; ours is their concatenation."""
Special = dict[str, Callable[[Callable[[str], Tensor]], Tensor]]
"""Tensors of ours that are computed, from a function that gives the published tensor of a name."""


@dataclass(frozen=True)
class Options:
    """What is asked of an import.

    Attributes:
        image_size: height and width in pixels; None: what the weights say, or else 256.
        averages: whether to take moving averages of the weights; None: where the file has them.
        thresholds: of DQ-VAE's entropy router: a JSON file of percentiles; None: the published ones of ImageNet.
        entropy: its definition, "older" as that of the published thresholds and checkpoint, or "current".
    """

    image_size: int | None = None
    averages: bool | None = None
    thresholds: Path | None = None
    entropy: Literal["older", "current"] = "older"

    def check_unused(self) -> None:
        """Raise a GraincodeError if something is asked of an entropy router, for a network that has none."""
        expected = "for a network without entropy router"
        check("thresholds", self.thresholds, f"None {expected}", self.thresholds is None)
        check("entropy", self.entropy, f"older, the default, {expected}", self.entropy == "older")


@dataclass(frozen=True)
class Translation:
    """A tokenizer of ours: the configuration and weights of its export, and what was left out.

    Attributes:
        node: the configuration.
        weights: by our names.
        dropped: first parts of published names, with the number of tensors.
    """

    node: dict[str, Any]
    weights: dict[str, Tensor]
    dropped: dict[str, int]


@dataclass(frozen=True)
class Spelling:
    """How a family calls the parts of encoder and decoder; pairs are of encoder and decoder.

    Attributes:
        levels: each level, by its number.
        from_coarse: whether the decoder counts its levels from the coarsest.
        block, attention: of a level, by their number.
        resample: what leads to the next level.
        middle: the blocks at the coarsest resolution, in order.
        heads: what is appended to the names of middle, norm and last convolution of each grain's head, coarsest first.
        norm: the last.
        skip: of a block that changes the width.
        attention_parts: norm, query, key, value and output.
    """

    levels: tuple[str, str] = ("down.{}", "up.{}")
    from_coarse: bool = False
    block: str = "block.{}"
    attention: str = "attn.{}"
    resample: tuple[str, str] = ("downsample.conv", "upsample.conv")
    middle: tuple[str, ...] = ("mid{}.block_1", "mid{}.attn_1", "mid{}.block_2")
    heads: tuple[str, ...] = ("",)
    norm: str = "norm_out"
    skip: str = "nin_shortcut"
    attention_parts: tuple[str, str, str, str, str] = ("norm", "q", "k", "v", "proj_out")

    def names(self, module: nn.Module) -> Names:
        """The names of all parts of a tokenizer's encoder and decoder."""
        names: Names = {"encoder.stem": ("encoder.conv_in",), "decoder.stem.0": ("decoder.conv_in",)}
        for head, suffix in enumerate(self.heads):
            end = len(module.encoder.heads[head])
            theirs = [f"encoder.{part.format(suffix)}" for part in self.middle]
            names |= self._blocks(module, [f"encoder.heads.{head}.{i}" for i in range(end - 3)], theirs)
            names[f"encoder.heads.{head}.{end - 3}"] = (f"encoder.{self.norm}{suffix}",)
            names[f"encoder.heads.{head}.{end - 1}"] = (f"encoder.conv_out{suffix}",)
        middle = [f"decoder.{part.format('')}" for part in self.middle]
        names |= self._blocks(module, [f"decoder.stem.{i + 1}" for i in range(len(middle))], middle)
        for side, part, between in (0, "encoder", "downs"), (1, "decoder", "ups"):
            levels = getattr(module, part).levels
            for number, level in enumerate(levels):
                theirs = len(levels) - 1 - number if side and not self.from_coarse else number
                where = f"{part}.{self.levels[side].format(theirs)}"
                counts: Counter[str] = Counter()
                for index, inner in enumerate(level):
                    kind = self.attention if isinstance(inner, SpatialAttention) else self.block
                    ours = [f"{part}.levels.{number}.{index}"]
                    names |= self._blocks(module, ours, [f"{where}.{kind.format(counts[kind])}"])
                    counts[kind] += 1
                names[f"{part}.{between}.{number}"] = (f"{where}.{self.resample[side]}",)
        return names | {"decoder.norm": (f"decoder.{self.norm}",), "decoder.last": ("decoder.conv_out",)}

    def _blocks(self, module: nn.Module, ours: Sequence[str], theirs: Sequence[str]) -> Names:
        names: Names = {}
        for mine, other in zip(ours, theirs, strict=False):  # what is left over is reported by `match`
            parts: Names = {name: (name,) for name in ("norm1", "conv1", "norm2", "conv2")} | {"skip": (self.skip,)}
            if isinstance(module.get_submodule(mine), SpatialAttention):
                before, *qkv, after = self.attention_parts
                parts = {"norm": (before,), "qkv": tuple(qkv), "out": (after,)}
            names |= {f"{mine}.{name}": tuple(f"{other}.{part}" for part in found) for name, found in parts.items()}
        return names

    def count_levels(self, found: Mapping[str, Tensor], side: int) -> int:
        """Levels of the encoder (side 0) or decoder (1); a KeyError names what is missing if there is none."""
        found[self._first(side, 0)]
        return _count(lambda number: self._first(side, number) in found)

    def size(self, found: Mapping[str, Tensor], image_size: int) -> dict[str, Any]:
        """The arguments of a `TrunkSize` that tensors have the shapes of; a KeyError names what is missing for it."""
        widths = [len(found[self._first(0, number)]) for number in range(self.count_levels(found, 0))]
        blocks, more = (_count(lambda i, s=side: self._first(s, 0, i) in found) for side in (0, 1))
        leaf = f"{self.attention.format(0)}.{self.attention_parts[1]}.weight"
        attends = [f"encoder.{self.levels[0].format(level)}.{leaf}" in found for level in range(len(widths))]
        return {
            "channels": math.gcd(*widths),
            "multipliers": [width // math.gcd(*widths) for width in widths],
            "blocks": blocks,
            "extra_blocks": more - blocks,
            "attention": [image_size // 2**level for level, holds in enumerate(attends) if holds],
        }

    def _first(self, side: int, level: int, block: int = 0) -> str:
        where = f"{('encoder', 'decoder')[side]}.{self.levels[side].format(level)}"
        return f"{where}.{self.block.format(block)}.conv1.weight"


def _count(holds: Callable[[int], bool]) -> int:
    number = 0
    while holds(number):
        number += 1
    return number


def tokenizer_node(
    size: Mapping[str, Any], image_size: int, codebook: Sequence[int], code_dim: int, quantizer: Mapping[str, Any],
    grains: int = 1, router: Mapping[str, Any] | None = None, network: str = "Grain", **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """The node of a tokenizer.

    Args:
        size: of the trunk, whose last levels have a grain each.
        codebook: number and dimension of its entries.
        code_dim: dimension of what the encoder gives and the decoder takes.
        quantizer: its other arguments.
        grains: their number.
        router: its other arguments; None: of one that has one grain.
        network: what the names of encoder and decoder begin with.
        more: arguments of the tokenizer.
    """
    coarsest = 2 ** (len(size["multipliers"]) - 1)
    layout = {
        "_target_": "graincode.core.layout.CodeLayout", "image_size": [image_size, image_size],
        "grains": [[coarsest >> grain] * 2 for grain in range(grains)], "codebook_size": codebook[0], "classes": 0,
        "codebook": "shared",
    }  # fmt: skip
    fixed = {
        "_target_": "graincode.tokenizer.QuantileRouter", "ratios": [1.0],
        "density": {"_target_": "graincode.tokenizer.FixedDensity"},
    }  # fmt: skip
    trunk = {"layout": layout, "size": {"_target_": "graincode.tokenizer.TrunkSize", **size}, "code_dim": code_dim}
    return {
        "_target_": "graincode.tokenizer.DQVAE",
        "layout": layout,
        "encoder": {"_target_": f"graincode.tokenizer.{network}Encoder", **trunk},
        "router": {"layout": layout, **(router or fixed)},
        "quantizer": {"codebook_size": codebook[0], "code_dim": codebook[1], **quantizer},
        "decoder": {"_target_": f"graincode.tokenizer.{network}Decoder", **trunk},
        **more,
    }


FIXED: Special = {"router.quantiles": lambda get: torch.zeros(4097)}
"""What a tokenizer of one grain has besides: no thresholds."""


def moving_averages(name: str) -> Special:
    """The tensors of an `EMAQuantizer` whose codebook is published without counts: as if each entry had been chosen
    once."""
    return {
        "quantizers.0.codebook": lambda get: get(name),
        "quantizers.0.sums": lambda get: get(name),
        "quantizers.0.counts": lambda get: torch.ones(len(get(name))),
    }


def match(
    node: dict[str, Any], found: Mapping[str, Tensor], names: Callable[[nn.Module], Names], special: Special,
    drop: Sequence[str] = (),
) -> Translation:  # fmt: skip
    """The translation of published tensors.

    Args:
        node: of the tokenizer, which is built without memory, for its names and shapes.
        names, special: where its tensors come from.
        drop: beginnings of names of tensors that it needs not.
    Raises:
        GraincodeError: tensors are missing, left over, or of other shapes or kinds of numbers.
    """
    with torch.device("meta"):
        module = build_node(node)
    known, used, missing, misshapen, weights = names(module), set(), set(), set(), {}
    for ours, wanted in module.state_dict().items():
        prefix, _, leaf = ours.rpartition(".")
        sources = [] if ours in special else [f"{part}.{leaf}" for part in known.get(prefix, (prefix,))]

        def get(name: str, sources: list[str] = sources) -> Tensor:
            sources.append(name)
            return found[name]

        try:
            values = [special[ours](get)] if ours in special else [found[name] for name in sources]
            parts = wanted.chunk(len(values)) if len(values) > 1 else [wanted]
            unlike = {
                f"{name} {_described(value, part)} instead of {_described(part, value)}"
                for name, value, part in zip(sources, values, parts, strict=False)  # some are computed from nothing
                if _squeezed(value) != _squeezed(part) or _kind(value) != _kind(part)
            }
            misshapen |= unlike
            if not unlike:
                weights[ours] = (torch.cat(values) if len(values) > 1 else values[0]).reshape(wanted.shape)
        except KeyError:
            missing.update(name for name in sources if name not in found)
        used.update(sources)
    left = [name for name in found if name not in used]
    dropped = [name for name in left if name.startswith(tuple(drop))]
    unknown = [name for name in left if name not in dropped]
    kinds = {"missing": missing, "unknown": unknown, "of other shapes": misshapen}
    wrong = [f"{len(those)} {kind} ({', '.join(sorted(those)[:3])})" for kind, those in kinds.items() if those]
    if wrong:
        raise GraincodeError(f"its tensors do not fit: {'; '.join(wrong)}")
    return Translation(node, weights, dict(Counter(name.partition(".")[0] for name in dropped)))


def _kind(value: Tensor) -> tuple[bool, bool]:
    return value.is_floating_point(), value.is_complex()


def _described(value: Tensor, other: Tensor) -> str:
    """The shape, with the type where another tensor's is of another kind."""
    kind = "" if _kind(value) == _kind(other) else str(value.dtype).replace("torch.", " ")
    return f"{list(value.shape)}{kind}"


def _squeezed(value: Tensor) -> list[int]:
    """The shape without the 1 x 1 cells of a convolution that others write as a linear map."""
    shape = list(value.shape)
    return shape[:2] if shape[2:] == [1, 1] else shape
