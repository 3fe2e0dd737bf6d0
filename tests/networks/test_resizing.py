"""Images are resized as those do whose metrics are to be compared with."""

import numpy as np
import pytest
import torch
from cleanfid.resize import make_resizer
from helpers_evaluation import photographs
from torch import nn
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from graincode.networks.resizing import IN_WORDS, resize


@pytest.mark.parametrize("side", [32, 100, 299, 400])
def test_clean_is_clean_fid_s(side: int):
    pixels = photographs(side, 8)[:: max(1, len(photographs(side, 8)) // 10)][:10]
    assert len(pixels) == 10
    pixels[1] = torch.randint(0, 2, pixels[1].shape, dtype=torch.uint8) * 255  # which bicubic goes beyond
    theirs = make_resizer("PIL", False, "bicubic", (299, 299))
    expected = np.stack([theirs(image.permute(1, 2, 0).numpy()) for image in pixels]).transpose(0, 3, 1, 2)
    found = resize(pixels.float(), 299, "clean")
    assert np.abs(found.numpy() - expected).max() < 2e-5
    assert 0 <= found.min() <= found.max() <= 255


def test_the_others_are_torch_s_and_torch_fidelity_s():
    images = photographs(48, 16)[:4].float()
    for how in "bilinear", "bicubic":
        expected = nn.functional.interpolate(images, size=(64, 64), mode=how, antialias=True)
        assert torch.equal(resize(images, 64, how), expected)
    expected = interpolate_bilinear_2d_like_tensorflow1x(images, size=(64, 64), align_corners=False)
    assert torch.equal(resize(images, 64, "tensorflow"), expected)
    found = [resize(images, 64, how) for how in IN_WORDS]
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
