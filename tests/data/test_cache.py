import errno
import io
import multiprocessing
import os
import pickle
import shutil
import signal
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import KINDS, gray, make, names_of, one_line, photo, write_files, write_tar
from torch.utils.data import DataLoader

from graincode.core.errors import GraincodeError
from graincode.core.images import to_uint8
from graincode.data import ImageFolder, TensorImages, WebDataset, encoded
from graincode.data.cached import CachedImages
from graincode.data.decoding import read_image
from graincode.data.encoded import EncodedImages
from graincode.data.images import summaries

FORK = multiprocessing.get_context("fork")
SPLITS = ("train", "val", "test")


def everything(dataset, workers: int = 0):
    """All batches of a split, and (N, 3, H, W) and (N,) of them together."""
    parts = [range(start, min(start + 7, len(dataset))) for start in range(0, len(dataset), 7)]
    batches = list(DataLoader(dataset, sampler=parts, batch_size=None, num_workers=workers))
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])


@pytest.fixture
def decoded(tmp_path, monkeypatch):
    """How many images have been decoded, by this process and those forked from it."""
    log = tmp_path / "decoded"
    log.touch()

    def counting(*arguments):
        with log.open("ab") as file:
            file.write(b".")
        return read_image(*arguments)

    monkeypatch.setattr(encoded, "read_image", counting)
    return lambda: log.stat().st_size


def folder(root: Path, count: int = 12, **arguments) -> ImageFolder:
    if not root.exists():
        write_files(root, {f"{'ab'[i % 2]}/{i:03d}.jpg": photo(i) for i in range(count)})
    return ImageFolder(str(root), **({"image_size": [8, 6], "cache": True} | arguments))


def folders(cache: Path) -> list[Path]:
    """What lies in the cache, without its locks."""
    return [path for path in (cache / "images").glob("*") if path.suffix != ".lock"]


# what is in the cache


@pytest.mark.parametrize("kind", KINDS)
def test_a_cached_split_is_the_split(tmp_path, kind):
    images = [photo(seed) for seed in range(24)]
    plain = make(kind, tmp_path / "data", images, image_size=[8, 6])
    cached = make(kind, tmp_path / "again", images, image_size=[8, 6], cache=True)
    for name in SPLITS:
        one, other = plain.split(name), cached.split(name)
        assert isinstance(other, CachedImages)
        assert len(one) == len(other) > 0
        for found, expected in zip(everything(other), everything(one), strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(one.labels, other.labels)
        assert (one.split, one.image_size, one.class_names) == (other.split, other.image_size, other.class_names)
        assert one.content_hash() == other.content_hash()
    one, other = plain.split("train"), cached.split("train")
    batch = other[[2, 0, 2]]
    assert batch.indices.tolist() == [2, 0, 2]
    assert torch.equal(batch.images, one[[2, 0, 2]].images)
    assert torch.equal(other[1].images, one[1].images)
    with pytest.raises(IndexError):
        other[len(other)]


def test_more_images_than_one_process_takes_at_a_time(tmp_path, decoded, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    cached = folder(tmp_path / "data", 150, val_fraction=0, test_fraction=0).split("train")
    assert decoded() == 150
    plain = folder(tmp_path / "data", 150, val_fraction=0, test_fraction=0, cache=False).split("train")
    assert all(map(torch.equal, everything(cached, workers=2), everything(plain)))


def test_the_cache_is_one_array_of_bytes(tmp_path, cache):
    split = folder(tmp_path / "data").split("train")
    (found,) = folders(cache)
    assert (found / "images.npy").stat().st_size == pytest.approx(len(split) * 3 * 8 * 6, abs=200)


def test_each_image_is_decoded_once_and_never_again(tmp_path, decoded):
    source = folder(tmp_path / "data")
    first = source.split("train")
    assert decoded() == len(first)
    again = folder(tmp_path / "data").split("train")
    assert all(map(torch.equal, everything(again), everything(first)))
    shutil.copytree(tmp_path / "data", tmp_path / "moved")  # with its times
    moved = folder(tmp_path / "moved").split("train")
    assert moved.content_hash() == first.content_hash()
    assert decoded() == len(first)


def test_a_changed_data_set_is_noticed(tmp_path):
    def content():
        hashes = {folder(root, image_size=8, cache=cache).split("train").content_hash() for cache in (False, True)}
        assert len(hashes) == 1
        return hashes.pop()

    def put(name: str, content: bytes, later: int) -> None:
        times = (root / name).stat()
        write_files(root, {name: content})
        os.utime(root / name, ns=(times.st_atime_ns, times.st_mtime_ns + later))

    root = write_files(tmp_path / "data", {f"a/{level}.png": gray(level) for level in range(10, 18)})
    seen = [content()]
    for index, file in enumerate(names_of(folder(root, cache=False).split("train"))):
        name = Path(file).relative_to(root).as_posix()
        if index % 2:
            size = (root / name).stat().st_size
            put(name, gray(100 + index), later=1)  # only its time tells
            assert (root / name).stat().st_size == size
        else:
            put(name, photo(index), later=0)  # only its size tells
        seen.append(content())
    (root / "b").mkdir()
    (root / name).rename(root / "b" / Path(name).name)
    seen.append(content())
    assert len(set(seen)) == len(seen) >= 6


@pytest.mark.parametrize("change", [{"image_size": [6, 8]}, {"image_size": 8}, {"crop": "none"}, {"classes": "none"}])
def test_another_way_to_read_is_another_cache(tmp_path, change):
    folder(tmp_path / "data").split("train")
    cached, plain = folder(tmp_path / "data", **change), folder(tmp_path / "data", cache=False, **change)
    assert cached.split("train").content_hash() == plain.split("train").content_hash()


def test_another_decoder_is_another_cache(tmp_path, monkeypatch, decoded):
    first = folder(tmp_path / "data").split("train")
    monkeypatch.setattr("PIL.__version__", "0")
    folder(tmp_path / "data").split("train")
    assert decoded() == 2 * len(first)


def test_parts_of_the_same_shards_have_caches_of_their_own(tmp_path):
    write_tar(tmp_path / "all.tar", {f"{level}.png": gray(level) for level in range(30)})
    found = {}
    for cached in (False, True):
        source = WebDataset(str(tmp_path), image_size=8, val_fraction=0.01, test_fraction=0.01, cache=cached)
        found[cached] = [levels_of(source.split(name)) for name in SPLITS]
        assert len(found[cached][1][0]) == len(found[cached][2][0]) == 1
    assert found[True] == found[False]


@pytest.mark.parametrize("kind", ["hf", "webdataset"])
def test_other_content_at_the_same_place_is_noticed(tmp_path, kind):
    for levels in (range(24), range(100, 124)):
        source = make(kind, tmp_path / "data", [gray(level) for level in levels], cache=True)
        images = to_uint8(everything(source.split("train"))[0])
        assert set(images[:, 0, 0, 0].tolist()) < set(levels)
        shutil.rmtree(tmp_path / "data")


def test_the_content_hash_is_kept_beside_the_images(tmp_path, monkeypatch):
    source = folder(tmp_path / "data")
    expected = source.split("train").content_hash()
    monkeypatch.setattr(CachedImages, "__getitem__", None)
    assert source.split("train").content_hash() == expected


def test_a_pickled_split_has_no_pixels_in_it(tmp_path):
    split = folder(tmp_path / "data", image_size=128).split("train")
    split[[0]]
    pickled = pickle.dumps(split)
    assert len(pickled) < 3 * 128 * 128
    assert torch.equal(pickle.loads(pickled)[[0, 1]].images, split[[0, 1]].images)


# building it


def test_processes_that_ask_at_once_build_it_once(tmp_path, decoded, cache):
    source = folder(tmp_path / "data", 80)
    barrier, hashes = FORK.Barrier(3), FORK.SimpleQueue()

    def ask():
        torch.set_num_threads(1)  # a fork cannot use the thread pool of its parent
        barrier.wait()
        hashes.put(source.split("train").content_hash())

    processes = [FORK.Process(target=ask) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    plain = folder(tmp_path / "data", 80, cache=False).split("train")
    assert decoded() == len(plain)
    assert {hashes.get() for _ in processes} == {plain.content_hash()}
    assert len(folders(cache)) == 1


@pytest.mark.parametrize("how", ["key", "kill"])
def test_an_interrupted_build_counts_for_nothing(tmp_path, monkeypatch, cache, how):
    source, plain = folder(tmp_path / "data"), folder(tmp_path / "data", cache=False)

    def interrupted(content, size, crop, name, *more):
        if name == names_of(plain.split("train"))[5]:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt
        return read_image(content, size, crop, name, *more)

    with monkeypatch.context() as patch:
        patch.setattr(encoded, "read_image", interrupted)
        if how == "kill":

            def build():
                torch.set_num_threads(1)
                source.split("train")

            process = FORK.Process(target=build)
            process.start()
            process.join(60)
            assert process.exitcode == -signal.SIGKILL
            assert len(folders(cache)) == 1  # what it left behind
        else:
            with pytest.raises(KeyboardInterrupt):
                source.split("train")
            assert folders(cache) == []
    assert source.split("train").content_hash() == plain.split("train").content_hash()
    (whole,) = folders(cache)
    assert not whole.name.startswith(".")


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_full_disk_is_named_with_the_bytes_needed(tmp_path, monkeypatch, cache, when):
    source = folder(tmp_path / "data")
    size = len(folder(tmp_path / "data", cache=False).split("train"))

    def write(self, rows):
        raise OSError(errno.ENOSPC, "No space left on device")

    if when == "before":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 99, 99))
    else:
        monkeypatch.setattr(EncodedImages, "load", write)
    with pytest.raises(GraincodeError) as error:
        source.split("train")
    one_line(error, str(cache / "images"), str(size * (3 * 8 * 6 + 8)), "GRAINCODE_CACHE")
    assert folders(cache) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAINCODE_CACHE", str(write_files(tmp_path, {"file": b""}) / "file"))
    with pytest.raises(GraincodeError) as error:
        folder(tmp_path / "data").split("train")
    one_line(error, str(tmp_path / "file"), "GRAINCODE_CACHE")


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def damages() -> dict[str, tuple[str, bytes]]:
    """Of a cache of 7 images of 8 x 6 pixels: a file and what stands in it instead."""
    huge = npy(np.zeros(7, dtype=np.int64)).replace(b"(7,), }" + b" " * 9, b"(7000000000,), }")
    assert b"7000000000" in huge
    return {
        "cut": ("images.npy", npy(np.zeros((7, 3, 8, 6), dtype=np.uint8))[:300]),
        "empty": ("images.npy", b""),
        "other shape": ("images.npy", npy(np.zeros((7, 3, 6, 8), dtype=np.uint8))),
        "other type": ("images.npy", npy(np.zeros((7, 3, 8, 6), dtype=np.int8))),
        "pickled": ("labels.npy", b"\x80\x04N."),
        "empty labels": ("labels.npy", b""),
        "fewer labels": ("labels.npy", npy(np.zeros(6, dtype=np.int64))),
        "other labels": ("labels.npy", npy(np.full(7, 9))),
        "labels without end": ("labels.npy", huge),
        "fractions": ("labels.npy", npy(np.zeros(7))),
        "an image that is not there": ("corrupt.npy", npy(np.array([7]))),
        "half a hash": ("content_hash", b"\xff0123"),
    }


@pytest.mark.when("a cache of decoded images is damaged", "it is built anew")
@pytest.mark.parametrize("damage", [*damages(), "missing"])
def test_a_damaged_cache_is_built_anew(tmp_path, cache, damage):
    source = folder(tmp_path / "data", 7, val_fraction=0, test_fraction=0)
    expected = source.split("train").content_hash()
    (found,) = folders(cache)
    assert np.load(found / "images.npy").shape == (7, 3, 8, 6)
    if damage == "missing":
        (found / "corrupt.npy").unlink()
    else:
        file, content = damages()[damage]
        (found / file).write_bytes(content)
    if damage != "half a hash":
        (found / "content_hash").unlink()
    assert source.split("train").content_hash() == expected
    assert folders(cache) == [found]


# corrupt images


def damaged(levels: range, *bad: int) -> list[bytes]:
    """Gray images that are told by their levels, of which some are cut short."""
    return [gray(level)[:-30] if level in bad else gray(level) for level in levels]


def levels_of(dataset, workers: int = 0) -> tuple[list[int], list[int]]:
    images, labels = everything(dataset, workers)
    return to_uint8(images)[:, 0, 0, 0].tolist(), labels.tolist()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_next_readable_image_stands_in_for_a_corrupt_one(tmp_path, caplog, kind, cached, workers):
    levels, labels = levels_of(make(kind, tmp_path / "good", [gray(i) for i in range(40)]).split("train"))
    places = [3, 4, len(levels) - 1]
    bad = [levels[place] for place in places]
    source = make(kind, tmp_path / "bad", damaged(range(40), *bad), cache=cached, on_corrupt="skip")
    caplog.clear()
    split = source.split("train")
    shown = [5 if place in (3, 4) else 0 if place == places[-1] else place for place in range(len(levels))]
    expected = [levels[place] for place in shown], [labels[place] for place in shown]
    assert split.skipped == (3 if cached else 0)
    assert levels_of(split, workers) == expected
    assert split.skipped == 3
    assert levels_of(split, workers) == expected
    assert split.skipped == 3
    if not workers:  # the log of worker processes does not come here
        names = names_of(make(kind, tmp_path / "bad2", damaged(range(40), *bad)).split("train"))
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        told = [warning.replace(str(tmp_path / "bad"), str(tmp_path / "bad2")) for warning in warnings]
        for place in places:
            assert sum(names[place] in warning for warning in told) == 1
    if cached:
        caplog.clear()
        assert levels_of(source.split("train")) == expected
        assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 3


def test_skipping_gives_the_same_content_with_and_without_a_cache(tmp_path):
    images = damaged(range(40), *range(0, 40, 3))
    splits = [make("image_folder", tmp_path / "d", images, cache=c, on_corrupt="skip").split("train") for c in (0, 1)]
    assert splits[0].content_hash() == splits[1].content_hash()
    assert splits[0].skipped == splits[1].skipped > 0


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_corrupt_image_is_an_error_by_default(tmp_path, cache, kind, cached, workers):
    good = make(kind, tmp_path / "good", [gray(i) for i in range(40)]).split("train")
    source = make(kind, tmp_path / "bad", damaged(range(40), levels_of(good)[0][6]), cache=cached)
    name = names_of(good)[6].replace(str(tmp_path / "good"), str(tmp_path / "bad"))
    message = ""
    try:
        everything(source.split("train"), workers)
    except GraincodeError as error:
        traceback.clear_frames(error.__traceback__)  # or torch takes ten seconds to end its workers
        message = str(error)
    assert ("\n" in message) == bool(workers and not cached)  # torch puts a worker's traceback before the message
    assert name in message.splitlines()[-1]
    assert "on_corrupt=skip" in message.splitlines()[-1]
    assert folders(cache) == []


def test_an_image_that_a_cache_skipped_is_an_error_with_on_corrupt_error(tmp_path):
    make("image_folder", tmp_path, damaged(range(40), *range(30)), cache=True, on_corrupt="skip").split("train")
    with pytest.raises(GraincodeError, match="cannot be read as an image"):
        ImageFolder(str(tmp_path), image_size=8, cache=True).split("train")


def test_a_build_by_several_processes_names_and_counts_what_is_corrupt(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    every = {"val_fraction": 0, "test_fraction": 0, "cache": True}
    images = damaged(range(150), 20, 140, 148)
    with pytest.raises(GraincodeError) as error:
        make("image_folder", tmp_path, images, **every).split("train")
    one_line(error, "cannot be read as an image", "on_corrupt=skip")
    assert folders(cache) == []
    skipping = make("image_folder", tmp_path, images, on_corrupt="skip", **every).split("train")
    assert skipping.skipped == 3
    plain = make("image_folder", tmp_path, images, on_corrupt="skip", **every | {"cache": False}).split("train")
    assert levels_of(skipping) == levels_of(plain)


@pytest.mark.parametrize("cached", [False, True])
def test_no_readable_image_at_all_is_an_error(tmp_path, cached):
    source = make("image_folder", tmp_path, damaged(range(9), *range(9)), cache=cached, on_corrupt="skip")
    with pytest.raises(GraincodeError) as error:
        source.split("train")[[0]]
    one_line(error, "none of the 7 train images", str(tmp_path))


@pytest.mark.when(
    "a file among images has more than 1 GiB", "it is refused, or skipped by data.on_corrupt=skip, unread"
)
@pytest.mark.parametrize("cached", [False, True])
def test_a_file_that_is_too_large_is_skipped_as_one_that_is_corrupt(tmp_path, cached, monkeypatch):
    monkeypatch.setenv("GRAINCODE_CACHE", str(tmp_path / "cache"))
    images = [gray(i) for i in range(9)]
    large = Path(names_of(make("image_folder", tmp_path / "d", images).split("train"))[2])
    with large.open("ab") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(GraincodeError) as error:
        make("image_folder", tmp_path / "d", [], cache=cached).split("train")[[2]]
    one_line(error, str(large), "1073741825 bytes: expected 1073741824 at most", "on_corrupt=skip")
    split = make("image_folder", tmp_path / "d", [], cache=cached, on_corrupt="skip").split("train")
    assert torch.equal(split[[2]].images, split[[3]].images)
    assert split.skipped == 1


def test_a_file_that_is_gone_is_not_skipped(tmp_path):
    split = make("image_folder", tmp_path, [gray(i) for i in range(9)], on_corrupt="skip").split("train")
    Path(names_of(split)[2]).unlink()
    with pytest.raises(GraincodeError) as error:
        split[[2]]
    one_line(error, names_of(split)[2])
    assert split.skipped == 0


def test_other_data_sets_skip_nothing():
    assert TensorImages("x", "train", torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.zeros(1)).skipped == 0


@pytest.mark.parametrize("kind", KINDS)
def test_bad_policies_say_what_to_type(tmp_path, kind):
    with pytest.raises(GraincodeError) as error:
        make(kind, tmp_path, [gray(0)], on_corrupt="ignore")
    one_line(error, "on_corrupt=ignore", "error, skip")


def test_what_identifies_images_is_had_without_filling_a_cache(tmp_path, cache, decoded):
    source = folder(tmp_path / "data")
    found = summaries(source, ("train", "val"))
    assert not folders(cache)
    assert not decoded()
    assert found == {name: source.split(name).summary() for name in found}
