"""Which files below a directory are images of a data set, and what is said of the others."""

import logging
import os
from pathlib import Path

import pytest
import torch
from helpers_data import gray, one_line, write_files, write_images

from graincode.core.errors import GraincodeError
from graincode.data import FFHQ, HuggingFace, ImageFolder, ImageNet
from graincode.data.encoded import MAX_BYTES, read_file
from graincode.data.scanning import image_files
from graincode.evaluation.subjects import Folder


@pytest.fixture
def outside(tmp_path) -> Path:
    """Images that are none of the data set's, which lies beside them in `root`."""
    write_images(tmp_path / "root", "a/1.png", "b/2.png")
    return write_images(tmp_path / "outside", "3.png", "more/4.png", "more/deep/5.png")


def paths(root: Path, **arguments) -> list[str]:
    return list(image_files(root, **arguments).paths)


def test_links_that_lead_out_are_followed_when_asked(tmp_path, outside, caplog):
    caplog.set_level("WARNING")  # whatever a job has set before
    root = tmp_path / "root"
    (root / "a" / "3.png").symlink_to(outside / "3.png")
    (root / "c").symlink_to(outside / "more")
    assert paths(root) == ["a/1.png", "b/2.png"]
    (line,) = caplog.messages
    assert line.startswith(f"{root}: left out 2 links that lead out")
    assert "'a/3.png'" in line
    assert "allow_outside=true" in line
    assert paths(root, allow_outside=True) == ["a/1.png", "a/3.png", "b/2.png", "c/4.png", "c/deep/5.png"]
    shares = {"val_fraction": 0, "test_fraction": 0}
    assert ImageFolder(str(root), allow_outside=True, **shares).class_names == ("a", "b", "c")
    assert ImageFolder(str(root), **shares).class_names == ("a", "b")


@pytest.mark.when(
    "a link in a folder of images leads out of it", "what is behind it is left out and named, unless it is asked for"
)
@pytest.mark.parametrize("kind", ["image_folder", "imagenet", "ffhq", "reference"])
def test_a_directory_that_is_a_link_out_is_named(tmp_path, kind):
    name = {"imagenet": "train", "ffhq": "images1024x1024"}.get(kind, "a")
    files = {f"{name}/n1/{number:05d}.png": gray(number) for number in range(20)}
    write_files(tmp_path / "outside", files)
    write_files(tmp_path / "root" / "val", {"n1/00050.png": gray(50)} if kind == "imagenet" else {})
    (tmp_path / "root").mkdir(exist_ok=True)
    (tmp_path / "root" / name).symlink_to(tmp_path / "outside" / name)

    def read(**arguments):
        root = str(tmp_path / "root")
        if kind == "reference":
            return Folder(root, **arguments).open_reference(None, None)
        source = {"image_folder": ImageFolder, "imagenet": ImageNet, "ffhq": FFHQ}[kind](root, **arguments)
        return source.split("train")

    with pytest.raises(GraincodeError) as error:
        read()
    one_line(error, str(tmp_path / "root"), "allow_outside=true")
    read(allow_outside=True)


def test_a_root_that_is_a_link_is_no_link_that_leads_out(tmp_path, outside):
    (tmp_path / "linked").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "b" / "1.png").symlink_to("../a/1.png")
    assert paths(tmp_path / "linked") == ["a/1.png", "b/1.png", "b/2.png"]


@pytest.mark.when("links in a folder of images make a loop", "each real folder is read once")
def test_each_real_directory_is_read_once(tmp_path, outside):
    root = tmp_path / "root"
    (root / "a" / "loop").symlink_to("..")
    (root / "a" / "self").symlink_to(".")
    (root / "c").symlink_to("a")
    (root / ".store").mkdir()
    write_images(root / ".store", "6.png")
    (root / "d").symlink_to(".store")  # the only way to what is hidden
    (root / "e").symlink_to(".store")
    assert paths(root) == ["a/1.png", "b/2.png", "d/6.png"]
    (root / "up").symlink_to(tmp_path)
    assert paths(root, allow_outside=True) == [
        "a/1.png", "b/2.png", "d/6.png", "up/outside/3.png", "up/outside/more/4.png", "up/outside/more/deep/5.png",
    ]  # fmt: skip


def test_a_chain_of_loops_ends(tmp_path):
    write_images(tmp_path, "x/1.png")
    for name, target in (("p", "q"), ("q", "p"), ("r.png", "r.png")):
        (tmp_path / name).symlink_to(target)
    assert paths(tmp_path, allow_outside=True) == ["x/1.png"]


@pytest.mark.when("a pipe or a device is called .png", "it is left out and named")
def test_what_is_no_regular_file_is_left_out(tmp_path, caplog):
    caplog.set_level("WARNING")  # whatever a job has set before
    write_images(tmp_path, "1.png")
    os.mkfifo(tmp_path / "2.png")
    (tmp_path / "3.png").symlink_to("2.png")
    (tmp_path / "4.png").symlink_to("nothing")
    (tmp_path / "5.png").symlink_to("/dev/zero")
    assert paths(tmp_path) == ["1.png"]
    (line,) = caplog.messages
    assert "3 pipes, devices or broken links, such as '2.png'" in line
    assert "1 links that lead out" in line
    assert paths(tmp_path, allow_outside=True) == ["1.png"]
    with pytest.raises(GraincodeError) as error:  # as of a file that becomes a pipe
        read_file(tmp_path / "2.png")
    one_line(error, str(tmp_path / "2.png"))


@pytest.mark.when("a folder of images may not be read", "it is named; none of the data set is left out in silence")
def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    write_images(tmp_path, "a/1.png", "b/2.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(GraincodeError) as error:
        ImageFolder(str(tmp_path)).split("train")
    one_line(error, str(tmp_path / "b"), "Permission denied")


def test_junk_and_hidden_files_are_left_out_and_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_images(tmp_path, "1.png", "__MACOSX/2.png", "@eaDir/3.png", "lost+found/4.png", "$RECYCLE.BIN/5.png")
    write_images(tmp_path, ".hidden.png", "a.png/6.png")
    write_files(tmp_path, {"notes.txt": b"", "more.heic": b"", "LICENSE": b""})
    assert paths(tmp_path) == ["1.png", "a.png/6.png"]
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert "3 files with other endings, such as 'LICENSE'" in record.getMessage()
    assert "5 hidden files or folders, such as '$RECYCLE.BIN'" in record.getMessage()


def test_what_is_left_out_is_said_where_nothing_is_left(tmp_path):
    write_files(tmp_path, {"1.heic": b"", "2.heic": b""})
    with pytest.raises(GraincodeError) as error:
        image_files(tmp_path)
    one_line(error, str(tmp_path), "2 files with other endings, such as '1.heic'")


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", os.fsdecode(b"\xff\xfe"), "x\u202ey"])
def test_names_that_cannot_be_printed_stay_within_their_line(tmp_path, name, caplog):
    folder = tmp_path / name
    write_files(folder, {f"{i}.png": b"no image" for i in range(3)})
    write_files(tmp_path / "other", {"1.png": gray(0)})
    os.mkfifo(folder / "pipe.png")
    source = ImageFolder(str(tmp_path), image_size=8, val_fraction=0, test_fraction=0)
    assert all(shown.isprintable() for shown in source.class_names)
    assert all(line.isprintable() for line in caplog.messages)
    split = source.split("train")
    assert sorted(split.labels.bincount().tolist()) == [1, 3]
    assert len(split.fingerprint()) == 16
    assert all(split.encoded.name(index).isprintable() for index in range(4))
    with pytest.raises(GraincodeError) as error:
        split[range(4)]
    assert error.value.line.isprintable()
    one_line(error, "cannot be read as an image")


@pytest.mark.when("a file of images says that it has terabytes", "it is refused by name before any memory is taken")
def test_a_file_that_is_too_large_is_named_before_it_is_read(tmp_path):
    write_images(tmp_path, "1.png")
    os.truncate(tmp_path / "1.png", 10 * 2**40)
    source = ImageFolder(str(tmp_path), val_fraction=0, test_fraction=0)
    with pytest.raises(GraincodeError) as error:
        source.split("train")[0]
    one_line(error, str(tmp_path / "1.png"), str(10 * 2**40), str(MAX_BYTES))


@pytest.mark.when("a row of a table names a file outside of the data set", "it is refused, unless it is asked for")
@pytest.mark.parametrize(
    ("layout", "path", "is_inside"),
    [
        ("folder", "root/inside.data", True),
        ("folder", "outside/3.png", False),
        ("folder", "root/../outside/3.png", False),
        ("folder", "root/link.data", False),
        ("folder", "root-of-others/3.png", False),
        ("file", "root/inside.data", False),  # nothing is inside of a file
    ],
)
def test_a_row_opens_no_file_outside(tmp_path, layout, path, is_inside):
    datasets = pytest.importorskip("datasets")
    for name in ("root/inside.data", "outside/3.png", "root-of-others/3.png"):
        write_files(tmp_path, {name: gray(7)})
    (tmp_path / "root" / "link.data").symlink_to("../outside/3.png")
    table = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": str(tmp_path / path)}]})
    target = tmp_path / "root" / "train.parquet"
    table.to_parquet(str(target))

    def level(**arguments) -> int:
        where = target if layout == "file" else target.parent
        source = HuggingFace(str(where), val_fraction=0, test_fraction=0, image_size=8, **arguments)
        return source.split("train").load(torch.tensor([0]))[0][0, 0, 0, 0].item()

    assert level(allow_outside=True) == 7
    if is_inside:
        assert level() == 7
    else:
        with pytest.raises(GraincodeError) as error:
            level()
        one_line(error, "row 0", repr(str(tmp_path / path)), "allow_outside=true")


def test_a_tree_that_the_system_makes_up_ends():
    with pytest.raises(GraincodeError) as error:
        image_files(Path("/proc/self"))
    one_line(error, "/proc/self")
