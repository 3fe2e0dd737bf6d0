"""The keys of the jobs' root files, and where the configuration lies. Nodes with a `_target_` have its arguments."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf

import graincode
from graincode.core.errors import SEEDS, check

JOBS = ("train_tokenizer", "extract_codes", "train_generator", "sample", "evaluate")


@dataclass(frozen=True)
class Range:
    """What a value of the right type must fulfil, in words and as a function."""

    expected: str
    holds: Callable[[Any], Any]


Count = Annotated[int, Range("1 or more", lambda value: value >= 1)]
_NAME = Range(
    "letters, digits, '_', '-' and '.', the first none of '-.', and not latest or table.csv",
    re.compile(r"(?!(latest|table\.csv)$)\w[\w.-]*").fullmatch,
)

KEYS: dict[str, Any] = {
    "seed": Annotated[int, Range(SEEDS, lambda value: 0 <= value < 2**57)],
    "experiment": str | None,
    "runs_dir": str,
    "run_name": Annotated[str, _NAME] | None,
    "init_from": str | None,
    "calibration_images": Count | None,
    "tokenizer_path": str,
    "generator_path": str,
    "codes_path": str,
    "splits": list[Literal["train", "val", "test"]],
    "ratios": list[float] | None,
    "psnr": float | None,
    "views": Count,
    "num_samples": Count,
    "classes": list[int | str] | None,
    "given": dict[str, Any] | None,
    "given.codes_path": str,
    "given.split": str,
    "given.images": Count,
    "given.grains": int | None,
    "given.regions": int | None,
    "given.map": bool,
    "given.mask": str | None,
    "precision": Literal["float32", "tf32", "bfloat16"],  # of which not every job has all
    "keep": Literal["png", "npz"] | None,
    "cache_dir": str | None,
    "batch_size": Count,
    "debug.dry": bool,
}
"""Types and ranges, the same in all jobs; what a job has stands in its root file."""

ELSEWHERE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("images", "n", "count", "num_images", "samples"), ("num_samples", "images.num_samples")),
    **dict.fromkeys(("epochs", "num_epochs", "max_steps", "iterations"), ("trainer.steps",)),
    **dict.fromkeys(("bs", "batch"), ("trainer.batch_size", "batch_size")),
    **dict.fromkeys(("gpus", "num_gpus", "devices"), ("hardware.num_processes",)),
    **dict.fromkeys(("name", "exp_name"), ("run_name",)),
    **dict.fromkeys(("out", "output", "output_dir", "outdir"), ("runs_dir",)),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance"), ("sampler.guidance_scale",)),
    **dict.fromkeys(("amp", "fp16", "bf16"), ("hardware.mixed_precision",)),
    "learning_rate": ("optimizer.lr",),
    "num_workers": ("hardware.workers",),
    "dataset": ("data",),
    "resolution": ("data.image_size",),
}
"""What other programs call some keys; the first of them that a job has is meant."""


def root_keys(job: str) -> set[str]:
    """The keys at the root of a job's configuration, groups among them."""
    files = [_read(name) for name in (job, "job")]
    groups = [str(group) for entry in files[0].defaults if isinstance(entry, DictConfig) for group in entry]
    return {*files[0], *files[1], *groups} - {"defaults", "hydra", "search"}  # which sets what is Hydra's


def identity_rules() -> DictConfig:
    """What conf/identity.yaml says of keys."""
    return _read("identity")


def _read(name: str) -> DictConfig:
    return OmegaConf.load(config_directory() / f"{name}.yaml")


def config_directory() -> Path:
    """Where the configuration lies: in the installed package, or in the checkout that it was installed from."""
    package = Path(graincode.__file__).parent
    found = [folder for folder in (package / "conf", package.parents[1] / "conf") if folder.is_dir()]
    check("package", package, "conf in it, or beside src: install graincode anew", bool(found))
    return found[0]
