"""Figures of sets of images, of pairs, and of codes."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch_fidelity import calculate_metrics

from graincode.core.errors import GraincodeError
from graincode.metrics import (
    CodebookUsage,
    Features,
    Lite0Features,
    PairErrors,
    class_consistency,
    frechet_distance,
    inception_score,
)
from graincode.metrics.reconstruction import MSE_FLOOR


def random_features(count: int, dimension: int = 8, classes: int = 10, seed: int = 0, shift: float = 0.0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(
        torch.randn(count, dimension, generator=generator) + shift,
        torch.randn(count, classes, generator=generator),
        "network:0",
    )


# Fréchet distance


@pytest.mark.parametrize("count", [2, 20, 200])
def test_frechet_distance_of_a_set_with_itself_is_zero(count: int):
    features = random_features(count, dimension=50)
    trace = features.features.double().var(0).sum().item()
    assert abs(frechet_distance(features, features)) < 1e-5 * trace


def test_frechet_distance_is_symmetric_and_sees_the_mean():
    a, b = random_features(100), random_features(80, seed=1, shift=3.0)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    moved = Features(a.features + 3, a.logits, a.identity)
    assert frechet_distance(a, moved) == pytest.approx(9 * 8, rel=1e-5)


def test_frechet_distance_of_gaussians_along_the_axes_is_the_closed_form():
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    scales = torch.tensor([1.0, 2.0, 5.0])
    a, b = (Features(points, points, "network:0") for points in (corners, corners * scales))
    assert frechet_distance(a, b) == pytest.approx(8 / 7 * (scales - 1).square().sum().item(), rel=1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_figures_are_those_of_torch_fidelity_with_our_network(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    batches = {}
    for name, coarse in (("a", 4), ("b", 8)):
        small = torch.randint(0, 256, (40, coarse, coarse, 3), generator=generator, dtype=torch.uint8)
        batches[name] = small.repeat_interleave(32 // coarse, 1).repeat_interleave(32 // coarse, 2)
        (tmp_path / name).mkdir()
        for index, image in enumerate(batches[name]):
            Image.fromarray(image.numpy()).save(tmp_path / name / f"{index:03}.png")
    expected = calculate_metrics(
        input1=str(tmp_path / "a"),
        input2=str(tmp_path / "b"),
        feature_extractor="lite0@112",
        fid=True,
        isc=True,
        isc_splits=4,
        rng_seed=7,
        batch_size=20,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    network = Lite0Features(resolution=112)
    a, b = (network.extract([batches[name].permute(0, 3, 1, 2)]) for name in ("a", "b"))
    score = inception_score(a, splits=4, seed=7)
    assert frechet_distance(a, b) == pytest.approx(expected["frechet_inception_distance"], rel=1e-5)
    assert score.mean == pytest.approx(expected["inception_score_mean"], rel=1e-5)
    assert score.std == pytest.approx(expected["inception_score_std"], rel=1e-4)


def test_frechet_distance_refuses_what_cannot_be_compared():
    a = random_features(10)
    wrong = a.features.clone()
    wrong[3] = float("nan")
    for b, words in (
        (Features(a.features, a.logits, "network:1"), "expected one network"),
        (Features(wrong, a.logits, a.identity), "1 of 10 images"),
        (Features(a.features[:1], a.logits[:1], a.identity), "at least 2"),
    ):
        for pair in ((a, b), (b, a)):
            with pytest.raises(GraincodeError, match=words) as error:
                frechet_distance(*pair)
            assert "\n" not in str(error.value)


# Inception score


@pytest.mark.parametrize("splits", [1, 10])
def test_inception_score_of_uniform_logits_is_one(splits: int):
    score = inception_score(Features(torch.zeros(30, 2), torch.zeros(30, 7), "network:0"), splits)
    assert score.mean == pytest.approx(1)
    assert score.std == pytest.approx(0)


def test_inception_score_of_certain_and_even_classes_is_their_number():
    logits = 100 * torch.eye(7).repeat(10, 1)
    assert inception_score(Features(logits, logits, "network:0"), splits=1).mean == pytest.approx(7)


def test_inception_score_does_not_suffer_from_images_sorted_by_class():
    logits = 100 * torch.eye(5).repeat_interleave(200, 0)
    assert inception_score(Features(logits, logits, "network:0"), splits=5).mean > 4.9


def test_inception_score_depends_on_its_seed_alone():
    features = random_features(40)
    assert inception_score(features, 4, seed=1) == inception_score(features, 4, seed=1)
    assert inception_score(features, 4, seed=1) != inception_score(features, 4, seed=2)


@pytest.mark.parametrize("splits", [0, 11])
def test_inception_score_refuses_more_splits_than_images(splits: int):
    with pytest.raises(GraincodeError, match=r"type evaluation\.inception_splits=1"):
        inception_score(random_features(10), splits)


def test_inception_score_refuses_logits_that_are_not_finite():
    logits = torch.zeros(10, 3)
    logits[0, 0] = float("inf")
    with pytest.raises(GraincodeError, match="infinite logits"):
        inception_score(Features(logits, logits, "network:0"), 2)


# Class consistency


def clusters(count: int, seed: int) -> tuple[Features, Tensor]:
    """Images of 4 classes that lie far apart."""
    noise = random_features(count, dimension=6, seed=seed)
    labels = torch.arange(count) % 4
    return Features(noise.features + 30 * torch.eye(6)[labels], noise.logits, noise.identity), labels


def test_class_consistency_of_separable_data_is_one():
    found = class_consistency(*clusters(200, 0), *clusters(50, 1), *clusters(60, 2))
    assert (found.real_accuracy, found.accuracy, found.ratio) == (1, 1, 1)


def test_class_consistency_counts_the_images_of_the_class_asked_for():
    generated, labels = clusters(60, 2)
    labels[:15] = (labels[:15] + 1) % 4
    found = class_consistency(*clusters(200, 0), *clusters(50, 1), generated, labels)
    assert found.accuracy == found.ratio == 0.75


def test_class_consistency_has_no_random_numbers():
    sets = [(random_features(100, seed=seed), torch.arange(100) % 3) for seed in range(3)]
    arguments = [part for pair in sets for part in pair]
    assert class_consistency(*arguments) == class_consistency(*arguments)


def test_class_consistency_does_not_see_the_scale_of_features():
    def scaled(features: Features, labels: Tensor) -> tuple[Features, Tensor]:
        return Features(features.features * 64 + 3, features.logits, features.identity), labels

    sets = [clusters(100, seed) for seed in range(3)]
    plain = class_consistency(*[part for pair in sets for part in pair])
    assert plain == class_consistency(*[part for pair in sets for part in scaled(*pair)])


def test_class_consistency_refuses_what_cannot_be_judged():
    (real, labels), (other, _) = clusters(40, 0), clusters(40, 1)
    strange = Features(other.features, other.logits, "network:1")
    for arguments, words in (
        ((real, labels, other, labels, strange, labels), "expected one network"),
        ((real, labels, other, labels[:-1], other, labels), "test labels of shape"),
        ((real, labels * 0, other, labels * 0, other, labels), "at least two classes"),
        ((real, labels, other, labels + 4, other, labels), "test accuracy 0"),
    ):
        with pytest.raises(GraincodeError, match=words) as error:
            class_consistency(*arguments)
        assert "\n" not in str(error.value)


# Pairs of images


def pairs(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(0, 256, (count, 3, 5, 7), generator=generator, dtype=torch.uint8) for _ in range(2))
    b[0] = a[0]
    return a, b


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 100))
def test_pair_errors_do_not_depend_on_batches_or_sides(sizes: list[int], seed: int):
    a, b = pairs(sum(sizes) + 1, seed)
    whole, parts = PairErrors(), PairErrors()
    whole.update(a, b)
    for x, y in zip(a.split([*sizes, 1]), b.split([*sizes, 1]), strict=True):
        parts.update(y, x)
    assert whole.result() == parts.result()


def test_pair_errors_are_their_definitions():
    a, b = pairs(6)
    errors = PairErrors()
    errors.update(a, b)
    result = errors.result()
    mse = ((a.double() - b.double()) / 255).square().mean((1, 2, 3))
    assert mse[0] == 0
    assert result.count == 6
    assert result.mse == pytest.approx(mse.mean().item(), rel=1e-12)
    assert result.psnr_of_mean == pytest.approx(-10 * math.log10(result.mse), rel=1e-12)
    expected = [-10 * math.log10(max(value, (1 / 255) ** 2 / 12)) for value in mse.tolist()]
    assert result.psnr_mean == pytest.approx(sum(expected) / 6, rel=1e-12)


def test_pair_errors_of_copies_are_finite():
    a, _ = pairs(3)
    errors = PairErrors()
    errors.update(a, a)
    result = errors.result()
    assert result.mse == 0
    assert result.psnr_of_mean == pytest.approx(result.psnr_mean) == pytest.approx(-10 * math.log10(MSE_FLOOR))


def test_pair_errors_of_black_against_white():
    errors = PairErrors()
    black = torch.zeros(1, 3, 256, 256, dtype=torch.uint8)
    errors.update(black, black + 255)
    assert (errors.result().mse, errors.result().psnr_mean) == (1, 0)


@pytest.mark.parametrize(
    "pair",
    [
        (torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 3, 4, 4)),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(3, 4, 4, dtype=torch.uint8)),
    ],
)
def test_what_is_not_pairs_is_refused(pair: tuple[Tensor, Tensor]):
    errors = PairErrors()
    with pytest.raises(GraincodeError, match="expected"):
        errors.update(*pair)
    with pytest.raises(GraincodeError, match="0 images"):
        errors.result()


# Codebook usage


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 11)), min_size=1, max_size=5).filter(any))
def test_codebook_usage_does_not_depend_on_batches(batches: list[list[int]]):
    whole, parts = CodebookUsage(12), CodebookUsage(12)
    indices = torch.tensor([index for batch in batches for index in batch], dtype=torch.uint8)
    whole.update(indices.unsqueeze(0))
    for batch in batches:
        parts.update(torch.tensor(batch, dtype=torch.long))
    result = whole.result()
    assert result == parts.result()
    used = len(indices.unique())
    assert result.usage == used / 12
    assert 1 - 1e-12 <= result.perplexity <= used + 1e-9
    assert result.count == len(indices)


def test_perplexity_of_even_use_is_the_number_of_codes_used():
    usage = CodebookUsage(10)
    usage.update(torch.arange(5).repeat(3, 4))
    assert usage.result().usage == 0.5
    assert usage.result().perplexity == pytest.approx(5)


def test_codes_that_are_none_are_refused():
    usage = CodebookUsage(4)
    for indices in (torch.tensor([0, 4]), torch.tensor([-1]), torch.tensor([0.5])):
        with pytest.raises(GraincodeError, match="expected"):
            usage.update(indices)
    with pytest.raises(GraincodeError, match="0 codes"):
        usage.result()
    with pytest.raises(GraincodeError, match="at least 1"):
        CodebookUsage(0)
