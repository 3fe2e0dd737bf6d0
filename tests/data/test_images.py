import pytest
import torch
from torch.utils.data import DataLoader

from graincode.core.images import to_uint8
from graincode.data import Subset, TensorImages
from graincode.data.images import split_by_hash


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


def test_a_batch_moves_as_a_whole_and_as_bytes():
    here = tensor_images()[[0]]
    batch = here.to("meta")
    assert (here.pixels.dtype, batch.pixels.dtype, batch.images.dtype) == (torch.uint8, torch.uint8, torch.float32)
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


def test_the_fingerprint_of_images_in_memory_is_of_all_that_is_there():
    base = tensor_images()
    assert base.fingerprint() == tensor_images(name="other", split="train").fingerprint()
    assert len(base.fingerprint()) == 16
    images = base.images.clone()
    images[3, 1, 2, 2] += 1
    different = [
        tensor_images(images=images),
        tensor_images(labels=base.labels.flip(0)),
        tensor_images(class_names=("a", "b", "c")),
        tensor_images(6),
        Subset(base, 7),
        Subset(base, 6),
    ]
    assert len({dataset.fingerprint() for dataset in [base, *different]}) == 7


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
