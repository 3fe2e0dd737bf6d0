"""From a file of published weights to an export."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from graincode.core.errors import GraincodeError, brief, check, check_choice
from graincode.export import build_node, save_export
from graincode.interop import FAMILIES, containers
from graincode.interop.names import Options

MARKS = {
    "dqvae": {"quantize.codebook.weight"},
    "vqgan": {"encoder.mid.block_1.conv1.weight", "quantize.embedding.weight"},
    "llamagen": {"encoder.conv_blocks.0.res.0.conv1.weight"},
    "maskgit": {"encoder.mid.0.conv1.weight", "encoder.down.0.block.0.conv1.weight"},
    "magvit2": {"encoder.mid_block.0.conv1.weight"},
    "diffusers": {"encoder.down_blocks.0.resnets.0.conv1.weight"},
}
"""Tensors that only this family has."""


@dataclass(frozen=True)
class Imported:
    """A tokenizer of ours, in evaluation mode; the node that builds it; its origin; what was left out of the file, by
    the first part of its names, with the number of tensors."""

    module: nn.Module
    node: dict[str, Any]
    origin: dict[str, Any]
    dropped: dict[str, int]

    def save(self, path: Path) -> str:
        """Write it as an export, whose records name the origin; returns the identity."""
        return save_export(path, "tokenizer", self.node, self.module, imported=self.origin)


def import_tokenizer(family: str, path: Path, options: Options | None = None) -> Imported:
    """The tokenizer in a file of published weights.

    Raises:
        GraincodeError: the file cannot be read, or holds no weights of this family that we have a network for.
    """
    check_choice("family", family, FAMILIES)
    options = options or Options()
    size = options.image_size
    check("image_size", size, "1 or more", size is None or size >= 1)
    if family != "dqvae":
        options.check_unused()
    weights = containers.read(path, options.averages)
    looks = [name for name, marks in MARKS.items() if marks <= set(weights.tensors)]
    if looks and family not in looks:
        raise GraincodeError(f"{path}: no weights of {family}; they look like {looks[0]}'s")
    try:
        found = import_module(f"graincode.interop.{family}").translate(weights, options)
        module = build_node(found.node)
        module.load_state_dict(found.weights)
    except KeyError as error:
        raise GraincodeError(f"{path}: no weights of {family}; {error.args[0]} is missing") from None
    except GraincodeError as error:
        raise GraincodeError(f"{path}: {error}") from None
    except (ArithmeticError, TypeError, ValueError, IndexError, RuntimeError) as error:  # of strange shapes
        raise GraincodeError(f"{path}: no weights of {family} ({brief(error)})") from error
    origin = {
        "family": family,
        "files": weights.files,
        "weights": "averages" if weights.averaged else "as trained",
        "image_size": found.node["layout"]["image_size"],
        "graincode": version("graincode"),
    }
    return Imported(module.eval(), found.node, origin, dict(Counter(weights.outside) + Counter(found.dropped)))
