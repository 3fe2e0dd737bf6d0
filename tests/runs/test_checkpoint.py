"""Resume states."""

import hashlib
import json

import pytest
import torch
from helpers_files import JSON_DAMAGES

from graincode.core.errors import Damaged, GraincodeError
from graincode.files import remove
from graincode.runs.checkpoint import Checkpoints, read_about, read_state


def test_checkpoints_keep_the_newest_and_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.load() is None
    for step in (5, 10, 15, 20):
        checkpoints.save(step, {"value": torch.tensor(step)}, identity={"seed": 1})
        if step == 5:
            checkpoints.mark_best(5, {"objective": 1.0})
    assert checkpoints.steps() == [20, 15, 5]
    assert checkpoints.load()["value"] == 20
    assert read_about(checkpoints.path(5))["identity"] == {"seed": 1}
    checkpoints.mark_best(20, {"objective": 0.5})
    assert checkpoints.steps() == [20, 15]


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "empty"])
def test_a_damaged_state_is_named_and_the_one_before_is_used(tmp_path, damage, caplog):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(step, {"value": torch.full((1000,), float(step))}, {})
    state, about = tmp_path / "step_000000002" / "state.pt", tmp_path / "step_000000002" / "state.json"
    content = bytearray(state.read_bytes())
    if damage == "truncated":
        content = content[:-100]
    elif damage == "flipped bit":
        content[len(content) // 2] ^= 4
    else:
        about.write_text("")
    state.write_bytes(content)
    found = checkpoints.load()
    assert found["step"] == 1
    assert str(tmp_path / "step_000000002") in caplog.text
    checkpoints.set_aside_after(1)
    assert checkpoints.steps() == [1]
    assert (tmp_path / "damaged_step_000000002").is_dir()


def test_a_state_of_another_version_is_refused_and_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {}, {})
    about = checkpoints.path(2) / "state.json"
    about.write_text(about.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(GraincodeError, match="has state format 3, this version reads 2"):
        checkpoints.load()
    assert checkpoints.steps() == [2, 1]


def test_a_state_that_is_a_pickle_is_not_run(tmp_path):
    class Boom:
        def __reduce__(self):
            return (pytest.fail, ("a pickle ran",))

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {}, {})
    torch.save(Boom(), checkpoints.path(1) / "state.pt")
    about = checkpoints.path(1) / "state.json"
    digest = hashlib.sha256((checkpoints.path(1) / "state.pt").read_bytes()).hexdigest()
    about.write_text(json.dumps(json.loads(about.read_text()) | {"sha256": digest}))
    with pytest.raises(GraincodeError, match="is damaged"):
        read_state(checkpoints.path(1))


@pytest.mark.parametrize("damage", JSON_DAMAGES)
@pytest.mark.when(
    "the record of a run's best state is damaged", "one line names it; once it is removed, the run goes on"
)
def test_a_damaged_record_of_the_best_state_is_named(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {}, {})
    checkpoints.mark_best(1, {"objective": 1.0})
    JSON_DAMAGES[damage](tmp_path / "best.json")
    with pytest.raises(Damaged, match=r"best\.json is damaged"):
        checkpoints.save(2, {}, {})
    assert checkpoints.steps() == [2, 1]  # nothing is lost
    remove(tmp_path / "best.json")
    checkpoints.save(3, {}, {})
    assert checkpoints.steps() == [3]


@pytest.mark.parametrize("damage", JSON_DAMAGES)
def test_a_damaged_description_of_a_state_is_named_and_the_one_before_is_used(tmp_path, damage, caplog):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {}, {"seed": 1})
    JSON_DAMAGES[damage](checkpoints.path(2) / "state.json")
    with pytest.raises(Damaged):
        read_about(checkpoints.path(2))
    assert checkpoints.load()["step"] == 1
    assert f"{checkpoints.path(2)}/state.json is damaged" in caplog.text


@pytest.mark.parametrize("content", [None, [], 3, {}, {"step": "2"}, {"step": 1}, torch.zeros(3)])
def test_a_state_that_holds_something_else_is_damaged(tmp_path, content):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, {}, {})
    torch.save(content, checkpoints.path(2) / "state.pt")
    about = checkpoints.path(2) / "state.json"
    digest = hashlib.sha256((checkpoints.path(2) / "state.pt").read_bytes()).hexdigest()
    about.write_text(json.dumps(json.loads(about.read_text()) | {"sha256": digest}))
    with pytest.raises(Damaged):
        read_state(checkpoints.path(2))


def test_a_file_where_a_state_was_is_passed_over(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {}, {})
    checkpoints.path(2).write_text("")
    assert checkpoints.load()["step"] == 1
    checkpoints.set_aside_after(1)
    checkpoints.path(0).write_text("")
    checkpoints.save(2, {}, {})
    assert checkpoints.steps() == [2]
