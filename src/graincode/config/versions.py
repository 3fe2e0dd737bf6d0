"""Hydra 1.3 and 1.4 as one, and what both may build of a configuration."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from graincode.config.schema import config_directory

_IS_1_4 = "execution_whitelist" in inspect.signature(hydra.main).parameters
_BASE: dict[str, Any] = {} if _IS_1_4 else {"version_base": "1.3"}


def trusted() -> tuple[str, ...]:
    """What a configuration may name as a `_target_`, as Hydra's patterns: our classes, optimizers, and those of the
    modules that `$GRAINCODE_PLUGINS` names, separated by commas."""
    plugins = filter(None, os.environ.get("GRAINCODE_PLUGINS", "").split(","))
    return ("graincode.*", "torch.optim.*", *(f"{name}.*" for name in plugins))


def main(job: str) -> Callable[[Any], Callable[[], Any]]:
    """`hydra.main` for a job."""
    more = {"execution_whitelist": trusted()} if _IS_1_4 else _BASE
    return hydra.main(config_path=str(config_directory()), config_name=job, **more)


def composing() -> AbstractContextManager[None]:
    """Hydra's context in which a job's configuration can be composed."""
    return hydra.initialize_config_dir(str(config_directory()), **_BASE)


def register_resolver(name: str, resolver: Callable[..., Any], use_cache: bool = False) -> None:
    """Have `${name:...}` stand for what a function gives."""
    register = OmegaConf.register_resolver if _IS_1_4 else OmegaConf.register_new_resolver
    register(name, resolver, replace=True, use_cache=use_cache)


def limits() -> dict[str, Any]:
    """Arguments of `hydra.utils.instantiate`, so that it builds what is `trusted` alone, where it can be told."""
    return {"_execution_whitelist_": trusted()} if _IS_1_4 else {}


def constructor_error(error: Exception) -> tuple[BaseException | None, str]:
    """What a constructor raised in `hydra.utils.instantiate`, and the key of its node."""
    text = str(error) if isinstance(error, InstantiationException) else "\n".join(getattr(error, "__notes__", ()))
    cause = error.__cause__ if isinstance(error, InstantiationException) else error
    return cause, text.partition("full_key: ")[2]
