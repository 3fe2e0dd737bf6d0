"""Augmentation and views."""

import pytest
import torch

from graincode.core.errors import GraincodeError
from graincode.core.rng import SampleRng
from graincode.data.augmentation import Augmentation, Views
from graincode.data.images import TensorImages


def test_views_are_the_image_its_mirror_image_and_shifts_of_both():
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    dataset = TensorImages("made", "train", pixels, torch.arange(5) % 2, ("even", "odd"))
    plain = dataset[range(5)].images
    views = Views(dataset, 4, Augmentation(flip=True, shift=2), seed=7)
    assert len(views) == 20
    made = views[range(20)]
    assert torch.equal(made.labels, torch.arange(5).repeat(4) % 2)
    assert torch.equal(made.labels, views.labels)
    first, mirrored, third, fourth = made.images.split(5)
    assert torch.equal(first, plain)
    assert torch.equal(mirrored, plain.flip(-1))
    inner = [plain[:, :, 2:-2, 2:-2], plain.flip(-1)[:, :, 2:-2, 2:-2]]
    for moved, still in zip((third, fourth), inner, strict=True):
        for image, whole in zip(still, moved, strict=True):
            places = whole.unfold(1, 12, 1).unfold(2, 12, 1)  # the middle of the image is somewhere in its view
            assert int((places == image[:, None, None]).all(-1).all(-1).all(0).sum()) == 1
    assert not torch.equal(third, plain)
    assert torch.equal(views[[13, 2, 19]].images, made.images[[13, 2, 19]])
    assert not torch.equal(Views(dataset, 4, Augmentation(True, 2), seed=8)[range(20)].images, made.images)
    unflipped = Views(dataset, 2, Augmentation(shift=2), 7)[range(10)].images
    assert torch.equal(unflipped[:5], plain)
    assert not torch.equal(unflipped[5:], plain)
    assert not torch.equal(unflipped[5:], third)


def test_augmentation_is_a_function_of_the_position():
    images = torch.randn(64, 3, 6, 8)
    rng = SampleRng(1, torch.arange(64))
    assert Augmentation()(images, rng) is images
    flipped = Augmentation(flip=True)(images, rng)
    mirrored = (flipped != images).flatten(1).any(1)
    assert 16 < int(mirrored.sum()) < 48
    assert torch.equal(flipped[mirrored], images[mirrored].flip(-1))
    shifted = Augmentation(shift=1)(images, rng)
    part = Augmentation(shift=1)(images[10:20], SampleRng(1, torch.arange(10, 20)))
    assert torch.equal(part, shifted[10:20])
    inner = [torch.stack([images[i, :, 1 + a : 5 + a, 1 + b : 7 + b] for a in (-1, 0, 1) for b in (-1, 0, 1)])
             for i in range(64)]  # fmt: skip
    found = [(options == shifted[i, :, 1:5, 1:7]).flatten(1).all(1) for i, options in enumerate(inner)]
    assert all(bool(match.any()) for match in found)
    assert len({int(match.nonzero()[0]) for match in found}) == 9


def test_images_are_not_shifted_out_of_the_picture():
    rng = SampleRng(0, torch.arange(1))
    assert Augmentation(shift=7)(torch.zeros(1, 3, 8, 9), rng).shape == (1, 3, 8, 9)
    with pytest.raises(GraincodeError, match=r"^shift=8: expected less than "):
        Augmentation(shift=8)(torch.zeros(1, 3, 8, 9), rng)


def test_a_random_crop_keeps_a_share_of_the_area_at_a_random_place():
    down, right = torch.meshgrid(torch.linspace(-1, 1, 33), torch.linspace(-1, 1, 41), indexing="ij")
    images, rng = torch.stack([down, right, down * 0])[None].expand(200, -1, -1, -1), SampleRng(1, torch.arange(200))
    cropped = Augmentation(crop=0.5)(images, rng)
    assert cropped.shape == images.shape
    inner = cropped[:, :, 1:-1, 1:-1]  # a ramp stays one; the outermost pixels may reach beyond the edge
    slopes = inner[:, 0].diff(dim=1)
    assert float((slopes - slopes.mean(dim=(1, 2), keepdim=True)).abs().max()) < 1e-4
    areas = (slopes.mean(dim=(1, 2)) / (2 / 32)) * (inner[:, 1].diff(dim=2).mean(dim=(1, 2)) / (2 / 40))
    assert 0.499 < float(areas.min()) < 0.53
    assert 0.97 < float(areas.max()) < 1.001
    middles = cropped[:, :2, 16, 20]
    assert (middles.std(dim=0) > 0.05).all()
    assert (middles.mean(dim=0).abs() < 0.05).all()
    part = Augmentation(crop=0.5)(images[10:20], SampleRng(1, torch.arange(10, 20)))
    torch.testing.assert_close(part, cropped[10:20], rtol=0, atol=1e-6)
    with pytest.raises(GraincodeError, match=r"^crop=0: "):
        Augmentation(crop=0)
    with pytest.raises(GraincodeError, match=r"^crop=0\.5: expected 1"):
        Augmentation(flip=True, crop=0.5).check_views(2)
