import json
import os
import struct
import zipfile
from pathlib import Path

import pytest
from helpers_data import gray, levels, one_line, photo, together, write_files

from graincode.core.errors import GraincodeError
from graincode.data import ImageFolder
from graincode.data.images import SPLITS

COUNT = 20


def names() -> list[str]:
    return [f"0000{i % 2}/img{i:08d}.png" for i in range(COUNT)]


def contents(labels: list | None = None, **more) -> dict[str, bytes]:
    """What `dataset_tool.py` writes: folders that are no classes, and labels by names."""
    images = {name: gray(i) for i, name in enumerate(names())}
    labels = [[name, i % 3] for i, name in enumerate(names())] if labels is None else labels
    return images | {"dataset.json": json.dumps({"labels": labels or None}).encode()} | more


def write(root: Path, layout: str, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    if layout == "folder":
        return write_files(root / "data", files)
    with zipfile.ZipFile(root / "data.zip", "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return root / "data.zip"


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("layout", ["folder", "zip"])
def test_the_labels_of_stylegan_are_read(tmp_path, layout, cache):
    source = ImageFolder(str(write(tmp_path, layout, contents())), image_size=8, cache=cache)
    assert source.class_names == ("0", "1", "2")
    found = levels(source)
    assert together(found) == list(range(COUNT))
    assert all(found.values())
    for name in SPLITS:
        assert source.split(name).labels.tolist() == [level % 3 for level in found[name]]
    assert len({source.split(name).fingerprint() for name in SPLITS}) == 3


@pytest.mark.parametrize("layout", ["folder", "zip"])
def test_stylegan_without_labels_has_no_classes(tmp_path, layout):
    source = ImageFolder(str(write(tmp_path, layout, contents(labels=[]))), image_size=8)
    assert source.class_names == ()
    assert together(levels(source)) == list(range(COUNT))
    unlabelled = ImageFolder(str(write(tmp_path, layout, contents())), image_size=8, classes="none")
    assert unlabelled.class_names == ()


@pytest.mark.parametrize("layout", ["folder", "zip"])
def test_another_dataset_json_says_nothing(tmp_path, layout):
    files = contents() | {"dataset.json": b'{"name": "mine"}'}
    assert ImageFolder(str(write(tmp_path, layout, files))).class_names == ("00000", "00001")


def test_a_zip_of_split_folders_is_read_like_a_directory(tmp_path):
    files = {f"mine/{part}/{'ab'[i % 2]}/{i}.jpg": photo(i) for part in ("train", "valid") for i in range(8)}
    junk = {"__MACOSX/mine/._1.jpg": b"", "mine/notes.txt": b"", "mine/.hidden.jpg": b""}
    outside = {"/etc/1.jpg": photo(1), "../2.jpg": photo(2), "mine//train/a/3.jpg": photo(3)}
    one = ImageFolder(str(write(tmp_path, "folder", files | junk)), image_size=8)
    other = ImageFolder(str(write(tmp_path, "zip", files | junk | outside)), image_size=8)
    assert one.class_names == other.class_names == ("a", "b")
    for name in SPLITS:
        assert one.split(name).content_hash() == other.split(name).content_hash()
    assert len(other.split("val")) == 8


@pytest.mark.parametrize("layout", ["folder", "zip"])
@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "Expecting value"),
        (b"\xff", "utf-8"),
        (b'{"labels": [["a.png", 0', "Expecting"),
        (b'{"labels": 3}', "expected {"),
        (b'{"labels": [["a.png"]]}', "expected {"),
        (b'{"labels": [["a.png", 0.5]]}', "whole number"),
        (b'{"labels": [["a.png", -1]]}', "whole number"),
        (b'{"labels": [["a.png", true]]}', "whole number"),
        (b'{"labels": [["a.png", 0]]}', "no label of '00000/img00000000.png'"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_damaged_labels_are_named(tmp_path, layout, content, part):
    path = write(tmp_path, layout, contents() | {"dataset.json": content})
    with pytest.raises(GraincodeError) as error:
        ImageFolder(str(path)).split("train")
    one_line(error, str(path / "dataset.json"), part, "classes=none")


def test_a_label_without_end_is_named(tmp_path):
    path = write(tmp_path, "folder", contents([[name, 10**8] for name in names()]))
    with pytest.raises(GraincodeError) as error:
        ImageFolder(str(path)).split("train")
    one_line(error, str(path), str(10**8))


def test_a_compressed_zip_says_what_to_do(tmp_path):
    path = write(tmp_path, "zip", contents(), zipfile.ZIP_DEFLATED)
    with pytest.raises(GraincodeError) as error:
        ImageFolder(str(path)).split("train")
    one_line(error, str(path), "compressed", "unpack it")


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "no images", "no name", "a size that is not there"])
def test_a_damaged_zip_is_named(tmp_path, damage):
    path = write(tmp_path, "zip", contents())
    whole = path.read_bytes()
    if damage == "cut":
        os.truncate(path, len(whole) // 2)
    elif damage == "empty":
        os.truncate(path, 0)
    elif damage == "text":
        path.write_bytes(b"no archive")
    elif damage == "no name":  # of the only member
        path = write(tmp_path, "zip", {"x": b""})
        at = path.read_bytes().rindex(b"PK\x01\x02")
        whole = bytearray(path.read_bytes())
        whole[at + 28 : at + 30] = bytes(2)
        whole[at + 30 : at + 32] = b"\x01\x00"  # its byte is of the extra field
        path.write_bytes(whole)
    elif damage == "no images":
        path = write(tmp_path, "zip", {"a.txt": b""})
    else:  # in the last header of an image, of the table at the end
        at = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"dataset.json") - 46)
        path.write_bytes(whole[: at + 20] + struct.pack("<II", 2**32 - 2, 2**32 - 2) + whole[at + 28 :])
    with pytest.raises(GraincodeError) as error:
        source = ImageFolder(str(path), val_fraction=0, test_fraction=0, image_size=8)
        split = source.split("train")
        split[range(len(split))]
    one_line(error, str(path))
