"""What of a configuration identifies a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from itertools import accumulate
from pathlib import Path
from typing import Any


def identity_of(config: Mapping[str, Any], left_out: Sequence[str]) -> dict[str, Any]:
    """The settings that matter to a result, by dotted key: all that match no `fnmatch` pattern, nor are below one."""

    def matters(key: str) -> bool:
        above = accumulate(key.split("."), "{}.{}".format)
        return not any(fnmatch(name, pattern) for name in above for pattern in left_out)

    return {key: value for key, value in flatten(config).items() if matters(key)}


def one_spelling(path: str) -> str:
    """A path that is there, or a pattern of paths, as the same text however it was typed; other names as they are."""
    found = Path(path).expanduser()
    return str(found.resolve()) if found.exists() or "*" in path else path


def flatten(node: Mapping[str, Any], prefix: str = "", nodes: bool = False) -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys; with `nodes`, those of the inner mappings too."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        is_node = isinstance(value, Mapping) and bool(value)
        if nodes or not is_node:
            flat[f"{prefix}{key}"] = value
        if is_node:
            flat |= flatten(value, f"{prefix}{key}.", nodes)
    return flat
