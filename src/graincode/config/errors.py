"""The border: errors of Hydra, of constructors and of a running job as one line with the key that was typed."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from graincode.config.schema import config_directory
from graincode.core.errors import GraincodeError
from graincode.runs.identity import flatten

REFERENCE = re.compile(r"\$\{([\w.]+)\}")
"""A value that stands for that of another key."""

_ARGUMENTS = re.compile(r"([A-Za-z_][\w.]*)=(.*?)(?=(?: and | )[A-Za-z_][\w.]*=|$)")


class Keys:
    """The keys of a job's whole configuration, each once: where a user types it."""

    def __init__(self, cfg: DictConfig) -> None:
        self._raw: Any = OmegaConf.to_container(cfg, resolve=False)
        flat = flatten(self._raw, nodes=True)
        own = [key for key, value in flat.items() if ".layout." not in key and not REFERENCE.fullmatch(str(value))]
        self.values = {key: flat[key] for key in own}  # without layouts, which are filled in by the job

    def typed(self, key: str) -> str:
        """The key that a key gets its value from: itself, or what `${...}` on the way to it names."""
        node, path = self._raw, ""
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
            path = f"{path}.{part}" if path else part
            if reference := REFERENCE.fullmatch(str(node)):
                path = self.typed(reference.group(1))
                node = self.values.get(path)
        return path

    def find(self, name: str, value: str, node: str = "") -> str | None:
        """The key of an argument: of the node that was built, or else of the same name and value, or name alone."""
        if name in self.values:
            return name
        if node and (key := self.typed(f"{node}.{name}")) in self.values:
            return key
        named = [key for key in self.values if key.rpartition(".")[2] == name]
        equal = [key for key in named if _is_same(self.values[key], value)]
        within = [key for key in equal if node and key.startswith(f"{self.typed(node.split('.')[0])}.")]
        if equal:
            return min(within or equal, key=lambda key: key.count("."))
        return named[0] if len(named) == 1 else None

    def explain(self, message: str, node: str = "") -> str:
        """A message about arguments, or about a path, with the keys that they came from."""
        head, colon, rest = message.partition(": ")
        if colon and (found := _ARGUMENTS.findall(head)) and head.startswith(f"{found[0][0]}="):
            keys = [f"{self.find(name, value, node) or name}={_listed(value)}" for name, value in found]
            return f"{' '.join(keys)}: {rest}"
        for key, value in self.values.items():
            paths = (value, str(Path(value).expanduser().resolve())) if isinstance(value, str) else ()
            if any("/" in path and message.startswith((f"{path}:", f"{path} ")) for path in paths):
                return f"{key}={message}"
        return message


def _listed(value: Any) -> str:
    """A value as it is typed."""
    text = str(value)
    if text[:1] not in ("[", "("):
        return {"None": "null", "True": "true", "False": "false"}.get(text, text)
    return re.sub(r"[\s'\"]", "", text).replace("(", "[").replace(")", "]").replace(",]", "]")


def _is_same(first: Any, second: str) -> bool:
    with suppress(TypeError, ValueError):
        return float(first) == float(second)
    return _listed(first) == _listed(second)


@contextmanager
def border(cfg: DictConfig) -> Iterator[None]:
    """Give a GraincodeError of the block whole keys, and raise one where a device's memory, or a disk, is full."""
    try:
        yield
    except GraincodeError as error:
        error.args = (Keys(cfg).explain(error.line),)
        raise
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's
            raise
        less = "batch_size= less" + (", or for samples precision=bfloat16" if "precision" in cfg else "")
        if "trainer" in cfg:
            more = "hardware.gradient_checkpointing=true or hardware.gradient_accumulation= more"
            less = f"trainer.batch_size= less, {more}"
        raise GraincodeError(f"{'. '.join(str(error).split('. ')[:2])}: type {less}") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        where = f" for {error.filename}" if error.filename else ""
        line = f"no room on the disk{where} ({error.strerror}): make room; the same command then goes on"
        raise GraincodeError(line) from error


# where Hydra says in words alone which key is unknown
_UNKNOWN = re.compile(r"Could not (?:override|delete from config\.|append to config\.|delete) '\+*~?([^'=]+)")
_IN_RECIPE = re.compile(r"^In '(\w+)/(\w+)': Could not override '([\w/]+)'")


def explain(error: Exception, job: str, overrides: Sequence[str]) -> str:
    """One line that says what was wrong with a command, and what to type."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    if ours := [cause for cause in chain if isinstance(cause, GraincodeError)]:
        return ours[0].line
    text = " ".join(" ".join(map(str, chain)).split())
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read: {error.message.splitlines()[0]}"
    if recipe := _IN_RECIPE.search(str(error)):
        group, name, other = recipe.groups()
        return f"{group}={name} is not for {job}, which has no {other}: type {group}= another"
    is_no_option = isinstance(error, MissingConfigException) or "Config group override" in text
    for group, _, name in (override.lstrip("+").partition("=") for override in overrides if is_no_option):
        if (config_directory() / group).is_dir() and name[:1] != "[" and name not in options(group):
            known = options(group, _groups(compose(job, with_hydra=True).hydra.runtime.choices))
            return f"{group}={name}: expected one of {', '.join(known) or 'null'}"
    if unknown := _UNKNOWN.search(text):
        return _of_unknown(unknown.group(1), job, overrides)
    for cause in chain:
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            return f"{cause.full_key}: {str(cause).splitlines()[0]}"
    return text


def _of_unknown(key: str, job: str, overrides: Sequence[str]) -> str:
    fitting = [o for o in overrides if "=" in o and not o.startswith("-") and o.split("=")[0].lstrip("+~") != key]
    cfg = compose(job, with_hydra=True)
    with suppress(HydraException, OmegaConfBaseException, ValueError):
        cfg = compose(job, fitting, with_hydra=True)
    groups = _groups(cfg.hydra.runtime.choices)
    if owners := _owners(key, groups):
        return f"unknown key {key!r}: type {' or '.join(owners)} too, which has it"
    known = {*groups, *(name for name in Keys(cfg).values if name.split(".")[0] != "hydra")}
    return f"unknown key {key!r}: {nearest(key, known)}"


def compose(job: str, overrides: Sequence[str] = (), with_hydra: bool = False) -> DictConfig:
    """A job's configuration, as its command composes it."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
        return hydra.compose(job, overrides=list(overrides), return_hydra_config=with_hydra)


def _groups(choices: DictConfig) -> list[str]:
    return sorted(group for group in choices if not group.startswith("hydra/"))


def options(group: str, groups: Collection[str] = ()) -> list[str]:
    """The options of a group; of recipes those that override no group that a job lacks."""
    files = sorted((config_directory() / group).glob("*.yaml"))
    if group == "experiment":
        files = [file for file in files if {*re.findall(r"override /([\w/]+):", file.read_text())} <= {*groups}]
    return [file.stem for file in files]


def list_groups(choices: DictConfig) -> str:
    """A line for each group that a job has, with its options: for --help."""
    groups = _groups(choices)
    found = ((group, options(group, groups)) for group in groups)
    return "\n".join(f"{group}: {', '.join(names)}" for group, names in found if names)


def _owners(key: str, groups: Collection[str]) -> list[str]:
    """The options of a job's groups that have a key, such as sampler=masked for sampler.steps."""
    found = []
    for group in groups:
        inner = key.removeprefix(f"{group.replace('/', '.')}.")
        for name in options(group) if inner != key else ():
            node = OmegaConf.load(config_directory() / group / f"{name}.yaml")
            if inner in flatten(OmegaConf.to_container(node), nodes=True):
                found.append(f"{group}={name}")
    return found


def nearest(key: str, known: set[str]) -> str:
    """What to type instead of an unknown key: one that ends the same, or one that is spelled nearly the same."""
    shown = sorted(name for name in known - {key} if "._" not in name)
    same = [name for name in shown if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = difflib.get_close_matches(key, same, 1, 0) or difflib.get_close_matches(key, shown, 1, 0.5)
    if near:
        return f"type {near[0]}"
    return f"type a key that begins with one of {', '.join(sorted({name.split('.')[0] for name in known}))}"
