"""What is typed on a command line, as Hydra's grammar has it: text that it cannot read is text."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn, get_args

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from graincode.config.schema import KEYS, config_directory, root_keys
from graincode.core.errors import GraincodeError

_KEY_VALUE = re.compile(r"(?s)(\+{0,2})([\w$@:/.-]+)=(.*)")
_HOME = re.compile(r"(^|,)~(?=/|,|$)")


class NoOverride(HydraException):
    """Words that are no override, such as `--seed 1`, and the key and value that they may stand for."""

    def __init__(self, words: str, key: str, value: str) -> None:
        super().__init__(words)
        self.words, self.key, self.value = words, key, value


def readable(job: str, arguments: Sequence[str]) -> list[str]:
    """Arguments that Hydra reads as they were meant, flags first.

    A value that its grammar cannot read is quoted, unless it begins as a list, a mapping or a quotation; so is one of a
    key that takes text and nothing else, such as `run_name=1e3`, and in sweeps a number that Hydra would spell in
    another way. `~` is the home directory.

    Raises:
        NoOverride: for words between the overrides.
    """
    parsed = read_flags(arguments)
    overrides = parsed.overrides
    wrong = {*parsed.unknown, *(word for word in overrides if not re.match(r"~|[^=-][^=]*=", word))}
    if place := [i for i, word in enumerate(arguments) if word in wrong]:
        raise _no_override(job, arguments, place[0])
    sweeps = parsed.multirun or "hydra.mode=MULTIRUN" in overrides
    return [*parsed.flags, *(_readable(word, sweeps) for word in overrides)]


def read_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Hydra's flags wherever they stand; also as words in `flags`; other words are `overrides`, or `unknown` flags.

    Raises:
        GraincodeError: for a flag whose value is missing or is none of its choices, and for one that reads a pickle.
    """
    words = [*arguments]
    for place, word in enumerate(words[:-1]):
        if word in ("--info", "-i") and "=" in words[place + 1]:  # which argparse would take for what is to be shown
            words[place] = "--info=all"
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    parsed, unknown = parser.parse_known_intermixed_args(words)
    given = {name: value for name, value in vars(parsed).items() if value not in (None, False) and name != "overrides"}
    if "experimental_rerun" in given:
        raise GraincodeError("--experimental-rerun would unpickle a file: type the same command again, which goes on")
    flags = [f"--{name.replace('_', '-')}{'' if value is True else f'={value}'}" for name, value in given.items()]
    return argparse.Namespace(**vars(parsed), flags=flags, unknown=unknown)


def _refuse(message: str) -> NoReturn:
    raise GraincodeError(message.removeprefix("argument "))


def _no_override(job: str, arguments: Sequence[str], place: int) -> NoOverride:
    word, before = arguments[place], arguments[place - 1] if place else ""
    key, _, value = re.sub("^-+", "", word).replace(":", "=", 1).partition("=")
    if before.endswith("="):  # seed= 1
        return NoOverride(f"{before} {word}", before[:-1], word)
    if "=" in before and key and key.split(".")[0].split("/")[0] not in root_keys(job) and not word.startswith("-"):
        return NoOverride(f"{before} {word}", *f"{before} {word}".split("=", 1))  # data.root=my photos
    after = [*arguments[place + 1 : place + 3], "", ""]
    used = 0
    if not value and after[0].startswith("="):  # seed = 1, seed =1
        value, used = (after[0][1:], 1) if after[0] != "=" else (after[1], 2)
    elif not value and "=" not in after[0]:  # seed 1, --seed 1, seed: 1
        value, used = after[0], 1
    return NoOverride(" ".join(arguments[place : place + 1 + used]), key, value)


def _readable(override: str, sweeps: bool) -> str:
    if not (found := _KEY_VALUE.fullmatch(override)):
        return override
    plus, key, text = found.groups()
    home = _HOME.sub(lambda match: match[1] + os.path.expanduser("~"), text)
    read = parse(f"{key}={home}")
    as_text = f"{plus}{key}={quoted(home)}"
    if read is None:
        is_one_text = home[:1] not in ("[", "{", '"', "'") and not (sweeps and "," in home)
        return as_text if is_one_text and parse(as_text) else override
    value = read.value()
    if (config_directory() / key.partition("@")[0]).is_dir():  # options have names
        if isinstance(value, list):
            return f"{plus}{key}=[{','.join(quoted(str(name)) for name in value)}]"
        if not isinstance(value, str | dict) and not read.is_sweep_override():
            return as_text
    if read.is_sweep_override() and sweeps and not re.search(r"[()'\"\[{\\]", home) and not key.startswith("hydra"):
        parts = [part.strip() for part in home.split(",")]
        return (
            f"{plus}{key}={','.join(quoted(part) if key in _TEXTS or _is_respelled(part) else part for part in parts)}"
        )
    if key in _TEXTS and isinstance(value, bool | int | float):
        return as_text
    if isinstance(value, str) and value.startswith("~/"):  # which was quoted
        return f"{plus}{key}={quoted(os.path.expanduser(value))}"
    if isinstance(value, str) and value and value == home.strip() != home:  # spaces that Hydra would take away
        return as_text
    return f"{plus}{key}={home}"


def _is_respelled(text: str) -> bool:
    """Whether Hydra reads a number that it writes in another way: what takes text would have lost it."""
    return (
        (read := parse(f"key={text}")) is not None and type(read.value()) in (int, float) and str(read.value()) != text
    )


def parse(override: str) -> Override | None:
    """An override as Hydra reads it, or None if it cannot."""
    with suppress(HydraException, ValueError):  # the latter of numbers of thousands of digits
        return OverridesParser.create().parse_override(override)
    return None


def quoted(text: str) -> str:
    """A text as Hydra's grammar quotes it."""
    return QuotedString(text, Quote.double).with_quotes()


def for_shell(key: str, value: str) -> str:
    """What to type in a shell to give a key a text."""
    return shlex.quote(f"{key}={quoted(value)}")


def _is_text(hint: Any) -> bool:
    return hint is str or any(_is_text(part) for part in get_args(hint) if part is not type(None))


_TEXTS = {key for key, hint in KEYS.items() if key != "experiment" and _is_text(hint)}
