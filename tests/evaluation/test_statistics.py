"""What is kept of a set of images: the same for any batches, stored once, and read from others' files."""

import errno
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_evaluation import LookedUp, drawn, message_of, numbered, statistics_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from graincode.core.errors import GraincodeError
from graincode.evaluation.statistics import Accumulator, Statistics, cached_statistics, measure
from graincode.evaluation.streams import DatasetStream
from graincode.files import cache_root

CONTENT = "0123456789abcdef" * 4


def gathered(network: LookedUp, batches: Iterable[Tensor], count: int, **options: int) -> Statistics:
    accumulator = Accumulator(network, count, **options)
    for images in batches:
        accumulator.update(images)
    return accumulator.result()


def assert_close(found: Tensor, expected: np.ndarray, relative: float) -> None:
    assert found.dtype == torch.float64
    assert np.abs(found.numpy() - expected).max() <= relative * np.abs(expected).max()


def assert_equal(found: Statistics, expected: Statistics) -> None:
    assert (found.identity, found.count) == (expected.identity, expected.count)
    for name, tensor in expected.tensors().items():
        assert found.tensors()[name].dtype == tensor.dtype
        assert torch.equal(found.tensors()[name], tensor), name


# Gathering


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(2, 40) | st.integers(508, 516) | st.integers(1000, 1100),
    batch_size=st.sampled_from([3, 16, 100, 700]),
    cuts=st.lists(st.integers(0, 1100), max_size=6).map(sorted),
    seed=st.integers(0, 100),
)
def test_statistics_are_numpy_s_and_do_not_depend_on_batches(count: int, batch_size: int, cuts: list[int], seed: int):
    features = drawn(count, 6, seed) * torch.tensor([1.0, 2, 3, 0.1, 1, 50]) + torch.tensor([0.0, 5, 0, 1, 100, 0])
    features[:, 4] += features[:, 0]
    network = LookedUp(features, drawn(count, 5, seed + 1), batch_size)
    images = numbered(count)
    options = {"subset": 20, "splits": min(3, count), "seed": seed}
    whole = gathered(network, [images], count, **options)
    assert_close(whole.mean, features.double().mean(0).numpy(), 1e-10)
    assert_close(whole.covariance, np.cov(features.double().numpy(), rowvar=False), 1e-10)
    parts = images.tensor_split(tuple(min(cut, count) for cut in cuts))
    assert_equal(gathered(network, filter(len, parts), count, **options), whole)


@pytest.mark.parametrize("count", [20, 500, 2000])
def test_covariance_of_numbers_far_from_zero_keeps_its_digits(count: int):
    features = drawn(count, 5, shift=1e4)
    found = gathered(LookedUp(features), numbered(count).split(7), count)
    assert_close(found.covariance, np.cov(features.double().numpy(), rowvar=False), 1e-10)


def test_one_image_has_a_mean_and_no_covariance():
    features = drawn(1)
    found = statistics_of(features)
    assert torch.equal(found.mean, features[0].double())
    assert torch.equal(found.covariance, torch.zeros(8, 8, dtype=torch.float64))


@pytest.mark.parametrize("subset", [0, 1, 7, 30, 31, 1000])
def test_the_subset_is_some_images_in_their_order(subset: int):
    features = drawn(30)
    found = statistics_of(features, subset=subset)
    assert len(found.subset) == len(found.indices) == min(30, subset)
    assert (found.indices.diff() > 0).all()
    assert torch.equal(found.subset, features[found.indices])


def test_the_subset_depends_on_the_number_of_images_alone():
    first, second = (statistics_of(drawn(50, seed=seed), subset=10, seed=seed) for seed in (0, 1))
    assert torch.equal(first.indices, second.indices)
    assert set(first.indices.tolist()) < set(statistics_of(drawn(50), subset=11).indices.tolist())
    assert not torch.equal(first.indices, torch.arange(10))


def test_splits_hold_each_image_once():
    found = statistics_of(drawn(23), drawn(23, 4), splits=5)
    assert sorted(found.split_sizes.tolist()) == [4, 4, 5, 5, 5]
    torch.testing.assert_close(found.class_mass.sum(1), found.split_sizes.double())
    torch.testing.assert_close(found.class_mass.sum(0), drawn(23, 4).double().softmax(1).sum(0))


def test_spatial_features_have_a_mean_and_covariance_where_they_are_asked_for():
    spatial = drawn(700, 5, 3).square()
    network = LookedUp(drawn(700), spatial=spatial)
    found, without = (gathered(network, numbered(700).split(90), 700, spatial=asked) for asked in (True, False))
    assert_close(found.spatial_mean, spatial.double().mean(0).numpy(), 1e-10)
    assert_close(found.spatial_covariance, np.cov(spatial.double().numpy(), rowvar=False), 1e-10)
    assert len(without.spatial_mean) == len(without.spatial_covariance) == 0
    assert torch.equal(found.covariance, without.covariance)


def test_several_networks_see_the_same_images_in_one_pass():
    tables = {"a": drawn(40), "b": drawn(40, 3, seed=1)}
    networks = {
        name: LookedUp(table, batch_size=size) for (name, table), size in zip(tables.items(), (7, 16), strict=True)
    }
    found = measure(networks, iter(numbered(40).split(9)), 40)
    assert list(found) == ["a", "b"]
    for name, table in tables.items():
        assert_close(found[name].mean, table.double().mean(0).numpy(), 1e-10)


@pytest.mark.parametrize("count", [40, 1100])
def test_features_and_logits_that_are_not_finite_are_counted(count: int):
    features, logits = drawn(count), drawn(count, 4)
    features[3, 2], features[17], logits[29, 0] = float("nan"), float("inf"), float("nan")
    with pytest.raises(GraincodeError) as error:
        statistics_of(features, logits)
    assert f"3 of {count} images" in message_of(error)
    assert "table:000000000000" in message_of(error)


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "count=10: expected 0"),
        ([numbered(9)], "count=10: expected 9"),
        ([numbered(11)], "count=10: expected 1[123] or more"),
        ([numbered(10), numbered(3)], "count=10: expected 1[123] or more"),
        ([numbered(10).float()], "uint8"),
        ([numbered(10)[:, :1]], "B, 3, H, W"),
    ],
)
def test_other_images_than_announced_are_refused(batches: list[Tensor], words: str):
    with pytest.raises(GraincodeError, match=words) as error:
        gathered(LookedUp(drawn(20), batch_size=4), batches, 10)
    message_of(error)


def test_a_set_of_no_images_is_refused():
    with pytest.raises(GraincodeError, match="count=0"):
        Accumulator(LookedUp(drawn(1)), 0)


@pytest.mark.parametrize("splits", [-1, 11])
def test_more_splits_than_images_are_refused(splits: int):
    with pytest.raises(GraincodeError, match=f"inception_splits={splits}: expected 1 to 10") as error:
        Accumulator(LookedUp(drawn(10), drawn(10)), 10, splits=splits)
    message_of(error)


def test_a_network_without_classes_refuses_splits():
    with pytest.raises(GraincodeError, match="table has no classifier") as error:
        Accumulator(LookedUp(drawn(10)), 10, splits=2)
    message_of(error)


# The cache


class Images(DatasetStream):
    """Counts how often its images are asked for."""

    def __init__(self, first: int = 0, content: str = CONTENT, count: int = 3) -> None:
        self.reads, self.first, self.count = 0, first, count
        self.name, self.batch_size, self.dataset = "images", 8, SimpleNamespace(content_hash=lambda: content)

    def __iter__(self) -> Iterator[Tensor]:
        self.reads += 1
        return iter([numbered(self.count, self.first)])


def table(weights_hash: str = "0" * 64) -> LookedUp:
    return LookedUp(drawn(6), drawn(6, 4), weights_hash=weights_hash)


def stored(cache: Path, images: Images, weights_hash: str = "0" * 64) -> Statistics:
    return cached_statistics({"it": table(weights_hash)}, images, cache_dir=cache)["it"]


def test_cached_statistics_are_computed_once(tmp_path: Path):
    source = Images()
    first, second = (stored(tmp_path, source) for _ in range(2))
    assert source.reads == 1
    assert_equal(second, first)
    assert_equal(first, measure({"it": table()}, source, 3)["it"])
    name = f"table-{'0' * 12}-{CONTENT[:16]}.safetensors"
    assert [path.name for path in (tmp_path / "statistics").iterdir()] == [name]


def test_other_content_and_other_networks_are_kept_apart(tmp_path: Path):
    source, other = Images(), Images(first=3, content=CONTENT[::-1])
    first = stored(tmp_path, source)
    second = stored(tmp_path, other)
    stored(tmp_path, source, weights_hash="1" * 64)
    assert (source.reads, other.reads) == (2, 1)
    assert not torch.equal(first.mean, second.mean)
    assert_equal(stored(tmp_path, source), first)
    assert source.reads == 2


def test_only_the_networks_that_are_missing_see_the_images(tmp_path: Path):
    source, networks = Images(), {"a": table(), "b": table("1" * 64)}
    before = cached_statistics({"b": networks["b"]}, source, cache_dir=tmp_path)["b"]
    found = cached_statistics(networks, source, cache_dir=tmp_path)
    assert list(found) == ["a", "b"]
    assert [network.rows.seen for network in networks.values()] == [3, 3]
    assert_equal(found["b"], before)
    assert found["a"].identity == networks["a"].identity


def test_spatial_features_that_are_not_stored_are_gathered_once(tmp_path: Path):
    network, source = LookedUp(drawn(6), spatial=drawn(6, 5)), Images()
    sizes = []
    for spatial in (False, True, True, False):
        found = cached_statistics({"it": network}, source, cache_dir=tmp_path, spatial=spatial)["it"]
        sizes.append((source.reads, len(found.spatial_mean)))
    assert sizes == [(1, 0), (2, 5), (2, 5), (2, 5)]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def drop_header(path: Path) -> None:
    save_file(load_file(path), path)


def drop_tensor(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    save_file({name: tensor for name, tensor in load_file(path).items() if name != "covariance"}, path, header)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, drop_header, drop_tensor, lambda path: path.write_text("")])
def test_damaged_files_are_named_and_computed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object]
):
    source = Images()
    before = stored(tmp_path, source)
    (path,) = (tmp_path / "statistics").iterdir()
    damage(path)
    with caplog.at_level(logging.WARNING):
        again = stored(tmp_path, source)
    assert str(path) in caplog.text
    assert_equal(again, before)
    stored(tmp_path, source)
    assert source.reads == 2


def test_content_that_only_begins_alike_is_not_taken_for_the_same(tmp_path: Path):
    first, second = Images(), Images(content=CONTENT[:16] + "f" * 48)
    stored(tmp_path, first)
    stored(tmp_path, second)
    assert (first.reads, second.reads) == (1, 1)


def test_a_file_under_the_name_of_another_is_not_taken_for_it(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    source, other = Images(), Images(first=3, content=CONTENT[::-1])
    expected = stored(tmp_path, source)
    (path,) = (tmp_path / "statistics").iterdir()
    stored(tmp_path, other)
    (wrong,) = set((tmp_path / "statistics").iterdir()) - {path}
    path.write_bytes(wrong.read_bytes())
    with caplog.at_level(logging.WARNING):
        assert_equal(stored(tmp_path, source), expected)
    assert str(path) in caplog.text


def test_a_failed_measurement_leaves_nothing_behind(tmp_path: Path):
    class Few(Images):
        def __iter__(self) -> Iterator[Tensor]:
            return iter([numbered(self.count - 1)])

    with pytest.raises(GraincodeError, match="count=3: expected 2"):
        cached_statistics({"it": table()}, Few(), cache_dir=tmp_path)
    assert not (tmp_path / "statistics").exists()


@pytest.mark.when("the cache of statistics cannot be written", "a warning; the evaluation goes on without it")
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, caplog, monkeypatch):
    (tmp_path / "file").touch()
    found = [cached_statistics({"it": table()}, Images(), cache_dir=tmp_path / "file")["it"]]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    found.append(cached_statistics({"it": table()}, Images(), cache_dir=tmp_path)["it"])
    assert sum("GRAINCODE_CACHE" in message for message in caplog.messages) == 2
    assert torch.equal(found[0].mean, found[1].mean)
    assert not list((tmp_path / "statistics").iterdir())


def test_the_cache_s_place_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("GRAINCODE_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    cached_statistics({"it": table()}, Images())
    assert len(list((tmp_path / "statistics").iterdir())) == 1
    monkeypatch.delenv("GRAINCODE_CACHE")
    assert cache_root() == Path.home() / ".cache" / "graincode"


def test_waiting_images_are_copies():
    network, buffer = LookedUp(drawn(6), batch_size=4), numbered(3).clone()
    accumulator = Accumulator(network, 6)
    accumulator.update(buffer)
    buffer.copy_(numbered(6)[3:])
    accumulator.update(buffer)
    torch.testing.assert_close(accumulator.result().subset, drawn(6).float())


def test_empty_batches_change_nothing():
    network = LookedUp(drawn(5), batch_size=1)
    accumulator = Accumulator(network, 5)
    for part in (numbered(5)[:0], numbered(5)[:3], numbered(5)[:0], numbered(5)[3:], numbered(5)[:0]):
        accumulator.update(part)
    found = accumulator.result()
    torch.testing.assert_close(found.mean, drawn(5).double().mean(0))


def test_a_smaller_subset_is_part_of_what_is_stored_and_a_larger_one_is_not(tmp_path: Path):
    network, images = LookedUp(drawn(30)), Images(count=30)

    def kept(subset: int) -> Statistics:
        return cached_statistics({"it": network}, images, subset, tmp_path)["it"]

    stored, fewer = kept(20), kept(8)
    assert images.reads == 1
    expected = measure({"it": network}, [numbered(30)], 30, subset=8)["it"]
    assert torch.equal(fewer.indices, expected.indices)
    assert torch.equal(fewer.subset, expected.subset)
    assert torch.equal(fewer.mean, stored.mean)
    assert len(kept(25).subset) == 25
    assert images.reads == 2
    assert len(kept(100).subset) == 30
    assert len(kept(200).subset) == 30
    assert images.reads == 3
