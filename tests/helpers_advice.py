"""What a line of an error says to type, done: the next command must accept it."""

import re
import shlex

from graincode.config.validate import check
from graincode.core.errors import GraincodeError

_NOT_LITERAL = ("key=value", "a key that begins")


def advised(line: str, overrides: list[str]) -> list[list[str]]:
    """The overrides that a line asks for in place of those that were refused, one list for each thing that it says."""
    wrong = next((one for one in overrides if _key(one) in (_named(line), _key(line))), "".join(overrides[-1:]))
    value = wrong.partition("=")[2]
    others, found = [one for one in overrides if one != wrong], []
    if typed := re.search(r"\btype (.+?)(?: (?:too, which|for (?:a list|text), or) .*)?$", line):
        for text in typed[1].split(" or "):
            if not text.startswith(_NOT_LITERAL) and not text.endswith("=..."):
                kept = overrides if " too, which has it" in line else others
                found.append([*kept, *(word if "=" in word else f"{word}={value}" for word in shlex.split(text))])
    if options := re.search(r": expected (a list of some|one) of ((?:[\w.]+, )+[\w.]+)$", line):
        every = options[2].split(", ")
        shape = "{}" if options[1] == "one" or every == ["null"] else "[{}]"
        found += [[*others, f"{_key(wrong)}={shape.format(option)}"] for option in (every[0], every[-2])]
    if example := re.search(r" such as (\[[^ ]*\])", line):
        found.append([*others, f"{_key(wrong)}={example[1]}"])
    return found


def follow(job: str, line: str, overrides: list[str]) -> list[list[str]]:
    """Check that the next command accepts what a line says, or asks for another key; gives what was tried."""
    tried = advised(line, overrides)
    for again in tried:
        then = _refusal(job, again)
        asks_more = not then.startswith("unknown key") and _key(then) not in {_key(one) for one in again}
        assert not then or asks_more, f"{line} -> {again} -> {then}"
    return tried


def _refusal(job: str, overrides: list[str]) -> str:
    try:
        check(job, overrides)
    except GraincodeError as error:
        return error.line
    return ""


def _key(text: str) -> str:
    return re.split(r"[= :]", text)[0].lstrip("+~")


def _named(line: str) -> str:
    """The key of "unknown key 'x'"."""
    return found[1] if (found := re.match(r"unknown key '([^']+)'", line)) else ""
