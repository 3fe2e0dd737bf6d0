"""Codes on disk are checked where they are read."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers_files import ARRAY_DAMAGES, JSON_DAMAGES

from graincode.core.codes import GrainCodes
from graincode.core.errors import Damaged, GraincodeError
from graincode.core.layout import CodeLayout
from graincode.data.codes import FORMAT, CodeBatch, CodeDataset, is_finished, read_report, write_info, write_split
from graincode.data.loader import load_batches
from graincode.files import remove, sha256, write_json

LAYOUT = CodeLayout((32, 32), ((8, 8), (4, 4)), 300, 3)
IMAGES = "6 images of 3 classes (0123456789abcdef)"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A directory of codes as `extract_codes` writes it."""
    path, rng = tmp_path_factory.mktemp("codes") / "codes", torch.Generator().manual_seed(0)
    grains = torch.randint(0, 2, (6, 4, 4), generator=rng)
    indices = torch.randint(0, 300, (6, 8, 8), generator=rng)
    indices = indices.flatten(1).gather(1, LAYOUT.first_cells(grains)).view(6, 8, 8)
    codes, labels = GrainCodes.checked(grains, indices, LAYOUT), torch.arange(6) % 3
    for split in ("train", "val"):
        write_split(
            path, split, LAYOUT, 6, [CodeBatch(codes[:4], labels[:4]), CodeBatch(codes[4:], labels[4:])], IMAGES
        )
    about = {"format": FORMAT, "layout": LAYOUT.to_config(), "class_names": list("abc"), "views": 1}
    splits = {split: read_report(path, split)["summary"] for split in ("train", "val")}
    write_info(path, about | {"tokenizer": 8 * "01", "tokenizer_path": "/there", "splits": splits})
    return path, codes


@pytest.fixture
def path(written, tmp_path):
    return shutil.copytree(written[0], tmp_path / "codes")


def read_all(path):
    """What a training reads of codes."""
    codes = CodeDataset(path, "train")
    lengths = codes.lengths
    return codes[range(len(codes))], lengths


def test_codes_come_back_as_they_were_written(written):
    path, codes = written
    batch, lengths = read_all(path)
    assert torch.equal(batch.codes.grains, codes.grains)
    assert torch.equal(batch.codes.indices, codes.indices)
    assert batch.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert lengths.tolist() == codes.lengths.tolist()
    assert sorted(file.name for file in path.iterdir()) == sorted(
        ["codes.json"]
        + [f"{s}.{n}" for s in ("train", "val") for n in ("grains.npy", "indices.npy", "labels.npy", "json")]
    )


@pytest.mark.when(
    "a file of codes is cut, empty, missing, of floats, texts or objects, or of fewer images than another",
    "one line names it, before the training begins; the command that extracted the codes makes it again",
)
@pytest.mark.parametrize("name", ["grains", "indices", "labels"])
@pytest.mark.parametrize("damage", ARRAY_DAMAGES)
def test_a_damaged_array_is_named(path, name, damage):
    ARRAY_DAMAGES[damage](path / f"train.{name}.npy")
    named = f"{path} has no codes of train" if (name, damage) == ("labels", "missing") else f"{path}/train."
    with pytest.raises(GraincodeError) as error:
        CodeDataset(path, "train")
    assert str(error.value).startswith(named)
    assert len(str(error.value).splitlines()) == 1
    CodeDataset(path, "val")


VALUES = {
    "grain 7 of 2": ("grains", lambda a: np.where(a == 1, 7, a)),
    "grain -1": ("grains", lambda a: np.where(a == 1, -1, a.astype(np.int8))),
    "index 300 of 300": ("indices", lambda a: np.full_like(a, 300)),
    "index -1": ("indices", lambda a: np.full(a.shape, -1, np.int16)),
    "indices that differ within a code": ("indices", lambda a: np.arange(a.size, dtype=a.dtype).reshape(a.shape) % 300),
    "label 3 of 3": ("labels", lambda a: a + 1),
    "label -1": ("labels", lambda a: a.astype(np.int8) - 1),
    "labels (N, 1)": ("labels", lambda a: a[:, None]),
}


@pytest.mark.when(
    "codes on disk have a grain, an index or a label that does not exist, or two indices in one code",
    "one line names the file; labels when it is opened, the others when they are read",
)
@pytest.mark.parametrize("case", VALUES)
def test_values_out_of_range_are_refused(path, case):
    name, change = VALUES[case]
    np.save(path / f"train.{name}.npy", change(np.load(path / f"train.{name}.npy")))
    with pytest.raises(Damaged) as error:
        read_all(path)
    assert str(error.value).startswith(f"{path}/train.{name if name != 'indices' else '*'}.npy is damaged")


@pytest.mark.when("codes.json beside codes is damaged", "one line names it")
@pytest.mark.parametrize("damage", JSON_DAMAGES)
def test_a_damaged_description_of_codes_is_named(path, damage):
    JSON_DAMAGES[damage](path / "codes.json")
    with pytest.raises(Damaged) as error:
        CodeDataset(path, "train")
    assert str(error.value).startswith(f"{path}/codes.json is damaged")


@pytest.mark.parametrize(
    "change",
    [
        {"layout": {"image_size": "wide"}}, {"layout": {}},
        {"layout": {"image_size": [32, 32], "grains": [[0, 0]], "codebook_size": 8}},
        {"layout": LAYOUT.to_config() | {"codebook_size": 10**9}},
        {"class_names": ["a", "b"]}, {"class_names": [1, 2, 3]}, {"splits": {"train": {"images": 5}}},
        {"splits": {"train": 5}}, {"views": "x"}, {"views": 0}, {"views": True}, {"tokenizer": "beef"},
    ],
)  # fmt: skip
def test_a_description_that_does_not_fit_is_refused(path, change):
    about = json.loads((path / "codes.json").read_text())
    write_info(path, {key: value for key, value in about.items() if key != "identity"} | change)
    with pytest.raises(Damaged):
        CodeDataset(path, "train")


@pytest.mark.when(
    "a name in codes.json, or values of codes, have changed and are still possible",
    "labels and names are refused when they are opened; the same extraction finds all, and makes them again",
)
def test_what_has_changed_since_it_was_written_is_refused(path):
    file = path / "codes.json"
    text = file.read_text()
    identity = CodeDataset(path, "train").identity
    assert json.loads(text)["identity"] == identity
    file.write_text(text.replace('"b",', '"d",'))
    with pytest.raises(Damaged, match=r"codes\.json .* changed since"):
        CodeDataset(path, "train")
    write_json(file, {key: value for key, value in json.loads(text).items() if key != "identity"})
    assert CodeDataset(path, "train").identity == identity == sha256(file)[:16]  # as earlier versions wrote it
    file.write_text(text)
    for name, value in (("grains", 1), ("indices", 7), ("labels", 2)):
        array = np.load(path / f"val.{name}.npy", "r+")
        before, array[0] = array[0].copy(), value
        array.flush()
        with pytest.raises(Damaged, match=rf"val\.{name}\.npy .* changed since"):
            CodeDataset(path, "val").check_content()
        array[0] = before
        array.flush()
    CodeDataset(path, "val").check_content()


def test_an_extraction_that_was_interrupted_is_told_from_damage(path):
    (path / "codes.json").unlink()
    with pytest.raises(GraincodeError, match="not finished") as error:
        CodeDataset(path, "train")
    assert not isinstance(error.value, Damaged)


def test_a_split_is_finished_if_it_is_what_was_written_of_these_images(path):
    assert is_finished(path, "train", LAYOUT, IMAGES)
    assert not is_finished(path, "train", LAYOUT, IMAGES.replace("6", "5"))
    assert not is_finished(path, "test", LAYOUT, IMAGES)
    array = np.load(path / "train.indices.npy", "r+")
    array[0] = array[1]
    array.flush()
    assert not is_finished(path, "train", LAYOUT, IMAGES)
    assert is_finished(path, "val", LAYOUT, IMAGES)
    for damage in JSON_DAMAGES.values():
        shutil.copy(path / "train.json", path / "other.json")
        damage(path / "other.json")
        assert not is_finished(path, "other", LAYOUT, IMAGES)
        remove(path / "other.json")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_process_that_loads_codes_names_the_file_too(path, workers):
    array = np.load(path / "train.indices.npy", "r+")
    array[:] = 300
    array.flush()
    with pytest.raises(Damaged) as error:
        list(load_batches(CodeDataset(path, "train"), [[0, 1], [2, 3]], workers))
    assert error.value.line.startswith(f"{path}/train.*.npy is damaged")
