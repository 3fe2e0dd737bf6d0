"""Runs whose own files are damaged or gone: they are made again, or named."""

import csv
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY_GENERATOR, TINY_TOKENIZER, TINY_TRAINER, refused, result, weights_of
from helpers import run_checked as run
from helpers_files import ARRAY_DAMAGES

import graincode

pytestmark = pytest.mark.slow

TOKENIZER = "tokenizer_path=runs/train_tokenizer/tok/export"
STATE = Path("runs/train_tokenizer/tok/state/step_000000006")


@pytest.mark.when(
    "the export of a finished training is gone, empty or damaged",
    "the same command writes it again from the last state; without a state, one line says so",
)
@pytest.mark.parametrize("job", ["train_tokenizer", "train_generator"])
@pytest.mark.parametrize("damage", ["gone", "empty", "damaged", "a file"])
def test_an_export_that_does_not_load_is_written_again(job, damage, inside):
    source = Path(f"runs/{job}/{'tok' if job == 'train_tokenizer' else 'ar'}")
    path = Path(f"runs/{job}/export-{damage.replace(' ', '-')}")
    shutil.copytree(source, path)
    export = path / "export"
    if damage == "damaged":
        (export / "weights.safetensors").write_bytes(weights_of(path)[:-9])
    else:
        shutil.rmtree(export)
        if damage != "gone":
            export.mkdir() if damage == "empty" else export.write_text("")
    data = inside if job == "train_tokenizer" else ["codes_path=runs/extract_codes/codes/codes"]
    base = [*data, *(TINY_TOKENIZER if job == "train_tokenizer" else TINY_GENERATOR), *TINY_TRAINER]
    before = result(path)
    run(job, *base, f"run_name={path.name}")
    assert weights_of(path) == weights_of(source)
    assert result(path) == before
    shutil.rmtree(export)
    shutil.rmtree(path / "state")
    assert "no state to make it from" in refused(job, *base, f"run_name={path.name}")


@pytest.mark.when("codes of a finished extraction are damaged or gone", "the same command makes that split again")
@pytest.mark.parametrize("damage", ["cut", "missing", "fewer", "values", "class names", "no description"])
def test_damaged_codes_are_extracted_again(damage, inside):
    path, overrides = Path("runs/extract_codes/mended"), [*inside, TOKENIZER, "run_name=mended"]
    run("extract_codes", *overrides)
    files = {file: file.read_bytes() for file in path.glob("codes/*")}
    broken = path / "codes/val.indices.npy"
    about = path / "codes/codes.json"
    if damage == "values":
        np.save(broken, np.full_like(np.load(broken), 7))
    elif damage == "class names":
        about.write_text(about.read_text().replace('"busy"', '"calm"'))
    else:
        about.unlink() if damage == "no description" else ARRAY_DAMAGES[damage](broken)
    kept = (path / "codes/train.indices.npy").stat().st_mtime_ns
    run("extract_codes", *overrides)
    assert {file: file.read_bytes() for file in path.glob("codes/*")} == files
    assert (path / "codes/train.indices.npy").stat().st_mtime_ns == kept


@pytest.mark.when(
    "an evaluation is killed between its result and the table", "the same command, or the next evaluation, adds its row"
)
def test_a_row_that_is_missing_is_added_by_the_same_command(inside, monkeypatch):
    overrides = [*inside, "evaluation=reconstruction", "features=lite0_112", TOKENIZER, "run_name=row"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("graincode.jobs.evaluate.update_table", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        run("evaluate", *overrides)
    run("evaluate", *overrides)
    with Path("runs/evaluate/table.csv").open() as file:
        assert "row" in [row["run"] for row in csv.DictReader(file)]


@pytest.mark.when(
    "what a finished sample or evaluation wrote is damaged or gone",
    "the same command makes it again, with equal results",
)
@pytest.mark.parametrize(
    ("job", "name", "file"),
    [("sample", "six", "samples.npz"), ("sample", "six", "samples.png"), ("evaluate", "record", "metrics.json")],
)
@pytest.mark.parametrize("damage", ["cut", "gone", "a directory"])
def test_results_that_do_not_load_are_made_again(job, name, file, damage, inside):
    overrides = ["num_samples=6", "batch_size=4", TOKENIZER, "generator_path=runs/train_generator/ar/export"]
    if job == "evaluate":
        overrides = [*inside, "evaluation=reconstruction", "features=lite0_112", TOKENIZER]
    run(job, *overrides, f"run_name={name}")
    path = Path(f"runs/{job}/{name}") / file
    before, content = result(path.parent), path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-30])
    else:
        path.unlink()
        if damage == "a directory":
            path.mkdir()
    if damage == "a directory":
        assert refused(job, *overrides, f"run_name={name}").startswith(f"{path} is a directory")
        path.rmdir()
    run(job, *overrides, f"run_name={name}")
    if job == "sample":
        assert path.read_bytes() == content
    else:
        assert result(path.parent) == before
        assert json.loads(path.read_text())["metrics"] == before["metrics"]


def edited(state, change):
    """A copy of a state with other content, and the right hash of that."""
    content = torch.load(state / "state.pt", weights_only=True)
    change(content)
    torch.save(content, state / "state.pt")
    about = json.loads((state / "state.json").read_text())
    about["sha256"] = hashlib.sha256((state / "state.pt").read_bytes()).hexdigest()
    (state / "state.json").write_text(json.dumps(about))


def of_another_stage(state):
    from graincode.runs.checkpoint import read_state

    other = read_state(Path("runs/train_generator/ar/state/step_000000006"))
    state.clear()
    state.update(other)


CONTENTS = {
    "another stage": of_another_stage,
    "no weights": lambda state: state["trainables"].clear(),
    "weights of other names": lambda state: state["trainables"]["tokenizer"]["module"].update(more=torch.zeros(1)),
    "weights of other shapes": lambda state: _first(state["trainables"]["tokenizer"]["module"]),
    "moments of other shapes": lambda state: _first(_moments(state)),
    "average of other shapes": lambda state: _first(state["average"]),
    "weights of NaN": lambda state: _first(state["trainables"]["tokenizer"]["module"], torch.nan),
    "average of NaN": lambda state: _first(state["average"], torch.nan),
    "a meter of numbers": lambda state: state.update(meter={"terms": {"loss": 3}, "histograms": {}}),
    "no meter": lambda state: state.pop("meter"),
    "a best of text": lambda state: state.update(best="good"),
    "metrics of nothing": lambda state: state.update(metrics=None),
    "flops of nothing": lambda state: state.pop("flops"),
}


def _first(tensors, value=None):
    name = next(name for name, value in tensors.items() if isinstance(value, torch.Tensor) and value.ndim)
    tensors[name] = torch.zeros(3, 3, 3) if value is None else torch.full_like(tensors[name], value)


def _moments(state):
    return next(iter(state["trainables"]["tokenizer"]["optimizer"]["state"].values()))


@pytest.mark.when(
    "a state holds what is not of its training: another stage, other names, other shapes, or weights that are NaN",
    "one line names it",
)
@pytest.mark.parametrize("case", CONTENTS)
def test_a_state_of_something_else_is_refused(case, inside):
    path = Path(f"runs/train_tokenizer/state-{case.replace(' ', '-')}")
    shutil.copytree(STATE.parents[1], path)
    for name in ("result.json", "export"):
        shutil.rmtree(path / name) if name == "export" else (path / name).unlink()
    edited(path / "state" / STATE.name, CONTENTS[case])
    line = refused("train_tokenizer", *inside, *TINY_TOKENIZER, *TINY_TRAINER, f"run_name={path.name}")
    assert line.startswith(f"{path / 'state' / STATE.name} is no")
    shutil.rmtree(path / "state" / STATE.name)  # as the line says
    run("train_tokenizer", *inside, *TINY_TOKENIZER, *TINY_TRAINER, f"run_name={path.name}")
    assert weights_of(path) == weights_of(STATE.parents[1])


def test_exports_of_either_run_load_after_all_this(inside):
    for path in Path("runs/train_tokenizer").glob("*/export"):
        graincode.load_tokenizer(path)
