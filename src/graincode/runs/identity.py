"""What of a configuration identifies a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from graincode.files import short_hash
from graincode.runs.checkpoint import read_about
from graincode.runs.run import Run

# keys that change how a run is carried out, not what comes out of it
_INCIDENTAL = (
    "experiment", "hardware", "logging", "debug", "runs_dir", "run_name", "cache_dir", "init_from",
    "features",  # whose identities, with their weights, are among the inputs
)  # fmt: skip
_INCIDENTAL_TRAINER = ("log_every", "eval_every", "eval_images", "checkpoint_every", "keep_checkpoints", "resume")


def open_run(job: str, cfg: DictConfig, **inputs: str) -> Run:
    """The directory of this run: `runs_dir/job/run_name`.

    The default name is the experiment's with 8 hex digits over the keys that matter, so that different runs, or the
    members of a sweep, never share a directory. What a run reads (`inputs`: names and content hashes of exports and
    codes) counts by its content, not by its path.
    """
    config = OmegaConf.to_container(cfg, resolve=True)
    kept = {k: v for k, v in config.items() if k not in _INCIDENTAL and not k.endswith("_path")}
    paths = ("path", "codes_path", "lpips_weights", "mask")  # what lies there is among the inputs
    for group in ("images", "reference", "evaluation", "given"):
        if kept.get(group):
            kept[group] = {k: v for k, v in kept[group].items() if k not in paths}
    if "perceptual" in kept.get("tokenizer", {}):  # the same of the network behind a loss
        perceptual = {k: v for k, v in kept["tokenizer"]["perceptual"].items() if k != "weights"}
        kept["tokenizer"] = kept["tokenizer"] | {"perceptual": perceptual}
    if kept.get("data"):
        kept["data"] = {k: v for k, v in kept["data"].items() if k != "cache"}
    if "trainer" in kept:
        trainer = kept["trainer"]
        kept["trainer"] = {k: v for k, v in trainer.items() if k not in _INCIDENTAL_TRAINER}
        if trainer["export"] == "best":  # then it matters which steps are looked at, and how
            kept["trainer"] |= {k: trainer[k] for k in ("eval_every", "eval_images")}
        if trainer["resume"] not in ("auto", "never"):
            inputs["resume"] = read_about(Path(trainer["resume"]))["sha256"]
        hardware = config["hardware"]
        tf32 = hardware["tf32"] and hardware["device"] == "gpu"
        kept["precision"] = {"mixed_precision": hardware["mixed_precision"], "tf32": tf32}
    if inputs:
        kept["inputs"] = inputs
    identity = flatten(kept)
    name = cfg.run_name or f"{cfg.experiment or 'default'}-{short_hash(identity)}"
    return Run(Path(cfg.runs_dir) / job / name, config, identity)


def flatten(node: Any, prefix: str = "", leaves_only: bool = True) -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{name}.", leaves_only)
            if leaves_only:
                continue
        flat[name] = value
    return flat
