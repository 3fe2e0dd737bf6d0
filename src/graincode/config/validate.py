"""Types and ranges of a composed configuration."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any

import hydra
import typeguard
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from graincode.config.errors import explain, nearest
from graincode.config.schema import SCHEMAS, config_directory, register_schemas
from graincode.core.errors import GraincodeError
from graincode.runs.identity import flatten


def check(job: str, overrides: list[str]) -> DictConfig:
    """Compose and validate a job's configuration, and give it.

    Raises:
        GraincodeError: what the job itself would say.
    """
    register_schemas()
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
            cfg = hydra.compose(job, overrides=overrides)
            validate(job, cfg)
    except (HydraException, OmegaConfBaseException) as error:
        raise GraincodeError(explain(error, job, overrides)) from error
    return cfg


def validate(job: str, cfg: DictConfig) -> None:
    """Check a composed configuration: types of everything that will be instantiated, and numbers across keys.

    Raises:
        GraincodeError: naming the key and what to type.
    """
    raw = OmegaConf.to_container(cfg, resolve=False)
    for key, value in flatten(raw).items():
        if value == "???":
            raise GraincodeError(f"{key} is not set: type {key}=...")
    _check_types(cfg, raw, "")
    positive = ["trainer.steps", "trainer.batch_size", "trainer.log_every", "trainer.eval_every", "trainer.eval_images",
                "trainer.checkpoint_every", "trainer.keep_checkpoints", "trainer.bucketing_window",
                "calibration_images",
                "views", "batch_size", "num_samples", "given.images", "images.num_samples",
                "evaluation.inception_splits",
                "evaluation.kid_subsets", "evaluation.kid_subset_size", "evaluation.precision_neighbours",
                "evaluation.density_neighbours", "evaluation.subset"]  # fmt: skip
    for key in positive:
        value = OmegaConf.select(cfg, key)
        if value is not None and value < 1:
            raise GraincodeError(f"{key}={value}: expected 1 or more; type for example {key}=100")
    if not 0 <= (decay := OmegaConf.select(cfg, "trainer.ema_decay", default=0)) < 1:
        raise GraincodeError(f"trainer.ema_decay={decay}: expected 0 (off) to below 1; type trainer.ema_decay=0.999")
    if (export := OmegaConf.select(cfg, "trainer.export", default="last")) not in ("last", "best"):
        raise GraincodeError(f"trainer.export={export}: type trainer.export= one of last, best")
    if (keep := OmegaConf.select(cfg, "keep")) not in (None, "png", "npz"):
        raise GraincodeError(f"keep={keep}: type keep= one of png, npz, null")
    if (unit := OmegaConf.select(cfg, "given.unit", default="region")) not in ("region", "pixel"):
        raise GraincodeError(f"given.unit={unit}: type given.unit= one of region, pixel")
    if cfg.run_name is not None and (not re.fullmatch(r"[\w.-]+", cfg.run_name) or cfg.run_name == "latest"):
        raise GraincodeError(f"run_name={cfg.run_name}: expected letters, digits, '_', '-' and '.', and not latest")
    known = {f.name for f in dataclasses.fields(SCHEMAS[job])}
    for key in raw:
        if key not in known:
            raise GraincodeError(f"unknown key {key!r}: {nearest(key, known)}")
    if not 0 <= cfg.seed < 2**32:
        raise GraincodeError(f"seed={cfg.seed}: expected 0 or more, below 2^32; type seed=0")


def _check_types(cfg: DictConfig, raw: Any, path: str) -> None:
    if not isinstance(raw, dict):
        return
    target = raw.get("_target_")
    hints = _hints(target) if isinstance(target, str) else None
    for key, value in raw.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, str) and re.fullmatch(r"\$\{[\w.]+\}", value):
            source = value[2:-1]
        else:
            source = name
            _check_types(cfg, value, name)
        if hints is None or str(key).startswith("_") or (isinstance(value, dict) and "_target_" in value):
            continue
        if key not in hints:
            raise GraincodeError(f"unknown key {name!r}: {nearest(name, {f'{path}.{hint}' for hint in hints})}")
        found = OmegaConf.select(cfg, name)
        if isinstance(found, DictConfig):
            continue
        _check_value(found, hints[key], source)


def _check_value(value: Any, hint: Any, key: str) -> None:
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    if plain is None and key.endswith(("image_size", "grains", "codebook_size", "classes")):
        return  # a layout that the job fills in
    for candidate in (plain, _tuples(plain)):
        try:
            typeguard.check_type(candidate, hint, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
        except typeguard.TypeCheckError:
            continue
        return
    if choices := list(dict.fromkeys(_choices(hint))):
        kind = "one of" if isinstance(plain, str) and typing.get_origin(hint) is typing.Literal else "a list of some of"
        raise GraincodeError(f"{key}={plain}: type {key}= {kind} {', '.join(map(str, choices))}")
    for pattern, kind, example in _KINDS:
        if re.search(pattern, str(hint)):
            raise GraincodeError(f"{key}={plain}: expected {kind}; type for example {key}={example}")
    raise GraincodeError(f"{key}={plain}: expected {hint}")


def _choices(hint: Any) -> Iterator[Any]:
    """All values of the `Literal`s in an annotation."""
    if typing.get_origin(hint) is typing.Literal:
        yield from typing.get_args(hint)
        return
    for inner in typing.get_args(hint):
        yield from _choices(inner)


# the first pattern that fits an annotation; what it is in words; an example
_KINDS = (
    (r"tuple\[tuple", "a list of pairs", "[[8,8],[4,4]]"),
    (r"(Sequence|list)\[float", "a list of numbers", "[0.5,0.5]"),
    (r"(Sequence|list|tuple)\[", "a list", "[16,32]"),
    (r"\bbool\b", "true or false", "true"),
    (r"\bfloat\b", "a number", "0.5"),
    (r"\bint\b", "a whole number", "64"),
    (r"\bstr\b", "text", "name"),
)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _hints(target: str) -> dict[str, Any] | None:
    """Annotations of what a `_target_` of this package or an optimizer takes; None for other packages' classes."""
    if not target.startswith(("graincode.", "torch.optim.")):
        return None
    module, _, name = target.rpartition(".")
    try:
        made = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise GraincodeError(f"_target_ {target!r} is not to be found: look for a slip of the pen") from None
    # fields of a dataclass are annotated in the modules of the classes that they come from
    function = made.__init__ if inspect.isclass(made) and not dataclasses.is_dataclass(made) else made
    hints = typing.get_type_hints(function)
    hints.pop("return", None)
    return {name: hints.get(name, Any) for name in inspect.signature(made).parameters}
