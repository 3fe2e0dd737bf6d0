"""Hydra's side of every job: where the configuration lies, what its keys are, and errors that say what to type."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
import logging
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import torch
import typeguard
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import graincode
from graincode.core.codes import CodeLayout
from graincode.core.errors import GraincodeError
from graincode.engine.checkpoint import read_about
from graincode.engine.hardware import Hardware
from graincode.engine.interruption import STATUS, Stopped
from graincode.engine.launch import ProcessFailed, launch
from graincode.engine.run import Run
from graincode.engine.tables import sweep_member
from graincode.files import short_hash

log = logging.getLogger(__name__)

# keys that change how a run is carried out, not what comes out of it
_INCIDENTAL = (
    "experiment", "hardware", "logging", "debug", "runs_dir", "run_name", "cache_dir", "init_from",
    "features",  # whose identities, with their weights, are among the inputs
)  # fmt: skip
_INCIDENTAL_TRAINER = ("log_every", "eval_every", "eval_images", "checkpoint_every", "keep_checkpoints", "resume")


@dataclass
class TrainerConfig:
    """How long to train, and how often to look, evaluate and save; all in steps.

    Attributes:
        batch_size: items in each step, of all processes and micro-batches together.
        clip_grad_norm: limit of the gradients' norm; 0: none.
        ema_decay: of the averaged weights that are evaluated and exported; 0: the trained ones themselves.
        eval_images: of the validation split, at each evaluation.
        keep_checkpoints: how many of the newest states stay, besides the best.
        resume: "auto" goes on where this run stands, "never" refuses if it stands anywhere, and the path of a state of
            another run starts from it.
        export: the "last" weights, or those of the "best" evaluation.
    """

    steps: int = MISSING
    batch_size: int = MISSING
    warmup_steps: int = MISSING
    clip_grad_norm: float = MISSING
    ema_decay: float = MISSING
    log_every: int = MISSING
    eval_every: int = MISSING
    eval_images: int = MISSING
    checkpoint_every: int = MISSING
    keep_checkpoints: int = 2
    resume: str = "auto"
    export: str = "last"


@dataclass
class GeneratorTrainerConfig(TrainerConfig):
    """The same for codes, whose number differs from image to image.

    Attributes:
        length_window: steps whose images are dealt out among them by length, so that little is padded; 1: each step
            keeps its own, sorted, so that micro-batches pad less.
    """

    length_window: int = MISSING


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


def explain(error: Exception, job: str, overrides: list[str]) -> str:
    """One line that says what was wrong and what to type."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for cause in chain:
        if isinstance(cause, GraincodeError):
            return cause.line
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"there is no {group} {name!r}: type {group}= one of {', '.join(error.options)}"
    text = " ".join(" ".join(str(cause) for cause in chain).split())
    if unknown := re.search(r"Could not (?:override|find|delete) '([^']+)'", text):
        key = unknown.group(1).lstrip("+~")
        known = set(_known_keys(job, key, overrides))
        if owners := _owners(key):
            return f"unknown key {key!r}: type {' or '.join(owners)} too, which has it"
        return f"unknown key {key!r}: {nearest(key, known)}"
    if wrong := re.search(r"Value '(.*?)'.*could not be converted to (\w+).*full_key: (\S+)", text):
        value, kind, key = wrong.groups()
        kind = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}.get(kind, kind)
        return f"{key}={value}: expected {kind}; type for example {key}={_EXAMPLES.get(wrong.group(2), '...')}"
    if single := re.search(r"merging override (\S+?)=(\S+) Invalid value assigned: \w+ is not a ListConfig", text):
        key, value = single.groups()
        return f"{key}={value}: expected a list; type for example {key}=[{value}]"
    if missing := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{missing.group(1)} is not set: type {missing.group(1)}=..."
    return text


def _owners(key: str) -> list[str]:
    """The options of configuration groups that have a key, such as sampler=masked for sampler.steps."""
    parts, found = key.split("."), []
    for split in range(1, len(parts)):
        group = "/".join(parts[:split])
        for file in sorted((config_directory() / group).glob("*.yaml")):
            node: Any = OmegaConf.to_container(OmegaConf.load(file))
            for part in parts[split:]:
                node = node.get(part, ...) if isinstance(node, dict) else ...
            if node is not ...:
                found.append(f"{group}={file.stem}")
    return found


def nearest(word: str, known: set[str]) -> str:
    """What to type instead of an unknown word."""
    shown = sorted(name for name in known - {word} if "._" not in name)
    near = difflib.get_close_matches(word, shown, n=1, cutoff=0.5)
    if near:
        return f"type {near[0]}"
    heads = sorted({name.split(".")[0] for name in known})
    return f"type a key that begins with one of {', '.join(heads)}"


def check(job: str, overrides: list[str]) -> DictConfig:
    """Compose and validate a job's configuration, and give it.

    Raises:
        GraincodeError: what the job itself would say.
    """
    register_schemas()
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
            cfg = hydra.compose(job, overrides=overrides)
            validate(job, cfg)
    except (HydraException, OmegaConfBaseException) as error:
        raise GraincodeError(explain(error, job, overrides)) from error
    return cfg


_EXAMPLES = {"Integer": "100", "Float": "0.5", "Boolean": "true"}


def _known_keys(job: str, key: str, overrides: list[str]) -> Iterator[str]:
    """Dotted keys and groups of a job's configuration, composed without the override that failed."""
    fitting = [o for o in overrides if "=" in o and not o.startswith("-") and o.split("=")[0].lstrip("+~") != key]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
        try:
            cfg = hydra.compose(job, overrides=fitting)
        except (HydraException, OmegaConfBaseException):
            cfg = hydra.compose(job)
    yield from _flatten(OmegaConf.to_container(cfg, resolve=False), leaves_only=False)
    for folder in config_directory().rglob("*/"):
        yield folder.relative_to(config_directory()).as_posix()


def _flatten(node: Any, prefix: str = "", leaves_only: bool = True) -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{name}.", leaves_only)
            if leaves_only:
                continue
        flat[name] = value
    return flat


def validate(job: str, cfg: DictConfig) -> None:
    """Check a composed configuration: types of everything that will be instantiated, and numbers across keys.

    Raises:
        GraincodeError: naming the key and what to type.
    """
    raw = OmegaConf.to_container(cfg, resolve=False)
    for key, value in _flatten(raw).items():
        if value == "???":
            raise GraincodeError(f"{key} is not set: type {key}=...")
    _check_types(cfg, raw, "")
    positive = ["trainer.steps", "trainer.batch_size", "trainer.log_every", "trainer.eval_every", "trainer.eval_images",
                "trainer.checkpoint_every", "trainer.keep_checkpoints", "trainer.length_window", "calibration_images",
                "views", "batch_size", "num_samples", "given.images", "images.num_samples",
                "evaluation.inception_splits",
                "evaluation.kid_subsets", "evaluation.kid_subset_size", "evaluation.precision_neighbours",
                "evaluation.density_neighbours", "evaluation.subset"]  # fmt: skip
    for key in positive:
        value = OmegaConf.select(cfg, key)
        if value is not None and value < 1:
            raise GraincodeError(f"{key}={value}: expected 1 or more; type for example {key}=100")
    if not 0 <= (decay := OmegaConf.select(cfg, "trainer.ema_decay", default=0)) < 1:
        raise GraincodeError(f"trainer.ema_decay={decay}: expected 0 (off) to below 1; type trainer.ema_decay=0.999")
    if (export := OmegaConf.select(cfg, "trainer.export", default="last")) not in ("last", "best"):
        raise GraincodeError(f"trainer.export={export}: type trainer.export= one of last, best")
    if (keep := OmegaConf.select(cfg, "keep")) not in (None, "png", "npz"):
        raise GraincodeError(f"keep={keep}: type keep= one of png, npz, null")
    if (unit := OmegaConf.select(cfg, "given.unit", default="region")) not in ("region", "pixel"):
        raise GraincodeError(f"given.unit={unit}: type given.unit= one of region, pixel")
    if cfg.run_name is not None and (not re.fullmatch(r"[\w.-]+", cfg.run_name) or cfg.run_name == "latest"):
        raise GraincodeError(f"run_name={cfg.run_name}: expected letters, digits, '_', '-' and '.', and not latest")
    known = {f.name for f in dataclasses.fields(SCHEMAS[job])}
    for key in raw:
        if key not in known:
            raise GraincodeError(f"unknown key {key!r}: {nearest(key, known)}")
    if not 0 <= cfg.seed < 2**32:
        raise GraincodeError(f"seed={cfg.seed}: expected 0 or more, below 2^32; type seed=0")


def _check_types(cfg: DictConfig, raw: Any, path: str) -> None:
    if not isinstance(raw, dict):
        return
    target = raw.get("_target_")
    hints = _hints(target) if isinstance(target, str) else None
    for key, value in raw.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, str) and re.fullmatch(r"\$\{[\w.]+\}", value):
            source = value[2:-1]
        else:
            source = name
            _check_types(cfg, value, name)
        if hints is None or str(key).startswith("_") or (isinstance(value, dict) and "_target_" in value):
            continue
        if key not in hints:
            raise GraincodeError(f"unknown key {name!r}: {nearest(name, {f'{path}.{hint}' for hint in hints})}")
        found = OmegaConf.select(cfg, name)
        if isinstance(found, DictConfig):
            continue
        _check_value(found, hints[key], source)


def _check_value(value: Any, hint: Any, key: str) -> None:
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    if plain is None and key.endswith(("image_size", "grains", "codebook_size", "classes")):
        return  # a layout that the job fills in
    for candidate in (plain, _tuples(plain)):
        try:
            typeguard.check_type(candidate, hint, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
        except typeguard.TypeCheckError:
            continue
        return
    if choices := list(dict.fromkeys(_choices(hint))):
        kind = "one of" if isinstance(plain, str) and typing.get_origin(hint) is typing.Literal else "a list of some of"
        raise GraincodeError(f"{key}={plain}: type {key}= {kind} {', '.join(map(str, choices))}")
    for pattern, kind, example in _KINDS:
        if re.search(pattern, str(hint)):
            raise GraincodeError(f"{key}={plain}: expected {kind}; type for example {key}={example}")
    raise GraincodeError(f"{key}={plain}: expected {hint}")


def _choices(hint: Any) -> Iterator[Any]:
    """All values of the `Literal`s in an annotation."""
    if typing.get_origin(hint) is typing.Literal:
        yield from typing.get_args(hint)
        return
    for inner in typing.get_args(hint):
        yield from _choices(inner)


# the first pattern that fits an annotation; what it is in words; an example
_KINDS = (
    (r"tuple\[tuple", "a list of pairs", "[[8,8],[4,4]]"),
    (r"(Sequence|list)\[float", "a list of numbers", "[0.5,0.5]"),
    (r"(Sequence|list|tuple)\[", "a list", "[16,32]"),
    (r"\bbool\b", "true or false", "true"),
    (r"\bfloat\b", "a number", "0.5"),
    (r"\bint\b", "a whole number", "64"),
    (r"\bstr\b", "text", "name"),
)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _hints(target: str) -> dict[str, Any] | None:
    """Annotations of what a `_target_` of this package or an optimizer takes; None for other packages' classes."""
    if not target.startswith(("graincode.", "torch.optim.")):
        return None
    module, _, name = target.rpartition(".")
    try:
        made = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise GraincodeError(f"_target_ {target!r} is not to be found: look for a slip of the pen") from None
    # fields of a dataclass are annotated in the modules of the classes that they come from
    function = made.__init__ if inspect.isclass(made) and not dataclasses.is_dataclass(made) else made
    hints = typing.get_type_hints(function)
    hints.pop("return", None)
    return {name: hints.get(name, Any) for name in inspect.signature(made).parameters}


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
    identity = _flatten(kept)
    name = cfg.run_name or f"{cfg.experiment or 'default'}-{short_hash(identity)}"
    return Run(Path(cfg.runs_dir) / job / name, config, identity)


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
