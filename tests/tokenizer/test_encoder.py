import pytest
import torch
from helpers_tokenizer import DUAL, make, photographs
from hydra.utils import instantiate
from omegaconf import OmegaConf

from graincode.config.schema import config_directory
from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout
from graincode.tokenizer import GrainDecoder, GrainEncoder, TrunkSize


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_every_pixel_reaches_every_grain(patch):
    encoder = make(DUAL, patch=patch).encoder
    for grain in range(2):
        images = photographs(1).requires_grad_()
        encoder(images)[grain].sin().sum().backward()
        assert (images.grad != 0).any(dim=1).all()


def test_grains_that_halving_does_not_reach_are_refused():
    with pytest.raises(GraincodeError, match=r"^grains=.*powers of two"):
        make(CodeLayout((36, 36), ((12, 12), (4, 4)), 16))


@pytest.mark.parametrize(("name", "value"), [("channels", 0), ("multipliers", []), ("blocks", 0), ("patch", 3)])
def test_sizes_that_cannot_be_are_refused(name, value):
    sizes = {"channels": 8, "multipliers": [1], "blocks": 1, "attention": []} | {name: value}
    with pytest.raises(GraincodeError, match=f"^{name}="):
        GrainEncoder(DUAL, TrunkSize(**sizes), 8)


@pytest.mark.parametrize(
    ("size", "pixels", "grains", "code_dim", "millions"),
    [
        ("tiny", 64, ((8, 8), (4, 4)), 16, 0.614),
        ("paper_dual", 256, ((16, 16), (8, 8)), 256, 43.750),
        ("paper_triple", 256, ((32, 32), (16, 16), (8, 8)), 256, 69.333),
    ],
)
def test_published_sizes_give_the_shapes_of_their_layout(size, pixels, grains, code_dim, millions):
    shape = instantiate(OmegaConf.load(config_directory() / "tokenizer" / "size" / f"{size}.yaml"))
    layout = CodeLayout((pixels, pixels), grains, 16)
    with torch.device("meta"):
        encoder, decoder = GrainEncoder(layout, shape, code_dim), GrainDecoder(layout, shape, code_dim)
        maps = encoder(torch.zeros(2, 3, pixels, pixels))
        images = decoder(maps, torch.zeros(2, *layout.grids[0], dtype=torch.long))
    assert [tuple(part.shape) for part in maps] == [(2, code_dim, *grid) for grid in layout.grids]
    assert images.shape == (2, 3, pixels, pixels)
    count = sum(parameter.numel() for part in (encoder, decoder) for parameter in part.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=1e-3)
