"""What README and docs/ tell their readers is so: commands compose, examples run, tables and links are current."""

import ast
import re
import shlex
import shutil
import sys
import tomllib
from importlib import util
from pathlib import Path

import pytest
import torch
from helpers import TINY_GENERATOR, TINY_TOKENIZER, TINY_TRAINER, command, train_masked
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from graincode.config.validate import check

ROOT = Path(__file__).parents[1]
DOCS = [page for page in sorted((ROOT / "docs").rglob("*.md")) if not re.search(r"/_\w+/", str(page))]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
EXTENDING = ROOT / "docs" / "extending"
TINY = {"train_tokenizer": [*TINY_TOKENIZER, *TINY_TRAINER], "train_generator": [*TINY_GENERATOR, *TINY_TRAINER]}


def blocks(page, *languages):
    """The code blocks of a page."""
    return [code for language, code in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S)
            if language in languages]  # fmt: skip


WITHOUT_SETTINGS = "graincode-runs", "graincode-report"


def commands(page, language=""):
    """(job, arguments) of each command line of a page that starts a job."""
    made = re.findall(
        r"^([a-z0-9-]+):.*\n\t@\$\(BIN\)/graincode-(.*) \$\(ARGS\)", (ROOT / "Makefile").read_text(), re.M
    )
    targets = dict(made) | {"demo": "train-tokenizer"}  # whose settings it takes, too
    for block in blocks(page, language):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["make"] and words[1] in targets:
                arguments = [word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")]
                words = shlex.split(" ".join([targets[words[1]], *arguments]))
            elif words and words[0].startswith("graincode-") and words[0] not in WITHOUT_SETTINGS:
                words[0] = words[0].removeprefix("graincode-")
            else:
                continue
            yield words[0].replace("-", "_"), words[1:]


def first(override):
    """The first value of a sweep."""
    parsed = OverridesParser.create().parse_override(override)
    return f"{parsed.key_or_group}={next(parsed.sweep_string_iterator())}" if parsed.is_sweep_override() else override


ALL = sorted(
    {(job, *(first(word) for word in words if word != "--multirun")) for page in PAGES for job, words in commands(page)}
)


@pytest.mark.parametrize("words", [pytest.param(words, id=" ".join(words)) for words in ALL])
def test_a_command_is_understood(words):
    check(words[0], list(words[1:]))


def test_the_readme_is_for_five_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_generated_parts_of_pages_are_current():
    spec = util.spec_from_file_location("pages", ROOT / "tools" / "pages.py")
    pages = util.module_from_spec(spec)
    sys.modules["pages"] = pages
    spec.loader.exec_module(pages)
    stale = [str(path.relative_to(ROOT)) for path, text in pages.pages().items() if path.read_text() != text]
    assert not stale, "python tools/pages.py writes them anew"


def test_the_lock_file_knows_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lock = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    locked = next(package for package in lock if package["name"] == "graincode")["metadata"]["requires-dist"]
    asked = [one for group in (project["dependencies"], *project["optional-dependencies"].values()) for one in group]
    names = {re.match(r"[\w-]+", one)[0] for one in asked}
    assert names == {one["name"] for one in locked}, "uv lock writes it anew"
    assert {package["source"].get("registry", "https://pypi.org/simple") for package in lock} == {
        "https://pypi.org/simple"
    }


def anchors(page):
    """What code hosts and the site call the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return {
        re.sub(r"[^\w\- ]", "", heading.replace("`", "")).strip().lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)", text, re.M)
    }


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "CHANGELOG.md", ROOT / "experiments" / "README.md"],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target, anchor in re.findall(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        if anchor and "_api" not in target:
            assert anchor in anchors(file), f"{target}#{anchor}"


def test_walks_name_what_exists():
    text = (ROOT / "docs" / "architecture.md").read_text()
    walks = re.split(r"^### ", text, flags=re.M)[1:]
    assert len(walks) == 3
    for walk in walks:
        steps = re.findall(r"^\d+\. `([\w/.]+)`: ((?:`[\w.]+`(?:,\s+)?)+)", walk, re.M)
        assert 0 < len(steps) <= 10
        assert len({file for file, _ in steps}) == len(steps), "a way back"
        for file, names in steps:
            tree = ast.parse((ROOT / "src" / "graincode" / file).read_text())
            known = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)} | {
                f"{node.name}.{inner.name}"
                for node in tree.body
                if isinstance(node, ast.ClassDef)
                for inner in node.body
                if isinstance(inner, ast.FunctionDef)
            }
            assert set(re.findall(r"`([\w.]+)`", names)) <= known, file


@pytest.fixture
def demo_runs(workspace, tmp_path, monkeypatch):
    """A directory in which the demo's exports are, narrow ones, and two images; the current one."""
    monkeypatch.chdir(workspace)
    masked = train_masked("class")
    runs = tmp_path / "runs" / "demo"
    for job, name, made in (
        ("train_tokenizer", "train_tokenizer", "runs/train_tokenizer/tok"),
        ("train_generator", "train_generator", "runs/train_generator/ar"),
        ("train_generator", "train_masked", masked),
    ):
        (runs / job).mkdir(parents=True, exist_ok=True)
        (runs / job / name).symlink_to(workspace / made)
    for name in ("cat.png", "dog.jpg"):
        Image.new("RGB", (40, 32), "orange").save(tmp_path / name)
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks(page, "python") and page.parent != EXTENDING],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_python_examples_run(page, demo_runs):
    names = {
        "images": torch.rand(2, 3, 32, 32) * 2 - 1,
        "labels": torch.tensor([0, 1]),
        "keep": torch.arange(32)[:, None].expand(2, 32, 32) < 16,
    }
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["router", "quantizer", "sampler", "dataset", "metric"])
def test_an_extension_is_a_complete_example(name, workspace, tmp_path, monkeypatch):
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "docs" / "examples" / name, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    data = ["data=image_folder", f"data.root={workspace / 'images'}", "data.image_size=32", "data.test_fraction=0.3"]
    exports = [f"{job}_path={workspace}/runs/train_{job}/{run}/export"
               for job, run in (("tokenizer", "tok"), ("generator", "ar"))]  # fmt: skip
    for block in blocks(EXTENDING / f"{name}.md", "sh"):
        for plugins in re.findall(r"GRAINCODE_PLUGINS=(\S+)", block):
            monkeypatch.setenv("GRAINCODE_PLUGINS", plugins)
    ran = 0
    for job, words in commands(EXTENDING / f"{name}.md", "sh"):
        more = TINY.get(job, [])
        if job in ("train_tokenizer", "extract_codes", "evaluate") and "data=shapes" not in words:
            more = [*more, *data]
        if job in ("sample", "evaluate"):
            more = [*more, *exports]
        if job == "evaluate":
            more.append("data.val_fraction=0.3")
        command(job, *words, *more, *(["data.count=40"] if "data=shapes" in words else []),
                *(["num_samples=4"] if job == "sample" else []))  # fmt: skip
        ran += 1
    assert ran
