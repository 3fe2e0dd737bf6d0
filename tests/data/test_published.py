import functools
import gzip
import hashlib
import http.server
import pickle
import re
import socket
import struct
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import one_line, sizes, write_files

from graincode.core.errors import GraincodeError
from graincode.core.images import to_uint8
from graincode.data import CIFAR10, FashionMNIST
from graincode.data.images import SPLITS
from graincode.data.published import validation_mask

SOURCES = {"cifar10": CIFAR10, "fashion_mnist": FashionMNIST}


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_fashion(folder: Path, compressed: bool = True) -> Path:
    """Image number i of its file has the value i + 1 everywhere and the label i % 10."""
    for prefix, count in (("train", 36), ("t10k", 10)):
        values = np.arange(count, dtype=np.uint8)
        images = np.broadcast_to((values + 1)[:, None, None], (count, 28, 28))
        for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", values % 10)):
            write_files(folder, {f"{name}.gz": gzip.compress(idx(array))} if compressed else {name: idx(array)})
    return folder


def write_cifar(folder: Path, each: int = 10) -> Path:
    """Image number i of all has planes of i, i + 1 and i + 2, a first byte of 255, and the label i % 10."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(CIFAR10.files):
        records = np.zeros((each, 3073), dtype=np.uint8)
        values = np.arange(number * each, (number + 1) * each)
        records[:, 0] = values % 10
        records[:, 1:] = (values[:, None] + np.arange(3).repeat(1024)).astype(np.uint8)
        records[:, 1] = 255
        records.tofile(folder / file)
    return folder


WRITE = {"cifar10": write_cifar, "fashion_mnist": write_fashion}


def test_the_validation_images_never_change():
    for count, one_in in ((60_000, 12), (50_000, 10)):
        mask = validation_mask(count, one_in)
        assert mask.sum() == 5_000
        assert mask.nonzero().flatten()[:6].tolist() == [1, 27, 54, 58, 67, 85]


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("below", ["", "FashionMNIST/raw"])
def test_fashion_mnist_splits(tmp_path, compressed, below):
    write_fashion(tmp_path / below, compressed=compressed)
    source = FashionMNIST(str(tmp_path))
    splits = {name: source.split(name) for name in SPLITS}
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


@pytest.mark.parametrize("below", ["", "cifar-10-batches-bin"])
def test_cifar10_splits(tmp_path, below):
    source = CIFAR10(str(write_cifar(tmp_path / below) and tmp_path))
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


def test_the_pickled_version_of_cifar10_is_not_read(tmp_path):
    write_files(tmp_path / "cifar-10-batches-py", {"data_batch_1": pickle.dumps({b"data": 0})})
    with pytest.raises(GraincodeError) as error:
        CIFAR10(str(tmp_path)).split("train")
    one_line(error, f"root={tmp_path}", "data_batch_1.bin")


@pytest.mark.parametrize("kind", SOURCES)
def test_an_unknown_split_is_refused_before_anything_is_read(kind):
    with pytest.raises(GraincodeError) as error:
        SOURCES[kind]("/does/not/exist").split("valid")
    one_line(error, "split=valid", "train, val, test")


@pytest.mark.parametrize("kind", SOURCES)
def test_nothing_beyond_a_given_root_is_looked_at(tmp_path, cache, kind):
    source, root = SOURCES[kind], WRITE[kind](tmp_path / "root")
    WRITE[kind](source.cache())
    missing = next(iter(source.found(root).values()))
    missing.unlink()
    with pytest.raises(GraincodeError) as error:
        source(str(root)).split("train")
    one_line(error, f"root={root}", missing.name.removesuffix(".gz"))
    assert len(source().split("train")) > 30


# the publisher


@pytest.fixture
def site(tmp_path, monkeypatch, request):
    """A publisher's folder, which a server on this computer has in place of the network."""
    folder = tmp_path / "site"
    write_fashion(folder)
    archive = folder / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(write_cifar(tmp_path / "cifar"), "cifar-10-batches-bin")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("no_proxy", "*")
        for source in SOURCES.values():
            monkeypatch.setattr(source, "url", f"http://127.0.0.1:{server.server_port}")
            monkeypatch.setattr(source, "installed", ())
            sums = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in source.downloads}
            monkeypatch.setattr(source, "downloads", sums)
        yield folder
        server.shutdown()


@pytest.mark.parametrize("kind", SOURCES)
def test_files_are_downloaded_once(site, cache, kind):
    source = SOURCES[kind]
    assert all(sizes(source()).values())
    for file in site.iterdir():
        file.unlink()
    assert all(sizes(source()).values())
    assert len(list(source.cache().iterdir())) == len(source.files)


@pytest.mark.parametrize("fault", ["another file", "no file", "no network", "no cache"])
@pytest.mark.parametrize("kind", SOURCES)
def test_a_failed_download_is_named(site, cache, monkeypatch, kind, fault):
    source = SOURCES[kind]
    file = site / list(source.downloads)[-1]
    if fault == "another file":
        file.write_bytes(b"<html>not found</html>")
    elif fault == "no file":
        file.unlink()
    elif fault == "no network":
        monkeypatch.setattr(source, "url", "http://127.0.0.1:9")
    else:
        source.cache().write_text("a file")
    with pytest.raises(GraincodeError) as error:
        source().split("train")
    one_line(error, str(source.cache()), "GRAINCODE_CACHE")
    assert ("experiments/data/fashion_mnist.py" in str(error.value)) == (kind == "fashion_mnist")
    assert fault == "no cache" or list(source.cache().iterdir()) == []


def test_a_download_has_a_time_limit_and_leaves_none_behind(site, monkeypatch):
    seen = []

    def refuse(*_):
        seen.append(socket.getdefaulttimeout())
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.OpenerDirector.open", refuse)
    before = socket.getdefaulttimeout()
    with pytest.raises(GraincodeError):
        CIFAR10().split("train")
    assert seen == [20]
    assert socket.getdefaulttimeout() == before


@pytest.mark.when("a download is sent on to an address without https, or is another file", "nothing of it is kept")
def test_addresses_are_safe(site, monkeypatch):
    def send_on(handler):
        handler.send_response(302)
        handler.send_header("Location", f"http://127.0.0.1:{handler.server.server_port}/elsewhere{handler.path}")
        handler.end_headers()

    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "do_GET", send_on)
    for source in SOURCES.values():
        with pytest.raises(GraincodeError) as error:
            source().split("train")
        one_line(error, "elsewhere", "not https")
        assert list(source.cache().iterdir()) == []
    monkeypatch.undo()
    assert all(source.url.startswith("https://") for source in SOURCES.values())
    assert all(
        re.fullmatch("[0-9a-f]{64}", value) for source in SOURCES.values() for value in source.downloads.values()
    )


def test_of_an_archive_nothing_else_is_unpacked(site, tmp_path, monkeypatch):
    archive = site / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "cifar", "cifar-10-batches-bin")
        for name, kind in (("../outside", tarfile.REGTYPE), ("x/data_batch_1.bin", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    monkeypatch.setattr(CIFAR10, "downloads", {archive.name: hashlib.sha256(archive.read_bytes()).hexdigest()})
    assert all(sizes(CIFAR10()).values())
    assert {path.name for path in CIFAR10.cache().iterdir()} == set(CIFAR10.files)
    assert not list(tmp_path.rglob("outside"))


# damaged files


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
        "255 dimensions": gzip.compress(b"\x00\x00\x08\xff" + idx(images)[4:]),
        "a count beyond the file": gzip.compress(idx(images)[:4] + b"\xff" * 4 + idx(images)[8:]),
        "sizes beyond the file": gzip.compress(idx(images)[:4] + b"\xff" * 12 + idx(images)[16:]),
        "a bomb": gzip.compress(bytes(2**27)),
    }


@pytest.mark.when("an IDX file says other sizes than it has, or unpacks to gigabytes", "it is refused by name")
@pytest.mark.parametrize("kind", corrupt_contents())
def test_a_corrupt_idx_file_is_named(tmp_path, kind):
    write_fashion(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(corrupt_contents()[kind])
    with pytest.raises(GraincodeError) as error:
        FashionMNIST(str(tmp_path)).split("test")
    at_fault = "t10k-labels-idx1-ubyte.gz" if kind == "other count" else "t10k-images-idx3-ubyte.gz"
    one_line(error, str(tmp_path / at_fault), "is corrupt")


def test_a_label_without_a_class_is_corrupt(tmp_path):
    path = write_fashion(tmp_path) / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.full(10, 10, dtype=np.uint8))))
    with pytest.raises(GraincodeError) as error:
        FashionMNIST(str(tmp_path)).split("test")
    one_line(error, str(path), "from 0 to 9, found 10")


@pytest.mark.parametrize("content", [b"", bytes(3072), bytes(3074), b"\x0a" + bytes(3072)])
def test_a_corrupt_file_of_cifar10_is_named(tmp_path, content):
    write_cifar(tmp_path)
    (tmp_path / "data_batch_3.bin").write_bytes(content)
    with pytest.raises(GraincodeError) as error:
        CIFAR10(str(tmp_path)).split("val")
    one_line(error, str(tmp_path / "data_batch_3.bin"), "is corrupt")
    assert len(CIFAR10(str(tmp_path)).split("test")) == 10
