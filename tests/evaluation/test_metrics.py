"""Metrics of sets of images."""

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers_evaluation import blurred, drawn, each, message_of, noisy, photographs, statistics_of, values_of
from helpers_networks import in_torch_fidelity
from PIL import Image
from safetensors.torch import save_file
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


@pytest.mark.slow
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
def test_metrics_are_those_of_torch_fidelity_with_our_networks(tmp_path: Path, kind: str):
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


@pytest.mark.parametrize("metric", [frechet_distance, lambda a, b: kernel_distance(a, b, 2, 5), density_coverage])
def test_statistics_of_two_networks_are_not_compared(metric: Callable[[Statistics, Statistics], object]):
    a = statistics_of(drawn(10))
    for b, words in (
        (statistics_of(drawn(10), weights_hash="1" * 64), "expected one network"),
        (statistics_of(drawn(10, 7)), "8 features .* 7|7 features .* 8"),
    ):
        for pair in ((a, b), (b, a)):
            with pytest.raises(GraincodeError, match=words) as error:
                metric(*pair)
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
        with pytest.raises(GraincodeError, match=r"kid_sub\w+=\d+") as error:
            kernel_distance(*pair, **arguments)
        message_of(error)


# Precision, recall, density, coverage


@pytest.mark.parametrize("neighbours", [1, 3])
@pytest.mark.parametrize("largest", [4, 1000])
def test_precision_and_recall_are_those_of_torch_fidelity(
    monkeypatch: pytest.MonkeyPatch, neighbours: int, largest: int
):
    made, real = small_integers(90, seed=0, largest=largest), small_integers(120, seed=1, largest=largest)
    real[:60] //= 2
    expected = prc_features_to_metric(made, real, prc_neighborhood=neighbours, verbose=False)
    monkeypatch.setattr("graincode.evaluation.metrics._DISTANCES", 4440)
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
    monkeypatch.setattr("graincode.evaluation.metrics._DISTANCES", 4440)
    found = density_coverage(statistics_of(made), statistics_of(real), neighbours)
    assert values_of(found) == pytest.approx(density_and_coverage(made, real, neighbours), rel=1e-12)
    assert 0 < found["coverage"].value < 1
    assert found["density"].std is None


@pytest.mark.parametrize("metrics", [precision_recall, density_coverage])
def test_a_set_matches_itself_and_nothing_that_is_far_away(
    metrics: Callable[[Statistics, Statistics], dict[str, Estimate]],
):
    near, far = statistics_of(small_integers(100)), statistics_of(small_integers(80, seed=1) + 2000)
    assert list(values_of(metrics(near, near)).values()) == [1, 1]
    assert list(values_of(metrics(far, near)).values()) == [0, 0]


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


@pytest.mark.parametrize("metrics", [precision_recall, density_coverage])
@pytest.mark.parametrize("neighbours", [0, 10])
def test_more_neighbours_than_images_are_refused(metrics: Callable, neighbours: int):
    few, many = statistics_of(drawn(10)), statistics_of(drawn(20))
    for pair in ((few, many), (many, few)):
        with pytest.raises(GraincodeError, match=f"neighbours={neighbours}: expected 1 to 9") as error:
            metrics(*pair, neighbours)
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
        ((real, labels, other, labels[:-1], other, labels), "test labels of"),
        ((real, labels, other, labels, kept, labels[kept.indices]), r"generated labels of \(20,\)"),
        ((real, labels * 0, other, labels * 0, other, labels), "at least two classes"),
        ((real, labels, other, labels + 4, other, labels), "test accuracy 0"),
    ):
        with pytest.raises(GraincodeError, match=words) as error:
            class_consistency(*arguments)
        message_of(error)
