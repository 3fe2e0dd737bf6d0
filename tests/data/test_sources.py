import builtins
import functools
import hashlib
import http.server
import itertools
import pickle
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import KINDS, WNIDS, gray, make, one_line, photo, table, write, write_files, write_tar

from graincode.config.job import build
from graincode.config.validate import check
from graincode.core.errors import GraincodeError
from graincode.core.images import to_uint8
from graincode.data import CIFAR10, FFHQ, HuggingFace, ImageNet, WebDataset, cifar10
from graincode.data.images import ImageSource, read_image
from graincode.data.published import validation_mask

SPLITS = ("train", "val", "test")


def levels(source: ImageSource) -> dict[str, list[int]]:
    """The gray level of every image."""
    splits = {name: source.split(name) for name in SPLITS}
    return {name: to_uint8(split[range(len(split))].images)[:, 0, 0, 0].tolist() for name, split in splits.items()}


def together(splits: dict[str, list[int]]) -> list[int]:
    return sorted(itertools.chain.from_iterable(splits.values()))


def sizes(source: ImageSource) -> dict[str, int]:
    return {name: len(source.split(name)) for name in SPLITS}


# what all of them share


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_is_composed_and_built(tmp_path, kind):
    overrides = write(kind, tmp_path / "data", [gray(level) for level in range(40)])
    cfg = check("train_tokenizer", [f"data={kind}", *overrides, "data.image_size=[8,12]", "data.cache=true"])
    source = build(cfg.data)
    assert type(source) is KINDS[kind]
    found = levels(source)
    assert all(found.values())
    assert together(found) == list(range(40))
    assert source.split("train")[[0, 1]].images.shape == (2, 3, 8, 12)
    again = make(kind, tmp_path / "again", [gray(level) for level in range(40)])
    assert levels(again) == found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.cache=yes please", ["data.cache=yes please", "true or false"]),
        ("data.on_corrupt=ignore", ["data.on_corrupt= one of error, skip"]),
        ("data.crop=left", ["data.crop= one of center, none"]),
        ("data.val_fraction=x", ["data.val_fraction=x", "a number"]),
        ("data.imagesize=8", ["'data.imagesize'", "type data.image_size"]),
    ],
)
def test_bad_overrides_say_what_to_type(kind, override, parts):
    with pytest.raises(GraincodeError) as error:
        check("train_tokenizer", [f"data={kind}", override])
    one_line(error, *parts)


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_decoded_alike_wherever_they_lie(tmp_path, kind):
    photos = [photo(seed) for seed in range(40)]
    source = make(kind, tmp_path, photos, image_size=[9, 7])
    expected = {read_image(content, (9, 7), "center").numpy().tobytes() for content in photos}
    found = {
        to_uint8(split[index].images).numpy().tobytes()
        for split in map(source.split, SPLITS)
        for index in range(len(split))
    }
    assert found == expected


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ffhq"])
def test_labels_belong_to_their_images(tmp_path, kind):
    source = make(kind, tmp_path, [gray(level) for level in range(40)])
    assert source.class_names == {"imagenet": WNIDS, "webdataset": ("0", "1")}.get(kind, ("a", "b"))
    for name in SPLITS:
        split = source.split(name)
        batch = split[range(len(split))]
        assert batch.labels.tolist() == [level % 2 for level in to_uint8(batch.images)[:, 0, 0, 0].tolist()]
        assert torch.equal(split.labels, batch.labels)


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_that_is_nowhere_says_what_to_type(tmp_path, kind):
    key = "path" if kind == "hf" else "root"
    for value, parts in ((None, [f"data.{key} is not set"]), (str(tmp_path / "missing"), [str(tmp_path / "missing")])):
        with pytest.raises(GraincodeError) as error:
            KINDS[kind](value).split("train")
        one_line(error, *parts, f"data.{key}=")


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_without_images_says_what_to_type(tmp_path, kind):
    with pytest.raises(GraincodeError) as error:
        make(kind, tmp_path, [gray(level) for level in range(40)], val_fraction=0).split("val")
    one_line(error, str(tmp_path), "no val images", "data.val_fraction=0.05")
    with pytest.raises(GraincodeError) as error:
        make(kind, tmp_path / "again", [gray(0)], val_fraction=1.0)
    one_line(error, "data.val_fraction=1.0", "data.val_fraction=0.05")


# ImageNet


@pytest.mark.parametrize("below", ["", "ILSVRC/Data/CLS-LOC"])
def test_the_published_validation_images_of_imagenet_are_our_test_split(tmp_path, below):
    write("imagenet", tmp_path / below, [gray(level) for level in range(80)])
    source = ImageNet(str(tmp_path), image_size=8, val_fraction=0.1)
    found = levels(source)
    assert sorted(found["test"]) == list(range(40))
    assert sorted(found["train"] + found["val"]) == list(range(40, 80))
    assert len(found["val"]) in range(1, 10)
    assert source.class_names == WNIDS
    assert source.split("test").name == "imagenet"
    few = levels(ImageNet(str(tmp_path), image_size=8))
    assert set(few["val"]) < set(found["val"])


def test_imagenet_validates_on_one_percent():
    assert ImageNet("/x").image_size == FFHQ("/x").image_size == (256, 256)
    assert ImageNet("/x")._fractions == {"val": 0.01}


@pytest.mark.parametrize(("name", "part"), [("val/5.JPEG", "val"), ("val/n9/5.JPEG", "val"), ("train/5.JPEG", "train")])
def test_an_image_of_imagenet_in_no_class_folder_is_named(tmp_path, name, part):
    write("imagenet", tmp_path, [gray(level) for level in range(8)])
    write_files(tmp_path, {name: gray(0)})
    with pytest.raises(GraincodeError) as error:
        ImageNet(str(tmp_path)).split("train")
    one_line(error, str(tmp_path / name), f"{part}/n01440764")


# FFHQ


@pytest.mark.parametrize("pattern", ["images1024x1024/{0:02d}000/{1}", "thumbnails128x128/{0:02d}000/{1}", "{1}"])
def test_the_faces_from_60000_on_are_the_test_split(tmp_path, pattern):
    numbers = [*range(0, 60000, 2000), 59999, 60000, 69999]
    write_files(tmp_path, {pattern.format(n // 1000, f"{n:05d}.png"): gray(i) for i, n in enumerate(numbers)})
    source = FFHQ(str(tmp_path), image_size=8, val_fraction=0.2)
    files = {name: [int(Path(file).stem) for file in source.split(name).files] for name in SPLITS}
    assert files["test"] == [60000, 69999]
    assert sorted(files["train"] + files["val"]) == numbers[:-2]
    assert files["train"] == sorted(files["train"])
    assert len(files["val"]) in range(1, 15)
    assert source.class_names == ()
    assert source.split("train").labels.eq(0).all()
    other = FFHQ(str(tmp_path), image_size=8, val_fraction=0.2)
    assert levels(other) == {name: [numbers.index(n) for n in files[name]] for name in SPLITS}


def test_the_split_of_a_face_does_not_depend_on_the_layout(tmp_path):
    numbers = [f"{n:05d}" for n in range(0, 60000, 1500)]
    write_files(tmp_path, {f"a/{n}.png": gray(i) for i, n in enumerate(numbers)})
    write_files(tmp_path, {f"b/images1024x1024/{n[:2]}000/{n}.png": gray(i) for i, n in enumerate(numbers)})
    splits = [FFHQ(str(tmp_path / layout), image_size=8).split("val").content_hash() for layout in "ab"]
    assert splits[0] == splits[1]


@pytest.mark.parametrize("name", ["face.png", "1/00002.png"])
def test_a_file_that_is_no_numbered_face_is_named(tmp_path, name):
    write_files(tmp_path, {"00001.png": gray(0), "00002.png": gray(0), name: gray(0)})
    with pytest.raises(GraincodeError) as error:
        FFHQ(str(tmp_path)).split("train")
    one_line(error, "expected each number once", "data=image_folder")


def test_faces_below_60000_alone_have_no_test_split(tmp_path):
    source = FFHQ(str(write_files(tmp_path, {f"{n:05d}.png": gray(n) for n in range(40)})), image_size=8)
    assert len(source.split("train")) + len(source.split("val")) == 40
    with pytest.raises(GraincodeError) as error:
        source.split("test")
    one_line(error, "no test images")


# CIFAR-10


def write_cifar(folder: Path, each: int = 10) -> Path:
    """Image number i of all has planes of i, i + 1 and i + 2, a first byte of 255, and the label i % 10."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(cifar10.TRAIN_FILES + cifar10.TEST_FILES):
        records = np.zeros((each, 3073), dtype=np.uint8)
        values = np.arange(number * each, (number + 1) * each)
        records[:, 0] = values % 10
        records[:, 1:] = (values[:, None] + np.arange(3).repeat(1024)).astype(np.uint8)
        records[:, 1] = 255
        records.tofile(folder / file)
    return folder


@pytest.mark.parametrize("below", ["", "cifar-10-batches-bin"])
def test_cifar10_splits(tmp_path, below):
    write_cifar(tmp_path / below)
    source = build(check("train_tokenizer", ["data=cifar10", f"data.root={tmp_path}"]).data)
    assert type(source) is CIFAR10
    assert sizes(source) == {"train": 45, "val": 5, "test": 10}
    values = {name: source.split(name).images[:, 0, 9, 9].tolist() for name in SPLITS}
    assert sorted(values["train"] + values["val"]) == list(range(50))
    assert values["val"] == torch.arange(50)[validation_mask(50, 10)].tolist()
    assert values["test"] == list(range(50, 60))
    for name in SPLITS:
        split = source.split(name)
        assert split.labels.tolist() == [value % 10 for value in values[name]]
        assert (split.name, split.image_size, len(split.class_names)) == ("cifar10", (32, 32), 10)
        images = to_uint8(split[range(len(split))].images)
        assert torch.equal(images[:, 1, 9], images[:, 0, 9] + 1)
        assert torch.equal(images[:, 2, 9], images[:, 0, 9] + 2)
        assert images[:, 0, 0, 0].eq(255).all()
        assert images.eq(255).sum() == len(split)


def test_the_validation_images_of_cifar10_never_change():
    mask = validation_mask(50_000, 10)
    assert mask.sum() == 5_000
    assert mask.nonzero().flatten()[:6].tolist() == [1, 27, 54, 58, 67, 85]


def test_the_pickled_version_of_cifar10_is_not_read(tmp_path):
    write_files(tmp_path / "cifar-10-batches-py", {"data_batch_1": pickle.dumps({b"data": 0})})
    with pytest.raises(GraincodeError) as error:
        CIFAR10(str(tmp_path)).split("train")
    one_line(error, f"data.root={tmp_path}", "data_batch_1.bin", "data.root=null")


@pytest.fixture
def published(tmp_path, monkeypatch):
    """CIFAR-10's archive, which a server on this computer has in place of the network."""
    site = tmp_path / "site"
    write_cifar(site / "cifar-10-batches-bin")
    archive = site / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(site / "cifar-10-batches-bin", "cifar-10-batches-bin")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(cifar10, "URL", f"http://127.0.0.1:{server.server_port}/{archive.name}")
        monkeypatch.setattr(cifar10, "MD5", hashlib.md5(archive.read_bytes()).hexdigest())
        yield archive
        server.shutdown()


def test_cifar10_is_fetched_once(published, cache):
    assert sizes(CIFAR10()) == {"train": 45, "val": 5, "test": 10}
    published.unlink()
    assert sizes(CIFAR10()) == {"train": 45, "val": 5, "test": 10}
    assert len(list((cache / "cifar10").iterdir())) == 6


@pytest.mark.parametrize("fault", ["another archive", "no archive", "no network"])
def test_what_cannot_be_fetched_is_named(published, cache, monkeypatch, fault):
    if fault == "another archive":
        published.write_bytes(b"<html>not found</html>")
    elif fault == "no archive":
        published.unlink()
    else:
        monkeypatch.setattr(cifar10, "URL", "http://127.0.0.1:9/cifar-10-binary.tar.gz")
    with pytest.raises(GraincodeError) as error:
        CIFAR10().split("train")
    one_line(error, str(cache / "cifar10"), cifar10.URL, "connect to the network", "data.root=/")
    assert list((cache / "cifar10").iterdir()) == []


@pytest.mark.parametrize("content", [b"", bytes(3072), bytes(3074), b"\x0a" + bytes(3072)])
def test_a_corrupt_file_of_cifar10_is_named(tmp_path, content):
    write_cifar(tmp_path)
    (tmp_path / "data_batch_3.bin").write_bytes(content)
    with pytest.raises(GraincodeError) as error:
        CIFAR10(str(tmp_path)).split("val")
    one_line(error, str(tmp_path / "data_batch_3.bin"), "is corrupt", "data.root=/")
    assert len(CIFAR10(str(tmp_path)).split("test")) == 10


# Hugging Face


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Hugging Face's package with an empty cache; it is asked for the rest by tests that need it alone."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf-cache"))
    return datasets


def test_a_data_set_at_the_hub_is_loaded_without_its_code(hub, monkeypatch):
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return hub.DatasetDict({"train": table([gray(level) for level in range(9)])})

    monkeypatch.setattr(hub, "load_dataset", load)
    assert sizes(HuggingFace("someone/faces", name="small", image_size=8)) == {"train": 7, "val": 1, "test": 1}
    assert asked == [(("someone/faces", "small"), {"trust_remote_code": False})]


@pytest.mark.parametrize("layout", ["save_to_disk", "one table", "parquet folder", "parquet file", "images"])
def test_every_local_layout_of_hugging_face(tmp_path, hub, layout):
    images = table([gray(level) for level in range(40)])
    path = tmp_path / "data"
    if layout == "save_to_disk":
        hub.DatasetDict({"train": images}).save_to_disk(str(path))
    elif layout == "one table":
        images.save_to_disk(str(path))
    elif layout == "images":
        write_files(path / "train", {f"{level:02d}.png": gray(level) for level in range(40)})
    else:
        path.mkdir()
        images.to_parquet(str(path / "train-00000-of-00001.parquet"))
        path = path / "train-00000-of-00001.parquet" if layout == "parquet file" else path
    source = HuggingFace(str(path), image_size=8)
    found = levels(source)
    assert together(found) == list(range(40))
    assert all(split == sorted(split) for split in found.values())
    assert source.class_names == ()
    assert levels(HuggingFace(str(path), image_size=8, cache=True)) == found


def test_the_splits_of_hugging_face_by_their_names(tmp_path, hub):
    parts = {"training": range(20), "validation": range(20, 25), "held-out": range(25, 30)}
    hub.DatasetDict({name: table([gray(i) for i in part]) for name, part in parts.items()}).save_to_disk(str(tmp_path))
    overrides = [f"data.path={tmp_path}", "data.splits.train=training", "data.splits.val=validation"]
    source = build(check("train_tokenizer", ["data=hf", *overrides, "data.splits.test=held-out"]).data)
    assert levels(source) == dict(zip(SPLITS, map(list, parts.values()), strict=True))
    partly = levels(build(check("train_tokenizer", ["data=hf", *overrides]).data))
    assert partly["val"] == list(parts["validation"])
    assert partly["test"]
    assert sorted(partly["train"] + partly["test"]) == list(parts["training"])
    wrong = build(check("train_tokenizer", ["data=hf", *overrides, "data.splits.test=tests"]).data)
    with pytest.raises(GraincodeError) as error:
        wrong.split("train")
    one_line(error, "data.splits.test=tests", "training, validation, held-out", "data.splits.test=null")


def test_labels_of_hugging_face_may_be_plain_numbers(tmp_path, hub):
    table([gray(i) for i in range(12)], [i % 3 for i in range(12)]).save_to_disk(str(tmp_path))
    assert HuggingFace(str(tmp_path), label_key="label").class_names == ("0", "1", "2")
    unlabelled = HuggingFace(str(tmp_path), image_size=8)
    assert unlabelled.class_names == ()
    assert unlabelled.split("train").labels.eq(0).all()


@pytest.mark.parametrize(("labels", "names"), [([0, -1], None), ([0, -1], ["a", "b"]), ([0, None], ["a", "b"])])
def test_labels_that_are_not_published_are_refused(tmp_path, hub, labels, names):
    table([gray(0), gray(1)], labels, names).save_to_disk(str(tmp_path))
    with pytest.raises(GraincodeError) as error:
        HuggingFace(str(tmp_path), label_key="label", val_fraction=0, test_fraction=0).split("train")
    one_line(error, repr(labels[1]), "'label'", "data.label_key=null")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"image_key": "img"}, ["data.image_key=img", "image, label"]),
        ({"label_key": "class"}, ["data.label_key=class", "image, label"]),
        ({"image_key": "label"}, ["data.image_key=label", "image, label"]),
        ({"splits": {"train": None}}, ["data.splits", "data.splits.train=train"]),
        ({"splits": {"train": "train", "val": 3}}, ["data.splits", "data.splits.train=train"]),
    ],
)
def test_wrong_columns_and_splits_are_named(tmp_path, hub, arguments, parts):
    table([gray(i) for i in range(9)], [0] * 9).save_to_disk(str(tmp_path))
    with pytest.raises(GraincodeError) as error:
        HuggingFace(str(tmp_path), **arguments).split("train")
    one_line(error, *parts)


def test_bytes_in_a_plain_column_are_images_too(tmp_path, hub):
    hub.Dataset.from_dict({"file": [gray(i) for i in range(9)]}).save_to_disk(str(tmp_path))
    found = levels(HuggingFace(str(tmp_path), image_key="file", image_size=8))
    assert together(found) == list(range(9))


def test_a_changed_image_behind_a_table_is_noticed(tmp_path, hub):
    def cached():
        return levels(HuggingFace(str(tmp_path / "data"), image_size=8, cache=True))

    write_files(tmp_path / "data" / "train", {f"{level:02d}.png": gray(level) for level in range(40)})
    first = cached()
    write_files(tmp_path / "data" / "train", {f"{level:02d}.png": gray(100 + level) for level in range(40)})
    assert cached() == {name: [100 + level for level in part] for name, part in first.items()}


def test_without_the_package_of_hugging_face_the_extra_is_named(tmp_path, monkeypatch):
    def refuse(name, *arguments):
        if name == "datasets":
            raise ModuleNotFoundError("No module named 'datasets'")
        return original(name, *arguments)

    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    source = HuggingFace(str(tmp_path))
    with pytest.raises(GraincodeError) as error:
        source.split("train")
    one_line(error, "type pip install graincode[hf]")


# WebDataset


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
    one_line(error, str(tmp_path / "more.tar"), "train-*.tar")


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
    one_line(error, "2 names", "the label 2", "data.class_names=null")
    write_tar(tmp_path / "all.tar", shard(range(9), labels=False))
    with pytest.raises(GraincodeError) as error:
        WebDataset(str(tmp_path), class_names=["cat"]).split("train")
    one_line(error, "has no labels", "data.class_names=null")


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
        "two": ["a.png and a.jpg"],
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
