"""The border: errors of Hydra, of constructors and of a running job as one line with the key that was typed."""

from __future__ import annotations

import difflib
import errno
import os
import re
import select
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from graincode.config.schema import ELSEWHERE, JOBS, config_directory, root_keys
from graincode.config.typed import NoOverride, for_shell, parse, read_flags, readable
from graincode.config.versions import composing
from graincode.core.errors import GraincodeError, brief, one_line
from graincode.distributed.signals import STATUS, ProcessFailed, Stopped
from graincode.runs.identity import flatten

REFERENCE = re.compile(r"\$\{([\w.]+)\}")
"""A value that stands for that of another key."""

_LISTS = re.compile(r"\[[\d.,\s\[\]]+\]")
_ADVISED = re.compile(r"\bgive (\w+)=")
_ARGUMENTS = re.compile(r"([A-Za-z_][\w.]*)=(.*?)(?=(?: and | )[A-Za-z_][\w.]*=|$)")


class Keys:
    """The keys of a job's whole configuration, each once: where a user types it."""

    def __init__(self, cfg: DictConfig) -> None:
        self._raw: Any = OmegaConf.to_container(cfg, resolve=False)
        flat = {key: value for key, value in flatten(self._raw, nodes=True).items() if ".layout." not in key}
        self.values = {key: value for key, value in flat.items() if not REFERENCE.fullmatch(str(value))}

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
        if node and (key := self.typed(f"{node}.{name}")) in self.values:
            return key
        named = [key for key in self.values if key.rpartition(".")[2] == name]
        equal = [key for key in named if _is_same(self.values[key], value)]
        within = f"{self.typed(node.split('.')[0])}."
        equal.sort(key=lambda key: (not key.startswith(within), key.count(".")))
        return equal[0] if equal else named[0] if len(named) == 1 else None

    def _advised(self, found: re.Match[str]) -> str:
        """The advice to give an argument, with its key: that on top, if there are several."""
        leaves = [key for key, value in self.values.items() if not isinstance(value, dict)]
        named = [key for key in leaves if key.rpartition(".")[2] == found[1]]
        return f"give {min(named, key=lambda key: key.count('.'), default=found[1])}="

    def explain(self, message: str, node: str = "") -> str:
        """A message about arguments, or about a path, with the keys that they came from."""
        message = _ADVISED.sub(self._advised, message)
        head, colon, rest = message.partition(": ")
        if colon and (found := _ARGUMENTS.findall(head)) and head.startswith(f"{found[0][0]}="):
            keys = [f"{self.find(name, value, node) or name}={as_typed(value)}" for name, value in found]
            return f"{' '.join(keys)}: {_LISTS.sub(lambda found: found[0].replace(' ', ''), rest)}"
        for key, value in self.values.items():
            paths = (value, str(Path(value).expanduser().resolve())) if isinstance(value, str) else ()
            if message.startswith(
                tuple(path + after for path in paths for after in (": ", " is ", " has ", " holds "))
            ):
                return f"{key}={message}"
        return message


_WORDS = {"None": "null", "True": "true", "False": "false"}


def as_typed(value: Any) -> str:
    """A value as it is typed."""
    text = str(value)
    if text[:1] in ("[", "("):
        text = re.sub(r"[\s'\"]", "", text).replace("(", "[").replace(")", "]").replace(",]", "]")
    elif text not in _WORDS:
        return text
    return re.sub(r"\b(None|True|False)\b", lambda word: _WORDS[word[0]], text)


def _is_same(first: Any, second: str) -> bool:
    with suppress(TypeError, ValueError):
        return float(first) == float(second)
    return as_typed(first) == as_typed(second)


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
        less = "a smaller batch_size" + (", or for samples precision=bfloat16" if "precision" in cfg else "")
        more = "hardware.gradient_checkpointing=true or a larger hardware.gradient_accumulation"
        less = f"a smaller trainer.batch_size, {more}" if "trainer" in cfg else less
        raise GraincodeError(f"{'. '.join(str(error).split('. ')[:2])}: give {less}") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        line = f"no room on the disk for {error.filename or 'results'} ({error.strerror}): make room, and go on"
        raise GraincodeError(line) from error


_UNUSABLE = errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG
_UNREAD = 141  # as a shell has it of a command that wrote to `head` for too long


def _is_unread(number: int) -> bool:
    """Whether a file descriptor is a pipe that nothing reads any more."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(number, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


@dataclass(frozen=True)
class Ending:
    """How a job ended: its exit status, a line that says why, and the error, if its traceback is to be shown."""

    status: int = 0
    line: str = ""
    crash: BaseException | None = None

    def show(self) -> None:
        """Print it to standard error."""
        if self.status == _UNREAD:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still to be flushed
        elif self.crash is not None:
            traceback.print_exception(self.crash)
        else:
            print(self.line if self.status in (STATUS, 130) else f"error: {self.line}", file=sys.stderr)


def ending(error: BaseException, job: str, arguments: Sequence[str]) -> Ending:
    """What an error makes of a job: 2 for bad input, 75 for a signal, 130 for Ctrl-C, 1 for a crash."""
    if isinstance(error, Stopped | ProcessFailed):
        return Ending(STATUS if isinstance(error, Stopped) else 1, one_line(str(error)))
    if isinstance(error, BrokenPipeError) and _is_unread(1):
        return Ending(_UNREAD, "what reads the output has ended")
    if isinstance(error, KeyboardInterrupt):
        return Ending(130, "interrupted: the same command goes on from the last checkpoint")
    if isinstance(error, SystemExit):
        return Ending(int(error.code or 0), "stopped")
    debug = error if os.environ.get("GRAINCODE_DEBUG") else None
    if isinstance(error, OSError) and error.errno in _UNUSABLE and error.filename:  # Hydra's directory of a sweep, say
        advice = "make it a place to write to, or give another, such as by runs_dir="
        return Ending(2, one_line(f"{error.filename}: {error.strerror}; {advice}"), debug)
    ours = isinstance(error, GraincodeError | HydraException | OmegaConfBaseException)
    if not ours:
        return Ending(1, f"{type(error).__name__}: {brief(error)}", error)
    who = f"process {rank}: " if (rank := os.environ.get("RANK", "0")) != "0" else ""
    line = who + one_line(explain(error, job, arguments))
    return Ending(2, line, debug)


# where Hydra says in words alone which key, or recipe, is wrong
_UNKNOWN = re.compile(r"Could not (?:override|delete from config\.|append to config\.|delete) '\+*~?([^'=]+)")
_IN_RECIPE = re.compile(r"^In '(\w+)/(\w+)': Could not override '([\w/]+)'")
_THERE = re.compile(r"Multiple values for ([\w/@]+)\.|An item is already at '([\w.]+)'")
_RESOLVING = r"^\w+ raised while resolving interpolation: "
_EXTRAS = {"optuna": "optuna", "joblib": "joblib", "submitit_slurm": "slurm", "submitit_local": "slurm"}
_SEVERAL = re.compile(r"Ambiguous value for argument '([^=]+)=([^']*)'")


def explain(error: BaseException, job: str, arguments: Sequence[str]) -> str:
    """One line that says what was wrong with a command, and what to type."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    if ours := [cause for cause in chain if isinstance(cause, GraincodeError)]:
        return ours[0].line
    text = " ".join(" ".join(map(str, chain)).split())
    flags = read_flags(arguments)
    folder = [f"hydra.searchpath=[file://{Path(flags.config_dir).absolute()}]"] if flags.config_dir else []
    overrides = [*flags.overrides, *folder]
    if isinstance(error, NoOverride):
        advice = _of_no_override(error, job)
        return advice if advice.startswith(error.words) else f"{error.words} cannot be read: {advice}"
    unread = error.override.partition("=") if isinstance(error, OverrideParseException) else ("", "", "")
    if unread[0] and parse(f"{unread[0]}=1") is not None:
        is_text = re.search(r"[^\W\d]{2}|/", unread[2])
        advice = (
            f"type {for_shell(unread[0], unread[2])}"
            if is_text
            else "expected one value, with brackets and quotation marks in pairs"
        )
        return f"{error.override} cannot be read: {advice}"
    if several := _SEVERAL.search(text):
        key, value = several.groups()
        others = [override for override in overrides if override.split("=")[0].lstrip("+") != key]
        return f"{key}={value}: {_of_several(key, value, compose(job, others))}add --multirun for a sweep"
    if there := _THERE.search(text):
        key = there.group(1) or there.group(2)
        value = next((one.partition("=")[2] for one in overrides if one.startswith(f"+{key}=")), "")
        return f"+{key}={value}: {key} is there already; type {key}={value}"
    recipe, unknown = _IN_RECIPE.search(str(error)), _UNKNOWN.search(text)
    typed = {
        name.lstrip("+~"): value.strip("\"'") for name, _, value in (override.partition("=") for override in overrides)
    }
    key = unread[0] or (unknown.group(1) if unknown else "")
    try:
        cfg = compose(job, [o for o in overrides if "=" in o and o.split("=")[0].lstrip("+~") != key], with_hydra=True)
    except (HydraException, OmegaConfBaseException, ValueError):
        cfg = compose(job, [o for o in overrides if o.startswith("hydra.searchpath=")], with_hydra=True)
    runtime = cfg.hydra.runtime
    if key and not recipe:
        return f"unknown key {key!r}: {_of_unknown(key, typed.get(key, ''), job, cfg)}"
    group, _, name = str(getattr(error, "missing_cfg_file", None) or "").rpartition("/")
    if recipe:
        group, name, other = recipe.groups()
    if group.startswith("hydra/") and name in _EXTRAS:
        return f"{group}={name} is not installed: pip install graincode[{_EXTRAS[name]}]"
    if group:
        why = f" is not for {job}, which has no {other}" if recipe else ""
        return f"{group}={name}{why}: expected one of {', '.join(options(group, runtime)) or 'null'}"
    for cause in chain:
        if isinstance(cause, OmegaConfBaseException) and cause.full_key not in (None, "", "value"):  # of a text
            return f"{cause.full_key}: {re.sub(_RESOLVING, '', str(cause).splitlines()[0])}"
    if cut := [override for override in overrides if "${" in override]:
        return f"{cut[0]} cannot be read: expected ${{KEY}} or ${{oc.env:NAME}}"
    return text


def _of_several(key: str, value: str, cfg: DictConfig) -> str:
    """How values with commas between them are typed for a key, beside those of a sweep."""
    now = OmegaConf.select(cfg, key)
    if isinstance(now, int | float) and re.fullmatch(r"\d{1,3}(,\d{3})+", value):
        return f"type {key}={value.replace(',', '')}, or "
    if key == "features" or isinstance(now, ListConfig) or (now is None and re.fullmatch(r"[\d.,eE+-]*", value)):
        return f"type {key}=[{value}] for a list, or "
    if (config_directory() / key).is_dir():
        return ""
    return f"type {for_shell(key, value)} for text, or " if now is None or isinstance(now, str) else ""


def _of_no_override(error: NoOverride, job: str) -> str:
    override = shlex.quote(f"{error.key}={error.value}")
    if not error.key or not error.value:
        return f"type {override}..." if error.key else "type key=value"
    try:
        compose(job, readable(job, [f"{error.key}={error.value}"]))
    except (HydraException, OmegaConfBaseException, ValueError) as other:
        return explain(other, job, [f"{error.key}={error.value}"])
    return f"type {override}"


def _of_unknown(key: str, value: str, job: str, cfg: DictConfig) -> str:
    head = re.split(r"[./]", key)[0]
    groups, keys = _groups(cfg.hydra.runtime), Keys(cfg).values
    if same := [name for name in ELSEWHERE.get(key, ()) if name in keys or name in groups]:
        return f"type {same[0]}={value}"
    if others := [name for name in JOBS if head in root_keys(name) - root_keys(job)]:
        return f"it belongs to {' and '.join(others)}"
    owners = _owners(key, cfg.hydra.runtime)
    if named := [group for group in groups if group.endswith(f"/{key}")]:
        return f"type {named[0]}={value}"
    if exact := [option for option, own in owners.items() if own == key]:
        return f"type {' or '.join(exact)} too, which has it"
    now = {*groups, *keys}
    advice = nearest(key, {name for name in {*owners.values(), *now} if not name.startswith("hydra")})
    if others := [option for option, own in owners.items() if own not in now and advice == f"type {own}"]:
        return f"{advice}={value} {others[0]}"
    return advice


def compose(job: str, overrides: Sequence[str] = (), with_hydra: bool = False) -> DictConfig:
    """A job's configuration, as its command composes it."""
    GlobalHydra.instance().clear()
    with composing():
        return hydra.compose(job, overrides=list(overrides), return_hydra_config=with_hydra)


def _groups(runtime: DictConfig) -> list[str]:
    return sorted(group for group in runtime.choices if not group.startswith("hydra/"))


def _files(group: str, runtime: DictConfig) -> dict[str, Path]:
    """The files of a group in all directories of Hydra's search path, by option."""
    folders = [Path(source.path) / group for source in runtime.config_sources if source.schema == "file"]
    return {file.stem: file for folder in reversed(folders) for file in sorted(folder.glob("*.yaml"))}


def options(group: str, runtime: DictConfig) -> list[str]:
    """The options of a group; of recipes and searches those that set nothing in a group that a job lacks."""
    files, groups = _files(group, runtime), {*_groups(runtime)}
    needed = {
        name: re.findall(r"override /(?!hydra)([\w/]+):|^ +(\w+)[./][\w./]+: ", file.read_text(encoding="utf-8"), re.M)
        for name, file in files.items()
    }
    return sorted(
        name for name in files
        if group not in ("experiment", "search") or groups.issuperset(filter(None, sum(needed[name], ())))
    )  # fmt: skip


def list_groups(runtime: DictConfig) -> str:
    """A line for each group that a job has, with its options: for --help."""
    return "\n".join(f"{group}: {', '.join(options(group, runtime)) or 'null'}" for group in _groups(runtime))


def _owners(key: str, runtime: DictConfig) -> dict[str, str]:
    """By option of a job's groups, such as sampler=masked for sampler.steps: this key, or one with its last part."""
    found = {}
    for group in _groups(runtime):
        prefix = f"{group.replace('/', '.')}."
        for name, file in _files(group, runtime).items() if key.startswith(prefix) else ():
            own = [f"{prefix}{inner}" for inner in flatten(OmegaConf.to_container(OmegaConf.load(file)), nodes=True)]
            same = [inner for inner in own if inner.rpartition(".")[2] == key.rpartition(".")[2]]
            found |= {f"{group}={name}": key if key in own else same[0]} if same else {}
    return found


def nearest(key: str, known: set[str]) -> str:
    """What to type instead of an unknown key: one that ends the same, or one that is spelled nearly the same."""
    shown = sorted(name for name in known - {key} if "._" not in name)
    same = [name for name in shown if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = difflib.get_close_matches(key, same, 1, 0) or difflib.get_close_matches(key, shown, 1, 0.75)
    if near:
        return f"type {near[0]}"
    return f"type a key that begins with one of {', '.join(sorted({re.split('[./]', name)[0] for name in known}))}"
