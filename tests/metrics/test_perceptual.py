"""Perceptual distances: LPIPS equals its authors' package, with a trunk that comes from a file."""

import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers_metrics import Bomb, message_of
from lpips import LPIPS
from torch import Tensor, nn
from torchvision.models import vgg16

from graincode.core.errors import GraincodeError
from graincode.core.images import from_uint8
from graincode.evaluation.pairs import PairMean
from graincode.networks.distances import Lite0Distance, LPIPSDistance
from graincode.networks.features import Lite0Features
from graincode.networks.perceptual import Lite0Loss, LPIPSLoss

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchvision")


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[nn.Sequential, Path]]:
    """The convolutions of a VGG16 with random weights, and a file of them as torchvision names them."""
    torch.manual_seed(0)
    features = vgg16(weights=None, init_weights=False).features
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({f"features.{name}": tensor for name, tensor in features.state_dict().items()}, path)
    yield features, path
    path.unlink()


@pytest.fixture(scope="module")
def distance(trunk: tuple[nn.Sequential, Path]) -> LPIPSDistance:
    return LPIPSDistance(str(trunk[1]))


def images(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator) * 255
    return nn.functional.interpolate(coarse, size=48, mode="bilinear").to(torch.uint8)


def test_lpips_is_that_of_its_authors(trunk: tuple[nn.Sequential, Path], distance: LPIPSDistance):
    expected = LPIPS(net="vgg", pnet_rand=True, verbose=False)
    convolutions = [layer for layer in expected.net.modules() if isinstance(layer, nn.Conv2d)]
    with torch.no_grad():
        for own, given in zip(convolutions, (x for x in trunk[0] if isinstance(x, nn.Conv2d)), strict=True):
            own.weight.copy_(given.weight)
            own.bias.copy_(given.bias)
        a, b = images(4), images(4, seed=1)
        values = expected(from_uint8(a), from_uint8(b)).flatten()
    found = distance(a, b)
    assert found.shape == (4,)
    torch.testing.assert_close(found, values)
    assert (found > 1e-4).all()
    assert found.std() > 1e-5
    assert not found.requires_grad


def test_the_loss_is_the_metric_and_its_gradient_reaches_the_images(
    trunk: tuple[nn.Sequential, Path], distance: LPIPSDistance
):
    loss, a, b = LPIPSLoss(weights=str(trunk[1])), images(2), images(2, seed=1)
    made = from_uint8(a).requires_grad_()
    found = loss(made, from_uint8(b))
    torch.testing.assert_close(found.detach(), distance(a, b))
    assert loss.identity == distance.identity
    found.sum().backward()
    assert (made.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(parameter.grad is None for parameter in loss.load((48, 48)).parameters())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(made, from_uint8(b)), found, rtol=0.05, atol=0)


def test_lpips_of_equal_images_is_zero_and_grows_as_they_part(distance: LPIPSDistance):
    a, b = images(3), images(3, seed=1)
    assert distance(a, a).tolist() == [0, 0, 0]
    between = (0.75 * a + 0.25 * b).to(torch.uint8)
    assert (distance(a, between) < distance(a, b)).all()


def test_lpips_is_averaged_over_pairs(distance: LPIPSDistance):
    a, b = images(5), images(5, seed=1)
    mean = PairMean(distance)
    for x, y in zip(a.split(2), b.split(2), strict=True):
        mean.update(x, y)
    values = distance(a, b)
    assert mean.figure().value == pytest.approx(values.mean().item(), rel=1e-5)
    assert mean.figure().std == pytest.approx(values.std().item() / 5**0.5, rel=1e-4)


def test_lpips_takes_uint8_only(distance: LPIPSDistance):
    with pytest.raises(GraincodeError, match="expected uint8"):
        distance(images(1).float(), images(1).float())


def test_lpips_is_identified_by_its_weights(trunk: tuple[nn.Sequential, Path], distance: LPIPSDistance):
    assert re.fullmatch("lpips-vgg:[0-9a-f]{12}", distance.identity)
    tensors = torch.load(trunk[1], weights_only=True)
    tensors["features.28.bias"][0] += 1
    other = trunk[1].with_name("other.pth")
    torch.save(tensors, other)
    try:
        assert LPIPSDistance(str(other)).identity != distance.identity
    finally:
        other.unlink()


CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


@pytest.mark.parametrize(
    "wrong",
    [
        {"fc.weight": torch.zeros(1)},
        {f"features.{place}.{part}": torch.zeros(1) for place in CONVOLUTIONS for part in ("weight", "bias")},
    ],
    ids=["names", "shapes"],
)
def test_weights_that_are_no_vgg16_are_refused(tmp_path: Path, wrong: dict[str, Tensor]):
    torch.save(wrong, tmp_path / "other.pth")
    distance = LPIPSDistance(str(tmp_path / "other.pth"))
    with pytest.raises(GraincodeError, match=f"{len(wrong)} tensors that are not torchvision's VGG16") as error:
        distance(images(1), images(1))
    assert "evaluation.lpips_weights=/path/to/vgg16-397923af.pth" in message_of(error)
    assert str(tmp_path / "other.pth") in message_of(error)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_in_place_of_weights_is_refused_and_not_executed(tmp_path: Path):
    trace, path = tmp_path / "executed", tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps({"features.0.weight": Bomb(trace)}))
    distance = LPIPSDistance(str(path))
    with pytest.raises(GraincodeError) as error:
        distance(images(1), images(1))
    assert str(path) in message_of(error)
    assert not trace.exists()


def test_without_a_network_lpips_says_what_to_type(no_network: None):
    distance = LPIPSDistance()
    with pytest.raises(GraincodeError) as error:
        distance(images(1), images(1))
    message = message_of(error)
    assert "evaluation.lpips_weights=/path/to/vgg16-397923af.pth" in message
    assert "leave lpips out" in message
    assert "no route to host" in message


def test_the_distance_of_lite0_is_its_loss_and_names_its_weights():
    a, b = images(3), images(3, seed=1)
    distance = Lite0Distance()
    found = distance(a, b)
    torch.testing.assert_close(found, Lite0Loss()(from_uint8(a), from_uint8(b)))
    assert (found > 0).all()
    assert distance(a, a).tolist() == [0, 0, 0]
    assert re.fullmatch("lite0:[0-9a-f]{12}", distance.identity)
    assert Lite0Features(112).identity.endswith(distance.identity.partition(":")[2])
    with pytest.raises(GraincodeError, match=r"31 x 48 pixels are too small.* leave lite0 out of evaluation.metrics"):
        distance(a[:, :, :31], b[:, :, :31])
