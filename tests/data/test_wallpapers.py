import csv
import dataclasses
import hashlib
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import one_line
from PIL import Image

from graincode.config.job import build
from graincode.config.validate import check
from graincode.core.errors import GraincodeError
from graincode.core.images import to_uint8
from graincode.data import CachedImages, Wallpapers, wallpapers
from graincode.data.images import split_by_hash
from graincode.data.published import unpack_debian_package
from graincode.data.wallpapers import PACKAGES, Photograph, crop_boxes

SPLITS = ("train", "val", "test")
EACH = 5  # photographs of a package


def write_photograph(path: Path, number: int, height: int = 60, width: int = 90) -> bytes:
    """A JPEG whose red is 12 * its number, and whose green and blue say where in it a pixel is."""
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = 12 * number
    pixels[..., 1] = np.arange(width) * 2
    pixels[..., 2] = np.arange(height)[:, None] * 2
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "jpeg", quality=98, subsampling=0)
    return path.read_bytes()


@pytest.fixture
def unpacked(tmp_path, monkeypatch):
    """Packages of small photographs, each unpacked into a directory of its name; none is installed or to be fetched."""

    def fail(package, scratch):
        raise OSError("no\nnetwork")

    root = tmp_path / "unpacked"
    with (tmp_path / "table.tsv").open("w", newline="") as lines:
        table = csv.writer(lines, delimiter="\t", lineterminator="\n")
        table.writerow(field.name for field in dataclasses.fields(Photograph))
        for index in range(EACH * len(PACKAGES)):
            package, path = PACKAGES[index % len(PACKAGES)], f"usr/share/{index}/photo.jpg"
            content = write_photograph(root / package / path, index)
            table.writerow([package, "1.0-1", path, hashlib.sha256(content).hexdigest(), "2024, A", "CC0-1.0"])
    monkeypatch.setattr(wallpapers, "TABLE", tmp_path / "table.tsv")
    monkeypatch.setattr(wallpapers, "INSTALLED", tmp_path / "installed")
    monkeypatch.setattr(wallpapers, "unpack_debian_package", fail)
    return root


@pytest.fixture
def opened(monkeypatch, unpacked):
    """How often each file was decoded; by this process, so there are no workers."""

    def counting(content, name):
        count[name] += 1
        return original(content, name)

    count, original = Counter(), wallpapers.open_image
    monkeypatch.setattr(wallpapers, "open_image", counting)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    return count


def source(root: Path | None, **arguments) -> Wallpapers:
    return Wallpapers(
        str(root) if root else None, **({"image_size": 8, "crops_per_photograph": 4, "cache": False} | arguments)
    )


def pixels(split) -> torch.Tensor:
    return to_uint8(split[range(len(split))].images)


def numbers(split) -> list[int]:
    """Of each crop, the number of its photograph."""
    return (pixels(split)[:, 0].float().mean((1, 2)) / 12).round().int().tolist()


@pytest.mark.parametrize("size", ["8", "[6,12]", "[12,6]"])
def test_splits_have_photographs_of_their_own(unpacked, size):
    overrides = ["data=wallpapers", f"data.root={unpacked}", f"data.image_size={size}", "data.crops_per_photograph=4"]
    found = build(check("train_tokenizer", overrides).data)
    assert type(found) is Wallpapers
    assert found.class_names == ()
    seen = []
    for name in SPLITS:
        split = found.split(name)
        assert isinstance(split, CachedImages)
        assert (split.name, split.split, split.image_size) == ("wallpapers", name, found.image_size)
        assert split[[0]].images.shape == (1, 3, *found.image_size)
        assert split.labels.tolist() == [0] * len(split)
        assert set(Counter(numbers(split)).values()) == {4}
        seen += set(numbers(split))
    assert sorted(seen) == list(range(EACH * len(PACKAGES)))


def test_the_split_of_a_photograph_does_not_depend_on_the_packages(unpacked):
    every = {name: set(numbers(source(unpacked).split(name))) for name in SPLITS}
    for index, package in enumerate(PACKAGES):
        one = source(unpacked, packages=[package])
        for name in SPLITS:
            own = {number for number in every[name] if number % len(PACKAGES) == index}
            if own:
                assert set(numbers(one.split(name))) == own
            else:
                with pytest.raises(GraincodeError) as error:
                    one.split(name)
                one_line(error, f"data.packages=[{package}] has no {name} images")


def test_the_first_crops_are_of_all_photographs(unpacked):
    split = source(unpacked).split("train")
    each = len(split) // 4
    assert sorted(numbers(split)[:each]) == sorted(set(numbers(split)))
    assert numbers(split) == numbers(split)[:each] * 4


def test_more_crops_begin_with_the_fewer(unpacked):
    few, many = (pixels(source(unpacked, crops_per_photograph=count).split("val")) for count in (2, 5))
    assert torch.equal(many[: len(few)], few)
    assert len({crop.numpy().tobytes() for crop in many}) == len(many)


@pytest.mark.parametrize("image_size", [(8, 8), (6, 12), (30, 10), (60, 60)])
@pytest.mark.parametrize("size", [(60, 90), (200, 61)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.01, 0.3), (0.5, 0.5)])
def test_windows_of_crops(size, image_size, scale):
    boxes = crop_boxes("a.jpg", range(300), size, image_size, scale)
    assert boxes[7:9] == crop_boxes("a.jpg", [7, 8], size, image_size, scale)
    assert boxes != crop_boxes("b.jpg", range(300), size, image_size, scale)
    left, top, right, bottom = torch.tensor(boxes).T
    width, height = right - left, bottom - top
    assert 0 <= left.min() <= right.max() <= size[1]
    assert 0 <= top.min() <= bottom.max() <= size[0]
    assert width.min() >= image_size[1]
    assert height.min() >= image_size[0]
    assert ((height / image_size[0] - width / image_size[1]).abs() * min(image_size) <= 1).all()
    largest = min(size[0] / image_size[0], size[1] / image_size[1])
    least, greatest = (max(share * largest, 1) * image_size[1] for share in scale)
    assert least - 0.5 <= width.min() <= width.max() <= greatest + 0.5
    shares = (torch.log(width / least) / np.log(greatest / least)) if greatest > 2 * least else torch.tensor([0.5])
    assert shares.mean() == pytest.approx(0.5, abs=0.07)
    if (room := size[1] - width).min() > 4:
        assert (left / room).mean() == pytest.approx(0.5, abs=0.07)


def test_a_crop_shows_its_window(unpacked):
    split = source(unpacked, crops_per_photograph=20, image_size=[10, 15]).split("train")
    crops = pixels(split).float()
    table = {int(path.parent.name): path for path in unpacked.glob("*/usr/share/*/photo.jpg")}
    for index, number in enumerate(numbers(split)):
        path = str(table[number].relative_to(unpacked / PACKAGES[number % len(PACKAGES)]))
        (box,) = crop_boxes(path, [20 * index // len(split)], (60, 90), (10, 15), (0.2, 1.0))
        left, top, right, bottom = box
        across = left + (torch.arange(15) + 0.5) * (right - left) / 15 - 0.5
        down = top + (torch.arange(10) + 0.5) * (bottom - top) / 10 - 0.5
        inner = crops[index, :, 1:-1, 1:-1]
        assert (inner[1] - 2 * across[1:-1]).abs().max() < 4
        assert (inner[2] - 2 * down[1:-1, None]).abs().max() < 4


def test_each_photograph_is_decoded_once_and_never_again(unpacked, opened, monkeypatch):
    plain = source(unpacked).split("train")
    expected = pixels(plain)
    opened.clear()
    assert torch.equal(pixels(source(unpacked, cache=True).split("train")), expected)
    assert set(opened.values()) == {1}
    assert len(opened) == len(plain) // 4
    again = source(unpacked, cache=True).split("train")
    assert torch.equal(pixels(again), expected)
    assert set(opened.values()) == {1}
    assert again.content_hash() == plain.content_hash()


def test_photographs_of_many_crops_are_decoded_in_parts(unpacked, opened, monkeypatch):
    expected = pixels(source(unpacked, crops_per_photograph=5).split("val"))
    opened.clear()
    monkeypatch.setattr(wallpapers, "_CROPS_AT_ONCE", 2)
    assert torch.equal(pixels(source(unpacked, crops_per_photograph=5, cache=True).split("val")), expected)
    assert set(opened.values()) == {3}


def test_several_processes_decode_the_same(unpacked, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    cached, plain = (source(unpacked, cache=cache).split("train") for cache in (True, False))
    assert torch.equal(pixels(cached), pixels(plain))


@pytest.mark.parametrize(
    "change", [{"image_size": [8, 6]}, {"crops_per_photograph": 5}, {"scale": [0.3, 1]}, {"packages": PACKAGES[:2]}]
)
def test_other_crops_are_another_cache(unpacked, change):
    source(unpacked, cache=True).split("train")
    cached, plain = (source(unpacked, **change | {"cache": cache}).split("train") for cache in (True, False))
    assert torch.equal(pixels(cached), pixels(plain))


# where they are


def together(unpacked: Path, folder: Path, *packages: str) -> Path:
    for package in packages or PACKAGES:
        shutil.copytree(unpacked / package, folder, dirs_exist_ok=True)
    return folder


def test_packages_may_be_unpacked_into_one_folder(unpacked, tmp_path):
    one = pixels(source(together(unpacked, tmp_path / "one")).split("train"))
    assert torch.equal(one, pixels(source(unpacked).split("train")))


def test_what_is_installed_is_not_fetched_and_the_rest_once(unpacked, tmp_path, monkeypatch, cache):
    fetched = []

    def fetch(package, scratch):
        fetched.append(package)
        return together(unpacked, scratch / "unpacked", package)

    monkeypatch.setattr(wallpapers, "unpack_debian_package", fetch)
    together(unpacked, tmp_path / "installed", PACKAGES[2])
    expected = pixels(source(unpacked).split("val"))
    for _ in range(2):
        assert torch.equal(pixels(source(None).split("val")), expected)
        assert fetched == [package for package in PACKAGES if package != PACKAGES[2]]
    assert sorted(path.name for path in (cache / "wallpapers").iterdir()) == fetched
    assert {path.name for path in (cache / "wallpapers").glob("*/*")} == {"usr"}


@pytest.mark.parametrize("fault", ["no network", "another version", "fewer files"])
def test_a_package_that_cannot_be_fetched_is_named(unpacked, monkeypatch, cache, fault):
    def fetch(package, scratch):
        folder = together(unpacked, scratch / "unpacked", package)
        file = next(folder.glob("**/photo.jpg"))
        if fault == "another version":
            write_photograph(file, 21)
        else:
            file.unlink()
        return folder

    if fault != "no network":
        monkeypatch.setattr(wallpapers, "unpack_debian_package", fetch)
    with pytest.raises(GraincodeError) as error:
        source(None).split("train")
    one_line(error, PACKAGES[0], "apt-get download", "GRAINCODE_CACHE", "data.root=", "data.packages=[")
    assert list((cache / "wallpapers").glob("**/*.jpg")) == []


def test_a_root_that_lacks_a_photograph_says_what_to_type(unpacked):
    file = next((unpacked / PACKAGES[1]).glob("**/photo.jpg"))
    file.unlink()
    with pytest.raises(GraincodeError) as error:
        source(unpacked).split("train")
    missing = str(file.relative_to(unpacked / PACKAGES[1]))
    one_line(error, f"data.root={unpacked}", missing, PACKAGES[1], "dpkg-deb -x", "data.root=null", "data.packages=[")
    rest = source(unpacked, packages=[package for package in PACKAGES if package != PACKAGES[1]])
    assert len(rest.split("train")) > 0


@pytest.mark.parametrize("cached", [False, True])
def test_a_photograph_that_was_changed_is_named(unpacked, cached):
    paths = [photograph.path for photograph in wallpapers.read_table()]
    path = split_by_hash(paths, {"test": 0.15, "val": 0.15})["train"][0]
    (file,) = unpacked.glob(f"*/{path}")
    write_photograph(file, 21)
    with pytest.raises(GraincodeError) as error:
        pixels(source(unpacked, cache=cached).split("train"))
    one_line(error, str(file), "1.0-1", "SHA-256", "data.packages=[")


def test_a_photograph_smaller_than_its_crops_is_named(unpacked):
    with pytest.raises(GraincodeError) as error:
        source(unpacked, image_size=[61, 4], cache=True).split("train")
    one_line(error, "photo.jpg has 60 x 90 pixels", "data.image_size=[61,4]")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.crops_per_photograph=0", ["data.crops_per_photograph=0", "type data.crops_per_photograph="]),
        ("data.scale=[0,1]", ["data.scale=[0, 1]", "type data.scale="]),
        ("data.scale=[0.5,0.2]", ["data.scale=[0.5, 0.2]", "type data.scale="]),
        ("data.scale=[0.5,1.5]", ["data.scale=[0.5, 1.5]", "type data.scale="]),
        ("data.scale=0.5", ["data.scale=0.5"]),
        ("data.packages=[gnome-backgrounds]", ["gnome-backgrounds", "type data.packages=[lomiri"]),
        ("data.packages=[]", ["data.packages=[]", "type data.packages=[lomiri"]),
        ("data.image_size=0", ["data.image_size=0", "type data.image_size=64"]),
        ("data.val_fraction=1", ["data.val_fraction=1", "data.val_fraction=0.05"]),
        ("data.cache=perhaps", ["data.cache=perhaps", "true or false"]),
        ("data.crop=center", ["'data.crop'"]),
    ],
)
def test_bad_settings_say_what_to_type(override, parts):
    with pytest.raises(GraincodeError) as error:
        build(check("train_tokenizer", ["data=wallpapers", override]).data)
    one_line(error, *parts)


def test_a_split_without_photographs_says_what_to_type(unpacked):
    with pytest.raises(GraincodeError) as error:
        source(unpacked, val_fraction=0).split("val")
    one_line(error, "no val images", "data.val_fraction=0.05")
    with pytest.raises(GraincodeError) as error:
        source(unpacked).split("valid")
    one_line(error, "'valid'", "train, val, test")


# the real ones


def test_the_table_names_author_and_licence_of_every_photograph():
    table = wallpapers.read_table()
    assert len(table) == len({photograph.path for photograph in table}) == len({p.sha256 for p in table}) == 37
    assert {photograph.package for photograph in table} == set(PACKAGES)
    for photograph in table:
        assert re.fullmatch(r"usr/share/(backgrounds|wallpapers)/[\w/.-]+\.jpg", photograph.path)
        assert re.fullmatch("[0-9a-f]{64}", photograph.sha256)
        assert photograph.version
        assert photograph.author
        assert re.match(r"(CC-BY|CC0|GPL-2\+)", photograph.licence)


def test_the_splits_never_change():
    paths = [photograph.path for photograph in wallpapers.read_table()]
    parts = split_by_hash(paths, {"test": 0.15, "val": 0.15})
    assert {name: len(part) for name, part in parts.items()} == {"train": 24, "val": 5, "test": 8}
    assert [path.removeprefix("usr/share/") for path in parts["val"]] == [
        "backgrounds/Picture_1A_by_freespace.jpg",
        "backgrounds/life_by_Aitzol_Berasategi.jpg",
        "wallpapers/DarkestHour/contents/images/2560x1600.jpg",
        "wallpapers/EveningGlow/contents/images/2560x1600.jpg",
        "wallpapers/Path/contents/images/2560x1600.jpg",
    ]
    assert crop_boxes("a.jpg", [0, 1], (1600, 2560), (64, 64), (0.2, 1.0)) == [
        (595, 709, 1251, 1365),
        (915, 5, 2473, 1563),
    ]


def test_a_debian_package_is_unpacked_without_being_installed(tmp_path, monkeypatch):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, script in {
        "apt-get": 'for last; do true; done; echo "$@" >> ../asked; echo content > "${last}_1.0_all.deb"',
        "dpkg-deb": 'mkdir -p "$3/usr/share" && cp "$2" "$3/usr/share/file"',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    (tmp_path / "scratch").mkdir()
    folder = unpack_debian_package("some-package", tmp_path / "scratch")
    assert (folder / "usr" / "share" / "file").read_text() == "content\n"
    assert (tmp_path / "asked").read_text().split()[-2:] == ["download", "some-package"]
