"""The keys of every job."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

import graincode
from graincode.core.errors import GraincodeError
from graincode.training.settings import GeneratorTrainerConfig, TrainerConfig


@dataclass
class JobConfig:
    """Keys that all jobs have. Groups are `Any`: their keys are checked against what they instantiate."""

    seed: int = 0
    experiment: str | None = None
    runs_dir: str = "runs"
    run_name: str | None = None
    hardware: Any = MISSING
    debug: Any = MISSING


@dataclass
class TrainTokenizerConfig(JobConfig):
    """Stage 1."""

    data: Any = MISSING
    tokenizer: Any = MISSING
    augmentation: Any = MISSING
    calibration_images: int | None = None
    init_from: str | None = None
    optimizer: Any = MISSING
    logging: Any = MISSING
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


@dataclass
class ExtractCodesConfig(JobConfig):
    """Images to codes on disk."""

    data: Any = MISSING
    tokenizer_path: str = MISSING
    splits: list[str] = MISSING
    ratios: list[float] | None = None
    psnr: float | None = None
    views: int = MISSING
    augmentation: Any = MISSING
    batch_size: int = MISSING


@dataclass
class TrainGeneratorConfig(JobConfig):
    """Stage 2."""

    codes_path: str = MISSING
    generator: Any = MISSING
    init_from: str | None = None
    optimizer: Any = MISSING
    logging: Any = MISSING
    trainer: GeneratorTrainerConfig = field(default_factory=GeneratorTrainerConfig)


@dataclass
class GivenConfig:
    """Real codes of which samples keep something; nothing by default.

    Attributes:
        grains, regions, map: keep the codes of the coarsest grains, of the first regions, or the grain map.
        keep, redraw: keep the codes of the regions in a box [top, left, bottom, right], or of all others.
        mask: keep the codes of the regions all of whose pixels in an image file are nearer to white than to black or
            transparent.
        unit: of boxes, "region" or "pixel".
    """

    codes_path: str = MISSING
    split: str = MISSING
    images: int = MISSING
    grains: int | None = None
    regions: int | None = None
    map: bool = False
    keep: list[int] | None = None
    redraw: list[int] | None = None
    mask: str | None = None
    unit: str = "region"


@dataclass
class SampleConfig(JobConfig):
    """Codes and images from a generator."""

    generator_path: str = MISSING
    tokenizer_path: str = MISSING
    sampler: Any = MISSING
    num_samples: int = MISSING
    classes: list[int] | None = None
    given: GivenConfig | None = field(default_factory=GivenConfig)
    precision: str = MISSING
    batch_size: int = MISSING


@dataclass
class EvaluateConfig(JobConfig):
    """Figures of images against a reference."""

    data: Any = MISSING
    evaluation: Any = MISSING
    features: Any = MISSING
    images: Any = MISSING
    reference: Any = MISSING
    tokenizer_path: str = MISSING
    generator_path: str = MISSING
    sampler: Any = MISSING
    precision: str = MISSING
    keep: str | None = None
    cache_dir: str | None = None
    batch_size: int = MISSING


SCHEMAS = {
    "train_tokenizer": TrainTokenizerConfig,
    "extract_codes": ExtractCodesConfig,
    "train_generator": TrainGeneratorConfig,
    "sample": SampleConfig,
    "evaluate": EvaluateConfig,
}


def register_schemas() -> None:
    """Make the schemas known to Hydra; the root files name them."""
    for name, schema in SCHEMAS.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)


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
