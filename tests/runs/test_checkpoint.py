"""Resume states."""

import hashlib
import json

import pytest
import torch

from graincode.core.errors import GraincodeError
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
        checkpoints.save(step, {"value": torch.full((1000,), float(step))})
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
        checkpoints.save(step, {})
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
    checkpoints.save(1, {})
    torch.save(Boom(), checkpoints.path(1) / "state.pt")
    about = checkpoints.path(1) / "state.json"
    digest = hashlib.sha256((checkpoints.path(1) / "state.pt").read_bytes()).hexdigest()
    about.write_text(json.dumps(json.loads(about.read_text()) | {"sha256": digest}))
    with pytest.raises(GraincodeError, match="is damaged"):
        read_state(checkpoints.path(1))
