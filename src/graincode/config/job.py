"""Hydra's side of every job: where the configuration lies, what its keys are, and errors that say what to type."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from graincode.config.errors import explain
from graincode.config.schema import config_directory, register_schemas
from graincode.config.sweep import sweep_member
from graincode.config.validate import validate
from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout
from graincode.distributed.hardware import Hardware
from graincode.distributed.launch import ProcessFailed, launch
from graincode.distributed.signals import STATUS, Stopped
from graincode.files import short_hash
from graincode.runs.checkpoint import read_about
from graincode.runs.identity import identity_of
from graincode.runs.run import Run

log = logging.getLogger(__name__)


def job_main(job: str, run: Callable[[DictConfig], float]) -> None:
    """Run one job from the command line: compose its configuration, check it, and hand it over.

    Exit statuses: 0; 1 for a crash; 2 and one line on standard error for bad input (GRAINCODE_DEBUG=1 shows the
    traceback); 75 for a training that a signal stopped and that saved its state; 130 for Ctrl-C otherwise.
    """
    register_schemas()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # exceptions reach us instead of Hydra's own printer

    @contextmanager
    def one_line_errors() -> Iterator[None]:
        try:
            yield
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            ours = isinstance(error, GraincodeError | HydraException | OmegaConfBaseException)
            if os.environ.get("GRAINCODE_DEBUG") or not (ours or "Config group override" in str(error)):
                raise
            rank = os.environ.get("RANK", "0")
            who = "" if rank == "0" else f"process {rank}: "
            print(f"error: {who}{explain(error, job, sys.argv[1:])}", file=sys.stderr)
            sys.exit(2)
        except (OSError, torch.OutOfMemoryError) as error:
            if os.environ.get("GRAINCODE_DEBUG") or (full := GraincodeError.of_no_room(error, job)) is None:
                raise
            print(f"error: {full}", file=sys.stderr)
            sys.exit(2)
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(STATUS)
        except ProcessFailed as failed:
            print(f"error: {failed}", file=sys.stderr)
            sys.exit(1)

    @functools.wraps(run)
    def checked(cfg: DictConfig) -> float:
        with one_line_errors():  # here already: Hydra would add lines of its own on the way out
            validate(job, cfg)
            cfg.experiment = HydraConfig.get().runtime.choices.get("experiment")
            hardware: Hardware = build(cfg.hardware)
            with sweep_member():
                if hardware.is_spread and not cfg.debug.dry:
                    return launch(job, cfg, hardware)
                return run(cfg)

    try:
        with one_line_errors():
            hydra.main(version_base="1.3", config_path=str(config_directory()), config_name=job)(checked)()
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def build(node: Any, **arguments: Any) -> Any:
    """Instantiate a checked node; errors of the constructors come through as they are."""
    try:
        return hydra.utils.instantiate(node, _convert_="all", **arguments)
    except InstantiationException as error:
        if isinstance(error.__cause__, GraincodeError):
            raise error.__cause__ from None
        raise


def with_layout(model: DictConfig, layout: CodeLayout) -> dict[str, Any]:
    """A model's node, resolved, with the layout filled in: what an export keeps, and what `build` takes."""
    OmegaConf.update(model, "layout", {**model.layout, **layout.to_config()}, merge=False)
    return OmegaConf.to_container(model, resolve=True)


def resolve_path(cfg: DictConfig, key: str, job: str, inside: str) -> Path:
    """The path that a key gives; `latest` stands for what the last finished run of a job made.

    Raises:
        GraincodeError: there is nothing at that path.
    """
    value = OmegaConf.select(cfg, key)
    if value == "latest":
        newest = Path(cfg.runs_dir) / job / "latest"
        if not newest.exists():
            raise GraincodeError(
                f"{key}=latest, but no {job} run has finished in {cfg.runs_dir}/{job}: "
                f"run graincode-{job.replace('_', '-')} first, or type {key}=/path"
            )
        path = newest.resolve() / inside
        log.info("%s: %s", key, path)
    else:
        path = Path(value).expanduser().resolve()
    if not path.exists():
        raise GraincodeError(f"{key}={value}: there is nothing at {path}; type {key}=latest or {key}=/path")
    return path


def open_run(job: str, cfg: DictConfig, **inputs: str) -> Run:
    """The directory of this run: `runs_dir/job/run_name`.

    The default name is the experiment's with 8 hex digits over the keys that matter (all but those of
    conf/identity.yaml), so that different runs, or the members of a sweep, never share a directory. What a run reads
    (`inputs`: names and content hashes of exports and codes) counts by its content, not by its path.
    """
    config = OmegaConf.to_container(cfg, resolve=True)
    known = OmegaConf.load(config_directory() / "identity.yaml")
    left_out, more = [*known.left_out], {}
    if trainer := config.get("trainer"):
        if trainer["export"] != "best":
            left_out += known.left_out_unless_best
        if trainer["resume"] not in ("auto", "never"):
            inputs["resume"] = read_about(Path(trainer["resume"]))["sha256"]
        hardware = config["hardware"]
        tf32 = hardware["tf32"] and hardware["device"] == "gpu"
        more = {"hardware.mixed_precision": hardware["mixed_precision"], "hardware.tf32": tf32}
    identity = identity_of(config, left_out) | more | {f"inputs.{name}": value for name, value in inputs.items()}
    name = cfg.run_name or f"{cfg.experiment or 'default'}-{short_hash(identity)}"
    return Run(Path(cfg.runs_dir) / job / name, config, identity)
