import builtins

import pytest
from helpers_data import (
    gray,
    levels,
    one_line,
    sizes,
    table,
    together,
    write_files,
)

from graincode.config.job import build
from graincode.config.validate import check
from graincode.core.errors import GraincodeError
from graincode.data import HuggingFace
from graincode.data.images import SPLITS


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
    one_line(error, "splits.test=tests", "training, validation, held-out")


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
    one_line(error, repr(labels[1]), "label_key=label")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"image_key": "img"}, ["image_key=img", "image, label"]),
        ({"label_key": "class"}, ["label_key=class", "image, label"]),
        ({"image_key": "label"}, ["image_key=label"]),
        ({"splits": {"train": None}}, ["splits="]),
        ({"splits": {"train": "train", "val": 3}}, ["splits="]),
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


def test_a_changed_file_that_a_row_names_is_noticed(tmp_path, hub):
    def fingerprint() -> str:
        return HuggingFace(str(table), val_fraction=0, test_fraction=0).split("train").fingerprint()

    table = tmp_path / "table.parquet"
    write_files(tmp_path, {"files/1.data": gray(1), "files/2.data": gray(2)})
    cells = [{"bytes": None, "path": str(tmp_path / "files" / f"{i}.data")} for i in (1, 2)]
    cells += [{"bytes": gray(3), "path": "not there.png"}]
    hub.Dataset.from_dict({"image": cells}).to_parquet(str(table))
    before = fingerprint()
    assert fingerprint() == before
    write_files(tmp_path, {"files/2.data": gray(20)})
    assert fingerprint() != before


@pytest.mark.parametrize("path", ["a\0b.png", "/no/such\nfile.png", "http://127.0.0.1/x.png", "/dev/zero"])
def test_a_row_that_names_what_is_no_file_of_the_data_set_is_refused(tmp_path, hub, path):
    table = tmp_path / "table.parquet"
    hub.Dataset.from_dict({"image": [{"bytes": None, "path": path}] * 2}).to_parquet(str(table))
    with pytest.raises(GraincodeError) as error:
        split = HuggingFace(str(table), val_fraction=0, test_fraction=0, image_size=8).split("train")
        split.fingerprint()
        split[[0]]
    assert error.value.line.isprintable()


def test_a_table_without_rows_says_so_in_one_line_alone(tmp_path, hub, caplog):
    table = tmp_path / "table.parquet"
    hub.Dataset.from_dict({"image": [{"bytes": None, "path": "x"}]}).select([]).to_parquet(str(table))
    with pytest.raises(GraincodeError) as error:
        HuggingFace(str(table)).split("train")
    one_line(error, str(table))
    assert "An error occurred" not in error.value.line
    assert not caplog.messages


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
    one_line(error, "pip install graincode[hf]")
