"""Exports: weights (safetensors) and configuration (JSON) that rebuild a model, and run no code of their own."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from graincode import generator, tokenizer
from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout
from graincode.distributed import collectives
from graincode.files import new_directory, write_json

log = logging.getLogger(__name__)

# tokenizers of 3 did not see the last row and column of pixels; tokens of generators of 4 were not normalised
FORMATS = {"tokenizer": 4, "generator": 5}

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# the only names that a configuration may ask for; compared as text, nothing is imported to find out
_ALLOWED: dict[str, type] = {
    f"graincode.{package}.{made.__name__}": made
    for package, classes in {
        "core.layout": (CodeLayout,),
        "tokenizer": (
            tokenizer.CodingDensity,
            tokenizer.CosineQuantizer,
            tokenizer.DQVAE,
            tokenizer.EMAQuantizer,
            tokenizer.EntropyDensity,
            tokenizer.FSQuantizer,
            tokenizer.FeatureRouter,
            tokenizer.FixedDensity,
            tokenizer.GradientDensity,
            tokenizer.GrainDecoder,
            tokenizer.GrainEncoder,
            tokenizer.LFQuantizer,
            tokenizer.QuantileRouter,
            tokenizer.RandomDensity,
            tokenizer.SimVQuantizer,
            tokenizer.VarianceDensity,
        ),
        "generator": (
            generator.ClassConditioning,
            generator.DGiTAR,
            generator.DGiTNAR,
            generator.HeterogeneousEmbedding,
            generator.InformationMasking,
            generator.NoConditioning,
            generator.Transformer,
        ),
    }.items()
    for made in classes
}
_ALLOWED["graincode.core.codes.CodeLayout"] = CodeLayout  # where it was when formats 4 and 5 began


@dataclass(frozen=True)
class Export:
    """A loaded export.

    Attributes:
        module: in evaluation mode.
        identity: 16 hex digits of the SHA-256 over configuration and weights.
        provenance: what the export records of its making, such as the identity of the tokenizer behind a generator.
    """

    module: nn.Module
    identity: str
    provenance: dict[str, Any]


def register(name: str, made: type) -> None:
    """Let exports name a class of your own: call it before loading, with the `_target_` that your configuration has."""
    _ALLOWED[name] = made


def save_export(path: Path, kind: str, config: dict[str, Any], module: nn.Module, **provenance: Any) -> str:
    """Write an export as a whole; gives its identity.

    Args:
        path: the directory to make.
        kind: "tokenizer" or "generator".
        config: the resolved node that the module was built from.
        module: whose weights are kept.
        provenance: anything JSON that tells where the weights come from.
    Raises:
        GraincodeError: the path is there already, or the configuration names a class that could not be loaded again.
    """
    _check_targets(config, path)
    with new_directory(path) as partial:
        weights = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
        try:
            save_file(weights, partial / "weights.safetensors")
        except SafetensorError as error:  # as which it reports a full disk
            raise GraincodeError(
                f"the export cannot be written to {path} ({' '.join(str(error).split())[:120]}): make room; the same "
                "command then writes it"
            ) from error
        digest = _sha256(partial / "weights.safetensors")
        about = {
            "format": FORMATS[kind],
            "kind": kind,
            "provenance": provenance,
            "weights_sha256": digest,
            "model": config,
        }
        write_json(partial / "config.json", about)
        return _identity(partial)


def export_run(path: Path, kind: str, config: dict[str, Any], module: nn.Module, **provenance: Any) -> None:
    """Write a run's trained model to `path/export`, unless an interrupted run has done so already."""
    folder = path / "export"
    collectives.on_main(lambda: folder.exists() or save_export(folder, kind, config, module, **provenance))
    log.info("export: %s", folder)


def load_export(path: str | os.PathLike[str], kind: str, device: torch.device | str = "cpu") -> Export:
    """Rebuild a model from its export.

    Raises:
        GraincodeError: the directory is no export of this kind, a newer or damaged one, or names a class outside the
            registry.
    """
    folder = Path(path)
    files = [folder / "config.json", folder / "weights.safetensors"]
    if not all(file.is_file() for file in files):
        raise GraincodeError(
            f"{folder} is no export (expected config.json and weights.safetensors in it): "
            f"type {kind}_path=/path/to/run/export, the directory that training wrote"
        )
    try:
        config = json.loads(files[0].read_text())
        found_format, found_kind, node = config["format"], config["kind"], config["model"]
        readable = FORMATS.get(found_kind)
        digest = config["weights_sha256"] if found_format == readable else None
    except (ValueError, KeyError, TypeError) as error:
        raise GraincodeError(f"{files[0]} is damaged ({error!r}): export the model anew") from error
    if found_kind != kind:
        raise GraincodeError(f"{folder} is a {found_kind}, expected a {kind}: type it as {found_kind}_path={folder}")
    if found_format != readable:
        newer = isinstance(found_format, int) and found_format > readable
        raise GraincodeError(
            f"{folder} has export format {found_format}, this version reads {readable}: "
            + ("type pip install -U graincode" if newer else "train it anew, with the same command")
        )
    _check_targets(node, folder)
    if _sha256(files[1]) != digest:
        raise GraincodeError(f"{files[1]} is damaged (its content has changed since it was written): copy it anew")
    try:
        module = _build(node)
        module.load_state_dict(load_file(files[1]))
    except GraincodeError:
        raise
    except (SafetensorError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise GraincodeError(f"{folder} is damaged ({reason}): export the model anew") from error
    return Export(module.eval().to(device), _identity(folder), config.get("provenance", {}))


def load_weights(module: nn.Module, path: str | os.PathLike[str], kind: str) -> str:
    """Start a model from an export's weights, for fine-tuning; gives the export's identity.

    Raises:
        GraincodeError: as `load_export`, or the model is built otherwise than the export's.
    """
    export = load_export(path, kind)
    try:
        module.load_state_dict(export.module.state_dict())
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise GraincodeError(
            f"init_from={path} is built otherwise than the configured {kind} ({lines[0][:160]}): "
            f"type the {kind} settings that stand in its config.json"
        ) from error
    return export.identity


def load_pair(
    generator_path: str | os.PathLike[str],
    tokenizer_path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    precision: str = "float32",
) -> tuple[Export, Export]:
    """A generator and the tokenizer whose codes it makes.

    Args:
        generator_path, tokenizer_path: exports.
        device: where they are to be.
        precision: of the generator, "float32" or "bfloat16".
    Raises:
        GraincodeError: as `load_export`, or the generator was trained on codes of another layout or tokenizer, or there
            is no such precision.
    """
    if precision not in PRECISIONS:
        raise GraincodeError(f"precision={precision}: type precision= one of {', '.join(PRECISIONS)}")
    made, decodes = load_export(generator_path, "generator", device), load_export(tokenizer_path, "tokenizer", device)
    tokenizer.check_layouts(
        made.module.layout, decodes.module.layout, f"codes of {generator_path}", str(tokenizer_path)
    )
    if made.provenance.get("tokenizer") != decodes.identity:
        raise GraincodeError(
            f"{generator_path} was trained on codes of tokenizer {made.provenance.get('tokenizer')}, "
            f"but {tokenizer_path} is {decodes.identity}: type the tokenizer_path that its codes were extracted with"
        )
    made.module.to(PRECISIONS[precision])
    return made, decodes


def _check_targets(node: Any, path: Path) -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "_target_" and not (isinstance(value, str) and value in _ALLOWED):
                raise GraincodeError(
                    f"{path} asks for {value!r}, which is not among the classes that an export may name: "
                    "if it is your own, call graincode.export.register(name, class) first"
                )
            if str(key).startswith("_") and key != "_target_":
                raise GraincodeError(f"{path} has the key {key!r}, which no export has: do not trust this file")
            _check_targets(value, path)
    elif isinstance(node, list):
        for value in node:
            _check_targets(value, path)


def _build(node: Any) -> Any:
    if isinstance(node, dict):
        values = {key: _build(value) for key, value in node.items() if key != "_target_"}
        return _ALLOWED[node["_target_"]](**values) if "_target_" in node else values
    return [_build(value) for value in node] if isinstance(node, list) else node


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _identity(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in ("config.json", "weights.safetensors"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]
