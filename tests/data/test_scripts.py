"""The scripts of experiments/data, with packages that lie on this computer."""

import csv
import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import one_line
from PIL import Image

from graincode.core.images import to_uint8
from graincode.data import FashionMNIST, ImageFolder
from graincode.data.images import SPLITS, split_by_hash

SCRIPTS = Path(__file__).parents[2] / "experiments" / "data"
if not SCRIPTS.is_dir():
    pytest.skip("a source distribution has no studies", allow_module_level=True)
sys.path.insert(0, str(SCRIPTS))
import debian  # noqa: E402
import fashion_mnist  # noqa: E402
import openclipart  # noqa: E402
import squares  # noqa: E402
import wallpapers  # noqa: E402

COUNT = 20


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
    """Two packages of small photographs, each unpacked into a directory of its name."""
    root = tmp_path / "unpacked"
    with (tmp_path / "table.tsv").open("w", newline="") as lines:
        table = csv.writer(lines, delimiter="\t", lineterminator="\n")
        table.writerow(field.name for field in dataclasses.fields(wallpapers.Photograph))
        for index in range(COUNT):
            package, path = f"package{index % 2}", f"usr/share/{index}/photo.jpg"
            content = write_photograph(root / package / path, index)
            table.writerow([package, "1.0-1", path, hashlib.sha256(content).hexdigest(), "2024, A", "CC0-1.0"])
    monkeypatch.setattr(wallpapers, "TABLE", tmp_path / "table.tsv")
    return root


def crops_of(folder: Path, split: str, size=(8, 8)) -> torch.Tensor:
    """(N, 3, H, W) uint8."""
    images = ImageFolder(str(folder), image_size=size).split(split)
    assert images.class_names == ()
    return to_uint8(images[range(len(images))].images)


def numbers(crops: torch.Tensor) -> list[int]:
    """Of each crop, the number of its photograph."""
    return (crops[:, 0].float().mean((1, 2)) / 12).round().int().tolist()


def test_splits_have_photographs_of_their_own(unpacked, tmp_path):
    folder = wallpapers.prepare((6, 12), 3, folder=tmp_path / "crops", root=unpacked)
    seen = []
    for name in SPLITS:
        found = numbers(crops_of(folder, name, (6, 12)))
        first = found[: len(found) // 3]
        assert found == first * 3  # the first crops are of all photographs
        assert len(set(first)) == len(first)
        seen += first
    assert sorted(seen) == list(range(COUNT))
    assert (folder / "licences.tsv").read_text() == wallpapers.TABLE.read_text()
    assert [path.name for path in tmp_path.glob(".preparing*")] == []


def test_more_crops_begin_with_the_fewer(unpacked):
    few, many = (crops_of(wallpapers.prepare((8, 8), count, root=unpacked), "val") for count in (2, 5))
    assert torch.equal(many[: len(few)], few)
    assert len({crop.numpy().tobytes() for crop in many}) == len(many)


@pytest.mark.parametrize("image_size", [(8, 8), (6, 12), (30, 10), (60, 60)])
@pytest.mark.parametrize("size", [(60, 90), (200, 61)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.01, 0.3), (0.5, 0.5)])
def test_windows_of_crops(size, image_size, scale):
    boxes = wallpapers.crop_boxes("a.jpg", range(300), size, image_size, scale)
    assert boxes[7:9] == wallpapers.crop_boxes("a.jpg", [7, 8], size, image_size, scale)
    assert boxes != wallpapers.crop_boxes("b.jpg", range(300), size, image_size, scale)
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
    crops = crops_of(wallpapers.prepare((10, 15), 10, root=unpacked), "train", (10, 15)).float()
    for index, number in enumerate(numbers(crops)):
        path = f"usr/share/{number}/photo.jpg"
        (box,) = wallpapers.crop_boxes(path, [10 * index // len(crops)], (60, 90), (10, 15), (0.2, 1.0))
        left, top, right, bottom = box
        across = left + (torch.arange(15) + 0.5) * (right - left) / 15 - 0.5
        down = top + (torch.arange(10) + 0.5) * (bottom - top) / 10 - 0.5
        inner = crops[index, :, 1:-1, 1:-1]
        assert (inner[1] - 2 * across[1:-1]).abs().max() < 4
        assert (inner[2] - 2 * down[1:-1, None]).abs().max() < 4


def test_packages_are_fetched_once(unpacked, monkeypatch, cache):
    fetched = []

    def fetch(package, scratch):
        fetched.append(package)
        (unpacked / package / "usr").rename(scratch / "usr")
        return scratch

    monkeypatch.setattr(debian, "unpack", fetch)
    folder = wallpapers.prepare((8, 8), 1)
    assert folder == wallpapers.folder_of((8, 8), 1) == wallpapers.prepare((8, 8), 1)
    wallpapers.prepare((8, 8), 2)
    assert sorted(fetched) == ["package0", "package1"]
    assert {path.name for path in (cache / "wallpapers").glob("package*/*")} == {"usr"}


@pytest.mark.parametrize("fault", ["missing", "changed", "small"])
def test_a_wrong_photograph_is_named(unpacked, tmp_path, fault):
    (file,) = unpacked.glob("*/usr/share/7/photo.jpg")
    if fault == "missing":
        file.unlink()
    elif fault == "changed":
        write_photograph(file, 21)
    with pytest.raises(SystemExit) as error:
        wallpapers.prepare((8, 8) if fault != "small" else (61, 4), 2, folder=tmp_path / "crops", root=unpacked)
    one_line(error, "photo.jpg")
    assert not (tmp_path / "crops").exists()


def test_the_table_names_author_and_licence_of_every_photograph():
    table = wallpapers.read_table()
    assert len(table) == len({photograph.path for photograph in table}) == len({p.sha256 for p in table}) == 37
    for photograph in table:
        assert re.fullmatch(r"usr/share/(backgrounds|wallpapers)/[\w/.-]+\.jpg", photograph.path)
        assert re.fullmatch("[0-9a-f]{64}", photograph.sha256)
        assert photograph.version
        assert photograph.author
        assert re.match(r"(CC-BY|CC0|GPL-2\+)", photograph.licence)


def test_the_splits_never_change():
    parts = split_by_hash([photograph.path for photograph in wallpapers.read_table()], wallpapers.FRACTIONS)
    assert {name: len(part) for name, part in parts.items()} == {"train": 24, "val": 5, "test": 8}
    assert [path.removeprefix("usr/share/") for path in parts["val"]] == [
        "backgrounds/Picture_1A_by_freespace.jpg",
        "backgrounds/life_by_Aitzol_Berasategi.jpg",
        "wallpapers/DarkestHour/contents/images/2560x1600.jpg",
        "wallpapers/EveningGlow/contents/images/2560x1600.jpg",
        "wallpapers/Path/contents/images/2560x1600.jpg",
    ]
    assert wallpapers.crop_boxes("a.jpg", [0, 1], (1600, 2560), (64, 64), (0.2, 1.0)) == [
        (595, 709, 1251, 1365),
        (915, 5, 2473, 1563),
    ]


# Debian's packages


def test_a_package_is_unpacked_without_being_installed(tmp_path, monkeypatch):
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
    folder = debian.unpack("some-package", tmp_path / "scratch")
    assert (folder / "usr" / "share" / "file").read_text() == "content\n"
    assert (tmp_path / "asked").read_text().split()[-2:] == ["download", "some-package"]


@pytest.mark.parametrize(
    ("user", "expected"), [(0, ["download", "update", "download", "unpack"]), (1000, ["download"])]
)
def test_only_root_updates_the_package_lists(tmp_path, monkeypatch, user, expected):
    done = []

    def run(command, **_):
        done.append("unpack" if command[0] == "dpkg-deb" else next(c for c in command if c in ("download", "update")))
        if done == ["download"]:
            raise subprocess.CalledProcessError(100, command, stderr="E: Unable to locate package")
        if done[-1] == "download":
            (tmp_path / "some.deb").touch()

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("os.geteuid", lambda: user)
    if user == 0:
        assert debian.unpack("some", tmp_path) == tmp_path
    else:
        with pytest.raises(SystemExit) as error:
            debian.unpack("some", tmp_path)
        one_line(error, "some", "Unable to locate package")
    assert done == expected


def test_fashion_mnist_is_put_into_the_cache_once(tmp_path, monkeypatch, cache):
    fetched = []

    def fetch(package, scratch):
        fetched.append(package)
        (scratch / "usr/share/fashion").mkdir(parents=True)
        for file in FashionMNIST.files:
            (scratch / "usr/share/fashion" / f"{file}.gz").write_bytes(b"")
        return scratch

    monkeypatch.setattr(FashionMNIST, "installed", (Path("/usr/share/fashion"),))
    monkeypatch.setattr(debian, "unpack", fetch)
    for _ in range(2):
        fashion_mnist.main()
    assert fetched == ["dataset-fashion-mnist"]
    assert len(FashionMNIST.found(cache / "fashion-mnist")) == len(list((cache / "fashion-mnist").iterdir())) == 4


def test_without_a_package_the_publisher_is_left(monkeypatch, cache, capsys):
    def fail(package, scratch):
        raise SystemExit(f"{package}: no apt-get")

    monkeypatch.setattr(FashionMNIST, "installed", ())
    monkeypatch.setattr(debian, "unpack", fail)
    fashion_mnist.main()
    assert "no apt-get" in capsys.readouterr().err
    assert list((cache / "fashion-mnist").iterdir()) == []


def test_open_clip_art_is_fetched_once_and_read_as_it_comes(tmp_path, monkeypatch, cache):
    fetched = []

    def fetch(package, scratch):
        fetched.append(package)
        for number in range(COUNT):
            write_photograph(scratch / openclipart.PICTURES / f"{'ab'[number % 2]}/deep/{number}.png", number)
        (scratch / openclipart.PICTURES / "a" / "link.png").symlink_to("../b/deep/1.png")
        (scratch / openclipart.COPYRIGHT).parent.mkdir(parents=True)
        (scratch / openclipart.COPYRIGHT).write_text("public domain")
        return scratch

    monkeypatch.setattr(debian, "unpack", fetch)
    folders = {openclipart.prepare() for _ in range(2)}
    assert fetched == ["openclipart-png"]
    assert folders == {cache / "openclipart"}
    assert (cache / "openclipart" / "copyright").read_text() == "public domain"
    source = ImageFolder(str(cache / "openclipart"), image_size=8)
    assert source.class_names == ("a", "b")
    assert sum(len(source.split(name)) for name in SPLITS) == COUNT + 1
    with pytest.raises(SystemExit) as error:
        openclipart.prepare(tmp_path / "other", root=tmp_path)
    one_line(error, str(tmp_path), "usr/share/openclipart/png")
    assert not (tmp_path / "other").exists()


def read(file):
    return json.loads(file.read_bytes())


def test_squares_of_open_clip_art_hold_nothing_twice_and_keep_lookalikes_together(tmp_path, monkeypatch):
    monkeypatch.setattr(squares, "SMALLEST_CLASS", 10)
    monkeypatch.setattr(squares, "SHARES", {"val": 0.3, "test": 0.3})
    source, generator = tmp_path / "source", np.random.default_rng(0)

    def save(name, pixels):
        file = source / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
        return file

    files = []
    for number in range(24):
        pixels = generator.integers(0, 256, (8, 4, 3), np.uint8).repeat(4, 0).repeat(4, 1)  # 32 x 16
        files.append(save(f"many/{number}.png", pixels))
        near = pixels.copy()
        near[0, 0] ^= 3
        files.append(save(f"many/deep/near_{number}.png", near))
    files += [save("few/equal.png", pixels), save("few/small.png", pixels[:8]), save("few/blank.png", 0 * pixels + 250)]
    transparent = np.zeros((48, 64, 4), np.uint8)
    transparent[8:40, 30:46] = np.dstack([200 - pixels // 2, np.full_like(pixels[..., 0], 255)])
    files += [save("few/other.png", transparent), source / "few/text.png"]
    files[-1].write_text("text")

    found = squares.write_squares(source, tmp_path / "out", 32, reversed(files))
    assert {key: found.pop(key) for key in ("unreadable", "small", "empty", "equal")} == dict.fromkeys(
        ("unreadable", "small", "empty", "equal"), 1
    )
    listed = read(tmp_path / "out" / "files.json")
    assert set(listed["left_out"]) == {"many/23.png", "few/small.png", "few/blank.png", "few/text.png"}
    assert {split: len(listed[split]) for split in SPLITS} == found
    split_of = {name: split for split in SPLITS for name in listed[split].values()}
    assert len(split_of) == 49
    assert all(split_of[f"many/{n}.png"] == split_of[f"many/deep/near_{n}.png"] for n in range(23))
    assert {split_of[f"many/{n}.png"] for n in range(23)} == set(SPLITS)
    data = ImageFolder(str(tmp_path / "out"), image_size=32, crop="none")
    assert {split: len(data.split(split)) for split in SPLITS} == found
    assert set(data.class_names) == {"many", "other"}
    name = next(name for split in SPLITS for name, path in listed[split].items() if path == "few/other.png")
    with Image.open(tmp_path / "out" / name) as square:
        made = np.asarray(square)
    assert (made[:, :8] == 255).all()
    assert (made[:, 24:] == 255).all()
    assert (made[:, 8:24] == 200 - pixels // 2).all()
    again = squares.write_squares(source, tmp_path / "again", 32, files[:10])  # fewer pictures: no split changes
    fewer = read(tmp_path / "again" / "files.json")
    assert all(split_of[name] == split for split in SPLITS for name in fewer[split].values()), again
