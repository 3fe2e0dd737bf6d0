"""Every study can be imported, and the commands that it runs are understood."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from graincode.config.validate import check

STUDIES = Path(__file__).parents[2] / "experiments"
SCRIPTS = sorted(path.relative_to(STUDIES).as_posix() for path in STUDIES.rglob("*.py"))


@pytest.fixture
def study(monkeypatch):
    """Loads a script as if it were run; what it imported from beside it is forgotten afterwards."""

    def load(name):
        script = STUDIES / name
        monkeypatch.syspath_prepend(script.parent)
        spec = importlib.util.spec_from_file_location(f"study_{name}", script)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    before = set(sys.modules)
    yield load
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(STUDIES)):
            del sys.modules[name]


def test_processes_are_started_without_the_working_directory_on_their_path():
    scripts = [*STUDIES.rglob("*.py"), *(STUDIES.parent / "src").rglob("*.py")]
    started = {path: re.findall(r'sys\.executable, *(".*?")', path.read_text()) for path in scripts}
    assert sum(map(len, started.values())) >= 4
    assert not [path for path, first in started.items() if {'"-m"', '"-c"'} & set(first)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_study_can_be_imported(study, script):
    study(script)


def adversary(it):
    for row in it.ROWS:
        yield "train_tokenizer", it.settings(row, 40)


def rate_distortion(it):
    for part in it.PARTS.values():
        for row in part.rows:
            yield "train_tokenizer", [*part.common, *row.settings]
        ratios = f"images.ratios={it.numbers([0.5, 0.5])}"
        yield "evaluate", ["evaluation=reconstruction", f"evaluation.metrics={part.metrics}", *part.data, ratios]


def generation(it):
    for part in it.PARTS.values():
        for row in part.rows:
            yield "train_generator", ["codes_path=codes", *row.settings]


def masked(it):
    for row in it.MODELS.values():
        yield "train_generator", ["codes_path=codes", *row.settings]
    for cell in (cell for part in it.PARTS.values() for cell in part.cells):
        sampler = ["sampler=masked"] if cell.order else []
        yield "evaluate", [*sampler, *(f"sampler.{key}={value}" for key, value in cell.settings.items())]


def published(it):
    for settings in it.ROWS.values():
        yield "train_generator", ["codes_path=codes", *settings]


def restarts(it):
    yield "train_tokenizer", it.TRAINING


def soak(it):
    for stage, job in it.JOBS.items():
        yield job, [*it.SETTINGS[stage], *it.TRAINER]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "commands"),
    [
        ("adversary/run.py", adversary),
        ("rate_distortion/run.py", rate_distortion),
        ("generation/run.py", generation),
        ("generation/masked.py", masked),
        ("published/generator.py", published),
        ("restarts/run.py", restarts),
        ("soak/run.py", soak),
    ],
)
def test_the_commands_of_a_study_are_understood(study, script, commands):
    found = {
        re.sub(r"[\d.]+", "0", f"{job} {overrides}"): (job, overrides) for job, overrides in commands(study(script))
    }
    assert found
    for job, overrides in found.values():  # those that differ only in numbers once
        check(job, list(overrides))
