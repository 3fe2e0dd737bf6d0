"""Statistics in files that others write and read."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_evaluation import Bomb, LookedUp, drawn, message_of, numbered, statistics_of

from graincode.core.errors import GraincodeError
from graincode.evaluation.metrics import frechet_distance
from graincode.evaluation.published import read_npz, write_npz
from graincode.evaluation.statistics import measure

CONTENT = "0123456789abcdef" * 4


def test_written_statistics_are_read_again(tmp_path: Path):
    network = LookedUp(drawn(30))
    written = measure({"it": network}, [numbered(30)], 30)["it"]
    write_npz(tmp_path / "made.npz", written, content=CONTENT, note="two words", images="a name")
    found = read_npz(tmp_path / "made.npz", network)
    assert (found.identity, found.count) == (network.identity, 30)
    assert torch.equal(found.mean, written.mean)
    assert torch.equal(found.covariance, written.covariance)
    assert len(found.subset) == len(found.indices) == len(found.split_sizes) == 0
    assert frechet_distance(found, written) == frechet_distance(written, written)
    with np.load(tmp_path / "made.npz", allow_pickle=False) as arrays:
        assert (str(arrays["note"]), str(arrays["content"]), int(arrays["count"])) == ("two words", CONTENT, 30)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_plain_file_of_mu_and_sigma_is_read(tmp_path: Path, dtype: type):
    mu, sigma = np.arange(8, dtype=dtype), np.eye(8, dtype=dtype)
    np.savez(tmp_path / "plain.npz", mu=mu, sigma=sigma)
    measured = statistics_of(drawn(30))
    found = read_npz(tmp_path / "plain.npz", LookedUp(drawn(30)))
    assert (found.identity, found.count) == (None, None)
    assert found.mean.dtype == found.covariance.dtype == torch.float64
    assert found.mean.tolist() == mu.tolist()
    assert found.covariance.tolist() == sigma.tolist()
    assert frechet_distance(found, measured).value == pytest.approx(frechet_distance(measured, found).value, rel=1e-9)


def test_measured_statistics_in_a_file_of_another_network_are_refused(tmp_path: Path):
    write_npz(tmp_path / "made.npz", statistics_of(drawn(30)))
    with pytest.raises(GraincodeError) as error:
        read_npz(tmp_path / "made.npz", LookedUp(drawn(30), weights_hash="1" * 64))
    assert "table:000000000000, not of table:111111111111" in message_of(error)


GOOD = {"mu": np.zeros(8), "sigma": np.eye(8)}


@pytest.mark.when("a reference's sigma is no covariance", "it is refused: no distance is made of it")
@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, r"mu of \(5,\) and sigma of \(5, 5\).* 8 features"),
        ({"mu": np.zeros(8), "sigma": np.eye(5)}, "table has 8"),
        ({"mu": np.zeros((8, 1)), "sigma": np.eye(8)}, "table has 8"),
        ({"mu": np.zeros(8)}, "no arrays mu and sigma"),
        ({"sigma": np.eye(8)}, "no arrays mu and sigma"),
        ({"images": np.zeros((2, 4, 4, 3))}, "images as a folder"),
        ({**GOOD, "mu": np.full(8, np.nan)}, "NaN or infinite"),
        ({**GOOD, "sigma": np.full((8, 8), np.inf)}, "NaN or infinite"),
        ({**GOOD, "sigma": 1e308 * np.eye(8)}, "NaN or infinite"),
        ({**GOOD, "mu": np.full(8, 1e200)}, "NaN or infinite"),
        ({**GOOD, "sigma": -np.eye(8)}, "negative eigenvalues"),
        ({**GOOD, "sigma": np.diag([1.0] * 7 + [-0.01])}, "negative eigenvalues"),
        ({**GOOD, "sigma": 2 - np.eye(8)}, "negative eigenvalues"),
    ],
)
def test_files_of_other_arrays_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], words: str):
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(GraincodeError, match=words) as error:
        read_npz(tmp_path / "other.npz", LookedUp(drawn(30)))
    assert str(tmp_path / "other.npz") in message_of(error)


@pytest.mark.parametrize("images", [2, 5, 40])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_covariances_of_few_images_and_in_float32_are_accepted(tmp_path: Path, images: int, dtype: type):
    sigma = np.cov(drawn(images).double().numpy() * 30, rowvar=False).astype(dtype)
    np.savez(tmp_path / "few.npz", mu=np.zeros(8), sigma=sigma)
    assert read_npz(tmp_path / "few.npz", LookedUp(drawn(30))).covariance.shape == (8, 8)
    np.savez(tmp_path / "few.npz", mu=np.zeros(8), sigma=np.zeros((8, 8), dtype))
    assert not read_npz(tmp_path / "few.npz", LookedUp(drawn(30))).covariance.any()


@pytest.mark.parametrize("name", ["mu", "sigma", "count", "features"])
def test_pickled_objects_among_arrays_are_refused_and_not_executed(tmp_path: Path, name: str):
    trace, path = tmp_path / "executed", tmp_path / "bad.npz"
    np.savez(path, **{**GOOD, name: np.array([Bomb(trace)], dtype=object)})
    with pytest.raises(GraincodeError) as error:
        read_npz(path, LookedUp(drawn(30)))
    assert str(path) in message_of(error)
    assert not trace.exists()


def test_other_pickled_objects_in_a_file_are_not_looked_at(tmp_path: Path):
    np.savez(tmp_path / "more.npz", **GOOD, more=np.array([Bomb(tmp_path / "executed")], dtype=object))
    assert read_npz(tmp_path / "more.npz", LookedUp(drawn(30))).mean.tolist() == [0] * 8
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"mu", b"PK\x03\x04 and no more", pickle.dumps({"mu": 1})])
def test_a_file_that_is_no_npz_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "none.npz").write_bytes(content)
    with pytest.raises(GraincodeError, match="cannot be read as") as error:
        read_npz(tmp_path / "none.npz", LookedUp(drawn(30)))
    assert str(tmp_path / "none.npz") in message_of(error)


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path):
    np.savez(tmp_path / "short.npz", **GOOD)
    (tmp_path / "short.npz").write_bytes((tmp_path / "short.npz").read_bytes()[:-30])
    with pytest.raises(GraincodeError, match="cannot be read as"):
        read_npz(tmp_path / "short.npz", LookedUp(drawn(30)))


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(GraincodeError, match="No such file") as error:
        read_npz(tmp_path / "none.npz", LookedUp(drawn(30)))
    assert str(tmp_path / "none.npz") in message_of(error)


def test_unknown_fields_of_a_plain_file_are_not_written(tmp_path: Path):
    network = LookedUp(torch.zeros(3, 8))
    np.savez(tmp_path / "plain.npz", **GOOD)
    write_npz(tmp_path / "copy.npz", read_npz(tmp_path / "plain.npz", network))
    again = read_npz(tmp_path / "copy.npz", network)
    assert again.identity is None
    assert again.count is None


@pytest.mark.parametrize(
    "arrays",
    [
        {**GOOD, "mu": np.array(list("abcdefgh"))},
        {**GOOD, "mu": np.zeros(8, dtype=complex)},
        {**GOOD, "sigma": np.eye(8) + np.triu(np.ones((8, 8)), 1)},
    ],
)
def test_numbers_that_are_no_mean_and_covariance_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray]):
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(GraincodeError, match=r"real numbers|not symmetric"):
        read_npz(tmp_path / "wrong.npz", LookedUp(torch.zeros(3, 8)))


def test_a_bare_array_and_a_damaged_archive_are_refused(tmp_path: Path):
    network = LookedUp(torch.zeros(3, 8))
    np.save(tmp_path / "bare.npy", np.zeros(8))
    np.savez_compressed(tmp_path / "damaged.npz", **GOOD)
    content = bytearray((tmp_path / "damaged.npz").read_bytes())
    content[60:120] = bytes(60)
    (tmp_path / "damaged.npz").write_bytes(content)
    for name in ("bare.npy", "damaged.npz"):
        with pytest.raises(GraincodeError, match=r"cannot be read as \.npz"):
            read_npz(tmp_path / name, network)
