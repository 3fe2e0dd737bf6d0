import copy
import os

import pytest
import torch
from helpers_data import KINDS, WNIDS, gray, levels, make, one_line, photo, together, write, write_files

from graincode.config.job import build
from graincode.config.validate import check
from graincode.core.errors import GraincodeError
from graincode.core.images import to_uint8
from graincode.data import ImageFolder
from graincode.data.decoding import read_image
from graincode.data.images import SPLITS


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


@pytest.mark.parametrize("kind", ["imagenet", "webdataset"])
@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.cache=yes please", ["data.cache=yes please"]),
        ("data.on_corrupt=ignore", ["data.on_corrupt=ignore", "error, skip"]),
        ("data.imagesize=8", ["data.imagesize", "data.image_size"]),
    ],
)
def test_bad_overrides_are_named(kind, override, parts):
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
    nowhere = str(tmp_path / "missing")
    for value, what in (
        (None, "expected"),
        (nowhere, "expected" if kind in ("hf", "webdataset") else "no such folder"),
    ):
        with pytest.raises(GraincodeError) as error:
            KINDS[kind](value).split("train")
        one_line(error, f"{key}={value}", what)


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_without_images_says_what_to_type(tmp_path, kind):
    with pytest.raises(GraincodeError) as error:
        make(kind, tmp_path, [gray(level) for level in range(40)], val_fraction=0).split("val")
    one_line(error, "val_fraction=0", str(tmp_path))
    with pytest.raises(GraincodeError) as error:
        make(kind, tmp_path / "again", [gray(0)], val_fraction=1.0)
    one_line(error, "val_fraction=1.0")


@pytest.mark.parametrize("kind", KINDS)
def test_a_fingerprint_is_the_same_with_and_without_a_cache_and_decodes_nothing(tmp_path, kind, monkeypatch):
    source = make(kind, tmp_path, [gray(level) for level in range(40)])
    prints = [source.split(name).fingerprint() for name in SPLITS]
    cached = copy.copy(source)
    cached.cache = True
    assert [cached.split(name).fingerprint() for name in SPLITS] == prints
    assert len(set(prints)) == 3
    monkeypatch.setattr("graincode.data.encoded.read_image", None)
    assert [source.split(name).fingerprint() for name in SPLITS] == prints


@pytest.mark.parametrize("change", ["touched", "longer", "more", "fewer", "renamed", "size", "crop", "class"])
def test_a_fingerprint_changes_with_what_it_depends_on(tmp_path, change):
    def fingerprint(**arguments) -> str:
        return ImageFolder(str(tmp_path), test_fraction=0, val_fraction=0, **arguments).split("train").fingerprint()

    write_files(tmp_path, {f"{label}/{i}.png": gray(i) for label in "ab" for i in range(3)})
    before, path = fingerprint(), tmp_path / "a" / "1.png"
    assert fingerprint() == before
    stat = path.stat()
    if change == "touched":
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "longer":
        path.write_bytes(path.read_bytes() + b" ")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "more":
        write_files(tmp_path, {"b/3.png": gray(9)})
    elif change == "fewer":
        path.unlink()
    elif change == "renamed":
        path.rename(tmp_path / "a" / "5.png")
    elif change == "class":
        (tmp_path / "a").rename(tmp_path / "A")
    assert fingerprint(**{"size": {"image_size": 8}, "crop": {"crop": "none"}}.get(change, {})) != before
