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


@pytest.mark.parametrize("strides", [((16, 16), (8, 8)), ((8, 16), (8, 8))])
def test_padding_at_the_end_sees_no_pixel_left_or_above_of_a_cell(strides):
    layout = CodeLayout((32, 64), strides, 16)
    size = TrunkSize(8, [1], blocks=1, attention=[], padding="end")
    down = GrainEncoder(layout, size, 4).downs[-1]
    columns = torch.arange(8.0).expand(1, 8, 6, 8)
    with torch.no_grad():
        down.weight.zero_()[:, 0, 1, 0] = 1  # the left cell of each window
        down.bias.zero_()
        found = down(columns)[0, 0, 1]
    assert found.tolist() == [0, 2, 4, 6]


def test_levels_of_the_decoder_may_have_more_blocks_and_change_their_width_themselves():
    size = TrunkSize(8, [1, 2, 3], blocks=2, attention=[], extra_blocks=1, middle_blocks=1, upsampling="own")
    decoder = GrainDecoder(DUAL, size, 4, position="none")
    assert [len(level) for level in decoder.levels] == [3, 3, 3]
    assert [(up.in_channels, up.out_channels) for up in decoder.ups] == [(24, 24), (16, 16)]
    assert [level[0].conv1.in_channels for level in decoder.levels] == [24, 24, 16]
    assert len(decoder.stem) == 3  # convolution, block, attention
    assert not hasattr(decoder.position, "rows")


def test_a_seed_gives_the_weights_that_it_has_given_before():
    tokenizer = make(DUAL)
    parts = tokenizer.encoder.heads[0][1].qkv, tokenizer.encoder.heads[1][0].conv1, tokenizer.decoder.last
    sums = [float(part.weight.detach().double().abs().sum()) for part in parts]
    assert sums == pytest.approx([95.63400468, 95.65954155, 50.41146348], abs=1e-7)
