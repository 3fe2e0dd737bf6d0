"""Runs: one process at a time, one identity, and the tables of what has finished."""

import csv
import json
import multiprocessing
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

from graincode.config.job import open_run
from graincode.config.schema import config_directory
from graincode.config.validate import check
from graincode.core.errors import GraincodeError
from graincode.files import write_json
from graincode.runs import run as runs
from graincode.runs.identity import flatten, identity_of
from graincode.runs.run import Run
from graincode.runs.table import update_table, write_sweep


def hold(path, held, done):
    with Run(path, {}, {}):
        held.set()
        done.wait(30)


def test_one_process_at_a_time_works_in_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_LOCK_SECONDS", 0.3)
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "run", held, done))
    other.start()
    assert held.wait(30)
    with pytest.raises(GraincodeError, match="another process works in"), Run(tmp_path / "run", {}, {}):
        pass
    done.set()
    other.join()
    with Run(tmp_path / "run", {}, {}):  # and nothing stays locked
        pass


def test_a_run_is_recorded_where_there_can_be_no_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("a required privilege is not held")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with Run(tmp_path / "run", {}, {}) as run:
        run.finish(0.5)
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == {"objective": 0.5}


def test_a_directory_belongs_to_one_identity(tmp_path):
    with Run(tmp_path / "run", {}, {"seed": 1, "lr": 0.1}) as run:
        assert run.result is None
        assert run.finish(0.5, metrics={"mse": 0.5}) == 0.5
    with pytest.raises(GraincodeError, match=r"lr: 0\.1 -> 0\.2"), Run(tmp_path / "run", {}, {"seed": 1, "lr": 0.2}):
        pass
    with Run(tmp_path / "run", {}, {"seed": 1, "lr": 0.1}) as run:
        assert run.result == {"objective": 0.5, "metrics": {"mse": 0.5}}
    assert (tmp_path / "latest").resolve() == tmp_path / "run"


def test_a_key_left_out_of_an_identity_takes_all_keys_below_it_along():
    config = {"hardware": {"device": "cpu"}, "seed": 1, "images": {"path": "/a", "split": "test"}, "codes_path": "/b"}
    left_out = ["hardware", "images.path", "*_path"]
    assert identity_of(config, left_out) == {"seed": 1, "images.split": "test"}
    assert flatten({"a": {"b": 1}}, nodes=True) == {"a.b": 1, "a": {"b": 1}}


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("hardware.num_processes=2", True), ("hardware=gpu", False), ("hardware.mixed_precision=bf16", False),
        ("trainer.log_every=7", True), ("trainer.eval_every=7", True), ("logging=none", True), ("run_name=other", True),
        ("optimizer.lr=0.5", False), ("trainer.steps=7", False), ("tokenizer/router=fixed", False),
        ("data.cache=false", True), ("data.test_fraction=0.5", False),
    ],
)  # fmt: skip
def test_a_training_is_another_where_its_result_may_be(override, same):
    base = ["data=image_folder", "data.root=/images", "trainer.export=last"]
    one, other = (open_run("train_tokenizer", check("train_tokenizer", [*base, *more])) for more in ([], [override]))
    assert (one.identity == other.identity) == same
    assert override == "run_name=other" or (one.path == other.path) == same


def test_which_steps_are_evaluated_matters_where_the_best_is_exported():
    best = ["trainer.export=best"]
    one, other = (open_run("train_tokenizer", check("train_tokenizer", [*best, *more]))
                  for more in ([], ["trainer.eval_every=7"]))  # fmt: skip
    assert one.path != other.path


def test_keys_that_an_identity_leaves_out_are_there():
    """A key that is renamed would count again."""
    listed = OmegaConf.load(config_directory() / "identity.yaml")
    known = set()
    for job, more in (("train_tokenizer", ["data=image_folder", "data.root=x", "tokenizer/perceptual=timm"]),
                      ("sample", []), ("evaluate", ["images=folder", "images.path=x", "reference=statistics",
                                                    "reference.path=x"]),
                      ("evaluate", ["evaluation=reconstruction"])):  # fmt: skip
        known |= set(flatten(OmegaConf.to_container(check(job, more)), nodes=True))
    assert not {key for key in [*listed.left_out, *listed.left_out_unless_best] if "*" not in key} - known


def finished(folder, name, metrics, spread):
    record = {"mode": "rec", "count": 6, "finished": name, "inputs": {"tokenizer": "ab", "ratios": [0.5, 0.5]}}
    record |= {"metrics": metrics, "uncertainty": {"mse": {"std": spread}}}
    write_json(folder / name / "metrics.json", record)
    write_json(folder / name / "result.json", {"objective": metrics["mse"], "metrics": metrics})
    return folder / name


def test_the_table_has_a_line_for_every_evaluation(tmp_path):
    for name in ("b", "a"):
        finished(tmp_path, name, {"mse": 0.25, "codes_per_image": 40}, 0.01)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/metrics.json").write_text("{}")
    with update_table(tmp_path).open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["mse"], row["mse_std"], row["inputs.ratios"]) for row in rows] == [
        (name, "0.25", "0.01", "0.5 0.5") for name in ("a", "b")
    ]


@pytest.mark.parametrize("setting", ["images.ratios", "tokenizer/router"])
def test_a_sweep_leaves_a_table_and_plots(setting, tmp_path):
    members = []
    for index, choice in enumerate(("0.5", "0.25", "0.75") if setting == "images.ratios" else ("fixed", "entropy")):
        metrics = {"mse": 0.2 / (index + 1), "mse_floor": 0.01, "codes_per_image": 30 + 10 * index}
        run = finished(tmp_path, f"r{index}", metrics, 0.01)
        members.append({"run": str(run), "overrides": [f"{setting}={choice}", "seed=1"]})
    with write_sweep(tmp_path, members).open() as file:
        rows = list(csv.DictReader(file))
    assert [row[setting] for row in rows] == [member["overrides"][0].split("=")[1] for member in members]
    assert "seed" not in rows[0]
    assert Image.open(tmp_path / "plot.png").size[0] > 400
    assert Image.open(tmp_path / "rate_distortion.png").size[0] > 400
    assert json.loads((tmp_path / "r0/result.json").read_text())["objective"] == 0.2
