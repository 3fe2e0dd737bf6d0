"""Hydra's side of every job: from the command line to its `run`, and from a node to an object."""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from graincode.config.errors import Ending, Keys, border, ending, list_groups
from graincode.config.schema import identity_rules
from graincode.config.sweep import member_gpus, sweep_member, whole_sweep
from graincode.config.typed import readable
from graincode.config.versions import constructor_error, limits, main, register_resolver
from graincode.core.errors import GraincodeError, brief, check, print_anything

if TYPE_CHECKING:  # a job's modules are imported when it runs: --help and completion answer at once
    from graincode.core.layout import CodeLayout
    from graincode.runs.run import Run

log = logging.getLogger(__name__)


def job_main(job: str) -> None:
    """Run one job from the command line: compose its configuration, check it, and hand it over.

    Exit statuses: 0; 1 for a crash; 2 and one line on standard error for bad input (GRAINCODE_DEBUG=1 shows the
    traceback); 75 for a training that a signal stopped and that saved its state; 130 for Ctrl-C otherwise.
    """
    print_anything()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # exceptions reach us instead of Hydra's own printer
    register_resolver("graincode_groups", list_groups)
    register_resolver("graincode_dashes", lambda name: name.replace("_", "-"))
    register_resolver("graincode_token", lambda: secrets.token_hex(2), use_cache=True)

    typed = sys.argv[1:]

    def end(error: BaseException, arguments: Sequence[str] = ()) -> Ending:
        return ending(error, job, arguments or typed)

    @contextmanager
    def one_line_errors() -> Iterator[None]:
        try:
            yield
            sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as error:
            if (ended := end(error)).crash is not None:
                raise
            ended.show()
            sys.exit(ended.status)

    def compose_and_run(cfg: DictConfig) -> float | None:
        with one_line_errors(), sweep_member(end):  # here already: Hydra would add lines of its own on the way out
            from graincode.config.validate import validate
            from graincode.distributed.launch import launch

            validate(job, cfg, HydraConfig.get().overrides.task)
            cfg.experiment = HydraConfig.get().runtime.choices.get("experiment")
            hardware = build(cfg.hardware)
            with border(cfg), member_gpus(hardware, cfg.debug.dry) as gpus:
                if gpus or (hardware.is_spread and not cfg.debug.dry):
                    return launch(f"{__name__}.run_job", job, cfg, hardware, gpus)
                return run_job(job, cfg)
        return None  # of a member of a sweep that failed: what sweepers take as no value

    compose_and_run.__module__ = f"graincode.jobs.{job}"  # Hydra names the job after it
    with one_line_errors(), whole_sweep(end):
        sys.argv = [sys.argv[0], *(typed := readable(job, typed))]
        if "--help" in typed:  # most of the time would go into lists of groups, for which our template has no place
            Hydra.format_config_groups = lambda *_: ""
        main(job)(compose_and_run)()


def run_job(job: str, cfg: DictConfig) -> float:
    """Run a job on a checked configuration, as one of its processes; returns its objective. Errors have whole keys."""
    with border(cfg):
        return import_module(f"graincode.jobs.{job}").run(cfg)


def build(node: Any, **arguments: Any) -> Any:
    """Instantiate a checked node; a constructor's GraincodeError gets whole keys."""
    own = node
    if isinstance(node, DictConfig) and (key := node._get_full_key(None)):
        own = OmegaConf.select(deepcopy(node._get_root()), key)  # Hydra resolves what stands in its place
    try:
        return hydra.utils.instantiate(own, _convert_="all", **limits(), **arguments)
    except (InstantiationException, ValueError) as error:
        cause, place = constructor_error(error)
        if not isinstance(cause, ValueError):
            raise
        line = cause.line if isinstance(cause, GraincodeError) else brief(cause)
        raise GraincodeError(Keys(node._get_root()).explain(line, place)) from cause


def with_layout(model: DictConfig, layout: CodeLayout) -> dict[str, Any]:
    """Fill the layout into a model's node, and give the node resolved, as an export keeps it."""
    node = {"_target_": "graincode.core.layout.CodeLayout", **layout.to_config()}
    OmegaConf.update(model, "layout", node, merge=False)
    return OmegaConf.to_container(model, resolve=True)


def resolve_path(cfg: DictConfig, key: str, job: str, inside: str) -> Path:
    """The path that a key gives, where something must be; `latest` is what the last finished run of a job made."""
    value = OmegaConf.select(cfg, key)
    path = Path(value).expanduser()
    if value == "latest":
        newest = Path(cfg.runs_dir) / job / "latest"
        expected = f"a {job} run that has finished in {newest.parent} and has its {inside}, or a path"
        check(key, value, expected, (newest / inside).exists())
        path = newest.resolve() / inside
        log.info("%s: %s", key, path)
    check(key, value, "latest or a path where something is", path.exists())
    return path.resolve()


def open_run(job: str, cfg: DictConfig, images: Mapping[str, str] | None = None, **inputs: str) -> Run:
    """The directory of this run: `runs_dir/job/run_name`.

    The default name is the experiment's with 8 hex digits over the keys that matter, all but those of
    conf/identity.yaml. What a run reads (`inputs`: names and hashes of exports and codes) counts by its content, but
    `images` (what identifies those of each split, in words) not in the name: a run whose images have changed is the
    same run, and refused.
    """
    from graincode.files import short_hash
    from graincode.runs.checkpoint import read_about
    from graincode.runs.identity import identity_of, one_spelling
    from graincode.runs.run import Run

    config, known = OmegaConf.to_container(cfg, resolve=True), identity_rules()
    left_out, more, may_grow = [*known.left_out], {}, []
    if trainer := config.get("trainer"):
        if trainer["export"] != "best":
            left_out += known.left_out_unless_best
        if (state := trainer["resume"]) not in ("auto", "never"):
            is_state = (Path(state) / "state.json").is_file()
            check(
                "trainer.resume", state, "auto, never or a state of a run, such as .../state/step_000000250", is_state
            )
            inputs["resume"] = read_about(Path(state))["sha256"]
        may_grow = known.may_grow
        hardware = config["hardware"]
        tf32 = hardware["tf32"] and hardware["device"] == "gpu"
        more = {"hardware.mixed_precision": hardware["mixed_precision"], "hardware.tf32": tf32}
    identity = identity_of(config, left_out) | more | {f"inputs.{name}": value for name, value in inputs.items()}
    identity |= {key: one_spelling(identity[key]) for key in known.paths if identity.get(key)}
    name = cfg.run_name or f"{cfg.experiment or 'default'}-{short_hash(identity)}"
    return Run(Path(cfg.runs_dir) / job / name, config, identity, images, may_grow, known.places)
