"""What the settings of all samplers have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graincode.core.errors import GraincodeError
from graincode.sampling.guidance import SCHEDULES

_RANGES = {
    "temperature": (lambda x: x > 0, "more than 0; type sampler.top_k=1 for greedy"),
    "top_k": (lambda x: x >= 0, "0 (all) or more, such as sampler.{}=100"),
    "top_p": (lambda x: 0 < x <= 1, "more than 0 and at most 1, such as sampler.{}=0.95"),
    "min_p": (lambda x: 0 <= x < 1, "0 (all) to below 1, such as sampler.{}=0.05"),
}


def check_settings(sampler: object, other: str) -> None:
    """Refuse settings of truncation and guidance that are out of range.

    Args:
        sampler: with `guidance_schedule`, `temperature`, `top_k`, `top_p` and `min_p`.
        other: the prefix of the latter for what else it draws besides contents, such as "region_".
    Raises:
        GraincodeError: naming the setting.
    """
    for what in ("", other):
        for name, (fits, expected) in _RANGES.items():
            if not fits(value := getattr(sampler, what + name)):
                raise GraincodeError(f"{what}{name} {value}: expected {expected.format(what + name)}")
    check_choice(sampler, "guidance_schedule", SCHEDULES)


def check_choice(sampler: object, name: str, known: Mapping[str, Any]) -> None:
    """Refuse a setting that is none of the known ones."""
    if (value := getattr(sampler, name)) not in known:
        raise GraincodeError(f"{name} {value!r}: type sampler.{name}= one of {', '.join(known)}")


def truncation(sampler: object, what: str = "") -> dict[str, float]:
    """The settings of `core.logits.truncate` for contents, or with a prefix for what else is drawn."""
    return {name: getattr(sampler, what + name) for name in _RANGES}
