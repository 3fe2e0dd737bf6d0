"""Generated pages: all options and recipes from the files in `conf/`, "what happens when ..." from the tests.

python tools/pages.py            writes them
python tools/pages.py --check    says whether they are current
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
JOBS = ("train_tokenizer", "extract_codes", "train_generator", "sample", "evaluate")
BEGIN, END = "<!-- begin: tools/pages.py -->", "<!-- end: tools/pages.py -->"

OPTIONS_HEAD = """# Options

Every setting, its default and what it means, made from the files in [`conf/`](../conf) by `tools/pages.py`. A setting
is typed as `key=value`, an option of a group as `group=option`. `--help` of a job lists its groups, `--cfg job` prints
all of its settings as they are composed.
"""

FAULTS_HEAD = """# What happens when ...

Each line is what a test shows, made from the marks `when` in `tests/` by `tools/pages.py`.
"""

_SUBJECTS = {
    "config": "Command line and sweeps", "core": "Messages", "data": "Data", "distributed": "Processes",
    "evaluation": "Evaluation", "interop": "Imports", "jobs": "Runs: changed, damaged, stopped",
    "runs": "Records of runs", "tests": "Python, exports and files", "tokenizer": "Tokenizers", "training": "Training",
}  # fmt: skip

_LINE = re.compile(
    r"(?P<indent> *)(?P<key>[\w@/.]+):(?: +(?P<value>[^#\s](?:[^#]|(?<! )#)*?))?(?: +# (?P<comment>.*))?$"
)
_ITEM = re.compile(r" +- (?P<item>.*?)(?: +# (?P<comment>.*))?$")


@dataclass
class File:
    """One file of `conf/`: its head, its keys with value and comment, and what it is made of.

    Attributes:
        head: the comment lines above its keys.
        keys: each dotted key, below the file's package, to (value, comment).
        groups: group and default option of its `defaults`.
        base: the option of its own group that it varies.
    """

    head: list[str] = field(default_factory=list)
    keys: dict[str, tuple[str, str]] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    base: str | None = None


def read(path: Path) -> File:
    """What a file says, as text: its comments are the documentation."""
    found, parents = File(), []
    lines = path.read_text(encoding="utf-8").splitlines()
    while lines and lines[0].startswith("#"):
        if not (line := lines.pop(0)).startswith("# @package"):
            found.head.append(line.removeprefix("#").removeprefix(" "))
    last = None
    for line in lines:
        if re.match(r" *#", line) and last:
            value, comment = found.keys[last]
            found.keys[last] = value, f"{comment} {line.strip(' #')}"
        elif item := _ITEM.match(line):
            if parents[0][1] == "defaults":
                _default(found, item["item"], path)
            else:
                key = ".".join(name for _, name in parents)
                value, comment = found.keys.get(key, ("", ""))
                found.keys[key] = f"{value[:-1] or '['}{', ' if value else ''}{item['item']}]", comment
        elif match := _LINE.match(line):
            indent = len(match["indent"])
            parents = [(depth, name) for depth, name in parents if depth < indent] + [(indent, match["key"])]
            last = ".".join(name for _, name in parents)
            if match["value"] is not None and parents[0][1] != "defaults":
                found.keys[last] = match["value"], match["comment"] or ""
            else:
                last = None
    return found


def _shown(keys: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Keys that a user may set: no `_target_`, no references to other keys, nothing that a job fills in."""
    return {
        key: value
        for key, value in keys.items()
        if not re.search(r"(^|\.)_\w+_$|(^|\.)layout(\.|$)", key)
        and not value[0].startswith("${")
        and f"{key}._target_" not in keys
    }


def _default(found: File, item: str, path: Path) -> None:
    if found_group := re.match(r"(?:override )?/?([\w/@.]+): *(\S+)", item):
        found.groups[found_group[1].partition("@")[0]] = found_group[2]
    elif "@" in item:
        name, _, package = item.partition("@")
        prefix = "" if package == "_here_" else f"{package}."
        part = read((CONF if name.startswith("/") else path.parent) / f"{name.strip('/')}.yaml")
        found.keys |= {f"{prefix}{key}": value for key, value in part.keys.items()}
    elif item not in ("_self_", "job") and not item.endswith("_schema"):
        found.base = item


def package_of(path: Path) -> str:
    """Where a file's keys stand in the configuration, with a dot behind it; empty for the root."""
    if package := re.match(r"# @package (\S+)", path.read_text(encoding="utf-8")):
        return "" if package[1] == "_global_" else f"{package[1]}."
    return ".".join(path.relative_to(CONF).parent.parts) + "."


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _code(value: str) -> str:
    return "to be given" if value == "???" else f"`{_cell(value)}`"


def table(keys: dict[str, tuple[str, str]], prefix: str) -> Iterator[str]:
    """Rows of (key, default, meaning)."""
    if shown := _shown(keys):
        yield "\n| key | default | |\n|---|---|---|"
        for key, (value, comment) in shown.items():
            yield f"| `{prefix}{key}` | {_code(value)} | {_cell(comment)} |"


def head(lines: list[str]) -> str:
    """The head of a file: prose, and its examples as code."""
    text, code = [], []
    for line in lines:
        (code if line.startswith("  ") else text).append(line.strip())
    return " ".join(text) + ("\n\n```text\n" + "\n".join(code) + "\n```" if code else "")


def group(folder: Path, level: int) -> Iterator[str]:
    """The sections of one group and of the groups in it."""
    name = folder.relative_to(CONF).as_posix()
    files = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    found = {option: read(path) for option, path in files.items()}
    yield f"\n{'#' * level} {name}"
    sets = {tuple(_shown(file.keys)) for file in found.values()}
    if len(sets) == 1 and len(found) > 1 and sets != {()}:
        yield ""
        yield from (f"- `{name}={option}`: {' '.join(file.head) or 'see below'}" for option, file in found.items())
        yield f"\n| key | {' | '.join(found)} | |\n|---|{'---|' * len(found)}---|"
        prefix = name.replace("/", ".") + "."
        for key in next(iter(sets)):
            values = " | ".join(_code(file.keys[key][0]) for file in found.values())
            comment = next((file.keys[key][1] for file in found.values() if file.keys[key][1]), "")
            yield f"| `{prefix}{key}` | {values} | {_cell(comment)} |"
    else:
        for option, file in found.items():
            yield f"\n{'#' * (level + 1)} {name}={option}\n"
            yield head(file.head)
            if file.base:
                yield (
                    f"\nAs `{name}={file.base}`, but for:"
                    if file.keys or file.groups
                    else f"\nAs `{name}={file.base}`."
                )
            if file.groups:
                yield f"\nGroups: {', '.join(f'`{inner}={default}`' for inner, default in file.groups.items())}."
            yield from table(file.keys, package_of(files[option]))
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and path.name not in ("parts", "base")):
        yield from group(inner, level + 1)


def options_page() -> str:
    """docs/options.md."""
    lines = [f"{OPTIONS_HEAD}\n## Jobs"]
    for job in JOBS:
        file = read(CONF / f"{job}.yaml")
        lines.append(f"\n### graincode-{job.replace('_', '-')}\n\n{head(file.head)}")
        groups = ", ".join(f"`{name}={default}`" for name, default in file.groups.items() if default != "null")
        lines.append(f"\nGroups and their defaults: {groups}, and `experiment=` with any [recipe](recipes.md).")
        lines += table(file.keys, "")
    file = read(CONF / "job.yaml")
    keys = {key: value for key, value in file.keys.items() if not key.startswith("hydra")}
    lines += ["\n### All jobs", *table(keys, "")]
    for folder in sorted(path for path in CONF.iterdir() if path.is_dir() and path.name != "experiment"):
        lines += group(folder, 2)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def faults_page() -> str:
    """docs/faults.md: the marks `pytest.mark.when(what, then)` of all tests, in the order of the files."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        rows = found.setdefault(_SUBJECTS.get(path.parent.name, path.parent.name), [])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for mark in getattr(node, "decorator_list", ()):
                if ast.unparse(mark).startswith("pytest.mark.when("):
                    what, then = (_cell(ast.literal_eval(argument)) for argument in mark.args)
                    rows.append(f"| {what} | {then} |")
    sections = (
        f"\n## {name}\n\n| when | then |\n|---|---|\n" + "\n".join(rows) for name, rows in found.items() if rows
    )
    return FAULTS_HEAD + "\n".join(sections) + "\n"


def recipes() -> str:
    """The recipes of `conf/experiment`, each with its head."""
    lines = []
    for path in sorted((CONF / "experiment").glob("*.yaml")):
        lines.append(f"## {path.stem}\n\n{head(read(path).head)}\n")
    return "\n".join(lines)


def with_files(text: str) -> str:
    """A page whose code blocks behind `<!-- file: PATH -->` show those files."""

    def shown(found: re.Match) -> str:
        file = ROOT / found[1]
        language = {".py": "python", ".yaml": "yaml"}[file.suffix]
        return f"<!-- file: {found[1]} -->\n```{language}\n{file.read_text(encoding='utf-8')}```\n"

    return re.sub(r"<!-- file: (\S+) -->\n(?:```\w+\n.*?^```\n)?", shown, text, flags=re.M | re.S)


def pages() -> dict[Path, str]:
    """What the pages should hold."""
    recipes_page = ROOT / "docs" / "recipes.md"
    before, _, rest = recipes_page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return {
        ROOT / "docs" / "options.md": options_page(),
        ROOT / "docs" / "faults.md": faults_page(),
        recipes_page: f"{before}{BEGIN}\n\n{recipes()}\n{END}{after}",
        **{
            page: with_files(page.read_text(encoding="utf-8"))
            for page in sorted((ROOT / "docs" / "extending").glob("*.md"))
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a page is not current")
    stale = [path for path, text in pages().items() if path.read_text(encoding="utf-8") != text]
    if parser.parse_args().check:
        sys.exit("".join(f"{path.relative_to(ROOT)} is not current: python tools/pages.py\n" for path in stale) or 0)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
