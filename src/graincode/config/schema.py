"""The keys of every job, and where their configuration lies.

A `Node` is checked against the constructor that its `_target_` names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import graincode
from graincode.core.errors import GraincodeError


@dataclass(frozen=True)
class Range:
    """What a value of the right type must fulfil, in words and as a function."""

    expected: str
    holds: Callable[[Any], bool]


Node = dict[str, Any]
"""Of a group, or with a `_target_`."""
Count = Annotated[int, Range("1 or more", lambda value: value >= 1)]
Seed = Annotated[int, Range("0 or more, below 2^32", lambda value: 0 <= value < 2**32)]
RunName = Annotated[
    str,
    Range(
        "letters, digits, '_', '-' and '.', and not latest",
        lambda value: re.fullmatch(r"[\w.-]+", value) is not None and value != "latest",
    ),
]


class Job(TypedDict):
    """Keys that all jobs have."""

    seed: Seed
    experiment: str | None
    runs_dir: str
    run_name: RunName | None
    hardware: Node
    debug: Node


class TrainTokenizer(Job):
    """Stage 1."""

    data: Node
    tokenizer: Node
    augmentation: Node
    calibration_images: Count | None
    init_from: str | None
    optimizer: Node
    logging: Node
    trainer: Node


class ExtractCodes(Job):
    """Images to codes on disk."""

    data: Node
    tokenizer_path: str
    splits: list[str]
    ratios: list[float] | None
    psnr: float | None
    views: Count
    augmentation: Node
    batch_size: Count


class TrainGenerator(Job):
    """Stage 2."""

    codes_path: str
    generator: Node
    init_from: str | None
    optimizer: Node
    logging: Node
    trainer: Node


class Given(TypedDict):
    """Real codes of which samples keep something; nothing by default.

    Attributes:
        grains, regions, map: keep the codes of the coarsest grains, of the first regions, or the grain map.
        mask: keep the codes of the regions all of whose pixels in an image file are nearer to white than to black or
            transparent.
    """

    codes_path: str
    split: str
    images: Count
    grains: int | None
    regions: int | None
    map: bool
    keep: list[int] | None
    redraw: list[int] | None
    mask: str | None
    unit: Literal["region", "pixel"]


class Sample(Job):
    """Codes and images from a generator."""

    generator_path: str
    tokenizer_path: str
    sampler: Node
    num_samples: Count
    classes: list[int] | None
    given: Given | None
    precision: Literal["float32", "bfloat16"]
    batch_size: Count


class Evaluate(Job):
    """Metrics of images against a reference."""

    data: Node
    evaluation: Node
    features: Node
    images: Node
    reference: Node
    tokenizer_path: str
    generator_path: str
    sampler: Node
    precision: Literal["float32", "bfloat16"]
    keep: Literal["png", "npz"] | None
    cache_dir: str | None
    batch_size: Count


SCHEMAS: dict[str, type] = {
    "train_tokenizer": TrainTokenizer,
    "extract_codes": ExtractCodes,
    "train_generator": TrainGenerator,
    "sample": Sample,
    "evaluate": Evaluate,
}


def config_directory() -> Path:
    """The directory of the configuration: in the installed package, or in the checkout that it was installed from.

    Raises:
        GraincodeError: it is in neither.
    """
    package = Path(graincode.__file__).parent
    for folder in (package / "conf", package.parents[1] / "conf"):
        if (folder / "train_tokenizer.yaml").is_file():
            return folder
    raise GraincodeError(f"no configuration beside {package}: install graincode anew (pip install -e . in a checkout)")


def flatten(node: dict[str, Any], prefix: str = "", nodes: bool = False) -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys; with `nodes`, inner mappings stand in it too."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat |= ({name: value} if nodes else {}) | flatten(value, f"{name}.", nodes)
        else:
            flat[name] = value
    return flat
