"""Exports: weights (safetensors) and configuration (JSON) that rebuild a model, and run no code of their own."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graincode.core.errors import GraincodeError, brief, check, check_choice
from graincode.core.layout import check_layouts
from graincode.distributed import collectives
from graincode.files import new_directory, sha256, write_json

log = logging.getLogger(__name__)

Kind = Literal["tokenizer", "generator"]
PathLike = str | os.PathLike[str]
FORMATS = {"tokenizer": 5, "generator": 6}  # as written; the one before is read too, through UPGRADES
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# the only names that a configuration may ask for, compared as text; None is imported by its name when it is asked for
_ALLOWED: dict[str, type | None] = {
    f"graincode.{package}.{name}": None
    for package, names in {
        "core.layout": "CodeLayout",
        "tokenizer": "DQVAE GrainEncoder GrainDecoder QuantileRouter FeatureRouter CodingDensity EntropyDensity "
        "FixedDensity GradientDensity RandomDensity VarianceDensity CosineQuantizer EMAQuantizer FSQuantizer "
        "LFQuantizer SimVQuantizer TrunkSize MaskGITEncoder MaskGITDecoder MAGVIT2Encoder MAGVIT2Decoder",
        "generator": "DGiTAR DGiTNAR Transformer HeterogeneousEmbedding InformationMasking ClassConditioning "
        "NoConditioning",
    }.items()
    for name in names.split()
}


@dataclass(frozen=True)
class Export:
    """A loaded export: the tokenizer or generator in evaluation mode, 16 hex digits of the SHA-256 over configuration
    and weights, and what it records of its making, such as the identity of the tokenizer behind a generator."""

    module: Any
    identity: str
    provenance: dict[str, Any]


def register(name: str, cls: type) -> None:
    """Let exports name a class of your own, by the `_target_` that your configuration has.

    Call it where the class is defined; jobs import the modules that `$GRAINCODE_PLUGINS` names, separated by commas.
    """
    _ALLOWED[name] = cls


def save_export(path: Path, kind: Kind, config: dict[str, Any], module: nn.Module, **provenance: Any) -> str:
    """Write a module's weights, the resolved node that it was built from, and its origin; returns the identity.

    Raises:
        GraincodeError: the path exists, the disk is full, or the configuration names a class that could not be loaded.
    """
    _check_targets(config, path)
    with new_directory(path) as partial:
        file = partial / "weights.safetensors"
        try:
            save_file({name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}, file)
        except SafetensorError as error:  # as which it reports a full disk
            line = f"{path}: cannot be written ({brief(error)}); make room, then run the same again"
            raise GraincodeError(line) from error
        about = {"format": FORMATS[kind], "kind": kind, "provenance": provenance}
        write_json(partial / "config.json", about | {"weights_sha256": sha256(file), "model": config})
        return _identity(partial)


def export_run(path: Path, kind: Kind, config: dict[str, Any], module: nn.Module, **provenance: Any) -> None:
    """Write a run's trained model to `path/export`, unless an interrupted run has done so already."""
    folder = path / "export"
    collectives.on_main(lambda: folder.exists() or save_export(folder, kind, config, module, **provenance))
    log.info("export: %s", folder)


def load_export(path: PathLike, kind: Kind, device: torch.device | str = "cpu") -> Export:
    """Rebuild a model from its export.

    Raises:
        GraincodeError: it is no export of this kind, a newer or damaged one, or names what exports may not name.
    """
    folder = Path(path)
    file, weights_file = folder / "config.json", folder / "weights.safetensors"
    if not (file.is_file() and weights_file.is_file()):
        raise GraincodeError(f"{folder}: no export; expected the directory `export` of a run that trained a {kind}")
    try:
        config = json.loads(file.read_text())
        found, found_kind, node = config["format"], config["kind"], config["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise GraincodeError(f"{file}: damaged ({error!r}); export the model again") from error
    if found_kind != kind:
        raise GraincodeError(f"{folder}: a {found_kind}; expected a {kind}")
    newest = FORMATS[kind]
    if found not in (newest - 1, newest):
        advice = "install a newer graincode" if isinstance(found, int) and found > newest else "train the model again"
        raise GraincodeError(f"{folder}: export format {found}, but this version reads {newest}; {advice}")
    if sha256(weights_file) != config.get("weights_sha256"):
        raise GraincodeError(f"{weights_file}: damaged (it has changed since it was written); copy it again")
    try:
        weights = load_file(weights_file)
        for upgrade in UPGRADES if found < newest else ():
            upgrade(kind, node, weights)
        _check_targets(node, folder)
        module = build_node(node)
        module.load_state_dict(weights)
    except GraincodeError as error:
        raise GraincodeError(f"{folder}: {str(error).removeprefix(f'{folder}: ')}") from error
    except (SafetensorError, RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise GraincodeError(f"{folder}: damaged ({brief(error)}); export the model again") from error
    return Export(module.eval().to(device), _identity(folder), config.get("provenance", {}))


def load_weights(module: nn.Module, path: PathLike, kind: Kind) -> str:
    """Start a model from an export's weights, for fine-tuning; returns the export's identity.

    Raises:
        GraincodeError: as `load_export`, or the model is built otherwise than the export's.
    """
    export = load_export(path, kind)
    try:
        module.load_state_dict(export.module.state_dict())
    except RuntimeError as error:
        reason = f"({str(error).splitlines()[-1].strip()[:160]}); use the settings of its config.json"
        raise GraincodeError(f"{path}: built otherwise than this {kind} {reason}") from error
    return export.identity


def load_pair(
    generator_path: PathLike, tokenizer_path: PathLike, device: torch.device | str = "cpu", precision: str = "float32"
) -> tuple[Export, Export]:
    """A generator, in a precision ("float32" or "bfloat16"), and the tokenizer whose codes it makes.

    Raises:
        GraincodeError: as `load_export`; another precision; or the generator was trained on codes of another tokenizer.
    """
    check_choice("precision", precision, PRECISIONS)
    generator = load_export(generator_path, "generator", device)
    tokenizer = load_export(tokenizer_path, "tokenizer", device)
    check_layouts(generator.module.layout, tokenizer.module.layout, f"{generator_path}: its codes", str(tokenizer_path))
    trained_on = generator.provenance.get("tokenizer")
    if trained_on != tokenizer.identity:
        advice = f"but {tokenizer_path} is {tokenizer.identity}; give the tokenizer that its codes were extracted with"
        raise GraincodeError(f"{generator_path}: trained on codes of tokenizer {trained_on}, {advice}")
    generator.module.to(PRECISIONS[precision])
    return generator, tokenizer


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every dictionary in a configuration, outer ones first."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _nodes(inner)


def _check_targets(config: Any, path: Path) -> None:
    for plugin in filter(None, os.environ.get("GRAINCODE_PLUGINS", "").split(",")):
        try:
            import_module(plugin)
        except ImportError as error:
            raise GraincodeError(f"GRAINCODE_PLUGINS={plugin}: expected a module to import ({error})") from error
    for node in _nodes(config):
        strange = [key for key in node if str(key).startswith("_") and key != "_target_"]
        if strange:
            raise GraincodeError(f"{path}: has the key {strange[0]!r}, which no export has; do not trust this file")
        target = node.get("_target_", "graincode.tokenizer.DQVAE")
        if not isinstance(target, str) or target not in _ALLOWED:
            advice = "register your own class by graincode.export.register, in a module that $GRAINCODE_PLUGINS names"
            raise GraincodeError(f"{path}: asks for {target!r}, which exports may not name; {advice}")


def build_node(node: Any) -> Any:
    """The object that a configuration asks for; `load_export` has compared its names with the list."""
    if isinstance(node, dict):
        values = {key: build_node(value) for key, value in node.items() if key != "_target_"}
        if "_target_" not in node:
            return values
        package, _, name = node["_target_"].rpartition(".")
        return (_ALLOWED[node["_target_"]] or getattr(import_module(package), name))(**values)
    return [build_node(value) for value in node] if isinstance(node, list) else node


def _identity(folder: Path) -> str:
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    with (folder / "weights.safetensors").open("rb") as opened:
        hashlib.file_digest(opened, lambda: digest)
    return digest.hexdigest()[:16]


def _upgrade_network(kind: Kind, node: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Names of today; a trunk's size in a node of its own; no definition of the density among the weights."""
    for inner in list(_nodes(node)):
        if inner.get("_target_") == "graincode.core.codes.CodeLayout":
            inner["_target_"] = "graincode.core.layout.CodeLayout"
        elif inner.get("_target_") in ("graincode.tokenizer.GrainEncoder", "graincode.tokenizer.GrainDecoder"):
            names = ("channels", "multipliers", "blocks", "attention", "patch")
            size = {name: inner.pop(name) for name in names if name in inner}
            inner["size"] = {"_target_": "graincode.tokenizer.TrunkSize", **size}
    weights.pop("router.definition", None)


def _drop_density_bins(kind: Kind, node: dict[str, Any], weights: dict[str, Tensor]) -> None:
    check("density_bins", bins := node.pop("density_bins", 1), "1, as densities are no longer predicted", bins == 1)


# what turns an export of tokenizer format 4 or generator format 5 into today's, in place
UPGRADES: list[Callable[[Kind, dict[str, Any], dict[str, Tensor]], None]] = [_upgrade_network, _drop_density_bins]
