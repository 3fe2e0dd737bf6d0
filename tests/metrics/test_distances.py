"""Figures of sets of images, of pairs, and of codes."""

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers_metrics import drawn, message_of, statistics_of
from helpers_networks import in_torch_fidelity
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch_fidelity import calculate_metrics
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from graincode.core.errors import GraincodeError
from graincode.evaluation.estimate import Estimate
from graincode.evaluation.metrics import (
    class_consistency,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from graincode.evaluation.pairs import MSE_FLOOR, CodebookUsage, PairErrors, PairMean, structural_similarity
from graincode.evaluation.statistics import Statistics, measure
from graincode.networks.features import Lite0Features, TimmFeatures


def small_integers(count: int, dimension: int = 6, seed: int = 0, largest: int = 1000) -> Tensor:
    """Points whose squared distances are exact in float32, so that every way to compute them agrees."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, largest, (count, dimension), generator=generator).float()


# Fréchet distance


@pytest.mark.parametrize("count", [3, 40, 300])
def test_frechet_distance_of_a_set_with_itself_is_zero(count: int):
    statistics = statistics_of(drawn(count, 60))
    assert abs(frechet_distance(statistics, statistics).value) <= 1e-6 * statistics.covariance.trace().item()


def test_frechet_distance_is_symmetric_and_sees_the_mean():
    a, b = statistics_of(drawn(100)), statistics_of(drawn(80, seed=1, shift=3.0))
    assert frechet_distance(a, b).value == pytest.approx(frechet_distance(b, a).value, rel=1e-9)
    moved = statistics_of(drawn(100) + 3)
    assert frechet_distance(a, moved).value == pytest.approx(9 * 8, rel=1e-5)


def test_frechet_distance_of_gaussians_along_the_axes_is_the_closed_form():
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    scales = torch.tensor([1.0, 2.0, 5.0])
    a, b = statistics_of(corners), statistics_of(corners * scales)
    assert frechet_distance(a, b).value == pytest.approx(8 / 7 * (scales - 1).square().sum().item(), rel=1e-9)


def photographs(side: int = 64, step: int = 40) -> Tensor:
    """Square parts of two photographs."""
    crops = []
    for photograph in load_sample_images().images:
        windows = sliding_window_view(photograph, (side, side), (0, 1))[::step, ::step]
        crops.append(torch.from_numpy(windows.reshape(-1, 3, side, side).copy()))
    return torch.cat(crops)


def each(images: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    changed = [np.asarray(change(Image.fromarray(image.permute(1, 2, 0).numpy()))) for image in images]
    return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2)


def blurred(images: Tensor, radius: float) -> Tensor:
    return each(images, lambda image: image.filter(ImageFilter.GaussianBlur(radius)))


def noisy(images: Tensor, deviation: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * deviation
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


def compressed(images: Tensor, quality: int) -> Tensor:
    def through_jpeg(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return each(images, through_jpeg)


@pytest.fixture(scope="module")
def sharp() -> tuple[Lite0Features, Tensor, Statistics]:
    network, images = Lite0Features(resolution=64), photographs()
    return network, images, measure({"it": network}, [images], len(images))["it"]


@pytest.mark.parametrize(
    ("damage", "strengths"),
    [(blurred, [0.5, 1, 2]), (noisy, [8, 16, 32]), (compressed, [75, 30, 10])],
    ids=["blur", "noise", "jpeg"],
)
def test_frechet_distance_grows_as_images_get_worse(
    sharp: tuple[Lite0Features, Tensor, Statistics], damage: Callable[[Tensor, float], Tensor], strengths: list[float]
):
    network, images, reference = sharp
    assert len(images) > 200
    found = [frechet_distance(reference, reference).value]
    for strength in strengths:
        worse = measure({"it": network}, [damage(images, strength)], len(images))["it"]
        found.append(frechet_distance(worse, reference).value)
    assert found == sorted(set(found))
    assert found[1] > 1e-3 * found[-1] > abs(found[0])


def patterns(coarse: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (40, 3, coarse, coarse), generator=generator, dtype=torch.uint8)
    return nn.functional.interpolate(small, scale_factor=32 // coarse)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["lite0", "timm"])
def test_figures_are_those_of_torch_fidelity_with_our_networks(tmp_path: Path, kind: str):
    if kind == "timm":
        path = tmp_path / "weights.safetensors"
        save_file(timm.create_model("test_resnet").state_dict(), path)
        network = TimmFeatures("test_resnet", str(path), resolution=64, batch_size=20)
    else:
        network = Lite0Features(resolution=112, batch_size=20)
    sets = {"a": patterns(4, 0), "b": patterns(8, 1)}
    for name, images in sets.items():
        (tmp_path / name).mkdir()
        for index, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{index:03}.png")
    expected = calculate_metrics(
        input1=str(tmp_path / "a"),
        input2=str(tmp_path / "b"),
        feature_extractor=in_torch_fidelity(network),
        fid=True,
        isc=True,
        isc_splits=4,
        kid=True,
        kid_subsets=10,
        kid_subset_size=20,
        prc=True,
        rng_seed=7,
        batch_size=20,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    a, b = (measure({"it": network}, [images], 40, splits=4, seed=7)["it"] for images in sets.values())
    score, kernel, shares = inception_score(a), kernel_distance(a, b, 10, 20, seed=7), precision_recall(a, b)
    assert frechet_distance(a, b).value == pytest.approx(expected["frechet_inception_distance"], rel=1e-5)
    assert score.value == pytest.approx(expected["inception_score_mean"], rel=1e-5)
    assert score.std == pytest.approx(expected["inception_score_std"], rel=1e-4)
    assert kernel.value == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    assert kernel.std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-4)
    assert {name: share.value for name, share in shares.items()} == {name: expected[name] for name in shares}


@pytest.mark.parametrize("figure", [frechet_distance, lambda a, b: kernel_distance(a, b, 2, 5), density_coverage])
def test_statistics_of_two_networks_are_not_compared(figure: Callable[[Statistics, Statistics], object]):
    a = statistics_of(drawn(10))
    for b, words in (
        (statistics_of(drawn(10), weights_hash="1" * 64), "expected one network"),
        (statistics_of(drawn(10, 7)), "8 and of 7 dimensions|7 and of 8 dimensions"),
    ):
        for pair in ((a, b), (b, a)):
            with pytest.raises(GraincodeError, match=words) as error:
                figure(*pair)
            message_of(error)


def test_frechet_distance_of_one_image_is_refused():
    a, b = statistics_of(drawn(10)), statistics_of(drawn(1))
    for pair in ((a, b), (b, a)):
        with pytest.raises(GraincodeError, match="at least 2") as error:
            frechet_distance(*pair)
        message_of(error)


# Inception score


def score_of(logits: Tensor, splits: int, seed: int = 0) -> Estimate:
    return inception_score(statistics_of(torch.zeros(len(logits), 1), logits, splits, seed))


@pytest.mark.parametrize("splits", [1, 10])
def test_inception_score_of_uniform_logits_is_one(splits: int):
    score = score_of(torch.zeros(30, 7), splits)
    assert score.value == pytest.approx(1)
    assert score.std == pytest.approx(0)


def test_inception_score_of_certain_and_even_classes_is_their_number():
    assert score_of(100 * torch.eye(7).repeat(10, 1), splits=1).value == pytest.approx(7)


def test_inception_score_does_not_suffer_from_images_sorted_by_class():
    assert score_of(100 * torch.eye(5).repeat_interleave(200, 0), splits=5).value > 4.9


@pytest.mark.parametrize("seed", [0, 2020])
@pytest.mark.parametrize(("count", "splits"), [(10, 1), (10, 10), (37, 4), (100, 10), (999, 7)])
def test_inception_score_is_that_of_torch_fidelity(count: int, splits: int, seed: int):
    logits = 3 * drawn(count, 12, seed)
    found, expected = score_of(logits, splits, seed), isc_features_to_metric(logits, splits, True, seed)
    assert found.value == pytest.approx(expected["inception_score_mean"], rel=1e-9)
    assert found.std == pytest.approx(expected["inception_score_std"], rel=1e-9, abs=1e-9)
    assert found.over == f"standard deviation over {splits} splits"


def test_inception_score_depends_on_its_seed_alone():
    assert score_of(drawn(40), 4, seed=1) == score_of(drawn(40), 4, seed=1)
    assert score_of(drawn(40), 4, seed=1) != score_of(drawn(40), 4, seed=2)


def test_inception_score_refuses_statistics_without_splits():
    with pytest.raises(GraincodeError, match="splits=10") as error:
        score_of(drawn(10), splits=0)
    message_of(error)


# Kernel distance


def test_kernel_distance_is_that_of_torch_fidelity():
    made, real = drawn(60, seed=0), drawn(50, seed=1, shift=0.5)
    found = kernel_distance(statistics_of(made), statistics_of(real), subsets=7, size=20, seed=3)
    expected = kid_features_to_metric(made, real, kid_subsets=7, kid_subset_size=20, rng_seed=3, verbose=False)
    assert found.value == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    assert found.std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-9)
    assert found.over == "standard deviation over 7 subsets of 20 images"


def test_kernel_distance_of_whole_sets_is_its_definition():
    made, real = drawn(30, seed=0), drawn(30, seed=1, shift=0.5)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() @ b.double().T / 8 + 1) ** 3

    within = sum((kernel(one, one).sum() - kernel(one, one).trace()) / (30 * 29) for one in (made, real))
    expected = (within - 2 * kernel(made, real).mean()).item()
    found = kernel_distance(statistics_of(made), statistics_of(real), subsets=3, size=30)
    assert found.value == pytest.approx(expected, rel=1e-4)
    assert found.std == pytest.approx(0, abs=1e-5)


def test_kernel_distance_grows_with_a_shift_from_nearly_zero():
    real = statistics_of(drawn(400))
    found = [
        kernel_distance(statistics_of(drawn(400, seed=1, shift=shift)), real, size=200) for shift in (0, 0.25, 0.5, 1)
    ]
    assert abs(found[0].value) < 0.02
    assert abs(found[0].value) < found[0].std
    assert found[0].value < 0.1 * found[1].value
    assert found[1].value < found[2].value < found[3].value


@pytest.mark.parametrize("arguments", [{"size": 41}, {"size": 1}, {"size": 20, "subsets": 0}, {}])
def test_kernel_distance_refuses_more_images_than_there_are(arguments: dict[str, int]):
    a, b = statistics_of(drawn(40)), statistics_of(drawn(50, seed=1))
    for pair in ((a, b), (b, a)):
        with pytest.raises(GraincodeError, match=r"type evaluation\.kid_subset_size=40") as error:
            kernel_distance(*pair, **arguments)
        message_of(error)


# Precision, recall, density, coverage


def values_of(figures: dict[str, Estimate]) -> dict[str, float]:
    return {name: figure.value for name, figure in figures.items()}


@pytest.mark.parametrize("neighbours", [1, 3])
@pytest.mark.parametrize("largest", [4, 1000])
def test_precision_and_recall_are_those_of_torch_fidelity(
    monkeypatch: pytest.MonkeyPatch, neighbours: int, largest: int
):
    made, real = small_integers(90, seed=0, largest=largest), small_integers(120, seed=1, largest=largest)
    real[:60] //= 2
    expected = prc_features_to_metric(made, real, prc_neighborhood=neighbours, verbose=False)
    monkeypatch.setattr("graincode.evaluation.metrics._BLOCK", 37)
    found = precision_recall(statistics_of(made), statistics_of(real), neighbours)
    assert values_of(found) == {"precision": expected["precision"], "recall": expected["recall"]}
    assert 0 < found["recall"].value < 1
    for name, count in (("precision", 90), ("recall", 120)):
        value = found[name].value
        assert found[name].std == pytest.approx(math.sqrt(value * (1 - value) / count))
        assert found[name].over == f"standard error over {count} images"


def density_and_coverage(made: Tensor, real: Tensor, neighbours: int) -> dict[str, float]:
    """Equations 3 and 4 of Naeem et al. (2020), one pair of images at a time."""
    made_rows, real_rows = (points.double().numpy() for points in (made, real))
    reaching, covered = 0, 0
    for index, centre in enumerate(real_rows):
        others = np.delete(real_rows, index, 0)
        radius = sorted(np.sqrt(((other - centre) ** 2).sum()) for other in others)[neighbours - 1]
        inside = [np.sqrt(((point - centre) ** 2).sum()) < radius for point in made_rows]
        reaching += sum(inside)
        covered += any(inside)
    return {"density": reaching / (neighbours * len(made)), "coverage": covered / len(real)}


@pytest.mark.parametrize("neighbours", [1, 5])
@pytest.mark.parametrize("largest", [4, 1000])
def test_density_and_coverage_are_their_definitions(monkeypatch: pytest.MonkeyPatch, neighbours: int, largest: int):
    made, real = small_integers(90, seed=0, largest=largest), small_integers(120, seed=1, largest=largest)
    real[:60] //= 2
    monkeypatch.setattr("graincode.evaluation.metrics._BLOCK", 37)
    found = density_coverage(statistics_of(made), statistics_of(real), neighbours)
    assert values_of(found) == pytest.approx(density_and_coverage(made, real, neighbours), rel=1e-12)
    assert 0 < found["coverage"].value < 1
    assert found["density"].std is None


@pytest.mark.parametrize("figures", [precision_recall, density_coverage])
def test_a_set_matches_itself_and_nothing_that_is_far_away(
    figures: Callable[[Statistics, Statistics], dict[str, Estimate]],
):
    near, far = statistics_of(small_integers(100)), statistics_of(small_integers(80, seed=1) + 2000)
    assert list(values_of(figures(near, near)).values()) == [1, 1]
    assert list(values_of(figures(far, near)).values()) == [0, 0]


def test_two_draws_of_one_distribution_have_a_density_near_one_and_cover_each_other():
    found = density_coverage(statistics_of(drawn(1000)), statistics_of(drawn(1000, seed=1)))
    assert found["density"].value == pytest.approx(1, abs=0.05)
    assert found["coverage"].value > 0.9


def test_density_sees_that_one_outlier_is_no_support():
    """The reason that they exist: precision is fooled by a single real image that lies far out."""
    real = drawn(200)
    real[0] = 50
    made = statistics_of(drawn(100, seed=1, shift=12.0))
    precision = precision_recall(made, statistics_of(real))["precision"].value
    density = density_coverage(made, statistics_of(real), neighbours=3)["density"].value
    assert precision > 0.9
    assert density < 0.4


@pytest.mark.parametrize("figures", [precision_recall, density_coverage])
@pytest.mark.parametrize("neighbours", [0, 10])
def test_more_neighbours_than_images_are_refused(figures: Callable, neighbours: int):
    few, many = statistics_of(drawn(10)), statistics_of(drawn(20))
    for pair in ((few, many), (many, few)):
        with pytest.raises(GraincodeError, match=f"{neighbours} neighbours among 10 images") as error:
            figures(*pair, neighbours)
        message_of(error)


# Class consistency


def clusters(count: int, seed: int, subset: int = 10_000) -> tuple[Statistics, Tensor]:
    """Images of 4 classes that lie far apart."""
    labels = torch.arange(count) % 4
    return statistics_of(drawn(count, 6, seed) + 30 * torch.eye(6)[labels], subset=subset), labels


def test_class_consistency_of_separable_data_is_one():
    found = class_consistency(*clusters(200, 0), *clusters(50, 1), *clusters(60, 2))
    assert values_of(found) == {
        "class_accuracy": 1,
        "class_accuracy_of_real_images": 1,
        "class_accuracy_ratio": 1,
    }


def test_class_consistency_counts_the_images_of_the_class_asked_for():
    generated, labels = clusters(60, 2)
    labels[:15] = (labels[:15] + 1) % 4
    found = class_consistency(*clusters(200, 0), *clusters(50, 1), generated, labels)
    assert found["class_accuracy"].value == found["class_accuracy_ratio"].value == 0.75
    assert found["class_accuracy"].std == pytest.approx(math.sqrt(0.75 * 0.25 / 60))


def test_class_consistency_has_no_random_numbers():
    sets = [(statistics_of(drawn(100, seed=seed)), torch.arange(100) % 3) for seed in range(3)]
    arguments = [part for pair in sets for part in pair]
    assert class_consistency(*arguments) == class_consistency(*arguments)


def test_class_consistency_does_not_see_the_scale_of_features():
    labels = torch.arange(100) % 4
    points = [drawn(100, 6, seed) + 30 * torch.eye(6)[labels] for seed in range(3)]
    plain, scaled = (
        class_consistency(*[part for one in points for part in (statistics_of(change(one)), labels)])
        for change in (lambda one: one, lambda one: one * 64 + 3)
    )
    assert plain == scaled


def test_class_consistency_takes_the_labels_of_the_images_that_were_kept():
    arguments = []
    for seed in range(3):
        statistics, labels = clusters(200, seed, subset=80)
        assert statistics.subset.shape == (80, 6)
        others = torch.ones(200, dtype=torch.bool)
        others[statistics.indices] = False
        labels[others] = 9
        arguments += [statistics, labels]
    found = class_consistency(*arguments)
    assert found["class_accuracy"] == Estimate(1, 0, "standard error over 80 images")
    assert found["class_accuracy_of_real_images"].value == 1


def test_class_consistency_refuses_what_cannot_be_judged():
    (real, labels), (other, _) = clusters(40, 0), clusters(40, 1)
    strange = statistics_of(other.subset, weights_hash="1" * 64)
    kept, _ = clusters(40, 1, subset=20)
    for arguments, words in (
        ((real, labels, other, labels, strange, labels), "expected one network"),
        ((real, labels, other, labels[:-1], other, labels), "test labels of shape"),
        ((real, labels, other, labels, kept, labels[kept.indices]), r"generated labels of shape \(20,\) for 40"),
        ((real, labels * 0, other, labels * 0, other, labels), "at least two classes"),
        ((real, labels, other, labels + 4, other, labels), "test accuracy 0"),
    ):
        with pytest.raises(GraincodeError, match=words) as error:
            class_consistency(*arguments)
        message_of(error)


# Pairs of images


def pairs(count: int, seed: int = 0, height: int = 5, width: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, height, width)
    a, b = (torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for _ in range(2))
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
    assert whole.metrics() == parts.metrics()


def test_pair_errors_are_their_definitions():
    a, b = pairs(6)
    errors = PairErrors()
    errors.update(a, b)
    found = errors.metrics()
    mse = ((a.double() - b.double()) / 255).square().mean((1, 2, 3))
    assert mse[0] == 0
    assert found["mse"].value == pytest.approx(mse.mean().item(), rel=1e-12)
    assert found["mse"].std == pytest.approx(mse.std().item() / math.sqrt(6), rel=1e-12)
    assert found["psnr_of_mean"].value == pytest.approx(-10 * math.log10(found["mse"].value), abs=1e-6)
    each_one = torch.tensor(
        [-10 * math.log10(max(value, (1 / 255) ** 2 / 12)) for value in mse.tolist()], dtype=torch.float64
    )
    assert found["psnr_mean"].value == pytest.approx(each_one.mean().item(), rel=1e-12)
    assert found["psnr_mean"].std == pytest.approx(each_one.std().item() / math.sqrt(6), rel=1e-12)
    assert {figure.over for figure in found.values()} == {"standard error over 6 images"}


def test_the_spread_of_psnr_of_mean_is_that_of_the_error_in_decibels():
    a, b = pairs(200)
    errors = PairErrors()
    errors.update(a, b)
    found = errors.metrics()
    low, high = (-10 * math.log10(found["mse"].value + sign * found["mse"].std) for sign in (1, -1))
    assert found["psnr_of_mean"].std == pytest.approx((high - low) / 2, rel=1e-2)


def test_one_pair_has_no_spread():
    errors = PairErrors()
    errors.update(*(part[1:] for part in pairs(2)))
    assert {(figure.std, figure.over) for figure in errors.metrics().values()} == {(None, "")}


def test_pair_errors_of_copies_are_finite():
    a, _ = pairs(3)
    errors = PairErrors()
    errors.update(a, a)
    found = values_of(errors.metrics())
    assert found["mse"] == 0
    assert found["psnr_of_mean"] == pytest.approx(found["psnr_mean"]) == pytest.approx(-10 * math.log10(MSE_FLOOR))


def test_pair_errors_of_black_against_white():
    errors = PairErrors()
    black = torch.zeros(1, 3, 256, 256, dtype=torch.uint8)
    errors.update(black, black + 255)
    assert values_of(errors.metrics()) == {"mse": 1, "psnr_of_mean": 0, "psnr_mean": 0}


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
    for accumulator in (errors, PairMean(structural_similarity)):
        with pytest.raises(GraincodeError, match="expected"):
            accumulator.update(*pair)
    with pytest.raises(GraincodeError, match="0 images"):
        errors.metrics()


def absolute_difference(images: Tensor, reference: Tensor) -> Tensor:
    return (images.float() - reference.float()).abs().mean((1, 2, 3))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 100))
def test_pair_mean_is_the_mean_over_images_whatever_the_batches(sizes: list[int], seed: int):
    a, b = pairs(sum(sizes) + 2, seed)
    whole, parts = PairMean(absolute_difference), PairMean(absolute_difference)
    whole.update(a, b)
    for x, y in zip(a.split([*sizes, 2]), b.split([*sizes, 2]), strict=True):
        parts.update(x, y)
    found = whole.figure()
    assert parts.figure().value == pytest.approx(found.value, rel=1e-6)
    values = (a.double() - b.double()).abs().mean((1, 2, 3)).numpy()
    assert found.value == pytest.approx(values.mean(), rel=1e-6)
    assert found.std == pytest.approx(values.std(ddof=1) / math.sqrt(len(values)), rel=1e-5)
    assert found.over == f"standard error over {len(values)} images"


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """SSIM of two (3, H, W), in float64, from the covariances within every whole window."""
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    x, y = (sliding_window_view(image.astype(np.float64), (11, 11), (1, 2)) for image in (a, b))

    def mean(values: np.ndarray) -> np.ndarray:
        return (values * window).sum((-2, -1))

    mean_x, mean_y = mean(x), mean(y)
    away_x, away_y = x - mean_x[..., None, None], y - mean_y[..., None, None]
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    structure = (2 * mean(away_x * away_y) + c2) / (mean(away_x**2) + mean(away_y**2) + c2)
    return float(((2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1) * structure).mean())


@pytest.mark.parametrize("size", [(11, 11), (11, 40), (33, 24)])
def test_structural_similarity_is_its_definition(size: tuple[int, int]):
    reference = photographs()[::60, :, : size[0], : size[1]]
    for worse in (noisy(reference, 20), blurred(reference, 2), 255 - reference, pairs(len(reference), 0, *size)[0]):
        expected = [similarity(a.numpy(), b.numpy()) for a, b in zip(worse, reference, strict=True)]
        torch.testing.assert_close(
            structural_similarity(worse, reference), torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-4
        )


def test_structural_similarity_of_equal_images_is_one_and_of_negatives_less_than_zero():
    images = photographs()[::20]
    torch.testing.assert_close(structural_similarity(images, images), torch.ones(len(images)))
    assert (structural_similarity(noisy(images, 20), images) < 0.999).all()
    assert structural_similarity(255 - images, images).mean() < 0


@pytest.mark.parametrize("size", [(10, 20), (20, 10), (1, 1)])
def test_structural_similarity_refuses_images_smaller_than_its_window(size: tuple[int, int]):
    a, b = pairs(2, 0, *size)
    with pytest.raises(GraincodeError, match="expected 11 or more") as error:
        PairMean(structural_similarity).update(a, b)
    assert str(size) in message_of(error)


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
