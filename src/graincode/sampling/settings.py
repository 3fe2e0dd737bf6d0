"""What the settings of all samplers have in common."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar, Literal

from graincode.core.errors import GraincodeError
from graincode.sampling.guidance import SCHEDULES

_RANGES = {
    "temperature": (lambda x: x > 0, "more than 0; type sampler.top_k=1 for greedy"),
    "top_k": (lambda x: x >= 0, "0 (all) or more, such as sampler.{}=100"),
    "top_p": (lambda x: 0 < x <= 1, "more than 0 and at most 1, such as sampler.{}=0.95"),
    "min_p": (lambda x: 0 <= x < 1, "0 (all) to below 1, such as sampler.{}=0.05"),
}


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """How contents are drawn, and guidance; a sampler adds its own.

    Attributes:
        temperature, top_k, top_p, min_p: of the contents, see `core.logits.truncate`.
        guidance_scale: classifier-free guidance; 1 is the conditional model, at half the cost of any other value.
        guidance_schedule: how it comes in as an image is completed: "constant", "linear" or "cosine".
        name: of the sampler in configurations.
        other: prefix of temperature and truncation of what it draws besides contents.
    Raises:
        GraincodeError: a setting is out of range, or not finite, or a fraction where whole numbers are expected.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    guidance_scale: float = 1.0
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"

    name: ClassVar[str]
    other: ClassVar[str]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, default = getattr(self, field.name), "null" if field.default is None else field.default
            whole, number = type(field.default) is int, not isinstance(field.default, bool | str)
            bad = (whole and not isinstance(value, Integral)) or (isinstance(value, float) and not math.isfinite(value))
            if bad or (number and isinstance(value, bool)):
                raise GraincodeError(
                    f"{field.name} {value}: expected a {'whole' if whole else 'finite'} number; type for example "
                    f"sampler.{field.name}={default}"
                )
        for what in ("", self.other):
            for name, (fits, expected) in _RANGES.items():
                if not fits(value := getattr(self, what + name)):
                    raise GraincodeError(f"{what}{name} {value}: expected {expected.format(what + name)}")
        self.check_choice("guidance_schedule", SCHEDULES)

    def check_choice(self, name: str, known: Mapping[str, Any]) -> None:
        """Refuse a setting that is none of the known ones."""
        if (value := getattr(self, name)) not in known:
            raise GraincodeError(f"{name} {value!r}: type sampler.{name}= one of {', '.join(known)}")

    def truncation(self, what: str = "") -> dict[str, float]:
        """The settings of `core.logits.truncate` for contents, or with a prefix for what else is drawn."""
        return {name: getattr(self, what + name) for name in _RANGES}
