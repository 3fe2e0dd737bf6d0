"""Files that are whole or not there."""

import shutil

import pytest

from graincode.files import clear_leftovers, new_directory, replacing


def test_files_are_replaced_as_a_whole_or_not_at_all(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("before")
    with pytest.raises(RuntimeError), replacing(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert target.read_text() == "before"
    with pytest.raises(RuntimeError), new_directory(tmp_path / "folder") as partial:
        (partial / "a").write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_leftovers_are_cleared_and_nothing_else(tmp_path):
    with replacing(tmp_path / "figures.json") as partial:
        partial.write_text("{}")
        half = shutil.copy(
            partial, partial.with_name(".figures.partial-abcdefgh.json")
        )  # as if it had been killed here
    (tmp_path / "figures.json").unlink()
    for name in (".export.partial-a1b2c3_d", ".keep", ".my-settings", "best.json", "step_1"):
        (tmp_path / name).mkdir()
    clear_leftovers(tmp_path)
    assert not half.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".keep", ".my-settings", "best.json", "step_1"]
