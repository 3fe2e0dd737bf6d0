import math

import pytest
import torch

from graincode.core.density import region_entropy, region_gradient, region_variance
from graincode.core.images import from_uint8

MEASURES = {
    "entropy": region_entropy,
    "entropy, wide": lambda images, region: region_entropy(images, region, sigma=0.1),
    "gradient": region_gradient,
    "variance": region_variance,
}


def of_grey(values):
    """A (1, 3, H, W) image whose grey values are these."""
    return (torch.tensor(values, dtype=torch.float64) / 0.9999).expand(1, 3, -1, -1)


def uint8_images(count, height, width):
    return from_uint8(torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8))


def test_gradient_by_hand():
    image = of_grey([[0.0, 0.1, 0.1, 0.1], [0.3, 0.1, 0.1, 0.5]])
    # left: across 0.1, 0, -0.2, 0, down 0.3, 0; right, whose last column has no neighbour: across 0, 0.4, down 0, 0.4
    expected = [(0.01 + 0.04) / 4 + 0.09 / 2, 0.16 / 2 + 0.16 / 2]
    assert region_gradient(image, (2, 2)).flatten().tolist() == pytest.approx(expected, rel=1e-6)


def test_a_ramp_has_the_square_of_its_slope_everywhere():
    row, column = torch.arange(8).double()[:, None], torch.arange(12).double()
    ramp = of_grey((0.05 * row + 0.02 * column).tolist())
    for region in ((4, 4), (2, 6), (8, 12), (2, 2)):
        torch.testing.assert_close(
            region_gradient(ramp, region).double(),
            torch.full((1, 8 // region[0], 12 // region[1]), 0.05**2 + 0.02**2).double(),
            rtol=1e-6, atol=0,
        )  # fmt: skip
    # single pixels: the last one has neither neighbour
    assert float(region_gradient(ramp, (1, 1))[0, -1, -1]) == 0


def test_variance_by_hand():
    image = of_grey([[0.0, 0.4, 0.5, 0.5], [0.0, 0.4, -0.5, -0.5]])
    assert region_variance(image, (2, 2)).flatten().tolist() == pytest.approx([0.04, 0.25], rel=1e-6)


@pytest.mark.parametrize("measure", [region_gradient, region_variance])
def test_flat_images_have_none_of_it(measure):
    levels = torch.linspace(-1, 1, 64)[:, None, None, None]
    colours = levels * torch.tensor([1.0, -0.3, 0.7])[:, None, None]
    assert (measure(colours.expand(-1, -1, 12, 12), (3, 3)) == 0).all()
    # and one step of one colour of one pixel is more than nothing
    pixel = torch.full((1, 3, 32, 32), 200, dtype=torch.uint8)
    pixel[0, 2, 5, 5] += 1
    assert float(measure(from_uint8(pixel), (32, 32))) > 0


@pytest.mark.parametrize("name", MEASURES)
def test_a_region_has_the_same_density_whatever_its_batch(name, monkeypatch):
    measure, images = MEASURES[name], uint8_images(7, 24, 40)
    together = measure(images, (8, 8))
    assert together.shape == (7, 3, 5)
    assert together.dtype == torch.float32
    for batch in ([0], [6], [2, 0], [1, 1, 1], [5, 4, 3, 2]):
        assert torch.equal(measure(images[batch], (8, 8)), together[batch])
    # nor on how it is divided
    monkeypatch.setattr("graincode.core.density._PIXELS_AT_ONCE", (2 * 24 * 40, 1))
    assert torch.equal(measure(images, (8, 8)), together)
    assert measure(images[:0], (8, 8)).shape == (0, 3, 5)


@pytest.mark.parametrize("name", ["entropy", "entropy, wide", "variance"])
def test_the_same_pixels_in_another_order_tie(name):
    images = uint8_images(1, 16, 16)
    orders = [torch.randperm(256) for _ in range(20)]
    shuffled = torch.cat([images.flatten(2)[..., order].view(1, 3, 16, 16) for order in orders])
    assert (MEASURES[name](shuffled, (16, 16)) == MEASURES[name](images, (16, 16))).all()


@pytest.mark.parametrize("sigma", [0.003, 0.01, 0.03, 0.065, 0.1, 1.0])
@pytest.mark.parametrize("bins", [2, 32])
def test_entropy_is_that_of_all_pixels_times_all_bins(sigma, bins):
    if sigma < 1 / 12 and bins == 2:
        sigma += 1 / 12
    images = torch.cat([torch.rand(2, 3, 12, 8), torch.linspace(-1, 1, 96).view(1, 1, 12, 8).expand(1, 3, 12, 8)])
    grey = (images.double() * torch.tensor([0.2989, 0.5870, 0.1140]).double()[:, None, None]).sum(dim=1)
    pixels = grey.unfold(1, 4, 4).unfold(2, 4, 4).flatten(3)
    weights = torch.exp(-0.5 * ((pixels[..., None] - torch.linspace(-1, 1, bins).double()) / sigma) ** 2).sum(dim=3)
    shares = weights / weights.sum(dim=-1, keepdim=True)
    expected = torch.special.entr(shares).sum(dim=-1).float()
    torch.testing.assert_close(region_entropy(images, (4, 4), bins, sigma), expected, rtol=0, atol=2e-5)
    assert float(expected.max()) <= math.log(bins)


def test_pixels_that_are_no_pixels_make_no_number():
    images = torch.zeros(2, 3, 4, 4)
    images[0, :, 1, 1] = torch.nan
    for name, measure in MEASURES.items():
        found = measure(images, (4, 4)).flatten()
        assert found[0].isnan(), name
        assert found[1:].isfinite().all(), name
