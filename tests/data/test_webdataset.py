import shutil
import tarfile
from pathlib import Path

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


def broken_shards(path: Path) -> dict[str, list[str]]:
    """Shards that are wrong in one way each, and what must be said of each."""
    write_tar(path / "gzip.tar", shard(range(3)))
    with tarfile.open(path / "gzip.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    whole = write_tar(path / "cut.tar", shard(range(30))).read_bytes()
    write_files(path, {"cut.tar": whole[: len(whole) // 2], "empty.tar": b""})
    write_tar(path / "none.tar", {"a.txt": b""})
    write_tar(path / "two.tar", {"a.png": gray(0), "a.jpg": gray(1)})
    write_tar(path / "word.tar", {"a.png": gray(0), "a.cls": b"cat"})
    write_tar(path / "some.tar", {"a.png": gray(0), "a.cls": b"0", "b.png": gray(0)})
    return {
        "gzip": ["not a whole uncompressed tar"],
        "cut": ["not a whole uncompressed tar"],
        "empty": ["not a whole uncompressed tar"],
        "none": ["no images", ".png"],
        "two": ["a.png", "a.jpg"],
        "word": ["a.cls", "b'cat'", "whole number"],
        "some": ["b.png", "add its .cls"],
    }


@pytest.mark.parametrize("kind", ["gzip", "cut", "empty", "none", "two", "word", "some"])
def test_a_broken_shard_is_named(tmp_path, kind):
    parts = broken_shards(tmp_path / "all")[kind]
    (tmp_path / "one").mkdir()
    path = Path(shutil.copy(tmp_path / "all" / f"{kind}.tar", tmp_path / "one" / f"{kind}.tar"))
    with pytest.raises(GraincodeError) as error:
        WebDataset(str(tmp_path / "one"), val_fraction=0, test_fraction=0).split("train")
    one_line(error, str(path), *parts)
