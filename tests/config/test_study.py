"""Studies by Optuna: stopped and gone on with, members that fail, settings that change. A function stands in for the
job."""

import csv
import os
import signal
from pathlib import Path

import pytest
from helpers import command, refusal
from hydra.errors import MissingConfigException

from graincode.config.errors import compose, explain, options
from graincode.core.errors import GraincodeError
from graincode.runs.run import Run

STUDY = [
    "--multirun", "hydra/sweeper=optuna", "hydra.sweeper.storage=sqlite:///${hydra.sweep.dir}/study.db",
    "hydra.sweep.dir=sweep", "hydra.sweeper.n_jobs=1", "hydra.sweeper.n_trials=6", "hydra.sweeper.sampler.seed=0",
    "sampler.temperature=interval(0.5, 2)",
]  # fmt: skip


@pytest.fixture
def study(tmp_path, monkeypatch, capsys):
    """Runs a study of `sample` whose members do what a function says; gives its status, table and lines of errors."""
    monkeypatch.chdir(tmp_path)

    def run_study(does, *overrides):
        def run(cfg):
            with Run(Path(cfg.runs_dir) / "sample" / str(cfg.sampler.temperature), {}, {}) as opened:
                if opened.result is not None:
                    pytest.fail("it was finished")
                value = does(cfg.sampler.temperature)
                return opened.finish(value, metrics={"mse": value})

        monkeypatch.setattr("graincode.jobs.sample.run", run)
        status = 0
        try:
            command("sample", *STUDY, *overrides)
        except SystemExit as end:
            status = end.code
        file = tmp_path / "sweep" / "table.csv"
        table = list(csv.DictReader(file.open(encoding="utf-8"))) if file.is_file() else []
        return status, table, capsys.readouterr().err.splitlines()

    return run_study


@pytest.mark.slow
@pytest.mark.when(
    "a study of hydra/sweeper=optuna is stopped or killed, and started again",
    "what was tried last goes on, then what is left; nothing that has finished runs again",
)
def test_a_study_goes_on_where_it_was_stopped(study):
    tried = []

    def stopped(number):
        tried.append(number)
        if len(tried) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return float(number)

    status, table, _ = study(stopped)
    assert status == 75
    assert [row["status"] for row in table] == ["0", "0", "0", "75"]
    status, table, _ = study(stopped)
    assert status == 0
    assert tried[4] == tried[3]
    assert len(tried) == 7
    assert len({*tried}) == 6
    assert sorted(float(row["objective"]) for row in table) == sorted({*map(float, tried)})
    assert Path("sweep/plot.png").is_file()
    assert study(stopped)[0] == 0
    assert len(tried) == 7


@pytest.mark.slow
@pytest.mark.when("a member of a study fails or is refused", "it is recorded, and the study goes on")
def test_a_member_that_fails_ends_nothing(study):
    tried = []

    def failing(number):
        tried.append(number)
        if len(tried) % 2:
            raise GraincodeError("classes=[9]: expected labels from 0 to 1")
        return 1.0

    status, table, errors = study(failing)
    assert status == 2
    assert [row["status"] for row in table] == ["2", "0"] * 3
    assert table[0]["error"] == "classes=[9]: expected labels from 0 to 1"
    assert errors[-1].startswith("3 of 6 failed: sampler.temperature=")


@pytest.mark.slow
def test_a_member_that_cannot_be_composed_ends_nothing(study):
    status, table, _ = study(lambda _: 1.0, "sampler=choice(autoregressive,nothing)")
    assert status == 2
    line = "sampler=nothing: expected one of auto, autoregressive, masked"
    found = {row["sampler"]: (row["status"], row["error"]) for row in table}
    assert found == {"autoregressive": ("0", ""), "nothing": ("2", line)}
    assert len(table) == 6


@pytest.mark.slow
def test_a_study_of_which_all_members_fail_leaves_its_table(study):
    def crash(number):
        raise RuntimeError("of a library")

    status, table, _ = study(crash, "hydra.sweeper.n_trials=2")
    assert status == 1
    assert [row["error"] for row in table] == ["RuntimeError: of a library"] * 2


@pytest.mark.slow
@pytest.mark.when("a study is gone on with, with other settings", "it is refused in one line")
def test_other_settings_are_another_study(study):
    named = "hydra.sweeper.study_name=mine"
    assert study(float, named, "hydra.sweeper.n_trials=1")[0] == 0
    status, _, errors = study(float, named, "hydra.sweeper.n_trials=1", "seed=1")
    assert status == 2
    assert errors[0].startswith("error: hydra.sweeper.study_name=mine: ")
    assert study(float, named, "hydra.sweeper.n_trials=2", "hardware.threads=1")[0] == 0
    assert len(list(Path("runs/sample").glob("[0-9]*"))) == 2


def test_a_storage_that_cannot_be_used_is_refused(study):
    status, _, errors = study(float, "hydra.sweeper.storage=sqlite:////no/such/place.db")
    assert status == 2
    assert errors[0].startswith("error: hydra.sweeper.storage=sqlite:////no/such/place.db: ")


@pytest.mark.parametrize(("job", "other"), [("train_tokenizer", "generator"), ("train_generator", "tokenizer")])
def test_a_job_lists_the_searches_that_are_its_own(job, other, capsys):
    own = job.removeprefix("train_")
    cfg = compose(job, [f"search={own}"], with_hydra=True)
    assert options("search", cfg.hydra.runtime) == [own]
    assert cfg.hydra.sweeper.storage.startswith("sqlite:///")
    assert all(key.split(".")[0] in cfg for key in cfg.hydra.sweeper.params)
    assert refusal(capsys, job, "search=nothing") == f"error: search=nothing: expected one of {own}"


@pytest.mark.parametrize(("file", "extra"), [("hydra/sweeper/optuna", "optuna"), ("hydra/launcher/joblib", "joblib")])
def test_a_plugin_that_is_not_installed_is_named(file, extra):
    line = explain(MissingConfigException("not found", file), "train_tokenizer", ["search=tokenizer"])
    assert line == f"{file.replace(f'/{extra}', '')}={extra} is not installed: pip install graincode[{extra}]"
