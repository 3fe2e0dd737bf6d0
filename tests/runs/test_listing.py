"""Lists of runs: their states, what is damaged, what differs. All from files that are made here."""

import json
import os
from pathlib import Path

import pytest

from graincode.core.errors import GraincodeError
from graincode.locks import locked
from graincode.runs.listing import best_of, differing, find_run, find_runs, read_run, side_by_side


@pytest.fixture
def make(tmp_path):
    """Makes a run in `runs/train` from its settings, result, error and steps of states."""

    def run(name, settings, result=None, failed=None, steps=(), job="train"):
        folder = tmp_path / "runs" / job / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"config": {}, "identity": settings}))
        (folder / "run.lock").touch()
        if result is not None:
            (folder / "result.json").write_text(json.dumps(result))
        if failed is not None:
            (folder / "failed.json").write_text(json.dumps({"error": failed}))
        for step in steps:
            (folder / "state" / f"step_{step:09d}").mkdir(parents=True)
        return folder

    return run


def test_the_states_of_runs(make):
    make("a", {}, {"objective": 0.5}, steps=[2, 4])
    make("b", {}, steps=[2, 4])
    make("c", {}, failed="no room", steps=[2])
    make("d", {}, {"objective": 0.5, "lengthened": {"trainer.steps": 9}}, steps=[6])
    running = make("e", {}, steps=[8])
    make("f", {})
    with locked(running / "run.lock"):
        states = {run.name: run.stands for run in find_runs(running.parents[1])}
    assert states == {
        "a": "finished", "b": "stopped at step 4", "c": "failed at step 2", "d": "stopped at step 6",
        "e": "running at step 8", "f": "stopped",
    }  # fmt: skip
    assert read_run(running.with_name("c")).problem == "no room"
    assert read_run(running).stands == "stopped at step 8"


def test_looking_at_a_run_changes_nothing_and_keeps_nobody_out(make):
    run = make("a", {}, steps=[2])
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with locked(run / "run.lock", 1):
        assert read_run(run).state == "running"
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


NESTED = '{"identity": {"a": ' + 900 * "[" + 900 * "]" + "}}"
HARMS = {
    "cut": lambda run: (run / "result.json").write_text('{"objective"'),
    "empty": lambda run: (run / "config.json").write_text(""),
    "another kind": lambda run: (run / "result.json").write_text("[1]"),
    "bytes": lambda run: (run / "config.json").write_bytes(bytes(range(256))),
    "nested": lambda run: (run / "config.json").write_text("[" * 100_000),
    "no number": lambda run: (run / "result.json").write_text('{"objective": "x"}'),
    "gone": lambda run: (run / "config.json").unlink(),
    "a folder": lambda run: (run / "failed.json").mkdir(),
    "metrics of text": lambda run: (run / "result.json").write_text('{"objective": 1, "metrics": [1]}'),
    "settings of text": lambda run: (run / "config.json").write_text('{"config": {}, "identity": []}'),
    "nested, as JSON may be": lambda run: (run / "config.json").write_text(NESTED),
    "a number of 400 digits": lambda run: (run / "result.json").write_text(f'{{"objective": {"9" * 400}}}'),
    "best of text": lambda run: [(run / "state").mkdir(), (run / "state" / "best.json").write_text('{"metrics": 3}')],
}


@pytest.mark.when("a run's files are damaged", "graincode-runs says so of that run, and lists the others")
@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_run_is_one_of_the_list(harm, make):
    whole, harmed = make("whole", {"seed": 0}, {"objective": 1}), make("harmed", {"seed": 1}, {"objective": 2})
    HARMS[harm](harmed)
    found = {run.name: run for run in find_runs(whole.parents[1])}
    assert found["whole"].state == "finished"
    assert found["harmed"].state == "damaged"
    assert "\n" not in found["harmed"].problem
    assert str(harmed) in found["harmed"].problem
    assert differing(found.values())[whole] in ({}, {"seed": 0})


def test_numbers_that_are_none_are_left_out(make):
    run = make("a", {}, {"objective": 1, "metrics": {"mse": 2, "huge": 10**400, "nan": float("nan"), "text": "x"}})
    assert read_run(run).metrics == {"mse": 2}
    other = make("b", {}, steps=[2])
    for value in ("x", None, [1], float("inf"), 10**400):
        (other / "state" / "best.json").write_text(json.dumps({"metrics": {"objective": value}}))
        assert (read_run(other).stands, read_run(other).objective) == ("stopped at step 2", None)


def test_a_pipe_in_place_of_a_lock_is_not_waited_for(make):
    run = make("a", {}, steps=[2])
    (run / "run.lock").unlink()
    os.mkfifo(run / "run.lock")
    assert read_run(run).stands == "stopped at step 2"


def test_what_differs_is_what_most_do_not_have_alike_each_once(make):
    for index, rate in enumerate([0.1, 0.1, 0.2]):
        settings = {"optimizer.lr": rate, "optimizer.model.lr": rate, "seed": index, "data": "x"}
        make(str(index), settings, {"objective": index})
    runs = find_runs(make("other", {"seed": 5}, job="sample").parents[1])
    found = {run.name: differing(runs)[run.path] for run in runs}
    assert found == {"0": {"seed": 0}, "1": {"seed": 1}, "2": {"optimizer.lr": 0.2, "seed": 2}, "other": {}}
    settings, _ = side_by_side([find_run(name, runs[0].path.parents[1]) for name in ("0", "train/2")])
    assert settings == {"seed": [0, 2], "optimizer.lr": [0.1, 0.2]}


def test_the_best_of_each_job_and_kind_of_metrics(make):
    for name, objective, metric in (("a", 2.0, "mse"), ("b", 1.0, "mse"), ("c", 0.5, "bits")):
        make(name, {}, {"objective": objective, "metrics": {metric: objective}})
    folder = make("d", {}).parents[1]
    assert sorted(run.name for run in best_of(find_runs(folder))) == ["b", "c"]


def test_a_run_is_found_by_name_or_path_and_several_are_named(make, tmp_path):
    one, _ = make("a", {}), make("a", {}, job="sample")
    assert find_run(str(one), tmp_path).path == one
    with pytest.raises(GraincodeError, match="one of sample/a, train/a"):
        find_run("a", tmp_path / "runs")
    with pytest.raises(GraincodeError, match=r"^b: no run in "):
        find_run("b", tmp_path / "runs")
    with pytest.raises(GraincodeError, match=r"^/no/run: no run is there, nor is a directory nowhere of runs"):
        find_run("/no/run", Path("nowhere"))
    with pytest.raises(GraincodeError, match="no directory of runs"):
        find_runs(tmp_path / "other")


def test_latest_and_sweeps_are_no_runs(make, tmp_path):
    run = make("a", {})
    (run.with_name("latest")).symlink_to("a")
    (tmp_path / "runs" / "sweeps" / "train" / "members").mkdir(parents=True)
    os.mkfifo(run.with_name("pipe"))
    assert [found.name for found in find_runs(tmp_path / "runs")] == ["a"]
