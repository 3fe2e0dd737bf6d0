"""One line for each error: the key, what was expected, what to type."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from graincode.config.schema import config_directory
from graincode.core.errors import GraincodeError
from graincode.runs.identity import flatten


def explain(error: Exception, job: str, overrides: list[str]) -> str:
    """One line that says what was wrong and what to type."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for cause in chain:
        if isinstance(cause, GraincodeError):
            return cause.line
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"there is no {group} {name!r}: type {group}= one of {', '.join(error.options)}"
    text = " ".join(" ".join(str(cause) for cause in chain).split())
    if unknown := re.search(r"Could not (?:override|find|delete) '([^']+)'", text):
        key = unknown.group(1).lstrip("+~")
        known = set(_known_keys(job, key, overrides))
        if owners := _owners(key):
            return f"unknown key {key!r}: type {' or '.join(owners)} too, which has it"
        return f"unknown key {key!r}: {nearest(key, known)}"
    if wrong := re.search(r"Value '(.*?)'.*could not be converted to (\w+).*full_key: (\S+)", text):
        value, kind, key = wrong.groups()
        kind = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}.get(kind, kind)
        return f"{key}={value}: expected {kind}; type for example {key}={_EXAMPLES.get(wrong.group(2), '...')}"
    if single := re.search(r"merging override (\S+?)=(\S+) Invalid value assigned: \w+ is not a ListConfig", text):
        key, value = single.groups()
        return f"{key}={value}: expected a list; type for example {key}=[{value}]"
    if missing := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{missing.group(1)} is not set: type {missing.group(1)}=..."
    return text


def _owners(key: str) -> list[str]:
    """The options of configuration groups that have a key, such as sampler=masked for sampler.steps."""
    parts, found = key.split("."), []
    for split in range(1, len(parts)):
        group = "/".join(parts[:split])
        for file in sorted((config_directory() / group).glob("*.yaml")):
            node: Any = OmegaConf.to_container(OmegaConf.load(file))
            for part in parts[split:]:
                node = node.get(part, ...) if isinstance(node, dict) else ...
            if node is not ...:
                found.append(f"{group}={file.stem}")
    return found


def nearest(word: str, known: set[str]) -> str:
    """What to type instead of an unknown word."""
    shown = sorted(name for name in known - {word} if "._" not in name)
    near = difflib.get_close_matches(word, shown, n=1, cutoff=0.5)
    if near:
        return f"type {near[0]}"
    heads = sorted({name.split(".")[0] for name in known})
    return f"type a key that begins with one of {', '.join(heads)}"


_EXAMPLES = {"Integer": "100", "Float": "0.5", "Boolean": "true"}


def _known_keys(job: str, key: str, overrides: list[str]) -> Iterator[str]:
    """Dotted keys and groups of a job's configuration, composed without the override that failed."""
    fitting = [o for o in overrides if "=" in o and not o.startswith("-") and o.split("=")[0].lstrip("+~") != key]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
        try:
            cfg = hydra.compose(job, overrides=fitting)
        except (HydraException, OmegaConfBaseException):
            cfg = hydra.compose(job)
    yield from flatten(OmegaConf.to_container(cfg, resolve=False), leaves_only=False)
    for folder in config_directory().rglob("*/"):
        yield folder.relative_to(config_directory()).as_posix()
