"""Perceptual distances, as metrics of uint8 images and as losses: LPIPS is its authors', the others have its form."""

import re

import pytest
import timm
import torch
from helpers_networks import numbers, write_vgg16
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from graincode.core.errors import GraincodeError
from graincode.core.images import from_uint8
from graincode.core.losses import feature_distance
from graincode.networks.features import Lite0Features
from graincode.networks.perceptual import Lite0Distance, LPIPSDistance, TimmDistance


@pytest.fixture(scope="module")
def vgg16(tmp_path_factory):
    path = write_vgg16(tmp_path_factory.mktemp("vgg") / "vgg16.pth")
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def lpips(vgg16):
    return LPIPSDistance(weights=str(vgg16))


@pytest.fixture(scope="module")
def lite0():
    return Lite0Distance()


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    return weights_of("test_resnet", tmp_path_factory.mktemp("resnet") / "resnet.safetensors")


def weights_of(model, path):
    """A file of random weights of a model of timm."""
    torch.manual_seed(0)
    save_file(timm.create_model(model, pretrained=False).state_dict(), path)
    return str(path)


def pairs(count=3, size=64):
    """Smooth images, and others."""
    coarse = torch.rand(2, count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return F.interpolate(coarse.flatten(0, 1), size=size, mode="bilinear").split(count)


def test_lpips_is_that_of_its_authors(lpips):
    """The numbers are those of the package `lpips` 0.1.4 with these weights and images."""
    found = lpips(numbers(2, 3, 48, 40) * 1.9, numbers(2, 3, 48, 40, start=7) * 1.5 + 0.2)
    torch.testing.assert_close(found, torch.tensor([0.1812250018, 0.1810256690]), rtol=0, atol=1e-6)
    ramp = torch.linspace(-1, 1, 16).expand(1, 3, 16, 16)
    assert lpips(ramp, ramp.mT).item() == pytest.approx(0.1989918947, abs=1e-6)
    assert lpips(ramp, torch.full_like(ramp, 0.25)).item() == pytest.approx(0.1827208102, abs=1e-6)


def test_lpips_is_identified_by_its_weights(lpips, vgg16):
    assert re.fullmatch("lpips-vgg:[0-9a-f]{12}", lpips.identity)
    tensors = torch.load(vgg16, weights_only=True)
    tensors["features.28.bias"][0] += 1
    other = vgg16.with_name("other.pth")
    torch.save(tensors, other)
    try:
        assert LPIPSDistance(weights=str(other)).identity != lpips.identity
    finally:
        other.unlink()


@pytest.mark.parametrize("name", ["lpips", "lite0"])
def test_the_distance_is_zero_for_equal_images_and_grows_as_they_part(name, request):
    distance, (a, b) = request.getfixturevalue(name), pairs()
    assert distance(a, a).tolist() == [0, 0, 0]
    near, far = distance(torch.lerp(a, b, 0.1), a), distance(b, a)
    assert near.shape == (3,)
    assert (near > 0).all()
    assert (far > near).all()
    torch.testing.assert_close(distance(b[1:2], a[1:2]), far[1:2])
    grey = a.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    assert (distance(grey, a) > 0).all()


@pytest.mark.parametrize("name", ["lpips", "lite0"])
def test_stored_images_have_the_distance_of_what_they_stand_for(name, request):
    distance, stored = request.getfixturevalue(name), [((part + 1) * 127.5).to(torch.uint8) for part in pairs()]
    found = distance(*stored)
    assert not found.requires_grad
    assert torch.equal(found, distance(*(from_uint8(part) for part in stored)))


@pytest.mark.parametrize("name", ["lpips", "lite0"])
def test_a_gradient_step_brings_images_nearer_and_leaves_the_network_alone(name, request):
    distance, (a, b) = request.getfixturevalue(name), pairs()
    moved = b.clone().requires_grad_()
    before = distance(moved, a)
    before.sum().backward()
    assert (moved.grad.flatten(1).norm(dim=1) > 0).all()
    with torch.no_grad():
        assert (distance(moved - 0.01 * F.normalize(moved.grad, dim=(1, 2, 3)), a) < before).all()
    assert not distance.module.training
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in distance.module.parameters())


def test_it_is_lpips_without_linear_weights(resnet):
    distance = TimmDistance("test_resnet", weights=resnet, stages=[0, 2, 4])
    network = timm.create_model("test_resnet", pretrained=False, features_only=True, out_indices=(0, 2, 4)).eval()
    network.load_state_dict({key: value for key, value in load_file(resnet).items() if not key.startswith("fc")})
    a, b = pairs()
    mean, std = (torch.tensor(network.default_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    maps = [[F.normalize(m, dim=1) for m in network(((x + 1) / 2 - mean) / std)] for x in (a, b)]
    expected = sum((x - y).square().sum(1).mean((1, 2)) for x, y in zip(*maps, strict=True))
    torch.testing.assert_close(distance(a, b), expected.detach())


def test_a_file_of_weights_counts_by_its_content_not_by_its_path(resnet, tmp_path):
    changed = load_file(resnet)
    save_file(changed, tmp_path / "same.safetensors")
    changed["fc.bias"] += 1
    save_file(changed, tmp_path / "other.safetensors")
    paths = (resnet, tmp_path / "same.safetensors", tmp_path / "other.safetensors")
    found = [TimmDistance("test_resnet", weights=str(path)).identity for path in paths]
    assert found[0] == found[1] != found[2]


def test_lite0_is_the_network_of_the_features_of_that_name(lite0):
    assert lite0.identity == "lite0:283f4cd01260"
    assert Lite0Features(112).weights_hash == lite0.weights_hash


def test_transformers_take_images_of_their_own_and_of_another_size(tmp_path):
    path = weights_of("test_vit", tmp_path / "vit.safetensors")
    a, b = pairs()
    for resize in (None, 96):
        distance = TimmDistance("test_vit", weights=path, resize=resize, stages=[1, 5])
        assert (distance(a, b) > distance(a, a)).all()
    with pytest.raises(GraincodeError, match=r"test_vit takes no images of \(65, 64\) pixels"):
        TimmDistance("test_vit", weights=path).load((65, 64))


def test_it_works_in_bfloat16_and_in_float64(lite0):
    a, b = pairs()
    exact, rough = lite0(b.double(), a.double()), b.clone().requires_grad_()
    assert exact.dtype == torch.float64
    torch.testing.assert_close(lite0(b, a).double(), exact, rtol=1e-4, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        found = lite0(rough, a)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0.05, atol=0)
    found.sum().backward()
    assert bool(rough.grad.isfinite().all())


def test_positions_with_zero_features_have_zero_gradient():
    features = torch.randn(2, 4, 3, 3)
    features[:, :, 1, 1] = 0
    features.requires_grad_()
    feature_distance(features, torch.randn(2, 4, 3, 3)).sum().backward()
    assert bool(features.grad.isfinite().all())
    assert (features.grad[:, :, 1, 1] == 0).all()
    assert (features.grad.abs().sum(1) > 0).sum() == 2 * 8


def test_images_that_are_too_small_or_not_in_colour_are_refused(lite0, lpips):
    small = torch.zeros(1, 3, 16, 24)
    with pytest.raises(GraincodeError, match=r"\(16, 24\) pixels are too small for lite0: expected 32 or more"):
        lite0(small, small)
    assert Lite0Distance(stages=[0, 1, 2])(small, small) == 0
    assert Lite0Distance(resize=64)(small, small) == 0
    with pytest.raises(GraincodeError, match=r"expected \(B, 3, H, W\) twice"):
        lite0(small[:, :1], small[:, :1])
    with pytest.raises(GraincodeError, match=r"\(8, 8\) pixels are too small for lpips-vgg: expected 16 or more"):
        lpips.load((8, 8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0}, "weight=0: expected"),
        ({"resize": 0}, "resize=0: expected"),
        ({"stages": [1, 1]}, r"stages=\[1, 1\]: expected"),
        ({"stages": [6]}, r"stages=\[6\]: expected some of 0 to 4"),
        ({"model": "resnet81"}, "model=resnet81: expected"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(resnet, settings, message):
    with pytest.raises(GraincodeError, match=f"^{message}"):
        TimmDistance(**{"model": "test_resnet", "weights": resnet} | settings).load()


def test_the_networks_have_the_order_of_fast_kernels(lite0, lpips):
    images = torch.randn(2, 3, 64, 64)
    for distance in (lite0, lpips):
        distance(images, images)
        kernels = [part.weight for part in distance.module.modules() if isinstance(part, torch.nn.Conv2d)]
        assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
        maps = distance.module.stages(images, distance.stages)
        assert all(found.is_contiguous(memory_format=torch.channels_last) for found in maps)
