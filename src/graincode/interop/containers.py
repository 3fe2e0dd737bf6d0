"""Files of weights as their authors wrote them: read as named tensors alone, without what is around them."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from graincode.core.errors import GraincodeError, brief
from graincode.files import sha256

# classes that stand in files of weights without holding any: stubs of these names, without methods, are put in their
# place, so that the rest can be read; nothing is imported under these names
_IGNORED = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",  # the key of its state in Lightning before 1.5
    "argparse.Namespace",  # the arguments of LlamaGen's training runs
)
_AVERAGES = ("ema", "model_ema", "ema_state_dict")
_WEIGHTS = ("state_dict", "model", "module", "weights")
_ANCHOR = "encoder.conv_in.weight"  # which all families have
_PARENTS = ("first_stage_model.",)  # of a tokenizer in a model that uses it


@dataclass(frozen=True)
class Weights:
    """The tensors of a tokenizer by their authors' names.

    Attributes:
        tensors: in float32 or wider, or integers.
        averaged: whether they are moving averages, of which the file has other weights as well.
        outside: what else the file holds, by the first part of its names, with the number of tensors.
        files: each file's name and SHA-256.
        config: what `config.json` beside them says, if it is there and they are in safetensors.
    """

    tensors: dict[str, Tensor]
    averaged: bool
    outside: dict[str, int]
    files: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def read(path: Path, averages: bool | None = None) -> Weights:
    """The tensors of a file by torch.save or in safetensors, or of a folder or index of parts in safetensors.

    Args:
        averages: whether to take moving averages or the weights themselves; None: averages where there are any.
    Raises:
        GraincodeError: there is no such file; it is damaged; it holds something else; it would have to be unpickled; it
            has no averages that are asked for.
    """
    try:
        return _read(path, averages)
    except OSError as error:
        raise GraincodeError(_unreadable(error.filename or path, error)) from None


def _read(path: Path, averages: bool | None) -> Weights:
    files, found = _files(path), {}
    for file in files:
        if file.suffix != ".json":
            found |= _load_safetensors(file) if file.suffix == ".safetensors" else _load_pickle(file)
    try:
        weights = select(found, averages)
    except GraincodeError as error:
        raise GraincodeError(f"{path}: {error}") from None
    config, about = {}, files[0].parent / "config.json"
    if files[0].suffix in (".safetensors", ".json") and about.is_file():
        try:
            config = dict(json.loads(about.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError):
            raise GraincodeError(f"{about}: damaged; copy it again") from None
        files.append(about)
    return replace(weights, files={file.name: sha256(file) for file in files}, config=config)


def select(found: Mapping[str, Any], averages: bool | None = None) -> Weights:
    """The tensors of a tokenizer among what a file holds; arguments and errors as of `read`."""
    named, taken = _nested(found, averages)
    prefix, marked = _prefix(named, averages)
    inside = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
    outside = Counter(name.partition(".")[0] for name in named if not name.startswith(prefix))
    flat = {name.replace(".", ""): name for name in inside}  # Lightning's averages have names without dots
    copies = {key: value for name, value in named.items() if (key := flat.get(name.partition("model_ema.")[2]))}
    missing = [name for name, value in inside.items() if name not in copies and _trained(name, value)]
    if copies and missing and averages is not False:
        lack = f"has moving averages of some weights but not of {len(missing)} others ({brief(', '.join(missing[:3]))})"
        raise GraincodeError(f"{lack}; take the weights themselves, --no-ema")
    averaged = taken or marked or (bool(copies) and averages is not False)
    if averages and not averaged:
        raise GraincodeError("has no moving averages of the weights; leave --ema out")
    kept = inside | (copies if averaged else {})
    tensors = {name: _widened(value) for name, value in kept.items() if not name.startswith("model_ema.")}
    unused = len(kept) - len(tensors) - (len(copies) if averaged else 0)
    return Weights(tensors, averaged, dict(outside + Counter(model_ema=unused)))


def _files(path: Path) -> list[Path]:
    """The files that a path stands for: itself, or the index of its parts and these."""
    if path.is_dir():
        here = sorted(path.iterdir())  # glob would find nothing in a folder that may not be read
        found = [file for file in here if file.name.endswith(".safetensors.index.json")]
        found = found or [file for file in here if file.suffix == ".safetensors"]
        plain = [file for file in found if file.name.partition(".")[2] in ("safetensors", "safetensors.index.json")]
        found = plain if len(plain) == 1 else found
        if len(found) != 1:
            names = brief(", ".join(file.name for file in found)) or "none"
            raise GraincodeError(f"{path}: a folder with several or no safetensors ({names}); give the file itself")
        path = found[0]
    if not path.is_file():
        raise GraincodeError(f"{path}: no such file; expected weights by torch.save or in safetensors")
    if path.suffix != ".json":
        return [path]
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        parts = [path.parent / name for name in names if name == Path(name).name and name.endswith(".safetensors")]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        parts, names = [], [None]
    if len(parts) != len(names):
        raise GraincodeError(f"{path}: no index of safetensors; expected weight_map with the names of files beside it")
    absent = [part.name for part in parts if not part.is_file()]
    if absent:
        raise GraincodeError(
            f"{path}: its part {brief(absent[0])} is not beside it, nor {len(absent) - 1} more; copy all parts"
        )
    return [path, *parts]


def _load_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise GraincodeError(_damaged(file, error)) from None


def _load_pickle(file: Path) -> dict[str, Any]:
    """What torch.save wrote, of allowed types alone."""
    stubs = [type(name.rpartition(".")[2], (), {"__module__": name.rpartition(".")[0]}) for name in _IGNORED]
    try:
        with torch.serialization.safe_globals(stubs), warnings.catch_warnings(action="ignore"):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"(?:GLOBAL '?|(?:class|global) '?(?=\w+\.))([A-Za-z_]\w*(?:\.\w+)*)", str(error))
        if name is None:
            raise GraincodeError(_damaged(file, error)) from None
        again = "torch.save({'model': torch.load(FILE, weights_only=False)['model']}, NEW), or 'state_dict' for 'model'"
        advice = f"save it anew where you trust it: {again}"
        raise GraincodeError(
            f"{file}: refused, as {brief(name[1])} in it would have to be unpickled; {advice}"
        ) from None
    except Exception as error:  # a damaged or hostile file can raise anything
        raise GraincodeError(_damaged(file, error)) from None
    if not isinstance(loaded, Mapping):
        raise GraincodeError(f"{file}: holds {type(loaded).__name__}; expected named tensors")
    return dict(loaded)


def _unreadable(path: object, error: OSError) -> str:
    return f"{path}: cannot be read ({brief(error.strerror or error)}); give a file and folder that may be read"


def _damaged(file: Path, error: Exception) -> str:
    with file.open("rb") as opened:
        start = opened.read(200).lstrip().lower()
    if file.stat().st_size == 0:
        return f"{file}: empty; copy it again"
    if start.startswith(b"version https://git-lfs"):
        return f"{file}: a pointer of Git LFS; fetch the file itself, git lfs pull"
    if start.startswith((b"<!doctype", b"<html")):
        return f"{file}: a web page; download the file that it leads to"
    reason = brief(str(error).partition("WeightsUnpickler error:")[2] or error)
    return f"{file}: damaged, cut short or no file of weights ({reason}); copy it again"


def _nested(found: Mapping[str, Any], averages: bool | None) -> tuple[dict[str, Tensor], bool]:
    """The named tensors of a file, which may stand under a key, and whether that is the one of averages."""

    def tensors(value: Any) -> dict[str, Tensor]:
        mapping = value if isinstance(value, Mapping) else {}
        return {name: v for name, v in mapping.items() if isinstance(v, Tensor) and isinstance(name, str)}

    if len(own := tensors(found)) == len(found):
        return own, False
    for key in (*(() if averages is False else _AVERAGES), *_WEIGHTS):
        inner = tensors(found.get(key))
        if any(name.endswith(_ANCHOR) for name in inner):
            return inner, key in _AVERAGES
    keys = brief(", ".join(map(str, list(found)[:8])))
    raise GraincodeError(f"holds {keys}; expected named tensors, or {' or '.join(_WEIGHTS[:2])} with them")


def _prefix(named: dict[str, Tensor], averages: bool | None) -> tuple[str, bool]:
    """What stands before the names of the tokenizer's tensors, and whether it says that these are averages."""
    prefixes = [name.removesuffix(_ANCHOR) for name in named if name.endswith(_ANCHOR)]
    inner = [prefix for prefix in prefixes if prefix.endswith(_PARENTS)] or prefixes
    marked = [prefix for prefix in inner if "ema" in re.split(r"[._]", prefix)]
    plain = [prefix for prefix in inner if prefix not in marked]
    chosen = marked if marked and averages is not False else plain
    if len(chosen) != 1:
        found = f"{len(named)} tensors such as {brief(', '.join(list(named)[:3]))}"
        where = f"under each of {brief(', '.join(map(repr, chosen)))}" if chosen else "nowhere"
        raise GraincodeError(f"holds {found}, and {_ANCHOR} {where}; expected the weights of one tokenizer")
    return chosen[0], bool(marked) and chosen is marked


def _trained(name: str, value: Tensor) -> bool:
    """Whether moving averages of a model have this tensor: not losses, which have frozen parts, nor codebooks, which
    may be learned without gradients."""
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    return name.startswith(parts) and name.endswith((".weight", ".bias")) and value.is_floating_point()


def _widened(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() and value.element_size() < 4 else value
