"""Images of an .npz file are read as they are asked for, and are those that numpy reads."""

import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.lib.format import write_array_header_1_0

from graincode.core.errors import GraincodeError
from graincode.data.images import TensorImages
from graincode.data.loader import in_order
from graincode.data.npz import NpzImages

WRITERS = [np.savez, np.savez_compressed]


def pixels(count: int, side: int = 6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side + 1, 3), dtype=np.uint8)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(("array", "labels"), [("arr_0", "arr_1"), ("images", "labels")])
def test_images_and_labels_are_those_of_numpy_in_any_order(tmp_path: Path, write: Callable, array: str, labels: str):
    write(tmp_path / "a.npz", **{labels: np.arange(9) % 4, "more": np.zeros(3), array: pixels(9)})
    found = NpzImages(tmp_path / "a.npz")
    assert (len(found), found.image_size, found.labelled, found.array) == (9, (6, 7), True, array)
    assert found.labels.tolist() == [0, 1, 2, 3] * 2 + [0]
    for indices in ([0, 1, 2], [3, 4], [8], [5, 2, 2, 7, 0], []):
        images, known = found.load(torch.tensor(indices, dtype=torch.long))
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), pixels(9)[indices])
        assert known.tolist() == found.labels[indices].tolist()


@pytest.mark.parametrize("write", WRITERS)
def test_its_content_is_that_of_the_same_images_in_memory(tmp_path: Path, write: Callable):
    write(tmp_path / "a.npz", arr_0=pixels(5))
    found = NpzImages(tmp_path / "a.npz")
    held = TensorImages("a", "images", torch.from_numpy(pixels(5)).permute(0, 3, 1, 2), torch.zeros(5).long())
    assert found.content_hash() == held.content_hash()
    assert not found.labelled


@pytest.mark.parametrize("write", WRITERS)
def test_several_processes_read_it_at_once(tmp_path: Path, write: Callable):
    write(tmp_path / "a.npz", arr_0=pixels(40))
    found = NpzImages(tmp_path / "a.npz")
    found.load(torch.tensor([0, 1]))  # opened here, too
    batches = [batch.images for batch in in_order(found, 7, workers=2)]
    assert torch.equal(torch.cat(batches), found[range(40)].images)
    assert torch.equal(pickle.loads(pickle.dumps(found)).load(torch.tensor([3]))[0], found.load(torch.tensor([3]))[0])


@pytest.mark.when("an .npz of images is larger than the memory", "it is read batch by batch")
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_it_is_not_held(tmp_path: Path, method: int):
    count, side = 1000, 128  # 49 MB
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, side, side, 3)}
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive, archive.open("arr_0.npy", "w") as file:
        write_array_header_1_0(file, header)
        for index in range(count):
            file.write(np.random.default_rng(index).bytes(side) * side * 3)
    tracemalloc.start()
    found = NpzImages(tmp_path / "a.npz")
    for start in range(0, count, 20):
        found.load(torch.arange(start, start + 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 20 * side**2 * 3
    assert found.load(torch.tensor([count - 1]))[0].numpy().transpose(0, 2, 3, 1).tobytes()[:side] == (
        np.random.default_rng(count - 1).bytes(side)
    )


@pytest.mark.parametrize("write", WRITERS)
def test_damage_within_is_found_where_it_is_read(tmp_path: Path, write: Callable):
    write(tmp_path / "a.npz", arr_0=pixels(60))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "a.npz").write_bytes(content)
    found = NpzImages(tmp_path / "a.npz")
    with pytest.raises(GraincodeError, match=r"a\.npz: cannot be read as \.npz"):
        found.content_hash()


@pytest.mark.when("the labels in others' .npz are none", "they are left out, with a warning")
@pytest.mark.parametrize(
    "labels",
    [np.zeros(5), np.zeros((5, 10), int), np.arange(4), np.full(5, -1), np.full(5, 2**40), np.array(["a"] * 5)],
)
def test_labels_that_are_none_are_left_out(tmp_path: Path, labels: np.ndarray):
    np.savez(tmp_path / "a.npz", arr_0=pixels(5), arr_1=labels)
    found = NpzImages(tmp_path / "a.npz")
    assert not found.labelled
    assert found.labels.tolist() == [0] * 5
    assert found.warnings == ["arr_1 is left out: it is no label from 0 of each image"]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 4, 4, 3)), r"found float64 \(2, 4, 4, 3\)"),
        (np.zeros((2, 3, 4, 4), np.uint8), r"found uint8 \(2, 3, 4, 4\)"),
        (np.zeros((0, 4, 4, 3), np.uint8), r"found uint8 \(0, 4, 4, 3\)"),
        (np.asfortranarray(pixels(3)), "in Fortran order"),
        (np.array([{}]), "found object"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, array: np.ndarray, words: str):
    np.savez(tmp_path / "a.npz", arr_0=array)
    with pytest.raises(GraincodeError, match=rf"a\.npz: expected arr_0 or images, .*{words}"):
        NpzImages(tmp_path / "a.npz")
