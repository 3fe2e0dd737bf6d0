import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers_data import gray, levels, one_line, together, write_files, write_tar

from graincode.config.job import build
from graincode.config.validate import check
from graincode.core.errors import GraincodeError
from graincode.data import WebDataset
from graincode.data.images import SPLITS


def shard(numbers: range, labels: bool = True) -> dict[str, bytes]:
    members = {}
    for i in numbers:
        members |= {f"deep/{i:03d}.png": gray(i), f"deep/{i:03d}.json": b"{}", f"deep/{i:03d}.seg.png": b"?"}
        if labels:
            members[f"deep/{i:03d}.cls"] = f"{i % 3}\n".encode()
    return members


@pytest.mark.when("shards are called training-, valid- or testing-, or lie in such folders", "they are the splits")
@pytest.mark.parametrize(
    ("names", "root"),
    [
        (("training-0.tar", "valid-0.tar", "testing-0.tar"), ""),
        (("Train_0.tar", "DEV_0.tar", "x.test.tar"), ""),
        (("train/0.tar", "val/0.tar", "test/0.tar"), "*/*.tar"),
        (("training/0.tar", "validation/0.tar", "testing/0.tar"), "**/0.tar"),
        (("a-train/0.tar", "a-valid/0.tar", "b-test/0.tar"), "*/0.tar"),
    ],
)
def test_shards_by_all_names_of_splits(tmp_path, names, root):
    parts = range(12), range(12, 15), range(15, 20)
    for name, numbers in zip(names, parts, strict=True):
        write_tar(tmp_path / name, shard(numbers))
    assert levels(WebDataset(str(tmp_path / root), image_size=8)) == dict(zip(SPLITS, map(list, parts), strict=True))


def test_shards_of_one_split_are_divided(tmp_path):
    write_tar(tmp_path / "val" / "val-0.tar", shard(range(20)))
    found = levels(WebDataset(str(tmp_path / "val"), image_size=8))
    assert all(found.values())
    assert together(found) == list(range(20))
    write_tar(tmp_path / "val" / "test-0.tar", shard(range(20, 30)))
    with pytest.raises(GraincodeError) as error:
        WebDataset(str(tmp_path / "val")).split("train")
    one_line(error, "shards of train", "test, val")


@pytest.mark.parametrize("prefix", ["", "imagenet-"])
def test_shards_named_after_splits_are_the_splits(tmp_path, prefix):
    parts = {"train-00": range(6), "train-01": range(6, 12), "val-0": range(12, 15), "test-0": range(15, 20)}
    for name, numbers in parts.items():
        write_tar(tmp_path / f"{prefix}{name}.tar", shard(numbers))
    source = WebDataset(str(tmp_path), image_size=8)
    found = levels(source)
    assert found == {"train": list(range(12)), "val": [12, 13, 14], "test": list(range(15, 20))}
    assert source.class_names == ("0", "1", "2")
    for name in SPLITS:
        assert source.split(name).labels.tolist() == [level % 3 for level in found[name]]
    (tmp_path / f"{prefix}val-0.tar").rename(tmp_path / f"{prefix}validation-0.tar")
    assert levels(WebDataset(str(tmp_path), image_size=8)) == found
    (tmp_path / f"{prefix}validation-0.tar").unlink()
    partly = levels(WebDataset(str(tmp_path), image_size=8))
    assert partly["val"]
    assert sorted(partly["train"] + partly["val"]) == list(range(12))
    assert partly["test"] == found["test"]
    write_tar(tmp_path / "more.tar", shard(range(20, 25)))
    with pytest.raises(GraincodeError) as error:
        WebDataset(str(tmp_path)).split("train")
    one_line(error, str(tmp_path / "more.tar"), "train, val or test")


def test_the_split_of_a_sample_does_not_depend_on_its_shard(tmp_path):
    write_tar(tmp_path / "a" / "all.tar", shard(range(60)))
    for start in (0, 20, 40):
        write_tar(tmp_path / "b" / f"part{start}.tar", shard(range(start, start + 20)))
    one, other = (levels(WebDataset(str(tmp_path / name), image_size=8)) for name in "ab")
    assert one == other
    assert all(one.values())


def test_a_glob_chooses_shards(tmp_path):
    for name, numbers in {"x-0": range(20), "x-1": range(20, 40), "y-0": range(40, 60)}.items():
        write_tar(tmp_path / f"{name}.tar", shard(numbers, labels=False))
    source = build(check("train_tokenizer", ["data=webdataset", f"data.root={tmp_path}/x-*.tar"]).data)
    assert together(levels(source)) == list(range(40))
    assert source.class_names == ()
    with pytest.raises(GraincodeError) as error:
        WebDataset(f"{tmp_path}/x-{{0..1}}.tar").split("train")
    one_line(error, "{0..1}", "with * in place of")


def test_class_names_may_be_given(tmp_path):
    write_tar(tmp_path / "all.tar", shard(range(9)))
    overrides = ["data=webdataset", f"data.root={tmp_path}"]
    named = build(check("train_tokenizer", [*overrides, "data.class_names=[cat,dog,cow,owl]"]).data)
    assert named.class_names == named.split("train").class_names == ("cat", "dog", "cow", "owl")
    with pytest.raises(GraincodeError) as error:
        build(check("train_tokenizer", [*overrides, "data.class_names=[cat,dog]"]).data).split("train")
    one_line(error, "class_names=['cat', 'dog']", "the label 2")
    write_tar(tmp_path / "all.tar", shard(range(9), labels=False))
    with pytest.raises(GraincodeError) as error:
        WebDataset(str(tmp_path), class_names=["cat"]).split("train")
    one_line(error, "class_names=['cat']", "no labels")


def test_headers_are_read_once_unless_a_shard_changes(tmp_path, monkeypatch, cache):
    def refuse(*arguments):
        raise AssertionError("the headers were read again")

    write_tar(tmp_path / "all.tar", shard(range(20)))
    found = levels(WebDataset(str(tmp_path), image_size=8))
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", refuse)
        assert levels(WebDataset(str(tmp_path), image_size=8)) == found
    assert len(list((cache / "webdataset").glob("*.npz"))) == 1
    write_tar(tmp_path / "all.tar", shard(range(1, 21)))
    assert together(levels(WebDataset(str(tmp_path), image_size=8))) == list(range(1, 21))


@pytest.mark.parametrize("name", ["b.tar.gz", "b.tgz", "b.tar.zst"])
def test_compressed_shards_are_refused(tmp_path, name):
    write_tar(tmp_path / "a.tar", shard(range(9)))
    write_files(tmp_path, {name: b"", "c.tar.json": b"{}"})
    with pytest.raises(GraincodeError) as error:
        WebDataset(str(tmp_path)).split("train")
    one_line(error, str(tmp_path / name), "is compressed", "uncompressed .tar")


def member(name: str, **fields) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(found, field, value)
    return found


def append(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "a") as tar:
        for each in members:
            tar.addfile(each)
    return path


def with_header(file: Path, **pax: str) -> Path:
    """A tar whose second member has a header that says more of it, such as its size."""
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member("0.txt"))
        tar.addfile(member("a.png", pax_headers=pax))
        tar.addfile(member("b.png"))
    return file


@pytest.mark.when("members of a shard are links, devices or sparse", "they are left out and counted")
def test_members_that_are_no_files_are_left_out(tmp_path, caplog):
    path = write_tar(tmp_path / "a.tar", shard(range(20), labels=False))
    kinds = tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE
    append(path, *(member(f"x{i}.png", type=kind, linkname="deep/000.png") for i, kind in enumerate(kinds)))
    with path.open("rb+") as file:  # a sparse file of GNU tar: what it has of 10 TB lies in no one piece
        sparse = bytearray(member("y.png", type=tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
        sparse[483:495] = b"%011o\0" % (8 * 2**30 - 1)
        sparse[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(sparse))[0]
        file.seek(-10240, 2)
        content = path.read_bytes().rstrip(b"\0")
        end = -(-len(content) // 512) * 512
        file.seek(end)
        file.write(bytes(sparse) + bytes(10240))
    for _ in range(2):  # the second time from the index
        caplog.clear()
        assert together(levels(WebDataset(str(tmp_path), image_size=8))) == list(range(20))
        (line,) = [line for line in caplog.messages if "left out" in line]
        assert "5 links, devices or sparse files, such as 'x0.png'" in line


@pytest.mark.when(
    "a shard holds one tar behind another", "both are read, or one line says how much lies behind the end"
)
def test_a_tar_behind_another_is_read(tmp_path):
    parts = [write_tar(tmp_path / f"{start}.tar", shard(range(start, start + 10))) for start in (0, 10, 20)]
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "a.tar").write_bytes(b"".join(path.read_bytes() for path in parts))
    assert together(levels(WebDataset(str(tmp_path / "all"), image_size=8))) == list(range(30))
    (tmp_path / "far").mkdir()
    far = parts[0].read_bytes() + bytes(3 << 20) + parts[1].read_bytes()
    (tmp_path / "far" / "a.tar").write_bytes(far)
    with pytest.raises(GraincodeError) as error:
        WebDataset(str(tmp_path / "far")).split("train")
    one_line(error, str(tmp_path / "far" / "a.tar"), "behind its end mark")
    with (tmp_path / "all" / "a.tar").open("ab") as file:
        file.write(b"no tar" * 200)
    with pytest.raises(GraincodeError) as error:
        WebDataset(str(tmp_path / "all")).split("train")
    one_line(error, str(tmp_path / "all" / "a.tar"), "not a whole")


def test_images_with_a_dot_in_their_names_are_counted(tmp_path, caplog):
    named = {f"photo.{i}.png": gray(100 + i) for i in range(5)} | {"noise.v2.cls": b"0"}
    write_tar(tmp_path / "a.tar", shard(range(20), labels=False) | named)
    assert together(levels(WebDataset(str(tmp_path), image_size=8))) == list(range(20))
    (line,) = [line for line in caplog.messages if "left out" in line]
    assert "5 images with a dot in their names, which end at the first, such as 'photo.0.png'" in line


def test_shards_outside_and_what_is_no_shard_are_left_out(tmp_path, caplog):
    caplog.set_level("WARNING")  # whatever a job has set before
    write_tar(tmp_path / "outside" / "b.tar", shard(range(20, 30)))
    write_tar(tmp_path / "root" / "a.tar", shard(range(20)))
    (tmp_path / "root" / "b.tar").symlink_to(tmp_path / "outside" / "b.tar")
    os.mkfifo(tmp_path / "root" / "c.tar")
    for root in ("root", "root/*.tar"):
        caplog.clear()
        assert together(levels(WebDataset(str(tmp_path / root), image_size=8))) == list(range(20))
        (line,) = caplog.messages
        assert "such as 'b.tar'" in line
        assert "such as 'c.tar'" in line
        both = WebDataset(str(tmp_path / root), image_size=8, allow_outside=True)
        assert together(levels(both)) == list(range(30))


@pytest.mark.when("the index of shards in the cache is damaged", "it is made anew")
@pytest.mark.parametrize(
    "damage",
    ["cut", "empty", "text", "missing", "pickled", "lengths", "shard", "offset", "size", "label", "kind"],
)
def test_a_damaged_index_is_made_anew(tmp_path, cache, damage):
    write_tar(tmp_path / "all.tar", shard(range(20)))
    found = levels(WebDataset(str(tmp_path), image_size=8))
    (file,) = (cache / "webdataset").glob("*.npz")
    with np.load(file) as arrays:
        index = dict(arrays)
    if damage == "cut":
        os.truncate(file, 1000)
    elif damage == "empty":
        os.truncate(file, 0)
    elif damage == "text":
        file.write_text("no index")
    else:
        if damage == "missing":
            del index["name"]
        elif damage == "pickled":
            index["name"] = index["name"].astype(object)
        elif damage == "lengths":
            index["label"] = index["label"][1:]
        elif damage == "kind":
            index["offset"] = index["offset"].astype(float)
        else:
            index[damage][3] = {"shard": 1, "offset": 10**12, "size": -1, "label": 10**8}[damage]
        np.savez(file, **index)
    before = file.read_bytes()
    assert levels(WebDataset(str(tmp_path), image_size=8)) == found
    assert file.read_bytes() != before


def broken_shards(path: Path) -> dict[str, list[str]]:
    """Shards that are wrong in one way each, and what must be said of each."""
    write_tar(path / "gzip.tar", shard(range(3)))
    with tarfile.open(path / "gzip.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    whole = write_tar(path / "cut.tar", shard(range(30))).read_bytes()
    write_files(path, {"cut.tar": whole[: len(whole) // 2], "empty.tar": b""})
    write_tar(path / "none.tar", {"a.txt": b""})
    write_tar(path / "two.tar", {"a.png": gray(0), "a.jpg": gray(1)})
    write_tar(path / "some.tar", {"a.png": gray(0), "a.cls": b"0", "b.png": gray(0)})
    labels = {"word": b"cat", "minus": b"-1", "no label": b"", "huge": b"100000000", "digits": b"9" * 5000}
    for name, label in labels.items():
        write_tar(path / f"{name}.tar", {"a.png": gray(0), "a.cls": label})
    append(write_tar(path / "label of terabytes.tar", {"a.png": gray(0)}), member("a.cls", size=8 * 2**30 - 1))
    with_header(path / "terabytes.tar", size=str(10 * 2**40))
    with_header(path / "negative.tar", size="-1024")
    with_header(path / "long name.tar", path=f"{'x' * 5000}.png")
    at = whole.index(b"deep/010.png")  # tarfile takes a header that is none for the end
    write_files(path, {"damaged.tar": whole[: at + 100] + b"????" + whole[at + 104 :]})
    return {
        "gzip": ["not a whole uncompressed tar"],
        "cut": ["not a whole uncompressed tar"],
        "empty": ["not a whole uncompressed tar"],
        "none": ["no images", ".png"],
        "two": ["a.png", "a.jpg"],
        "some": ["b.png", "add its .cls"],
        "terabytes": ["not a whole uncompressed tar"],
        "negative": ["not a whole uncompressed tar"],
        "damaged": ["no header at byte"],
        "long name": ["not a whole uncompressed tar"],
        "label of terabytes": [".tar"],
        **{name: ["a.cls", repr(label[:20]), "whole number"] for name, label in labels.items()},
    }


BROKEN = (
    "gzip", "cut", "empty", "none", "two", "some", "word", "minus", "no label", "huge", "digits", "label of terabytes",
    "terabytes", "negative", "damaged", "long name",
)  # fmt: skip


@pytest.mark.when("a shard says that a member has terabytes, or a label 5,000 digits", "the shard is named")
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_shard_is_named(tmp_path, kind):
    parts = broken_shards(tmp_path / "all")[kind]
    (tmp_path / "one").mkdir()
    path = Path(shutil.copy(tmp_path / "all" / f"{kind}.tar", tmp_path / "one" / f"{kind}.tar"))
    with pytest.raises(GraincodeError) as error:
        WebDataset(str(tmp_path / "one"), val_fraction=0, test_fraction=0).split("train")
    one_line(error, str(path), *parts)
