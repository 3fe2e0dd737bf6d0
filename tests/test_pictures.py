import numpy as np
import pytest
import torch
from PIL import Image

from graincode.core.codes import GrainCodes
from graincode.core.layout import CodeLayout
from graincode.pictures import code_maps, density_maps, error_maps, grain_usage, length_histogram
from graincode.training.trackers import LogSettings, RunLog

LAYOUTS = [
    CodeLayout((32, 32), ((8, 8), (4, 4)), 16),
    CodeLayout((32, 32), ((4, 8),), 16),
    CodeLayout((64, 64), ((32, 32), (16, 16), (4, 4)), 16),
]


def test_errors_are_black_where_there_are_none_and_brightest_from_the_limit_on():
    images = torch.full((2, 3, 4, 4), -1.0)
    made = images.clone()
    made[0, :, 0, 0] += 2 * 0.21  # an error of 0.044 in [0, 1]
    made[0, 0, 0, 1] += 2 * 0.21  # a third of it
    made[1, :, 1, 1] = 1.0
    maps = error_maps(images, made)
    assert maps.dtype == torch.uint8
    assert maps[0, :, 3, 3].tolist() == maps[1, :, 0, 0].tolist() == maps[0, :, 1, 1].tolist()
    assert torch.equal(maps[0, :, 0, 0], maps[1, :, 1, 1])
    brightness = maps[0].long().sum(dim=0)
    assert brightness[3, 3] < 10
    assert brightness[0, 0] > brightness[0, 1] > brightness[3, 3]
    # the scale is fixed: other images beside it change nothing
    assert torch.equal(error_maps(images[:1], made[:1]), maps[:1])
    assert (error_maps(images, made, limit=10.0)[0].long().sum(dim=0) <= brightness).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_lengths_and_grains_are_drawn_for_any_layout(layout):
    for count, grain in ((1, 0), (40, None)):
        shape = (count, *layout.grids[0])
        grains = torch.randint(layout.num_grains, shape) if grain is None else torch.full(shape, grain)
        finest = sum(
            layout.expand(torch.randint(16, (count, *grid)), g) * (layout.expand(grains, 0) == g)
            for g, grid in enumerate(layout.grids)
        )
        codes = GrainCodes(grains, finest, layout)
        for picture in (length_histogram(codes.lengths, layout), grain_usage(codes)):
            assert picture.shape == (3, 300, 480)
            assert picture.dtype == torch.uint8
            assert len(picture.unique()) > 10


def test_maps_are_colours_of_their_values():
    density = torch.tensor([[[0.0, 1.0], [0.5, 1.0]]])
    maps = density_maps(density, (4, 4))
    assert maps.shape == (1, 3, 4, 4)
    assert torch.equal(maps[0, :, 0, 2], maps[0, :, 3, 3])
    assert not torch.equal(maps[0, :, 0, 0], maps[0, :, 2, 0])
    assert torch.equal(density_maps(density.square(), (4, 4)), maps)  # their ranks are what is shown
    codes = GrainCodes(torch.zeros(1, 1, 1).long(), torch.full((1, 2, 2), 5), CodeLayout((8, 8), ((8, 8), (4, 4)), 16))
    assert len(code_maps(codes)[0].flatten(1).unique(dim=1).T) == 1


def test_the_newest_picture_of_each_name_is_kept_as_a_file(tmp_path):
    log, image = RunLog(tmp_path, 0, True, LogSettings(tensorboard=False)), torch.zeros(3, 4, 6, dtype=torch.uint8)
    log.image(1, "Images, density: all", image)
    image[0] = 200
    log.image(None, "Images, density: all", image)
    (file,) = (tmp_path / "pictures").iterdir()
    assert file.name == "images_density_all.png"
    assert (np.asarray(Image.open(file)) == [200, 0, 0]).all()
