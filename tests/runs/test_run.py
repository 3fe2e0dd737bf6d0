"""Runs: one process at a time, one identity, and the tables of what has finished."""

import csv
import json
import multiprocessing
import os
from pathlib import Path

import pytest
from helpers_files import JSON_DAMAGES, to_pipe
from omegaconf import OmegaConf
from PIL import Image

from graincode.config.job import open_run, resolve_path
from graincode.config.schema import config_directory
from graincode.config.validate import check
from graincode.core.errors import Damaged, GraincodeError
from graincode.files import remove, write_json
from graincode.locks import is_held
from graincode.runs import run as runs
from graincode.runs.checkpoint import Checkpoints
from graincode.runs.identity import flatten, identity_of, one_spelling
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


@pytest.mark.when("two commands work in one run, as where locks do nothing", "the first ends before it writes a state")
def test_where_locks_do_nothing_the_second_process_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    with Run(tmp_path / "run", {}, {}) as first:
        first.check_owner()
        with Run(tmp_path / "run", {}, {}) as second:
            with pytest.raises(GraincodeError, match="another process has opened"):
                first.check_owner()
            with pytest.raises(GraincodeError, match="another process has opened"):
                first.finish(0.5)
            assert not (tmp_path / "run/result.json").exists()
            second.finish(0.5)


@pytest.mark.when("a pipe stands in the place of the owner's or the lock's file of a run", "the run goes on")
@pytest.mark.parametrize("name", ["owner", "run.lock"])
def test_a_pipe_among_the_files_of_a_run_is_not_waited_for(tmp_path, name):
    path = tmp_path / "run"
    with Run(path, {}, {}):
        pass
    to_pipe(path / name)
    assert not is_held(path / "run.lock")
    with Run(path, {}, {}) as run:
        run.check_owner()
        run.finish(0.5)


def test_a_run_is_recorded_where_there_can_be_no_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("a required privilege is not held")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with Run(tmp_path / "run", {}, {}) as run:
        run.finish(0.5)
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == {"objective": 0.5}


def test_the_latest_run_must_have_what_is_read(tmp_path):
    (tmp_path / "train_tokenizer/latest").mkdir(parents=True)
    cfg = OmegaConf.create({"tokenizer_path": "latest", "runs_dir": str(tmp_path)})
    with pytest.raises(GraincodeError, match=r"tokenizer_path=latest: .* finished in .* and has its export, or a path"):
        resolve_path(cfg, "tokenizer_path", "train_tokenizer", "export")
    (tmp_path / "train_tokenizer/latest/export").mkdir()
    found = resolve_path(cfg, "tokenizer_path", "train_tokenizer", "export")
    assert found == tmp_path / "train_tokenizer/latest/export"


@pytest.mark.when("runs were copied without their links, so that latest is a directory", "a warning with every new run")
def test_a_directory_called_latest_is_named(tmp_path, caplog):
    (tmp_path / "latest").mkdir()
    with Run(tmp_path / "run", {}, {}) as run:
        run.finish(0.5)
    assert f"{tmp_path / 'latest'} is not this run" in caplog.text
    assert not (tmp_path / ".latest-run").is_symlink()


def test_a_directory_belongs_to_one_identity(tmp_path):
    with Run(tmp_path / "run", {}, {"seed": 1, "lr": 0.1}) as run:
        assert run.result is None
        assert run.finish(0.5, metrics={"mse": 0.5}) == 0.5
    with pytest.raises(GraincodeError, match=r"lr: 0\.1 -> 0\.2"), Run(tmp_path / "run", {}, {"seed": 1, "lr": 0.2}):
        pass
    with Run(tmp_path / "run", {}, {"seed": 1, "lr": 0.1}) as run:
        assert run.result == {"objective": 0.5, "metrics": {"mse": 0.5}}
    assert (tmp_path / "latest").resolve() == tmp_path / "run"


@pytest.mark.when(
    "a run's config.json or result.json is damaged: empty, cut, null, without a key, a directory, a pipe",
    "one line names the file, and nothing is changed",
)
@pytest.mark.parametrize("name", ["config.json", "result.json"])
@pytest.mark.parametrize("damage", JSON_DAMAGES)
def test_damaged_records_of_a_run_are_named(tmp_path, name, damage):
    path = tmp_path / "run"
    with Run(path, {}, {"seed": 1}) as run:
        run.finish(0.5)
    JSON_DAMAGES[damage](path / name)
    with pytest.raises(Damaged) as error, Run(path, {}, {"seed": 1}) as run:
        assert run.result is None
    assert str(error.value).startswith(f"{path / name} is damaged")
    remove(path / name)
    with Run(path, {}, {"seed": 1}) as run:  # as the line says
        assert (run.result is None) == (name == "result.json")


def test_a_run_is_of_the_images_that_it_was_begun_with(tmp_path, caplog):
    def enter(train, **settings):
        with Run(tmp_path / "run", {}, {"seed": 1} | settings, {"train": train}) as run:
            return run

    enter("40 images (aa)")
    enter("41 images (bb)")  # nothing is made of them yet
    (tmp_path / "run/state/step_000000002").mkdir(parents=True)
    enter("41 images (bb)")
    with pytest.raises(GraincodeError, match=r"inputs\.train_images: 41 images \(bb\) -> 40 images \(aa\)") as error:
        enter("40 images (aa)")
    assert "on other images" in str(error.value)
    with pytest.raises(GraincodeError, match=r"other settings .*: 41 images.*, seed: 1 -> 2"):
        enter("40 images (aa)", seed=2)
    before = {"config": {}, "identity": {"seed": 1}}  # as an earlier version wrote it
    write_json(tmp_path / "run/config.json", before)
    assert "which images" not in caplog.text
    enter("40 images (aa)")
    assert "which images it was begun with" in caplog.text
    with pytest.raises(GraincodeError, match="on other images"):
        enter("41 images (bb)")


@pytest.mark.when(
    "an export that a run was made with is no longer the latest", "the line that refuses says where it is"
)
def test_the_line_names_the_path_of_what_a_run_was_made_with(tmp_path):
    def enter(place, content):
        with Run(tmp_path / "run", {"tokenizer_path": place}, {"inputs.tokenizer": content}) as run:
            run.finish(0.5)

    enter("first/export", "aa")
    enter("moved/export", "aa")
    with pytest.raises(GraincodeError, match=r"inputs\.tokenizer: aa -> bb.*, such as tokenizer_path=first/export$"):
        enter("second/export", "bb")
    with pytest.raises(GraincodeError, match=r"or those settings$"):
        enter("first/export", "cc")  # which is another one now


def test_settings_that_look_alike_are_told_apart(tmp_path):
    with Run(tmp_path / "run", {}, {"steps": 6, "name": None}) as run:
        run.finish(0)
    expected = "name: None -> 'None', steps: 6 -> '6'"
    with pytest.raises(GraincodeError, match=expected), Run(tmp_path / "run", {}, {"steps": "6", "name": "None"}):
        pass


def test_a_run_is_lengthened_and_keeps_what_it_had_until_it_ends(tmp_path, caplog):
    def enter(steps):
        return Run(tmp_path / "run", {}, {"steps": steps, "seed": 1}, may_grow=["steps"])

    with enter(6) as run:
        run.finish(0.5)
    caplog.set_level("INFO")
    with enter(8) as run:
        assert run.result is None
    assert "steps: 6 -> 8" in caplog.text
    assert json.loads((tmp_path / "run/result.json").read_text())["objective"] == 0.5
    with pytest.raises(GraincodeError, match="steps: 8 -> 6"), enter(6):
        pass
    with enter(8) as run:  # it was killed meanwhile
        assert run.result is None
        run.finish(0.25)
    with enter(8) as run:
        assert run.result == {"objective": 0.25}
    with pytest.raises(GraincodeError, match="steps: 8 -> 9"), Run(tmp_path / "run", {}, {"steps": 9, "seed": 1}):
        pass


def as_another_user(action):
    """Whether an action succeeds in a process without root's rights, which ignore permissions; or its error."""
    reader, writer = multiprocessing.Pipe(duplex=False)

    def act():
        os.setgid(65534)
        os.setuid(65534)
        try:
            writer.send(action())
        except GraincodeError as error:
            writer.send(error)

    process = multiprocessing.get_context("fork").Process(target=act)
    process.start()
    assert reader.poll(30)
    return reader.recv()


@pytest.mark.when(
    "runs_dir cannot be written to: read-only, of another user, a file in the way",
    "a finished run is read; all else is refused in one line",
)
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root becomes another user")
def test_a_finished_run_of_another_user_is_read(tmp_path, monkeypatch):
    for parent in (tmp_path, *tmp_path.parents):  # pytest's are for its user alone
        if parent != Path("/") and not parent.stat().st_mode & 0o005:
            parent.chmod(0o755)
    for name in ("finished", "begun"):
        with Run(tmp_path / "job" / name, {}, {"seed": 1}, may_grow=["seed"]) as run:
            if name == "finished":
                run.finish(0.5)

    def enter(name="finished", seed=1):
        with Run(tmp_path / "job" / name, {}, {"seed": seed}, may_grow=["seed"]) as run:
            return run.report_finished(run.result)

    assert as_another_user(enter) == 0.5
    assert "holds a run with other settings (seed: 1 -> 0)" in str(as_another_user(lambda: enter(seed=0)))
    for refused in (lambda: enter("begun"), lambda: enter("new"), lambda: enter(seed=2)):
        line = str(as_another_user(refused))
        assert line.startswith(f"runs_dir={tmp_path}: expected a directory to write to (")
        assert "Permission denied" in line


@pytest.mark.parametrize("file", ["runs", "runs/job", "runs/job/run"])
def test_a_file_in_the_way_is_named(tmp_path, file):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("")
    with pytest.raises(GraincodeError) as error, Run(tmp_path / "runs/job/run", {}, {}):
        pass
    assert str(error.value).startswith(f"runs_dir={tmp_path}/runs: expected a directory to write to ({tmp_path}/runs")


def test_a_run_is_opened_again_after_it_was_refused(tmp_path):
    """A sweep goes on in the same process: nothing stays locked."""
    for _ in range(2):
        with Run(tmp_path / "run", {}, {"seed": 1}) as run:
            run.finish(0)
        with pytest.raises(GraincodeError), Run(tmp_path / "run", {}, {"seed": 2}) as run:
            run.finish(0)


@pytest.mark.when("a start is refused, and its settings are then corrected", "the same run_name takes the new ones")
def test_a_run_of_which_nothing_is_made_takes_other_settings(tmp_path):
    for seed in (1, 2):
        with Run(tmp_path / "run", {}, {"seed": seed}):
            pass
    assert json.loads((tmp_path / "run/config.json").read_text())["identity"] == {"seed": 2}
    (tmp_path / "run/log.jsonl").write_text("")
    with pytest.raises(GraincodeError, match="seed: 2 -> 3"), Run(tmp_path / "run", {}, {"seed": 3}):
        pass


@pytest.mark.when(
    "config.json of a run is gone", "what a run was begun with is read from its newest state; without one, a warning"
)
def test_what_a_run_was_begun_with_is_in_its_states_too(tmp_path, caplog):
    for step in (2, 4):
        Checkpoints(tmp_path / "run/state").save(step, {}, {"seed": 1, "steps": step})
    (tmp_path / "run/state/step_000000004/state.json").write_text("")
    with pytest.raises(GraincodeError, match="seed: 1 -> 2"), Run(tmp_path / "run", {}, {"seed": 2, "steps": 2}):
        pass
    assert not (tmp_path / "run/config.json").exists()
    with Run(tmp_path / "run", {}, {"seed": 1, "steps": 2}):
        pass
    assert json.loads((tmp_path / "run/config.json").read_text())["identity"] == {"seed": 1, "steps": 2}
    assert not caplog.text
    (tmp_path / "other").mkdir()
    write_json(tmp_path / "other/result.json", {"objective": 0.5})
    with Run(tmp_path / "other", {}, {"seed": 2}):
        assert "has no config.json" in caplog.text


def test_a_state_of_another_run_is_told(tmp_path):
    run = Run(tmp_path / "run", {}, {"seed": 1, "steps": 6}, {"train": "9 images (aa)"}, may_grow=["steps"])
    run.check_state(tmp_path, {"seed": 1, "steps": 4, "inputs.train_images": "9 images (aa)"})
    run.check_state(tmp_path, {"seed": 1, "steps": 6})  # of a version that kept no fingerprint
    for other in ({"seed": 2}, {"inputs.train_images": "8 images (bb)"}, {"codes": "b"}):
        with pytest.raises(GraincodeError, match=f"{tmp_path} is a state of another run"):
            run.check_state(tmp_path, {"seed": 1, "steps": 6} | other)


@pytest.mark.when("a folder of images is moved, or copied with its times", "its runs go on from there")
def test_where_images_lie_does_not_matter_where_they_are_known(tmp_path):
    def enter(root, images, name="run"):
        return Run(tmp_path / name, {}, {"root": root}, images, places=["root"])

    with enter("/a", {"train": "9 images (aa)"}) as run:
        run.finish(0.5)
    with enter("/b", {"train": "9 images (aa)"}) as run:
        assert run.result == {"objective": 0.5}
    with pytest.raises(GraincodeError, match=r"on other images .inputs\.train_images: [^:]*: choose"):
        enter("/b", {"train": "8 images (bb)"}).__enter__()
    before = {"config": {}, "identity": {"root": "/a"}}  # an earlier version's, which knows of the place alone
    write_json(tmp_path / "run/config.json", before)
    with pytest.raises(GraincodeError, match="root: /a -> /b"):
        enter("/b", {"train": "9 images (aa)"}).__enter__()


def test_a_run_that_was_begun_from_a_state_goes_on_without_it(tmp_path):
    def enter(steps, **more):
        return Run(tmp_path / "run", {}, {"steps": steps, **more}, may_grow=["steps"])

    start = {"inputs.resume": "aa"}
    with enter(6, **start) as run:
        run.finish(0.5)
    for steps, more in ((6, {}), (8, start), (9, {}), (10, start)):
        with enter(steps, **more) as run:
            assert (run.result is None) == (steps > 6)
    with pytest.raises(GraincodeError, match=r"inputs\.resume: aa -> bb"):
        enter(10, **{"inputs.resume": "bb"}).__enter__()


@pytest.mark.when("the result of a run is no finite number", "it is not recorded, and not taken for one")
@pytest.mark.parametrize("objective", [float("nan"), float("inf")])
def test_a_result_is_finite(tmp_path, objective):
    with Run(tmp_path / "run", {}, {}) as run:
        with pytest.raises(GraincodeError, match=r"^objective="):
            run.finish(objective)
        assert run.result is None
        write_json(tmp_path / "run/result.json", {"objective": objective})
        with pytest.raises(Damaged, match="objective is"):
            run.result  # noqa: B018


@pytest.mark.parametrize("name", ["..", ".", "../other", "/abs", "a/b", ".hidden", "-", "latest", "table.csv", ""])
def test_names_that_lead_elsewhere_are_refused(name):
    with pytest.raises(GraincodeError, match=r"^run_name="):
        check("train_tokenizer", [f"run_name='{name}'"])


def test_a_path_counts_as_one_however_it_is_spelled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "imgs").mkdir()
    (tmp_path / "link").symlink_to("imgs")
    spelled = ["imgs", "./imgs", "imgs/", "imgs/../imgs", "~/imgs", "link", str(tmp_path / "imgs")]
    runs = [open_run("train_tokenizer", check("train_tokenizer", ["data=image_folder", f"data.root='{path}'"]))
            for path in spelled]  # fmt: skip
    assert len({run.path for run in runs}) == len({json.dumps(run.identity) for run in runs}) == 1
    assert one_spelling("imgs/*.tar") == f"{tmp_path}/imgs/*.tar"
    assert one_spelling("ylecun/mnist") == "ylecun/mnist"


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
    listed = [*listed.left_out, *listed.left_out_unless_best, *listed.may_grow]
    assert not {key for key in listed if "*" not in key} - known


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
    update_table(tmp_path)
    with (tmp_path / "table.csv").open() as file:
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
        members.append({"run": str(run), "overrides": [f"{setting}={choice}", "seed=1"], "status": 0})
    with write_sweep(tmp_path, members).open() as file:
        rows = list(csv.DictReader(file))
    assert [row[setting] for row in rows] == [member["overrides"][0].split("=")[1] for member in members]
    assert "seed" not in rows[0]
    assert Image.open(tmp_path / "plot.png").size[0] > 400
    assert Image.open(tmp_path / "rate_distortion.png").size[0] > 400
    assert json.loads((tmp_path / "r0/result.json").read_text())["objective"] == 0.2
