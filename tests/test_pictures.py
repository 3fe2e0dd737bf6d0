import numpy as np
import pytest
import torch

from graincode.core.codes import GrainCodes
from graincode.core.layout import CodeLayout
from graincode.pictures import (
    chart,
    code_maps,
    density_maps,
    error_maps,
    grain_maps,
    grain_usage,
    grid,
    length_histogram,
    to_pixels,
    to_svg,
)  # fmt: skip

LAYOUTS = [
    CodeLayout((32, 32), ((8, 8), (4, 4)), 16),
    CodeLayout((32, 32), ((4, 8),), 16),
    CodeLayout((64, 64), ((32, 32), (16, 16), (4, 4)), 16),
]


def test_a_grid_holds_every_image_in_its_place():
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 2, 4)
    picture = grid(images, 3, scale=2, gap=1)
    assert picture.shape == (3, 2 * (4 + 1) + 1, 3 * (8 + 1) + 1)
    for index in range(6):
        top, left = 1 + 5 * (index // 3), 1 + 9 * (index % 3)
        assert (picture[:, top : top + 4, left : left + 8] == (index if index < 5 else 255)).all()
    assert (picture[:, 0] == 255).all()
    assert (picture[:, 5] == 255).all()


def test_errors_are_black_where_there_are_none_and_brightest_from_the_limit_on():
    images = torch.full((2, 3, 4, 4), -1.0)
    wrong = images.clone()
    wrong[0, :, 0, 0] += 2 * 0.21  # an error of 0.044 in [0, 1]
    wrong[0, 0, 0, 1] += 2 * 0.21  # a third of it
    wrong[1, :, 1, 1] = 1.0
    maps = error_maps(images, wrong)
    assert maps.dtype == torch.uint8
    assert maps[0, :, 3, 3].tolist() == maps[1, :, 0, 0].tolist() == maps[0, :, 1, 1].tolist()
    assert torch.equal(maps[0, :, 0, 0], maps[1, :, 1, 1])
    brightness = maps[0].long().sum(dim=0)
    assert brightness[3, 3] < 10
    assert brightness[0, 0] > brightness[0, 1] > brightness[3, 3]
    # the scale is fixed: other images beside it change nothing
    assert torch.equal(error_maps(images[:1], wrong[:1]), maps[:1])
    assert (error_maps(images, wrong, limit=10.0)[0].long().sum(dim=0) <= brightness).all()


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
        figures = length_histogram(codes.lengths, layout), grain_usage(codes)
        assert sum(bar.get_height() for bar in figures[0].axes[0].patches) == count
        heights = np.array([bar.get_height() for bar in figures[1].axes[0].patches]).reshape(3, layout.num_grains)
        assert heights[:2].sum(axis=1) == pytest.approx([100, 100])
        for figure in figures:
            picture = to_pixels(figure)
            assert picture.shape == (3, 300, 480)
            assert picture.dtype == torch.uint8
            assert len(picture.unique()) > 10


def test_a_chart_is_an_element_that_needs_nothing_and_takes_the_colours_of_the_page():
    def drawn():
        figure, axes = chart()
        axes.plot([1, 2], [3, 4])
        axes.set(xlabel="steps")
        return to_svg(figure, 'a "title"')

    text = drawn()
    assert text.startswith('<svg viewBox="0 0 345.6 216"')
    assert text.rstrip().endswith("</svg>")
    assert 'aria-label="a &quot;title&quot;"' in text
    assert ">steps</text>" in text
    assert "var(--blue, #1f77b4)" in text
    assert "http" not in text
    assert "<style" not in text
    assert drawn() == text


def test_maps_are_colours_of_their_values():
    density = torch.tensor([[[0.0, 1.0], [0.5, 1.0]]])
    maps = density_maps(density, (4, 4))
    assert maps.shape == (1, 3, 4, 4)
    assert torch.equal(maps[0, :, 0, 2], maps[0, :, 3, 3])
    assert not torch.equal(maps[0, :, 0, 0], maps[0, :, 2, 0])
    assert torch.equal(density_maps(density.square(), (4, 4)), maps)  # their ranks are what is shown
    codes = GrainCodes(torch.zeros(1, 1, 1).long(), torch.full((1, 2, 2), 5), CodeLayout((8, 8), ((8, 8), (4, 4)), 16))
    assert len(code_maps(codes)[0].flatten(1).unique(dim=1).T) == 1


def test_grain_maps_outline_the_cells_of_each_grain():
    grains = torch.tensor([[[0, 1]]])
    maps = grain_maps(torch.ones(1, 3, 8, 16), grains, ((8, 8), (4, 4)), scale=3)
    assert maps.shape == (1, 3, 24, 48)
    plain = maps[0, :, 5, 5]
    assert plain.tolist() == [140] * 3  # white, darkened
    assert not torch.equal(maps[0, :, 0, 5], plain)
    assert torch.equal(maps[0, :, 12, 5], plain)  # a coarse cell has no line in its middle
    assert torch.equal(maps[0, :, 12, 26], maps[0, :, 0, 26])
    assert not torch.equal(maps[0, :, 12, 26], maps[0, :, 0, 5])
