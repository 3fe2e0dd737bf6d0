"""Metrics by a file of ADM's layout: from its statistics and from its images, and never from half of it elsewhere."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch
from helpers_evaluation import LookedUp, drawn, numbered
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

from graincode.core.errors import GraincodeError
from graincode.evaluation.adm import ADM
from graincode.evaluation.comparisons import Generation
from graincode.evaluation.record import evaluate
from graincode.evaluation.subjects import Context, Folder, ReferenceBatch, StatisticsFile

SAMPLES, REFERENCE = 300, 200


class Pretended(LookedUp):
    """A network that says it is the Inception of published ones."""

    published = True

    def label(self, metric: str) -> str:
        return metric.replace("fd", "fid")


@pytest.fixture
def made(tmp_path: Path) -> tuple[Pretended, Path, Path]:
    """A network, samples, and a reference file: rows of tables, by the numbers that images spell."""
    features, logits = drawn(SAMPLES + REFERENCE, 8) * torch.linspace(1, 2, 8), 2 * drawn(SAMPLES + REFERENCE, 6, 1)
    features[:SAMPLES] += 0.3
    network = Pretended(features, logits, spatial=drawn(SAMPLES + REFERENCE, 5, 2).square())
    np.savez(tmp_path / "samples.npz", arr_0=numbered(SAMPLES).permute(0, 2, 3, 1), arr_1=np.arange(SAMPLES) % 7)
    known = {"arr_0": numbered(REFERENCE, SAMPLES).permute(0, 2, 3, 1).numpy(), "arr_1": np.arange(REFERENCE)}
    for end, dimension, seed in ("", 8, 3), ("_s", 5, 4):
        many = drawn(5000, dimension, seed).double().numpy()
        known |= {f"mu{end}": many.mean(0), f"sigma{end}": np.cov(many, rowvar=False)}
    np.savez(tmp_path / "adm.npz", **known)
    return network, tmp_path / "samples.npz", tmp_path / "adm.npz"


def context(network: LookedUp, folder: Path) -> Context:
    return Context({"it": network}, None, None, None, torch.device("cpu"), cache_dir=str(folder / "cache"), seed=7)


def record(mode: ADM, network: LookedUp, images: Path, reference: Path) -> dict:
    subject, choice = Folder(str(images)), ReferenceBatch(str(reference))
    mode.check(subject, choice)
    return evaluate(mode, mode.plan(subject, choice, context(network, images.parent)), images.parent, None)


def distance(features: np.ndarray, mu: np.ndarray, sigma: np.ndarray) -> float:
    own, away = np.cov(features, rowvar=False), features.mean(0) - mu
    return float(away @ away + np.trace(own + sigma - 2 * scipy.linalg.sqrtm(own @ sigma).real))


def within(a: np.ndarray, b: np.ndarray, neighbours: int) -> float:
    """The share of rows of `a` that lie in a ball of a row of `b`, which ends at its neighbour of this number."""
    reach = np.sort(np.linalg.norm(b[:, None] - b, axis=2), axis=1)[:, neighbours]
    return float((np.linalg.norm(a[:, None] - b, axis=2) <= reach).any(1).mean())


def test_metrics_equal_numpy_s_and_torch_fidelity_s(made: tuple[Pretended, Path, Path]):
    network, images, reference = made
    found = record(ADM({"it": network}, inception_splits=3), network, images, reference)
    features, logits, spatial = (
        table.double().numpy() for table in (network.rows.features, network.rows.logits, network.rows.spatial)
    )
    with np.load(reference) as known:
        expected = {
            "fid": distance(features[:SAMPLES], known["mu"], known["sigma"]),
            "sfid": distance(spatial[:SAMPLES], known["mu_s"], known["sigma_s"]),
            "precision": within(features[:SAMPLES], features[SAMPLES:], 3),
            "recall": within(features[SAMPLES:], features[:SAMPLES], 3),
        }
    score = isc_features_to_metric(torch.from_numpy(logits[:SAMPLES]), splits=3, rng_seed=7)
    assert found["metrics"].keys() == expected.keys() | {"is"}
    for name, value in expected.items():
        assert found["metrics"][name] == pytest.approx(value, abs=1e-6), name
    assert 0 < expected["precision"] < 1
    assert found["metrics"]["is"] == pytest.approx(score[KEY_METRIC_ISC_MEAN], abs=1e-9)
    assert found["uncertainty"]["is"]["std"] == pytest.approx(score[KEY_METRIC_ISC_STD], abs=1e-9)
    assert network.rows.seen == SAMPLES + REFERENCE
    assert (found["count"], found["reference_count"]) == (SAMPLES, REFERENCE)
    assert found["labels"] == "7 classes of 42 to 43 images"
    assert found["recipes"] == {"table": "rows of tables"}
    assert found["pixels"] == "uint8 as they are"
    assert sum("do not compare" in line for line in found["warnings"]) == 2


@pytest.mark.parametrize(("count", "parts"), [(300, 1), (5000, 1), (5001, 2), (50_000, 10)])
def test_parts_of_the_inception_score_have_5000_images(count: int, parts: int):
    assert ADM({})._parts(count) == parts


def test_the_reference_says_how_many_samples_tables_have(made: tuple[Pretended, Path, Path]):
    network, images, reference = made
    opened = ReferenceBatch(str(reference)).open_reference(context(network, images.parent), Folder(str(images)))
    assert (opened.wanted, opened.count, opened.labels.tolist()) == (50_000, REFERENCE, list(range(REFERENCE)))
    assert replace(opened, usual=None).wanted == REFERENCE


def test_without_precision_and_recall_no_image_s_features_are_kept(made: tuple[Pretended, Path, Path]):
    network, images, reference = made
    mode, choice = ADM({"it": network}, metrics=["fd", "sfd", "is"]), ReferenceBatch(str(reference))
    plan = mode.plan(Folder(str(images)), choice, context(network, images.parent))
    assert (plan.subset, plan.real) == (0, {})
    assert evaluate(mode, plan, images.parent, None)["metrics"].keys() == {"fid", "sfid", "is"}
    assert network.rows.seen == SAMPLES


def test_a_file_without_spatial_statistics_gives_all_but_sfid(made: tuple[Pretended, Path, Path]):
    network, images, reference = made
    with np.load(reference) as known:
        np.savez(reference.with_name("less.npz"), **{name: known[name] for name in ("arr_0", "mu", "sigma")})
    found = record(ADM({"it": network}), network, images, reference.with_name("less.npz"))
    assert found["metrics"].keys() == {"fid", "is", "precision", "recall"}
    assert any("sfd left out: the reference has no mu_s" in line for line in found["warnings"])


@pytest.mark.when(
    "a reference file holds images and statistics, as ADM's do",
    "evaluation=adm reads both; anything else, which would read half of it, is refused",
)
@pytest.mark.parametrize("choice", [Folder, StatisticsFile])
def test_a_file_of_both_kinds_is_not_read_by_half(made: tuple[Pretended, Path, Path], choice: type):
    network, images, reference = made
    mode, opened = Generation({"it": network}), context(network, images.parent)
    with pytest.raises(GraincodeError, match=r"adm\.npz: holds images and statistics.* evaluation=adm"):
        mode.plan(Folder(str(images)), choice(str(reference)), opened)
    with pytest.raises(GraincodeError, match=r"adm\.npz: holds images and statistics.* save its arr_0 alone"):
        mode.plan(Folder(str(reference)), Folder(str(images)), opened)


@pytest.mark.when(
    "a file of statistics does not say which network they are of",
    "it is taken for the published Inception's; with another network, a warning says so",
)
@pytest.mark.parametrize("published", [True, False])
def test_statistics_without_the_name_of_a_network_are_doubted(made: tuple[Pretended, Path, Path], published: bool):
    network, images, reference = made
    network.published = published
    with np.load(reference) as known:
        np.savez(images.with_name("bare.npz"), mu=known["mu"], sigma=known["sigma"])
    mode, choice = Generation({"it": network}, metrics=["fd"]), StatisticsFile(str(images.with_name("bare.npz")))
    warnings = mode.plan(Folder(str(images)), choice, context(network, images.parent)).warnings
    assert published != any("bare.npz does not say which features" in line for line in warnings)


def test_other_files_references_and_networks_are_refused(made: tuple[Pretended, Path, Path]):
    network, images, reference = made
    mode, folder = ADM({"it": network}), Folder(str(images))
    with pytest.raises(GraincodeError, match=r"samples\.npz: images without mu and sigma; .* reference=folder"):
        record(mode, network, images, images)
    with np.load(reference) as known:
        np.savez(images.with_name("bare.npz"), mu=known["mu"], sigma=known["sigma"])
    with pytest.raises(GraincodeError, match=r"bare\.npz: .*mu and sigma are statistics"):
        record(mode, network, images, images.with_name("bare.npz"))
    with pytest.raises(GraincodeError, match="reference=folder: expected adm"):
        mode.check(folder, folder)
    with pytest.raises(GraincodeError, match=r"reference=adm: .* evaluation=adm"):
        Generation({"it": network}).check(folder, ReferenceBatch(str(reference)))
    for networks in {"a": LookedUp(drawn(3))}, {"a": network, "b": network}:
        with pytest.raises(GraincodeError, match=r"features=.*: expected inception alone"):
            ADM(networks).check(folder, ReferenceBatch(str(reference)))
