"""Exports: weights (safetensors) and configuration (JSON) that rebuild a model, and run no code of their own."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from graincode.core.errors import GraincodeError, brief, check, check_choice, one_line
from graincode.core.layout import check_layouts
from graincode.core.precision import not_finite
from graincode.distributed import collectives
from graincode.files import new_directory, read_json, sha256, write_json

log = logging.getLogger(__name__)

Kind = Literal["tokenizer", "generator"]
PathLike = str | os.PathLike[str]
FORMATS = {"tokenizer": 5, "generator": 6}  # as written; the one before is read too, through UPGRADES
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_USED_AS = {"tokenizer": "tokenize", "generator": "sample"}
_LARGEST = 2**22  # bytes of a configuration and of the header of weights; large models have a tenth of it

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

    def names(self, key: str) -> tuple[str, ...]:
        """Texts of its provenance, such as class_names; none if there are none."""
        found = self.provenance.get(key)
        return tuple(map(str, found)) if isinstance(found, list) else ()

    @property
    def imported(self) -> dict[str, Any]:
        """What records say besides the identity: whose weights an imported tokenizer has; nothing of others."""
        return {"tokenizer_imported": self.provenance["imported"]} if "imported" in self.provenance else {}


def register(name: str, cls: type) -> None:
    """Let exports name a class of your own, by the `_target_` that your configuration has.

    Call it where the class is defined; jobs import the modules that `$GRAINCODE_PLUGINS` names, separated by commas.
    """
    _ALLOWED[name] = cls


def save_export(
    path: Path, kind: Kind, config: dict[str, Any], module: nn.Module, replaces: bool = False, **provenance: Any
) -> str:
    """Write a module's weights, the resolved node that it was built from, and its origin; returns the identity.

    Raises:
        GraincodeError: the path exists, unless this `replaces` it, the disk is full, a weight is not finite, or the
            configuration names a class that could not be loaded.
    """
    _check_targets(config, path)
    _check_finite(module.state_dict())
    with new_directory(path, replaces) as partial:
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
    """Write a run's trained model to `path/export`, in place of what is there: of an interrupted or a shorter run."""
    folder = path / "export"
    collectives.on_main(lambda: save_export(folder, kind, config, module, replaces=True, **provenance))
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
    about = read_json(file, {"format": int, "kind": str}, "export the model again")
    found, found_kind = about["format"], about["kind"]
    if found_kind != kind:
        raise GraincodeError(f"{folder}: a {one_line(brief(found_kind))}; expected a {kind}")
    newest = FORMATS[kind]
    if found not in (newest - 1, newest):
        advice = "install a newer graincode" if found > newest else "train the model again"
        raise GraincodeError(f"{folder}: export format {brief(found)}, but this version reads {newest}; {advice}")
    keys = {"model": dict, "provenance": dict, "weights_sha256": str}
    config = read_json(file, keys, "export the model again")
    node = config["model"]
    try:
        weights = _map_weights(weights_file)
        for upgrade in UPGRADES if found < newest else ():
            upgrade(kind, node, weights)
        _check_targets(node, folder)
        with _Bounded(weights):
            module = build_node(node)
        if not hasattr(module, _USED_AS[kind]):
            raise TypeError(f"{type(module).__name__} is no {kind}")
        if sha256(weights_file) != config["weights_sha256"]:
            raise GraincodeError(f"{weights_file}: damaged (it has changed since it was written); copy it again")
        _check_finite(weights)
        module.load_state_dict(weights)
    except GraincodeError as error:
        raise GraincodeError(f"{folder}: {one_line(str(error).removeprefix(f'{folder}: '))}") from error
    except Exception as error:  # what someone wrote into a configuration can raise anything
        raise GraincodeError(f"{folder}: damaged ({one_line(brief(error))}); export the model again") from error
    return Export(module.eval().to(device), _identity(folder), config["provenance"])


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


def _map_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, which is not read yet but for its header; their sizes are checked against the file's."""
    with file.open("rb") as opened:
        if int.from_bytes(opened.read(8), "little") > _LARGEST:
            raise ValueError("weights.safetensors has no header, or too large a one")
    if hasattr(os, "sysconf") and file.stat().st_size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise ValueError("weights.safetensors is larger than the memory of this machine")  # on disk it may be empty
    return load_file(file)


class _Bounded(TorchFunctionMode):
    """In the block, what is built makes hardly more tensors and numbers than weights have, and gives up before that."""

    _makers = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange)

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._calls = 10_000 + 100 * len(weights)
        self._most = self._left = 2**24 + sum(tensor.numel() for tensor in weights.values())

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, copied = kwargs or {}, getattr(function, "__name__", "") in ("clone", "__deepcopy__")
        if function is torch._C._set_grad_enabled:  # `no_grad` ends with it, after an error too
            return function(*args, **kwargs)
        if copied or function in self._makers:
            size = args[0].shape if copied else kwargs.get("size", args if isinstance(args[0], int) else args[0])
            self._left -= math.prod(size)
        self._calls -= 1
        self._check(min(self._left, self._calls) >= 0)
        result = function(*args, **kwargs)
        parts = result if isinstance(result, tuple | list) else [result]
        self._check(all(part.numel() <= self._most for part in parts if isinstance(part, Tensor)))
        return result

    def _check(self, holds: bool) -> None:
        if not holds:
            raise GraincodeError("config.json asks for a larger model than weights.safetensors holds; do not trust it")


def _check_finite(weights: Mapping[str, Tensor]) -> None:
    if (name := not_finite(weights)) is not None:
        raise GraincodeError(f"{name!r} has NaN or infinite values; train the model again, or copy it again")


def _check_targets(config: Any, path: Path) -> None:
    for plugin in filter(None, os.environ.get("GRAINCODE_PLUGINS", "").split(",")):
        try:
            import_module(plugin)
        except ImportError as error:
            raise GraincodeError(f"GRAINCODE_PLUGINS={plugin}: expected a module to import ({error})") from error
    layouts = [node for node in _nodes(config) if node.get("_target_") == "graincode.core.layout.CodeLayout"]
    if any(layout != layouts[0] for layout in layouts):
        raise GraincodeError(f"{path}: damaged (its parts have different layouts); export the model again")
    for node in _nodes(config):
        strange = [key for key in node if str(key).startswith("_") and key != "_target_"]
        if strange:
            raise GraincodeError(f"{path}: has the key {strange[0]!r}, which no export has; do not trust this file")
        target = node.get("_target_", "graincode.tokenizer.DQVAE")
        if not isinstance(target, str) or target not in _ALLOWED:
            advice = "register your own class by graincode.export.register, in a module that $GRAINCODE_PLUGINS names"
            raise GraincodeError(f"{path}: asks for {brief(repr(target))}, which exports may not name; {advice}")


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
