"""Entropy of regions as the public code computes it, in both of its definitions."""

import pytest
import torch
from helpers_golden import golden, images_of

from graincode.core.density import region_entropy
from graincode.core.errors import GraincodeError

SPANS = {"current": (-1.0, 1.0), "older": (0.0, 1.0)}


@pytest.mark.parametrize("name", SPANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_regions_have_the_published_entropy(name, dtype):
    found = golden("density")
    # theirs has its bins in float32, and float32 itself moves theirs by as much; ours is rounded to 2^-20
    entropy = region_entropy(images_of(found, dtype), (16, 16), span=SPANS[name])
    torch.testing.assert_close(entropy.flatten().double(), found[f"{name}_float64"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SPANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flat_regions_of_all_grey_levels_have_the_published_entropy(name, dtype):
    levels = torch.arange(256).to(dtype) / 127.5 - 1
    flat = levels[:, None, None, None].expand(-1, 3, 16, 16)
    entropy = region_entropy(flat, (16, 16), span=SPANS[name]).flatten()
    expected = golden("density")[f"flat_{name}_float64"]
    torch.testing.assert_close(entropy.double(), expected, rtol=0, atol=3e-5)


@pytest.mark.when("a region's entropy is asked for with pixels outside [-1, 1]", "one line names the range found")
@pytest.mark.parametrize(("value", "where"), [(-1.02, 0), (-1.02, 1), (1.02, 0), (200.0, 1), (-torch.inf, 0)])
def test_pixels_outside_the_range_are_refused(value, where):
    images = torch.zeros(2, 3, 8, 8)
    images[where, :, 0, 0] = value
    images[1, :, 7, 7] = torch.nan  # hides nothing
    with pytest.raises(GraincodeError, match=r"^images=from .* to .*: expected values in \[-1, 1\]"):
        region_entropy(images, (4, 4))
