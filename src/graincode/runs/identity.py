"""What of a configuration identifies a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from itertools import accumulate
from typing import Any


def identity_of(config: Mapping[str, Any], left_out: Sequence[str]) -> dict[str, Any]:
    """The settings that matter to a run's result, by dotted key.

    Args:
        config: nested mappings.
        left_out: patterns as of `fnmatch`, such as "*_path": keys that match, and all below them, are left out.
    """

    def matters(key: str) -> bool:
        above: Iterator[str] = accumulate(key.split("."), "{}.{}".format)
        return not any(fnmatch(name, pattern) for name in above for pattern in left_out)

    return {key: value for key, value in flatten(config).items() if matters(key)}


def flatten(node: Mapping[str, Any], prefix: str = "", leaves_only: bool = True) -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.", leaves_only)
            if leaves_only:
                continue
        flat[name] = value
    return flat
