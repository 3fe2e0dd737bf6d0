"""Types and ranges of a composed configuration."""

from __future__ import annotations

import inspect
import math
import os
import pkgutil
import re
import typing
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import typeguard
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from graincode.config.errors import REFERENCE, Keys, as_typed, compose, explain, nearest
from graincode.config.schema import KEYS, Range, config_directory, root_keys
from graincode.config.typed import parse, readable
from graincode.config.versions import trusted
from graincode.core.errors import GraincodeError, brief
from graincode.core.errors import check as check_value
from graincode.runs.identity import flatten

Hints = dict[str, Any]


def check(job: str, overrides: list[str]) -> DictConfig:
    """A job's configuration, composed and validated; raises a GraincodeError that says what the job itself would."""
    try:
        overrides = readable(job, overrides)
        cfg = compose(job, overrides)
        validate(job, cfg, overrides)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise GraincodeError(explain(error, job, overrides)) from error
    return cfg


def validate(job: str, cfg: DictConfig, overrides: Sequence[str] = ()) -> None:
    """Check a composed configuration: that all is set, types of all that will be instantiated, ranges of a job's keys.

    A value of another type is converted where that is certain: text that is a number, as an environment variable's, or
    a number where text is expected, which is as it was typed (`overrides`). `~/` is the home directory.

    Raises:
        GraincodeError: naming the key and what to type.
    """
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    flat = dict.fromkeys(sorted(root_keys(job) - {*raw}), "???") | flatten(raw)
    for key, value in flat.items():
        if value == "???":
            raise GraincodeError(f"{key} is not set: type {key}=...")
        if isinstance(value, str) and key != "experiment" and (config_directory() / key.replace(".", "/")).is_dir():
            raise GraincodeError(f"{key}={value}: expected settings; type {key.replace('.', '/')}={value}")
        name = key.rpartition(".")[2]
        if key == f"features.{name}":
            raise GraincodeError(f"{key}={value}: expected settings; type features={name}")
        is_filled_in = ".layout." in key or (".model." in key and f"{key.partition('.model.')[0]}.{name}" in flat)
        if is_filled_in and value and name != "_target_" and not REFERENCE.fullmatch(str(value)):
            raise GraincodeError(f"{key}={value}: the job fills it in; {nearest(key, {*Keys(cfg).values})}")
    typed = {name.lstrip("+"): text for name, _, text in (override.partition("=") for override in overrides)}
    _check_node(cfg, raw, "", {key: KEYS.get(key, dict[str, Any]) for key in root_keys(job)}, typed)


def _check_node(cfg: DictConfig, node: dict[str, Any], path: str, hints: Hints | None, typed: dict[str, str]) -> None:
    if isinstance(target := node.get("_target_"), str):
        hints = _arguments(target, path)
    for key, value in node.items():
        name = f"{path}{key}"
        if str(key).startswith("_"):
            continue
        if hints is not None and key not in hints:
            raise GraincodeError(f"unknown key {name!r}: {nearest(name, {f'{path}{hint}' for hint in hints})}")
        if isinstance(value, dict):
            built = any(isinstance(one, dict) and "_target_" in one for one in (value, *value.values()))
            hint = dict[str, Any] if hints is None or built else hints[key]
            check_value(name, as_typed(value), _in_words(hint, value), _fits(value, hint))
            inner = {key.removeprefix(f"{name}."): hint for key, hint in KEYS.items() if key.startswith(f"{name}.")}
            _check_node(cfg, value, f"{name}.", inner or None, typed)
        elif hints is not None and not _is_node(found := OmegaConf.select(cfg, name)):
            reference = REFERENCE.fullmatch(str(value))
            own = reference.group(1) if reference else name
            _check_value(cfg, own, found, hints[key], typed.get(own))


def _is_node(found: Any) -> bool:
    return isinstance(found, DictConfig) and "_target_" in found


def _check_value(cfg: DictConfig, key: str, value: Any, hint: Any, typed: str | None) -> None:
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    if plain is None and "layout" in key.split("."):
        return  # what the job fills in
    if (other := _converted(plain, hint, typed)) != plain:
        OmegaConf.update(cfg, key, plain := other)
    shown = brief(as_typed(plain))
    check_value(key, shown, _in_words(hint, plain), _fits(plain, hint) or _fits(_tuples(plain), hint))
    check_value(
        key, as_typed(plain), "finite numbers", all(math.isfinite(x) for x in _leaves(plain) if isinstance(x, float))
    )
    for rule in (rule for part in _parts(hint) for rule in getattr(part, "__metadata__", ())):
        if isinstance(rule, Range) and plain is not None:
            check_value(key, shown, rule.expected, bool(rule.holds(plain)))


def _converted(value: Any, hint: Any, typed: str | None) -> Any:
    """A value in the type that is expected, where that is certain."""
    if isinstance(value, str) and _fits(value, hint):
        return os.path.expanduser(value) if value.startswith("~") else value
    if isinstance(value, str):  # as on a command line: YAML would take 0500 for 320, and 1:30 for 90
        read = parse(f"value={value}")
        return read.value() if read is not None and _fits(read.value(), hint) else value
    if isinstance(value, int | float) and not _fits(value, hint) and _fits(str(value), hint):
        return typed or str(value)
    return value


def _fits(value: Any, hint: Any) -> bool:
    if bool in map(type, _leaves(value)) and not {bool, Any} & {*_parts(hint)}:  # which Python has as 0 and 1
        return False
    with suppress(typeguard.TypeCheckError):
        typeguard.check_type(value, hint, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
        return True
    return False


# the first pattern that fits an annotation, in words
_KINDS = (
    (r"^dict", "keys of its own"),
    (r"tuple\[tuple", "a list of pairs such as [[8,8],[4,4]]"),
    (r"(Sequence|list)\[float", "a list of numbers such as [0.5,0.5]"),
    (r"(Sequence|list|tuple)\[", "a list such as [{value}]"),
    (r"\bbool\b", "true or false"),
    (r"\bfloat\b", "a number"),
    (r"\bint\b", "a whole number"),
    (r"\bstr\b", "text"),
)


def _in_words(hint: Any, value: Any) -> str:
    """What an annotation allows."""
    literals = [part for part in _parts(hint) if typing.get_origin(part) is typing.Literal]
    if choices := [str(choice) for part in literals for choice in typing.get_args(part)]:
        choices += ["null"] if type(None) in typing.get_args(hint) else []
        several = re.search(r"(Sequence|list|tuple)\[", str(hint))
        return f"{'a list of some' if several else 'one'} of {', '.join(dict.fromkeys(choices))}"
    kind = next((kind for pattern, kind in _KINDS if re.search(pattern, str(hint))), str(hint))
    return kind.replace("{value}", str(value) if _fits([value], hint) else "16,32")


def _parts(hint: Any) -> Iterator[Any]:
    """An annotation and all that it is made of."""
    yield hint
    for inner in typing.get_args(hint) if typing.get_origin(hint) is not typing.Literal else ():
        yield from _parts(inner)


def _leaves(value: Any) -> list[Any]:
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, list | tuple) else [value]


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _arguments(target: str, path: str) -> Hints | None:
    """Annotations of what a `_target_` of this package or an optimizer takes; None for other packages' classes."""
    module = target.partition(".")[0]
    expected = f"a class of graincode or torch.optim (GRAINCODE_PLUGINS={module} allows those of {module})"
    check_value(f"{path}_target_", target, expected, target.startswith(tuple(name[:-1] for name in trusted())))
    try:
        built = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        line = f"{path}_target_={target}: cannot be imported ({brief(error)}); check the spelling"
        raise GraincodeError(line) from error
    if not target.startswith(("graincode.", "torch.optim.")):
        return None
    # fields of a dataclass are annotated in the modules of the classes that they come from
    function = built.__init__ if inspect.isclass(built) and "__dataclass_fields__" not in vars(built) else built
    hints = typing.get_type_hints(function, include_extras=True)
    return {name: hints.get(name, Any) for name in inspect.signature(built).parameters}
