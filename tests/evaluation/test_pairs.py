"""Errors of pairs of images, and what is counted of their codes."""

import math

import numpy as np
import pytest
import torch
from helpers_evaluation import blurred, message_of, noisy, photographs, values_of
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from graincode.core.codes import GrainCodes
from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout
from graincode.evaluation.pairs import MSE_FLOOR, CodeMetrics, PairMetrics, codebook_use, structural_similarity


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
    whole, parts = PairMetrics(), PairMetrics()
    whole.update(a, b)
    for x, y in zip(a.split([*sizes, 1]), b.split([*sizes, 1]), strict=True):
        parts.update(y, x)
    assert whole.metrics() == parts.metrics()


def test_pair_errors_are_their_definitions():
    a, b = pairs(6)
    errors = PairMetrics()
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
    assert {estimate.over for estimate in found.values()} == {"standard error over 6 images"}


def test_the_spread_of_psnr_of_mean_is_that_of_the_error_in_decibels():
    a, b = pairs(200)
    errors = PairMetrics()
    errors.update(a, b)
    found = errors.metrics()
    low, high = (-10 * math.log10(found["mse"].value + sign * found["mse"].std) for sign in (1, -1))
    assert found["psnr_of_mean"].std == pytest.approx((high - low) / 2, rel=1e-2)


def test_one_pair_has_no_spread():
    errors = PairMetrics()
    errors.update(*(part[1:] for part in pairs(2)))
    assert {(estimate.std, estimate.over) for estimate in errors.metrics().values()} == {(None, "")}


def test_pair_errors_of_copies_are_finite():
    a, _ = pairs(3)
    errors = PairMetrics()
    errors.update(a, a)
    found = values_of(errors.metrics())
    assert found["mse"] == 0
    assert found["psnr_of_mean"] == pytest.approx(found["psnr_mean"]) == pytest.approx(-10 * math.log10(MSE_FLOOR))


def test_pair_errors_of_black_against_white():
    errors = PairMetrics()
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
def test_images_that_are_no_pairs_are_refused(pair: tuple[Tensor, Tensor]):
    errors = PairMetrics()
    with pytest.raises(GraincodeError, match="expected"):
        errors.update(*pair)
    with pytest.raises(GraincodeError, match="count=0"):
        errors.metrics()


def absolute_difference(images: Tensor, reference: Tensor) -> Tensor:
    return (images.float() - reference.float()).abs().mean((1, 2, 3))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 100))
def test_pair_mean_is_the_mean_over_images_whatever_the_batches(sizes: list[int], seed: int):
    a, b = pairs(sum(sizes) + 2, seed)
    whole, parts = (PairMetrics({"it": absolute_difference}) for _ in range(2))
    whole.update(a, b)
    for x, y in zip(a.split([*sizes, 2]), b.split([*sizes, 2]), strict=True):
        parts.update(x, y)
    found = whole.metrics()["it"]
    assert parts.metrics()["it"].value == pytest.approx(found.value, rel=1e-6)
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
        structural_similarity(a, b)
    assert str(size) in message_of(error)


# Codes


def codes_of(grains: Tensor, seed: int = 0) -> GrainCodes:
    """Random codes for grain maps."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, LAYOUT.codebook_size, (len(grains), 8, 8), generator=generator)
    coarse = indices[:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2)
    fine = grains.repeat_interleave(2, 1).repeat_interleave(2, 2).bool()
    return GrainCodes.checked(grains, torch.where(fine, indices, coarse), LAYOUT)


LAYOUT = CodeLayout((32, 32), ((8, 8), (4, 4)), 16)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 100))
def test_use_of_codes_does_not_depend_on_batches(sizes: list[int], seed: int):
    codes = codes_of(torch.randint(0, 2, (sum(sizes), 4, 4), generator=torch.Generator().manual_seed(seed)), seed)
    whole, parts = CodeMetrics(LAYOUT), CodeMetrics(LAYOUT)
    whole.update(codes)
    for start, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
        parts.update(codes[start : start + size])
    found = whole.metrics()
    assert found == parts.metrics()
    assert found["codes_per_image"].value == pytest.approx(codes.lengths.double().mean().item())
    assert found["bits_per_image"].value == pytest.approx(
        4 * found["codes_per_image"].value + found["grain_map_bits"].value
    )
    for name in ("codebook_usage", "codebook_usage_0", "codebook_usage_1"):
        assert 0 < found[name].value <= 1


@pytest.mark.parametrize("grain", [0, 1])
def test_a_grain_map_that_never_changes_costs_nothing(grain: int):
    metrics = CodeMetrics(LAYOUT)
    metrics.update(codes_of(torch.full((3, 4, 4), grain)))
    found = values_of(metrics.metrics())
    assert found["grain_map_bits"] == 0
    assert found["codes_per_image"] == 16 * 4**grain
    assert found["codebook_usage"] == found[f"codebook_usage_{grain}"]
    assert f"codebook_usage_{1 - grain}" not in found


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any))
def test_perplexity_is_at_most_the_number_of_entries_used(counts: list[int]):
    usage, perplexity = codebook_use(torch.tensor(counts))
    used = sum(count > 0 for count in counts)
    assert usage == used / len(counts)
    assert 1 - 1e-12 <= perplexity <= used + 1e-9


def test_perplexity_of_even_use_is_the_number_of_entries_used():
    assert codebook_use(torch.tensor([12] * 5 + [0] * 5)) == (0.5, pytest.approx(5))
