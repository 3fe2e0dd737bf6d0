"""Files that are whole or not there, and archives that are what they say."""

import os
import resource
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from helpers_files import ARRAY_DAMAGES, JSON_DAMAGES

from graincode import files
from graincode.core.errors import Damaged, GraincodeError
from graincode.files import (
    allocate_array,
    clear_leftovers,
    new_directory,
    open_npz,
    read_array,
    read_json,
    replacing,
    scratch_directory,
    write_json,
)  # fmt: skip


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


def npy(shape: str, content: bytes, dtype: str = "|u1", version: int = 1) -> bytes:
    """An .npy file that says what it likes."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2 if version == 1 else 4, "little") + text + content


@pytest.mark.when("an .npz declares more than its file can hold", "it is refused before memory is taken")
@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"arr_0.npy": npy("(6000000, 1000, 1000, 3)", b"x" * 100)}, "declares 18,000,000,000,"),
        ({"arr_0.npy": npy("(6000000, 1000, 1000, 3)", b"x" * 100, version=2)}, "declares 18,000,000,000,"),
        ({"arr_0.npy": npy("(2,)", b"x" * 100, "|V1000000000")}, "declares 2,000,000,"),
        ({"arr_0.npy": npy(f"({10**30},)", b"x")}, "declares 1,000,000,000,000,000,000,000,000,000,"),
        ({"arr_0.npy": npy("(-1, 3)", b"xxx")}, "declares"),
        ({"arr_0.npy": npy("(80000000,)", bytes(80_000_000))}, "1 arrays of 80,000,"),
        ({f"{i}.npy": npy("(40000000,)", bytes(40_000_000)) for i in range(2)}, "2 arrays of 80,000,"),
        ({f"{i}.npy": npy("(1,)", b"x") for i in range(1001)}, "1001 arrays"),
        ({"arr_0.npy": npy("(1,)", b"x", version=0)}, "cannot be read"),
        ({"arr_0.npy": b"x" * 5}, "cannot be read"),
    ],
)
def test_archives_that_declare_too_much_are_refused(tmp_path, members, words):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=words), open_npz(tmp_path / "a.npz") as arrays:
        [arrays[name] for name in arrays.files]


def test_archives_that_compress_well_are_read(tmp_path):
    arrays = {"flat": np.zeros((20, 256, 256, 3), np.uint8), "empty": np.zeros((0, 3)), "one": np.array(2.5)}
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    with open_npz(tmp_path / "a.npz") as found:
        assert all(np.array_equal(found[name], value) for name, value in arrays.items())


@pytest.mark.parametrize("damage", JSON_DAMAGES)
def test_damaged_json_is_named_with_what_to_do(tmp_path, damage):
    file = tmp_path / "a.json"
    write_json(file, {"steps": 3, "loss": 2, "names": ["a"], "values": {}})
    keys = {"steps": int, "loss": float, "names": list, "values": dict}
    assert read_json(file, keys, "remove it")["steps"] == 3
    JSON_DAMAGES[damage](file)
    with pytest.raises(Damaged) as error:
        read_json(file, keys, "remove it")
    assert str(error.value) == f"{error.value.finding}: remove it"
    assert error.value.finding.startswith(f"{file} is damaged (")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("value", "kind"), [(True, int), (1.5, int), ("1", float), (True, float), (1, str), ([], dict)]
)
def test_json_of_another_type_is_damaged(tmp_path, value, kind):
    write_json(tmp_path / "a.json", {"key": value})
    with pytest.raises(Damaged, match="key is "):
        read_json(tmp_path / "a.json", {"key": kind}, "remove it")


@pytest.mark.parametrize("damage", ARRAY_DAMAGES)
@pytest.mark.parametrize("mapped", [True, False])
def test_damaged_arrays_are_named_with_what_to_do(tmp_path, damage, mapped):
    file, array = tmp_path / "a.npy", np.arange(300, dtype=np.uint16).reshape(10, 30)
    np.save(file, array)
    assert np.array_equal(read_array(file, np.integer, (10, None), "remove it", mapped), array)
    ARRAY_DAMAGES[damage](file)
    with pytest.raises(Damaged) as error:
        read_array(file, np.integer, (10, None), "remove it", mapped)
    assert str(error.value).startswith(f"{file} is damaged (")
    assert "pickle" not in str(error.value)


def test_no_values_are_an_array_too(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(0, np.int64))
    assert read_array(tmp_path / "a.npy", np.int64, (None,), "remove it").shape == (0,)


@pytest.mark.parametrize("found", ["nothing", "empty", "a model", "a file", "leftovers", "a link to nothing"])
def test_a_directory_is_replaced_as_a_whole(tmp_path, found):
    target = tmp_path / "export"
    if found in ("empty", "a model"):
        target.mkdir()
    if found == "a model":
        (target / "a").write_text("before")
    if found == "a file":
        target.write_text("before")
    if found == "a link to nothing":
        target.symlink_to("gone")
        with pytest.raises(GraincodeError, match="is there already"), new_directory(target):
            pass
    if found == "leftovers":  # of a process that was killed when it replaced it
        (tmp_path / "export.before").mkdir()
    with pytest.raises(RuntimeError), new_directory(target, replaces=True):
        raise RuntimeError
    assert target.exists() == (found in ("empty", "a model", "a file"))
    with new_directory(target, replaces=True) as partial:
        (partial / "a").write_text("now")
    assert (target / "a").read_text() == "now"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


KILLED = """
import os, signal, sys
from pathlib import Path
from graincode.files import new_directory, replacing, scratch_directory

folder = Path(sys.argv[1])
with replacing(folder / "a.json") as file, new_directory(folder / "b") as half, scratch_directory(folder, "c"):
    file.write_text("half")
    (half / "d").write_text("half")
    print("written", flush=True)
    if sys.argv[2] == "waits":
        input()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def write_again(folder):
    """What the next command does with the same names."""
    with replacing(folder / "a.json") as file, new_directory(folder / "b"), scratch_directory(folder, "c"):
        file.write_text("whole")


@pytest.mark.when("a process is killed while it writes a file", "the next that writes it removes what is half written")
def test_what_a_killed_process_left_goes_with_the_next_that_writes(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), "dies"], stdout=subprocess.PIPE)
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == [".a.partial", ".b.partial", ".c.partial"]
    write_again(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b"]


def test_what_a_living_process_writes_stays(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path), "waits"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        write_again(tmp_path)
        left = [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        assert len(left) == 3
        other.kill()
    for path in left[:2]:  # of another machine: too young, and old
        foreign = path.with_name(path.name.replace("partial-", "partial-abc"))
        path.rename(foreign)
        age = 0 if path == left[0] else 2 * files._LONG_AGO_SECONDS
        os.utime(foreign, (foreign.stat().st_mtime - age,) * 2)
    shutil.rmtree(tmp_path / "b")
    write_again(tmp_path)
    assert len([path for path in tmp_path.iterdir() if path.name.startswith(".")]) == 1


@pytest.mark.when("the disk has no room for an array of codes or kept images", "one line, before anything is computed")
def test_the_room_of_an_array_is_taken_when_it_is_made(tmp_path):
    file, limit = tmp_path / "a.npy", resource.getrlimit(resource.RLIMIT_FSIZE)
    allocate_array(file, np.uint8, (1000, 100))
    assert file.stat().st_blocks * 512 >= 100_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(OSError, match=r"a\.npy"):
            allocate_array(file, np.uint8, (1000, 100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not file.exists()
