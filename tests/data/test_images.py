import gzip
import io
import os
import socket
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import one_line, write_images
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader

from graincode.core.errors import GraincodeError
from graincode.core.images import from_uint8, to_uint8
from graincode.data import FashionMNIST, ImageFolder, TensorImages, fashion_mnist
from graincode.data.images import EXTENSIONS, read_image, split_by_hash
from graincode.data.published import validation_mask

CONF = Path(__file__).parents[2] / "conf" / "data"


# core: the two representations


def test_uint8_round_trip_is_exact():
    levels = torch.arange(256, dtype=torch.uint8)
    images = from_uint8(levels)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(to_uint8(images.to(dtype)), levels)


def test_to_uint8_rounds_to_the_nearest_level_and_clamps():
    between = (torch.arange(255) + 0.4) / 127.5 - 1
    assert torch.equal(to_uint8(between), torch.arange(255, dtype=torch.uint8))
    assert to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_converting_twice_is_refused():
    levels = torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(GraincodeError, match=r"torch\.uint8"):
        to_uint8(levels)
    with pytest.raises(GraincodeError, match=r"torch\.float32"):
        from_uint8(from_uint8(levels))


# the data set


def tensor_images(count: int = 7, channels: int = 3, **changes) -> TensorImages:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, channels, 4, 6), generator=rng, dtype=torch.uint8)
    arguments = {"name": "noise", "split": "val", "images": images, "labels": torch.arange(count) % 3}
    return TensorImages(**arguments | changes)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_is_its_images_one_by_one(channels):
    dataset = tensor_images(channels=channels)
    order = [5, 0, 5, 6]
    batch = dataset[order]
    assert batch.images.shape == (4, 3, 4, 6)
    assert batch.images.dtype == torch.float32
    assert batch.labels.dtype == batch.indices.dtype == torch.long
    assert batch.indices.tolist() == order
    for row, index in enumerate(order):
        single = dataset[index]
        assert torch.equal(single.images, batch.images[row : row + 1])
        assert torch.equal(single.labels, batch.labels[row : row + 1])
    assert torch.equal(to_uint8(batch.images), dataset.images[order].expand(-1, 3, -1, -1))


def test_an_empty_batch_and_an_empty_split_are_fine():
    assert tensor_images()[[]].images.shape == (0, 3, 4, 6)
    assert len(tensor_images(0).content_hash()) == 64


@pytest.mark.parametrize("indices", [7, -1, [0, 7]])
def test_an_index_outside_the_split_is_refused(indices):
    with pytest.raises(IndexError, match="7 images"):
        tensor_images()[indices]


def test_a_data_loader_takes_index_lists():
    dataset = tensor_images()
    batches = list(DataLoader(dataset, sampler=[[0, 1, 2], [3, 4, 5, 6]], batch_size=None))
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(7))
    assert torch.equal(torch.cat([batch.images for batch in batches]), dataset[range(7)].images)


def test_a_batch_moves_as_a_whole():
    batch = tensor_images()[[0]].to("meta")
    assert {batch.images.device.type, batch.labels.device.type, batch.indices.device.type} == {"meta"}


def test_the_content_hash_is_of_content_alone():
    base = tensor_images()
    assert base.content_hash() == tensor_images(name="other", split="train", class_names=("a", "b", "c")).content_hash()
    images = base.images.clone()
    images[3, 1, 2, 2] += 1
    different = [
        tensor_images(images=images),
        tensor_images(images=base.images.flip(0)),
        tensor_images(images=base.images.reshape(7, 3, 6, 4)),
        tensor_images(labels=base.labels.flip(0)),
        tensor_images(6),
    ]
    assert len({dataset.content_hash() for dataset in [base, *different]}) == 6


def test_the_content_hash_does_not_depend_on_how_it_is_read(monkeypatch):
    whole = tensor_images().content_hash()
    monkeypatch.setattr("graincode.data.images._HASH_CHUNK", 2)
    assert tensor_images().content_hash() == whole


# Fashion-MNIST


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_fashion(folder: Path, train: int = 36, test: int = 10, compressed: bool = True) -> Path:
    """Image number i of its file has the value i + 1 everywhere and the label i % 10."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", train), ("t10k", test)):
        values = np.arange(count, dtype=np.uint8)
        images = np.broadcast_to((values + 1)[:, None, None], (count, 28, 28))
        for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", values % 10)):
            if compressed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (folder / name).write_bytes(idx(array))
    return folder


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """Fashion-MNIST is not on this computer, and every way to fetch it is a failure until a test puts one in."""

    def fail(scratch):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setattr(fashion_mnist, "FETCHERS", {"first": fail, "second": fail})
    monkeypatch.setenv("GRAINCODE_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("below", ["", "FashionMNIST/raw"])
def test_fashion_mnist_splits(tmp_path, compressed, below):
    write_fashion(tmp_path / below, compressed=compressed)
    source = FashionMNIST(str(tmp_path))
    splits = {name: source.split(name) for name in ("train", "val", "test")}
    assert {name: len(split) for name, split in splits.items()} == {"train": 33, "val": 3, "test": 10}
    values = {name: split.images[:, 0, 16, 16].tolist() for name, split in splits.items()}
    assert sorted(values["train"] + values["val"]) == list(range(1, 37))
    assert values["test"] == list(range(1, 11))
    for name, split in splits.items():
        assert (split.name, split.split, split.image_size) == ("fashion_mnist", name, source.image_size)
        assert split.class_names == source.class_names
        assert split.labels.tolist() == [(value - 1) % 10 for value in values[name]]


def test_fashion_mnist_is_padded_with_black_and_gray(tmp_path):
    images = FashionMNIST(str(write_fashion(tmp_path))).split("test")[range(10)].images
    assert images.shape == (10, 3, 32, 32)
    inner = images[:, :, 2:30, 2:30]
    assert (inner > -1).all()
    assert (images == -1).sum() == images.numel() - inner.numel()
    assert torch.equal(images[:, :1].expand(-1, 3, -1, -1), images)


def test_the_validation_images_never_change():
    mask = validation_mask(60_000, 12)
    assert mask.sum() == 5_000
    assert mask.nonzero().flatten()[:6].tolist() == [1, 27, 54, 58, 67, 85]


def test_an_unknown_split_is_refused_before_anything_is_read():
    for source in (FashionMNIST("/does/not/exist"), ImageFolder("/does/not/exist")):
        with pytest.raises(GraincodeError) as error:
            source.split("valid")
        one_line(error, "'valid'", "train, val, test")


def test_fashion_mnist_never_looks_beyond_a_given_root(nowhere):
    write_fashion(nowhere / "debian")
    root = write_fashion(nowhere / "partial")
    (root / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(GraincodeError) as error:
        FashionMNIST(str(root)).split("train")
    one_line(error, f"data.root={root}", "t10k-labels-idx1-ubyte", "data.root=null")


def test_fashion_mnist_is_found_before_it_is_fetched(nowhere):
    fetched = []

    def fetch(scratch):
        fetched.append(scratch)
        return write_fashion(scratch / "deep" / "inside", train=12)

    fashion_mnist.FETCHERS["second"] = fetch
    cache = nowhere / "cache" / "fashion-mnist"
    assert fashion_mnist.locate(None) == cache
    assert len(FashionMNIST().split("train")) == 11
    assert len(fetched) == 1
    assert len(list(cache.iterdir())) == 4
    debian = write_fashion(nowhere / "debian")
    assert fashion_mnist.locate(None) == debian
    root = write_fashion(nowhere / "root")
    assert fashion_mnist.locate(str(root)) == root


def test_an_incomplete_fetch_leaves_the_next_way_open(nowhere, caplog):
    def fetch(scratch):
        folder = write_fashion(scratch)
        (folder / "t10k-labels-idx1-ubyte.gz").unlink()
        return folder

    fashion_mnist.FETCHERS["first"] = fetch
    fashion_mnist.FETCHERS["second"] = write_fashion
    with caplog.at_level("INFO"):
        fashion_mnist.locate(None)
    assert "first failed" in caplog.text
    assert "by second" in caplog.text


def test_where_nothing_works_every_way_is_named(nowhere):
    with pytest.raises(GraincodeError) as error:
        FashionMNIST().split("train")
    one_line(error, "first and second failed", "dataset-fashion-mnist", "data.root=/", "GRAINCODE_CACHE")


def test_a_cache_that_cannot_be_written_is_named(nowhere):
    (nowhere / "cache").write_text("a file")
    with pytest.raises(GraincodeError) as error:
        FashionMNIST().split("train")
    one_line(error, str(nowhere / "cache"), "GRAINCODE_CACHE")


def test_the_download_has_a_time_limit_and_leaves_none_behind(tmp_path, monkeypatch):
    seen = []

    def refuse(root, download):
        seen.append(socket.getdefaulttimeout())
        raise RuntimeError("no network")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", refuse)
    before = socket.getdefaulttimeout()
    with pytest.raises(RuntimeError):
        fashion_mnist._fetch_with_torchvision(tmp_path)
    assert seen == [20]
    assert socket.getdefaulttimeout() == before


@pytest.mark.parametrize(
    ("user", "expected"), [(0, ["download", "update", "download", "unpack"]), (1000, ["download"])]
)
def test_only_root_updates_the_package_lists(tmp_path, monkeypatch, user, expected):
    done = []

    def run(command, **options):
        done.append("unpack" if command[0] == "dpkg-deb" else next(c for c in command if c in ("download", "update")))
        if done == ["download"]:
            raise subprocess.CalledProcessError(100, command, stderr="E: Unable to locate package")
        if done[-1] == "download":
            (tmp_path / "some.deb").touch()

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    if user == 0:
        folder = fashion_mnist._fetch_with_apt(tmp_path)
        assert folder == tmp_path / "usr/share/datasets/fashion-mnist"
    else:
        with pytest.raises(subprocess.CalledProcessError):
            fashion_mnist._fetch_with_apt(tmp_path)
    assert done == expected


def corrupt_contents() -> dict[str, bytes]:
    images = np.zeros((10, 28, 28), dtype=np.uint8)
    good = gzip.compress(idx(images))
    return {
        "empty": b"",
        "no gzip": b"<html>not found</html>",
        "cut gzip": good[: len(good) // 2],
        "flipped bits": good[:-8] + bytes(byte ^ 1 for byte in good[-8:]),
        "empty content": gzip.compress(b""),
        "wrong magic": gzip.compress(b"\x01" + idx(images)[1:]),
        "floats": gzip.compress(b"\x00\x00\x0d\x03" + idx(images)[4:]),
        "cut header": gzip.compress(idx(images)[:9]),
        "cut content": gzip.compress(idx(images)[:-1]),
        "other size": gzip.compress(idx(np.zeros((10, 32, 32), dtype=np.uint8))),
        "labels instead": gzip.compress(idx(np.zeros(10, dtype=np.uint8))),
        "other count": gzip.compress(idx(images[:9])),
    }


@pytest.mark.parametrize("kind", corrupt_contents())
def test_a_corrupt_idx_file_is_named(tmp_path, kind):
    write_fashion(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(corrupt_contents()[kind])
    with pytest.raises(GraincodeError) as error:
        FashionMNIST(str(tmp_path)).split("test")
    at_fault = "t10k-labels-idx1-ubyte.gz" if kind == "other count" else "t10k-images-idx3-ubyte.gz"
    one_line(error, str(tmp_path / at_fault), "is corrupt", "remove it", "data.root=/")


def test_a_label_without_a_class_is_corrupt(tmp_path):
    write_fashion(tmp_path)
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.full(10, 10, dtype=np.uint8))))
    with pytest.raises(GraincodeError) as error:
        FashionMNIST(str(tmp_path)).split("test")
    one_line(error, str(path), "from 0 to 9, found 10")


# folders of images


def files_of(source: ImageFolder, root: Path) -> dict[str, set[str]]:
    return {
        name: {Path(file).relative_to(root).as_posix() for file in source.split(name).files}
        for name in ("train", "val", "test")
    }


def test_a_small_folder_just_works(tmp_path):
    names = {f"{i}.png" for i in range(20)}
    source = ImageFolder(str(write_images(tmp_path, *names)), image_size=8)
    files = files_of(source, tmp_path)
    assert all(files.values())
    assert files["train"] | files["val"] | files["test"] == names
    assert sum(map(len, files.values())) == 20
    assert source.class_names == ()
    split = source.split("train")
    batch = split[range(len(split))]
    assert batch.images.shape == (len(split), 3, 8, 8)
    assert batch.images.abs().max() <= 1
    assert batch.labels.eq(0).all()
    assert (split.name, split.split, split.image_size) == (tmp_path.name, "train", (8, 8))
    assert list(split.files) == sorted(split.files)
    assert torch.equal(split[[2, 0]].images, torch.cat([split[2].images, split[0].images]))
    assert split.content_hash() == source.split("train").content_hash() != source.split("val").content_hash()


def test_a_split_by_hash_does_not_depend_on_the_other_names():
    names = [f"class{i % 7}/{i}.jpg" for i in range(4000)]
    fractions = {"test": 0.05, "val": 0.1}
    whole = split_by_hash(names, fractions)
    half = split_by_hash(names[::-2], fractions)
    assert sorted(name for part in whole.values() for name in part) == sorted(names)
    for part in ("train", "val", "test"):
        assert set(half[part]) == set(whole[part]) & set(names[::-2])
    assert len(whole["test"]) == pytest.approx(200, abs=50)
    assert len(whole["val"]) == pytest.approx(400, abs=70)
    assert split_by_hash(["a", "b", "c"], fractions) == {"test": ["c"], "val": ["b"], "train": ["a"]}


def test_no_part_but_those_of_share_zero_is_empty():
    for count in range(3, 30):
        parts = split_by_hash([str(i) for i in range(count)], {"test": 0.01, "val": 0.01})
        assert all(parts.values())
    assert split_by_hash(["a"], {"test": 0.0, "val": 0.0}) == {"test": [], "val": [], "train": ["a"]}


def test_classes_are_the_first_level_directories(tmp_path):
    names = [f"{label}/deep{i % 2}/{i}.PNG" for label in ("cat", "ant", "bee") for i in range(8)]
    source = ImageFolder(str(write_images(tmp_path, *names)), image_size=8)
    assert source.class_names == ("ant", "bee", "cat")
    for name in ("train", "val", "test"):
        split = source.split(name)
        assert split.class_names == source.class_names
        for file, label in zip(split.files, split.labels.tolist(), strict=True):
            assert Path(file).relative_to(tmp_path).parts[0] == source.class_names[label]
    unlabelled = ImageFolder(str(tmp_path), image_size=8, classes="none")
    assert unlabelled.class_names == ()
    assert files_of(unlabelled, tmp_path) == files_of(source, tmp_path)
    assert unlabelled.split("train").labels.eq(0).all()


def test_given_splits_are_kept(tmp_path):
    write_images(
        tmp_path, *(f"{split}/{label}/{i}.png" for split in ("train", "val", "test") for label in "ab" for i in "12")
    )
    source = ImageFolder(str(tmp_path), image_size=8)
    assert source.class_names == ("a", "b")
    for name, files in files_of(source, tmp_path).items():
        assert files == {f"{name}/a/1.png", f"{name}/a/2.png", f"{name}/b/1.png", f"{name}/b/2.png"}


@pytest.mark.parametrize(("given", "missing"), [("val", "test"), ("test", "val")])
def test_a_missing_split_is_taken_out_of_train(tmp_path, given, missing):
    names = {f"train/{i}.png" for i in range(10)}
    write_images(tmp_path, *names, f"{given}/0.png")
    files = files_of(ImageFolder(str(tmp_path), image_size=8), tmp_path)
    assert files[given] == {f"{given}/0.png"}
    assert files[missing]
    assert files[missing] < names
    assert files["train"] == names - files[missing]


def test_a_class_may_be_named_train(tmp_path):
    write_images(tmp_path, *(f"{label}/{i}.png" for label in ("train", "bus") for i in range(5)))
    assert ImageFolder(str(tmp_path)).class_names == ("bus", "train")


def test_hidden_and_other_files_are_passed_over(tmp_path):
    write_images(tmp_path, "1.png", "2.jpg", "3.webp", ".hidden.png", ".thumbnails/4.png")
    (tmp_path / "notes.txt").write_text("no image")
    files = files_of(ImageFolder(str(tmp_path)), tmp_path)
    assert set.union(*files.values()) == {"1.png", "2.jpg", "3.webp"}


def test_every_known_format_is_decoded(tmp_path):
    for extension in EXTENSIONS:
        path = tmp_path / f"image{extension}"
        Image.new("RGB", (10, 10), (200, 100, 40)).save(path)
        image = read_image(path, (4, 4), "center").float()
        assert (image - torch.tensor([200.0, 100.0, 40.0])[:, None, None]).abs().max() < 12, extension


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / "image.tif"
    Image.new("RGB", (10, 10), "white").convert(mode).save(path)
    assert read_image(path, (4, 6), "center").eq(255).all()


def test_crop_keeps_the_centre_and_none_keeps_everything(tmp_path):
    pixels = np.zeros((20, 60, 3), dtype=np.uint8)
    pixels[:, 20:40] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    for size in ((10, 10), (20, 20), (40, 40)):
        assert read_image(tmp_path / "wide.png", size, "center")[:, :, 2:-2].eq(255).all()
    squeezed = read_image(tmp_path / "wide.png", (6, 30), "none")
    assert squeezed.shape == (3, 6, 30)
    assert squeezed[0, 3, [2, 15, 27]].tolist() == [0, 255, 0]


def test_scaling_down_is_antialiased(tmp_path):
    checker = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checker).save(tmp_path / "checker.png")
    image = read_image(tmp_path / "checker.png", (8, 8), "center").float()
    assert (image - 127.5).abs().max() < 8


def test_images_are_turned_upright(tmp_path):
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    image = read_image(tmp_path / "photo.png", (8, 8), "center")
    assert image[0, :, 0].tolist() == [0] * 4 + [255] * 4


def broken_files() -> dict[str, bytes]:
    jpeg, png, deep = io.BytesIO(), io.BytesIO(), io.BytesIO()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    noise.save(jpeg, "jpeg")
    noise.save(png, "png")
    Image.fromarray(np.full((8, 8), 1000, dtype=np.uint16)).save(deep, "png")
    return {
        "empty": b"",
        "text": b"hello",
        "cut jpeg": jpeg.getvalue()[:800],
        "cut png": png.getvalue()[:800],
        "broken png": png.getvalue()[:50] + b"????" + png.getvalue()[54:],
        "16 bits": deep.getvalue(),
    }


@pytest.mark.parametrize("kind", broken_files())
def test_a_broken_image_is_named_when_it_is_read(tmp_path, kind):
    write_images(tmp_path, "1.png", "2.png", "3.png")
    source = ImageFolder(str(tmp_path), image_size=8)
    (tmp_path / "1.png").write_bytes(broken_files()[kind])
    with pytest.raises(GraincodeError) as error:
        [source.split(name)[0] for name in ("train", "val", "test")]
    one_line(error, str(tmp_path / "1.png"), "remove it", "re-save it")


def test_a_root_without_images_is_refused(tmp_path):
    for root in (tmp_path / "missing", tmp_path):
        for use in (lambda source: source.class_names, lambda source: source.split("train")):
            with pytest.raises(GraincodeError) as error:
                use(ImageFolder(str(root)))
            one_line(error, str(root), "data.root=/path/to/images")
    one_line(error, *EXTENSIONS)


def test_images_beside_class_folders_are_refused(tmp_path):
    write_images(tmp_path, "a/1.png", "b/2.png", "3.png")
    with pytest.raises(GraincodeError) as error:
        ImageFolder(str(tmp_path)).split("train")
    one_line(error, str(tmp_path / "3.png"), "data.classes=none")
    assert len(ImageFolder(str(tmp_path), classes="none").split("train")) == 1


def test_too_few_images_for_the_splits(tmp_path):
    source = ImageFolder(str(write_images(tmp_path, "1.png", "2.png")))
    with pytest.raises(GraincodeError) as error:
        source.split("train")
    one_line(error, str(tmp_path), "data.test_fraction=0 data.val_fraction=0")
    source = ImageFolder(str(tmp_path), val_fraction=0, test_fraction=0)
    assert len(source.split("train")) == 2
    with pytest.raises(GraincodeError) as error:
        source.split("val")
    one_line(error, "data.val_fraction=0.05")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"root": None}, "data.root=/path/to/images"),
        ({"image_size": 0}, "data.image_size=64"),
        ({"image_size": True}, "data.image_size=64"),
        ({"image_size": "64"}, "data.image_size=64"),
        ({"image_size": 64.5}, "data.image_size=64"),
        ({"image_size": [64]}, "data.image_size=[64,96]"),
        ({"image_size": [64, -1]}, "data.image_size=[64,96]"),
        ({"crop": "random"}, "data.crop=center or data.crop=none"),
        ({"classes": "names"}, "data.classes=folders or data.classes=none"),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "data.val_fraction=0.05"),
        ({"val_fraction": -0.1}, "data.val_fraction=0.05"),
        ({"test_fraction": float("nan")}, "data.test_fraction=0.05"),
        ({"test_fraction": "a tenth"}, "data.test_fraction=0.05"),
    ],
)
def test_bad_arguments_say_what_to_type(arguments, expected):
    with pytest.raises(GraincodeError) as error:
        ImageFolder(**{"root": "/images"} | arguments)
    one_line(error, expected)


# configuration


def test_the_configurations_build_the_sources(tmp_path):
    write_fashion(tmp_path / "fashion")
    config = OmegaConf.load(CONF / "fashion_mnist.yaml")
    config.root = str(tmp_path / "fashion")
    assert len(instantiate(config).split("val")) == 3

    write_images(tmp_path / "folder", "1.png", "2.png", "3.png")
    config = OmegaConf.load(CONF / "image_folder.yaml")
    config.root, config.image_size = str(tmp_path / "folder"), [8, 12]
    assert instantiate(config).split("val")[0].images.shape == (1, 3, 8, 12)


def test_an_image_folder_without_a_root_says_what_to_type():
    with pytest.raises(InstantiationException, match=r"type data\.root=/path/to/images"):
        instantiate(OmegaConf.load(CONF / "image_folder.yaml"))
