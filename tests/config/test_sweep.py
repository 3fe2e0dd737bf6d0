"""Sweeps: members that fail, directories, signals. A function stands in for what the job does."""

import csv
import os
import shutil
import signal
from pathlib import Path

import pytest
from helpers import command

from graincode.core.errors import GraincodeError
from graincode.runs.run import Run

SWEEP = ["--multirun", "hydra.sweep.dir=sweep"]


@pytest.fixture
def swept(tmp_path, monkeypatch, capsys):
    """Runs a sweep of `sample` whose members do what a function says; gives its status, table and lines of errors."""
    monkeypatch.chdir(tmp_path)

    def sweep(does, *overrides):
        def run(cfg):
            with Run(Path(cfg.runs_dir) / "sample" / f"{cfg.seed}", {}, {}) as opened:
                value = does(cfg)
                return opened.finish(value, metrics={"mse": value, "num_samples": 7})

        monkeypatch.setattr("graincode.jobs.sample.run", run)
        status = 0
        try:
            command("sample", *SWEEP, *overrides)
        except SystemExit as end:
            status = end.code
        file = tmp_path / "sweep" / "table.csv"
        table = list(csv.DictReader(file.open(encoding="utf-8"))) if file.is_file() else []
        return status, table, capsys.readouterr().err.splitlines()

    return sweep


def failing(cfg):
    if cfg.seed == 1:
        raise GraincodeError("classes=[9]: expected labels from 0 to 1")
    if cfg.seed == 3:
        raise RuntimeError("of a library\nin two lines")
    return float(cfg.seed)


@pytest.mark.when(
    "a member of a sweep is refused or fails", "the others run; table.csv has its error, the end a status"
)
def test_the_others_run_when_a_member_fails(swept):
    status, table, errors = swept(failing, "seed=0,1,2")
    assert status == 2
    assert [(row["seed"], row["status"], row["mse"]) for row in table] == [
        ("0", "0", "0.0"), ("1", "2", ""), ("2", "0", "2.0"),
    ]  # fmt: skip
    assert table[1]["error"] == "classes=[9]: expected labels from 0 to 1"
    assert [row["error"] for row in table[::2]] == ["", ""]
    assert errors == ["error: classes=[9]: expected labels from 0 to 1", "1 of 3 failed: seed=1"]


@pytest.mark.when(
    "a member of a sweep cannot be composed, as with data=mnist", "the others run; table.csv has its line"
)
@pytest.mark.parametrize("more", [[], ["hydra.sweeper.max_batch_size=1"]])
def test_the_others_run_when_a_member_cannot_be_composed(more, swept):
    status, table, errors = swept(lambda cfg: 1.0, "sampler=auto,sample,masked", "num_samples=1,2", *more)
    assert status == 2
    assert [(row["sampler"], row["num_samples"], row["status"]) for row in table] == [
        ("auto", "1", "0"), ("auto", "2", "0"), ("masked", "1", "0"), ("masked", "2", "0"),
        ("sample", "1", "2"), ("sample", "2", "2"),
    ]  # fmt: skip
    assert table[4]["error"] == "sampler=sample: expected one of auto, autoregressive, masked"
    assert errors[:-1] == [f"error: {row['error']}" for row in table[4:]]
    assert errors[-1] == "2 of 6 failed: sampler=sample num_samples=1; sampler=sample num_samples=2"


@pytest.mark.parametrize(("typed", "said"), [
    ("sampler=x,y", "expected one of"), ("sampler.steps=1,2", "type sampler=masked too"),
    ("nothing=1,2", "unknown key 'nothing'"),
])  # fmt: skip
def test_a_sweep_of_which_no_member_can_be_composed(typed, said, swept):
    status, table, errors = swept(lambda cfg: 1.0, typed)
    assert status == 2
    assert [row["status"] for row in table] == ["2", "2"]
    assert all(said in row["error"] for row in table)
    assert len(errors) == 3


def test_a_crash_is_told_from_bad_input(swept):
    status, table, errors = swept(failing, "seed=1,3,2")
    assert status == 1
    assert [row["status"] for row in table] == ["2", "1", "0"]
    assert table[1]["error"] == "RuntimeError: of a library in two lines"
    assert errors[-1] == "2 of 3 failed: seed=1; seed=3"
    assert any("Traceback" in line for line in errors)


def test_a_sweep_without_any_result_leaves_its_table(swept):
    status, table, _ = swept(failing, "seed=1", "num_samples=1,2")
    assert status == 2
    assert [row["num_samples"] for row in table] == ["1", "2"]
    assert not Path("sweep/plot.png").exists()


def test_bad_settings_of_a_member_are_its_own(swept):
    status, table, _ = swept(lambda cfg: 1.0, "num_samples=1,0,many")
    assert status == 2
    assert [row["status"] for row in table] == ["0", "2", "2"]
    assert "num_samples=many" in table[2]["error"]


def test_members_of_an_earlier_sweep_in_the_same_directory_stay_out(swept):
    swept(lambda cfg: 1.0, "seed=0,1,2")
    _, table, _ = swept(lambda cfg: 2.0, "seed=3,4")
    assert [row["seed"] for row in table] == ["3", "4"]


@pytest.mark.when("a run of a sweep is deleted while the sweep goes on", "its row in table.csv says so")
@pytest.mark.parametrize("harm", ["deleted", "cut"])
def test_a_member_whose_run_is_gone_keeps_its_row(harm, swept):
    def does(cfg):
        if cfg.seed == 2 and harm == "deleted":
            shutil.rmtree("runs/sample/0", ignore_errors=True)
        elif cfg.seed == 2:
            Path("runs/sample/0/result.json").write_text("{", encoding="utf-8")
        return 1.0

    status, table, _ = swept(does, "seed=0,1,2")
    assert status == 0
    assert [row["mse"] for row in table] == ["", "1.0", "1.0"]
    assert table[0]["error"].startswith("its result is gone")


@pytest.mark.parametrize("setting", ["hydra.job.chdir=true", "hydra.sweep.subdir=${hydra.job.num}"])
def test_a_sweep_finds_its_members_wherever_they_run(setting, swept):
    _, table, _ = swept(lambda cfg: 1.0, "seed=0,1", setting)
    assert [row["seed"] for row in table] == ["0", "1"]


def test_members_that_have_other_directories_of_runs_are_in_one_table(swept):
    _, table, _ = swept(lambda cfg: 1.0, "runs_dir=a,b")
    assert [row["runs_dir"] for row in table] == ["a", "b"]


def test_a_metric_does_not_replace_a_setting_of_its_name(swept):
    _, table, _ = swept(lambda cfg: 1.0, "num_samples=1,2")
    assert [row["num_samples"] for row in table] == ["1", "2"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.when("a signal comes to a sweep", "it ends with status 75 and a table of what has finished")
def test_a_signal_ends_a_sweep_with_its_table(number, swept):
    def does(cfg):
        if cfg.seed == 1:
            os.kill(os.getpid(), number)
        return 1.0

    before = signal.getsignal(number)
    status, table, errors = swept(does, "seed=0,1,2")
    assert status == 75
    assert [(row["seed"], row["status"]) for row in table] == [("0", "0"), ("1", "75")]
    assert errors == [f"stopped by {number.name}: the same command runs what is left"]
    assert signal.getsignal(number) is before


@pytest.mark.when("two sweeps are started in the same second", "each has a directory of its own")
def test_two_sweeps_of_one_second_have_different_directories(swept, monkeypatch):
    from hydra.core import utils

    class Stopped(utils.datetime):
        @classmethod
        def now(cls):
            return cls(2024, 11, 28)

    monkeypatch.setattr(utils, "datetime", Stopped)
    for _ in range(2):
        swept(lambda cfg: 1.0, "seed=0,1", "hydra.sweep.dir=${runs_dir}/sweeps/x/${now:%S}-${graincode_token:}")
    assert len(list(Path("runs/sweeps/x").glob("*/table.csv"))) == 2
