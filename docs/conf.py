"""Sphinx's configuration: Markdown pages by MyST, an API reference from doc-strings; `make docs` builds the site."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from pathlib import Path

from sphinx.util import logging

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT / "src"))

about = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
project, release = about["name"], about["version"]
author = about["authors"][0]["name"]
copyright = f"{author}. Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "examples"]
html_theme = "furo"
html_title = f"graincode {release}"
html_show_sphinx = False
highlight_language = "none"

myst_enable_extensions = ["attrs_inline", "html_image"]
myst_heading_anchors = 4  # links to headings, as code hosts make them

default_role = "literal"  # in doc-strings, `name` is code
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Source"]

suppress_warnings = ["ref.python"]  # attributes of one name in several classes

linkcheck_anchors = False
linkcheck_timeout = 20


def write_api_pages(app) -> None:
    """One page for each sub-package, with all its modules, so that the reference cannot miss one."""
    package = ROOT / "src" / "graincode"
    folder = DOCS / "_api"
    folder.mkdir(exist_ok=True)
    pages: dict[str, list[str]] = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        if parts[0] != "jobs" and parts[-1] != "__init__":
            pages.setdefault(parts[0] if len(parts) > 1 else "graincode", []).append(".".join(("graincode", *parts)))
    for name, modules in pages.items():
        directives = "\n\n".join(
            f"## `{module}`\n\n```{{eval-rst}}\n.. automodule:: {module}\n   :members:\n   :show-inheritance:\n```"
            for module in modules
        )
        text = f"# `{name}`\n\n{directives}\n"
        if not (page := folder / f"{name}.md").is_file() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")
    for page in folder.glob("*.md"):
        if page.stem not in pages:
            page.unlink()


def rewrite_links(text: str, origin: Path, location: Path) -> str:
    """Links of a Markdown file as the site needs them; those that lead nowhere are warnings, which `make docs` refuses.

    Args:
        text: of the file.
        origin: where it lies in the repository, to which its links are relative.
        location: where the site reads it, `origin` or a copy.
    """

    def replace(found: re.Match) -> str:
        label, target, anchor = found["label"], found["target"], found["anchor"] or ""
        if not target or re.match(r"[a-z]+:", target):
            return found[0]
        path = Path(os.path.normpath(origin.parent / target))
        if not path.exists():
            logging.getLogger(__name__).warning("%s links to %s, which does not exist", origin, target, type="link")
        if path.is_dir():  # code hosts show folders, the site does not
            return label
        if path.suffix == ".md" and DOCS not in path.parents:
            path = DOCS / "_pages" / path.relative_to(ROOT)
        return f"[{label}]({os.path.relpath(path, location.parent)}{anchor})"

    pieces = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)
    pieces[::2] = [
        re.sub(r"(?<!!)\[(?P<label>[^\]]*)\]\((?P<target>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)", replace, piece)
        for piece in pieces[::2]
    ]
    return "".join(pieces)


def write_other_pages(app) -> None:
    """Copies of the Markdown files outside `docs/` to which pages link: README, CONTRIBUTING, CHANGELOG, records."""
    for file in [*ROOT.glob("*.md"), *(ROOT / "experiments").rglob("*.md")]:
        page = DOCS / "_pages" / file.relative_to(ROOT)
        page.parent.mkdir(parents=True, exist_ok=True)
        text = file.read_text(encoding="utf-8")
        if not text.startswith("# "):
            text = f"# {file.relative_to(ROOT).with_suffix('')}\n\n{text}"
        images = os.path.relpath(file.parent, page.parent)
        text = re.sub(r"!\[([^\]]*)\]\((?![a-z]+:)", rf"![\1]({images}/", rewrite_links(text, file, page))
        text = f"---\norphan: true\n---\n\n{text}"
        if not page.is_file() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def rewrite_page(app, name: str, content: list[str]) -> None:
    """Links of the pages in `docs/` itself."""
    if not name.startswith(("_pages", "_api")):
        page = DOCS / f"{name}.md"
        content[0] = rewrite_links(content[0], page, page)


def plain_text(app, what, name, obj, options, lines: list[str]) -> None:
    """Doc-strings are plain text with `code`: what reStructuredText would read as markup is escaped."""
    if lines[:1] == ["Attributes:"] and not lines[1].startswith(" "):
        lines[1:] = [f"    {line}" if line else line for line in lines[1:]]
    parts = re.split(r"(^ *>>>.*$|`+[^`]*`+)", "\n".join(lines), flags=re.M)
    parts[::2] = [re.sub(r"([*|\\])|_(?=\W|$)", lambda found: "\\" + found[0], part) for part in parts[::2]]
    parts[1::2] = [f"`{part.strip('` ')}`" if part.startswith("`") else part for part in parts[1::2]]
    lines[:] = "".join(parts).split("\n")
    if what == "property":
        _properties[name] = list(lines)


def whole_properties(app, what, name, obj, options, lines: list[str]) -> None:
    """Doc-strings of properties as they were: napoleon takes what stands before a colon for a type."""
    lines[:] = _properties.pop(name, lines)


_properties: dict[str, list[str]] = {}


def setup(app) -> None:
    app.connect("builder-inited", write_api_pages)
    app.connect("builder-inited", write_other_pages)
    app.connect("source-read", rewrite_page)
    app.connect("autodoc-process-docstring", plain_text, priority=400)  # before napoleon reads them
    app.connect("autodoc-process-docstring", whole_properties, priority=600)  # and after
