"""Logs of runs: log.jsonl, and every tracker's configuration with a class in its tracker's place."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from helpers_files import JSON_DAMAGES
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from graincode.config.job import build
from graincode.config.schema import config_directory
from graincode.config.validate import check
from graincode.core.errors import Damaged, GraincodeError
from graincode.training.trackers import LogSettings, RunLog, read_log

TRACKERS = sorted({file.stem for file in (config_directory() / "logging").glob("*.yaml")} - {"none"})
PICTURE = torch.zeros(3, 4, 6, dtype=torch.uint8)


def settings_of(name):
    return build(check("train_tokenizer", [f"logging={name}"]).logging)


def train_line(step):
    return {"train/loss": 1 / step, "speed/images_per_second": 7.0}


def test_a_resumed_log_has_no_lines_of_steps_that_were_lost(tmp_path):
    log = RunLog(tmp_path, 0, True, LogSettings())
    for step in (1, 2, 3):
        log.scalars(step, {"loss": math.sqrt(step)})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    RunLog(tmp_path, 2, True, LogSettings()).scalars(3, {"loss": 7.0})
    assert [(line["step"], line["loss"]) for line in read_log(tmp_path)] == [(1, 1.0), (2, math.sqrt(2)), (3, 7.0)]


def test_an_evaluation_that_is_done_again_is_logged_once(tmp_path):
    for _ in range(2):
        log = RunLog(tmp_path, 0, True, LogSettings())
        log.scalars(2, {"train/loss": 1.0})
        log.scalars(2, {"val/loss": 1.5})
    RunLog(tmp_path, 2, False, LogSettings()).scalars(2, {"val/loss": 1.5})
    assert read_log(tmp_path) == [{"step": 2, "train/loss": 1.0}, {"step": 2, "val/loss": 1.5}]


@pytest.mark.parametrize("name", TRACKERS)
def test_a_run_that_goes_on_keeps_its_id_and_sends_no_step_twice(name, tmp_path, monkeypatch):
    settings, sent, made = settings_of(name), [], []

    class Fake:
        """Gives each run an id of its own, unless it is told one."""

        def __init__(self, project, **arguments):
            made.append((project, arguments))

        def start(self):
            told = [value for value in made[-1][1].values() if str(value).startswith("id-")]
            one = SimpleNamespace(id=(told or [f"id-{len(made)}"])[0])
            one.hash = one.name = one.run_id = one.id
            one.info, one.get_key = one, lambda: one.id
            self.tracker = one

        def store_init_configuration(self, values):
            sent.append(("config", values["seed"]))

        def log(self, values, step):
            sent.append((step, *sorted(values)))

        def log_images(self, values, step):
            sent.append((step, *values))

        def finish(self):
            sent.append("finished")

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, settings.tracker, Fake)
    run = tmp_path / "my-run"
    run.mkdir()
    for begins in (0, 2, 1):  # after step 2, and after step 1 again, as when the state of step 2 was damaged
        log = RunLog(run, begins, True, settings, {"seed": 3, "data": {"size": [1, 2]}})
        for step in range(begins + 1, 4):
            log.scalars(step, train_line(step))
            if step == 2:
                log.pictures(step, {"Samples, drawn": PICTURE})
                log.scalars(step, {"val/loss": 0.5})
        log.close()
    lines = [(1, *sorted(train_line(1))), (2, *sorted(train_line(2))), (2, "val/loss"), (3, *sorted(train_line(3)))]
    if settings.images is not None:
        lines.insert(2, (2, "Samples, drawn"))
    config = [("config", 3)] if settings.config else []
    assert sent == [*config, *lines, "finished", "finished", "finished"]
    assert len(read_log(run)) == 4
    assert (run / "pictures/samples_drawn.png").is_file()
    assert settings.id is None or json.loads((run / "tracker.json").read_text())[settings.tracker]["id"] == "id-1"
    texts = [str(value) for project, arguments in made for value in (project, *arguments.values())]
    assert not any("{" in text for text in texts)
    assert settings.id is None or [("id-1" in arguments.values()) for _, arguments in made] == [False, True, True]


def test_tensorboard_has_every_step_once(tmp_path):
    PartialState(cpu=True)
    for begins in (0, 2):
        log = RunLog(tmp_path, begins, True, settings_of("tensorboard"))
        for step in range(begins + 1, 4):
            log.scalars(step, train_line(step))
        log.pictures(3, {"samples": PICTURE})
        log.close()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [
        (step, pytest.approx(1 / step)) for step in (1, 2, 3)
    ]
    assert (found.Images("samples")[0].height, found.Images("samples")[0].width) == (4, 6)


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    def start(self):
        raise ModuleNotFoundError("No module named 'mlflow'")

    monkeypatch.setattr(LOGGER_TYPE_TO_CLASS["mlflow"], "start", start)
    with pytest.raises(GraincodeError, match=r"^tracker=mlflow: expected .* pip install mlflow$"):
        RunLog(tmp_path, 0, True, settings_of("mlflow"))


def test_a_tracker_that_does_not_start_is_named(tmp_path, monkeypatch):
    def start(self):
        raise RuntimeError("no API key\ngiven")

    monkeypatch.setattr(LOGGER_TYPE_TO_CLASS["mlflow"], "start", start)
    with pytest.raises(GraincodeError, match=r"^tracker=mlflow: expected one that starts \(no API key given\)$"):
        RunLog(tmp_path, 0, True, settings_of("mlflow"))


def test_without_a_tracker_nothing_but_the_log_is_written(tmp_path):
    settings = settings_of("none")
    RunLog(tmp_path, 0, True, settings).scalars(1, train_line(1))
    assert settings.tracker is None
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]


def test_the_newest_picture_of_each_name_is_kept_as_a_file(tmp_path):
    log = RunLog(tmp_path, 0, True, LogSettings())
    log.pictures(1, {"Images, density: all": PICTURE})
    red = PICTURE.clone()
    red[0] = 200
    log.pictures(None, {"Images, density: all": red})
    (file,) = (tmp_path / "pictures").iterdir()
    assert file.name == "images_density_all.png"
    assert (np.asarray(Image.open(file)) == [200, 0, 0]).all()


LOG_DAMAGES = {
    "empty": b"", "cut": b'{"step": 1, "lo', "null": b"null\n", "list": b"[1]\n", "no step": b'{"loss": 1}\n',
    "text step": b'{"step": "x"}\n', "not UTF-8": b'\xff{"step": 1}\n', "zeros": bytes(50),
    "nested": b"[" * 10**5 + b"\n", "text": b'{"step": 2, "loss": "x"}\n', "none": b'{"step": 2, "loss": null}\n',
    "yes": b'{"step": 2, "loss": true}\n', "a value that no plot has": b'{"step": 2, "loss": 1e308}\n',
    "a huge step": b'{"step": %d}\n' % 10**400,
}  # fmt: skip


@pytest.mark.when(
    "log.jsonl of a run has damaged lines", "they are named and left out; a last line that was cut off is left out"
)
@pytest.mark.parametrize("damage", LOG_DAMAGES)
def test_damaged_lines_of_a_log_are_left_out(tmp_path, damage, caplog):
    lines = b'{"step": 1, "loss": 1.0}\n', b'{"step": 3, "loss": 3.0}\n'
    (tmp_path / "log.jsonl").write_bytes(lines[0] + LOG_DAMAGES[damage] + b"\n" * (damage == "cut") + lines[1])
    if damage == "zeros":  # a block that a power failure lost takes the line along
        assert [line["step"] for line in read_log(tmp_path)] == [1]
    else:
        assert [line["step"] for line in read_log(tmp_path)] == [1, 3]
    assert ("log.jsonl is damaged (line 2 " in caplog.text) == (damage != "empty")
    caplog.clear()
    (tmp_path / "log.jsonl").write_bytes(lines[0] + lines[1][:9])
    assert [line["step"] for line in read_log(tmp_path)] == [1]
    assert not caplog.text


def test_a_directory_in_the_place_of_a_log_is_named(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(Damaged, match=r"log\.jsonl is damaged .*: move it away"):
        RunLog(tmp_path, 0, True, LogSettings())


@pytest.mark.parametrize("damage", JSON_DAMAGES)
def test_a_damaged_record_of_trackers_is_named(tmp_path, damage):
    settings = settings_of("tensorboard")
    RunLog(tmp_path, 0, True, settings).close()
    assert json.loads((tmp_path / "tracker.json").read_text())["tensorboard"]["sent"] == [0, False]
    JSON_DAMAGES[damage](tmp_path / "tracker.json")
    if damage == "no keys":  # of no tracker yet
        RunLog(tmp_path, 0, True, settings).close()
        return
    with pytest.raises(Damaged, match=r"tracker\.json is damaged"):
        RunLog(tmp_path, 0, True, settings)


@pytest.mark.when(
    "TensorBoard's file cannot be written, as on a full disk", "a warning, once; the run goes on without it"
)
def test_a_tracker_without_room_is_given_up(tmp_path, monkeypatch, caplog, capfd):
    log = RunLog(tmp_path, 0, True, settings_of("tensorboard"))
    log.scalars(1, train_line(1))

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", refuse)
    for step in (2, 3, 4):
        log.scalars(step, train_line(step))
        log.pictures(step, {"some": PICTURE})
    log.close()
    assert [record.message for record in caplog.records] == [
        "tensorboard cannot log ([Errno 28] No space left on device): the run goes on without it"
    ]
    assert "Traceback" not in capfd.readouterr().err
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3, 4]
