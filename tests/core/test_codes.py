from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LAYOUTS, grain_codes, random_codes, random_grains

from graincode.core.codes import CodeCells, GrainCodes, true_places
from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout, check_layouts
from graincode.core.sequences import CodeSequences, from_sequences, to_sequences


@given(grain_codes())
@settings(max_examples=150, deadline=None)
def test_sequences_are_the_codes(codes):
    for ends in (True, False):
        sequences = to_sequences(codes, ends)
        back = from_sequences(sequences)
        assert torch.equal(back.grains, codes.grains)
        assert torch.equal(back.indices, codes.indices)
        tokens = (sequences.slots != codes.layout.pad_slot).sum(dim=1)
        assert torch.equal(tokens, codes.lengths + ends * codes.layout.num_marks)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: str(layout.grains))
def test_all_coarse_and_all_fine_are_sequences_too(layout):
    codes = random_codes(layout, random_grains(layout, 2))
    back = from_sequences(to_sequences(codes))
    assert torch.equal(back.grains, codes.grains)
    assert torch.equal(back.indices, codes.indices)
    assert codes.lengths.tolist() == [layout.num_regions, layout.num_regions * layout.codes_per_region[-1]]


@given(grain_codes())
@settings(max_examples=50, deadline=None)
def test_each_code_counts_once(codes):
    sequences = to_sequences(codes)
    assert torch.equal(sequences.is_code.sum(dim=1), codes.lengths)
    assert torch.equal(codes.first_cells.sum(dim=(1, 2)), codes.lengths)
    marks = sequences.is_token & ~sequences.is_code
    assert (marks.sum(dim=1) == codes.layout.num_marks).all()


@given(grain_codes())
@settings(max_examples=50, deadline=None)
def test_order_is_coarse_to_fine_then_region_then_cell(codes):
    layout, sequences = codes.layout, to_sequences(codes)
    table = layout.slots()
    for row in range(len(codes)):
        slots = sequences.slots[row][sequences.is_code[row]]
        by_rows = (table.grain == layout.num_grains - 1) & (layout.last_grain_order == "rows")
        inner = torch.where(by_rows, table.finest, table.region * layout.codes_per_region[-1] + table.cell)
        keys = [(int(table.grain[s]), int(inner[s])) for s in slots]
        assert keys == sorted(keys)
        region_of = {int(table.region[s]): int(table.grain[s]) for s in slots}
        assert [region_of[r] for r in range(layout.num_regions)] == codes.grains[row].flatten().tolist()


def test_padding_of_one_image_does_not_depend_on_the_others():
    layout = LAYOUTS[2]
    codes = random_codes(layout, random_grains(layout, 5))
    together = to_sequences(codes)
    for row in range(5):
        alone = to_sequences(codes[[row]])
        length = alone.slots.shape[1]
        assert torch.equal(alone.slots[0], together.slots[row, :length])
        assert torch.equal(alone.contents[0], together.contents[row, :length])
        assert (together.slots[row, length:] == layout.pad_slot).all()


@given(grain_codes(), st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_a_sequence_with_a_hole_is_refused(codes, seed):
    sequences = to_sequences(codes)
    slots, contents = sequences.slots.clone(), sequences.contents.clone()
    places = sequences.is_code[0].nonzero()[:, 0]
    place = places[seed % len(places)]
    slots[0, place], contents[0, place] = codes.layout.pad_slot, codes.layout.no_content
    with pytest.raises(GraincodeError, match="does not tile"):
        from_sequences(CodeSequences(slots, contents, codes.layout))


@given(grain_codes())
@settings(max_examples=30, deadline=None)
def test_scatter_undoes_gather(codes):
    layout = codes.layout
    maps = [torch.randn(len(codes), 3, *grid) for grid in layout.grids]
    cells = CodeCells.of(codes.grains, layout)
    parts = cells.gather(maps)
    assert sum(map(len, parts)) == int(codes.lengths.sum())
    for g, (back, original) in enumerate(zip(cells.scatter(parts), maps, strict=True)):
        here = layout.cells_at(codes.grains, g)[:, None]
        assert torch.equal(back, original * here)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_images_have_no_codes_to_gather_and_scatter(layout):
    cells = CodeCells.of(torch.zeros(0, *layout.grids[0], dtype=torch.long), layout)
    parts = cells.gather([torch.zeros(0, 3, *grid) for grid in layout.grids])
    assert [part.shape for part in parts] == [(0, 3)] * layout.num_codebooks
    assert [part.shape for part in cells.scatter(parts)] == [(0, 3, *grid) for grid in layout.grids]


@pytest.mark.parametrize("mask", [[], [False], [True], [False, True, True, False], [True, False, False, True]])
def test_true_places_are_those_that_nonzero_finds(mask):
    mask = torch.tensor(mask, dtype=torch.bool)
    assert torch.equal(true_places(mask, int(mask.sum())), mask.nonzero()[:, 0])


@given(grain_codes())
@settings(max_examples=20, deadline=None)
def test_the_counts_of_codes_are_those_of_their_grain_maps(codes):
    longest, regions = codes.counts
    assert longest == int(codes.lengths.max())
    assert list(regions) == torch.bincount(codes.grains.flatten(), minlength=codes.layout.num_grains).tolist()


def test_the_slots_of_a_layout_written_out_by_hand():
    layout = CodeLayout((4, 4), ((4, 2), (2, 2)), 9)
    table = layout.slots()
    # two regions side by side; grain 0: one cell each, then its end; grain 1: two cells each, one below the other
    assert table.grain.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert table.region.tolist() == [0, 1, 2, 0, 0, 1, 1]
    assert table.finest.tolist() == [0, 1, 0, 0, 2, 1, 3]
    assert table.is_end.tolist() == [False, False, True, False, False, False, False]
    assert table.first.tolist() == [[0, 1, 2], [3, 5, 7]]
    assert table.following.tolist() == [7, 7, 7, 4, 7, 6, 7]
    assert table.at_cell.tolist() == [[0, 1, 0, 1], [3, 5, 4, 6]]
    assert (layout.num_slots, layout.max_tokens, layout.pad_slot, layout.start_slot) == (7, 5, 7, 8)


def test_rows_and_starts_written_out_by_hand():
    layout = CodeLayout((4, 4), ((4, 2), (2, 1)), 9, 0, "shared", "rows", True)
    table = layout.slots()
    # grain 0: two cells, its end; grain 1: its start, then two rows of four cells, two of each region
    assert table.grain.tolist() == [0, 0, 0, *[1] * 9]
    assert table.region.tolist() == [0, 1, 2, 2, 0, 0, 1, 1, 0, 0, 1, 1]
    assert table.cell.tolist() == [0, 0, 0, 0, 0, 1, 0, 1, 2, 3, 2, 3]
    assert table.finest.tolist() == [0, 2, 0, 0, *range(8)]
    assert table.is_code.tolist() == [True, True, False, False, *[True] * 8]
    assert table.is_end.tolist() == [False, False, True, *[False] * 9]
    assert table.is_last.tolist() == [True, True, *[False] * 7, True, False, True]
    assert table.following.tolist() == [12, 12, 3, *[12] * 9]  # after the end its start; else the grain map decides
    assert table.first.tolist() == [[0, 1, 2], [4, 6, 12]]
    assert table.at_cell.tolist() == [[0, 0, 1, 1] * 2, [*range(4, 12)]]
    assert (layout.num_slots, layout.max_tokens, layout.num_marks) == (12, 10, 2)
    codes = random_codes(layout, torch.tensor([[[1, 0]], [[1, 1]]]))
    assert to_sequences(codes).slots.tolist() == [[1, 2, 3, 4, 5, 8, 9, *[12] * 3], [2, 3, *range(4, 12)]]


@pytest.mark.parametrize("grains", [((8, 8),), ((4, 8),)], ids=str)
def test_rows_and_starts_change_nothing_with_one_grain(grains):
    plain, other = (CodeLayout((32, 32), grains, 16, 0, "shared", *more) for more in ((), ("rows", True)))
    assert plain.num_slots == other.num_slots
    for name, column in vars(plain.slots()).items():
        assert torch.equal(getattr(other.slots(), name), column), name


@given(grain_codes())
@settings(max_examples=50, deadline=None)
def test_the_order_of_the_last_grain_moves_its_codes_alone(codes):
    orders = [replace(codes.layout, last_grain_order=order) for order in ("regions", "rows")]
    a, b = (to_sequences(replace(codes, layout=layout)) for layout in orders)
    last = codes.layout.num_grains - 1
    tables = [layout.slots() for layout in orders]
    for row in range(len(codes)):
        lists = [
            [
                (*(int(c[s]) for c in (t.grain, t.region, t.cell)), int(v))
                for s, v in zip(x.slots[row], x.contents[row], strict=True)
                if s < codes.layout.num_slots
            ]
            for t, x in zip(tables, (a, b), strict=True)
        ]
        coarse = [[token for token in tokens if token[0] < last] for tokens in lists]
        assert coarse[0] == coarse[1] == lists[1][: len(coarse[1])]
        assert sorted(lists[0]) == sorted(lists[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((30, 32), ((8, 8),), 4), r"grains=.*: expected .* image_size=\[30, 32\], .* \[32, 32\]"),
        (((32, 32), ((8, 8), (16, 16)), 4), "grains=.*: expected coarse to fine"),
        (((32, 32), ((8, 8), (8, 8)), 4), "grains=.*: expected coarse to fine"),
        (((32, 32), (), 4), r"grains=\[\]: expected at least one"),
        (((32, 32), ((8, 8),), 0), "codebook_size=0: expected 1"),
        (((32, 32), ((8, -8),), 4), "grains=.*: expected a positive"),
        (((32, 32), ((8, 8),), 4, 0, "one"), "codebook=one: expected one of"),
        (((32, 32), ((8, 8),), 4, 0, "shared", "row"), "last_grain_order=row: expected one of regions, rows"),
        (((32, 32), ((8, 8),), 4, 0, "shared", "rows", 1), "grain_starts=1: expected true or false"),
    ],
)
def test_impossible_layouts_are_refused(arguments, message):
    with pytest.raises(GraincodeError, match=f"^{message}"):
        CodeLayout(*arguments)


def test_codes_from_elsewhere_are_checked():
    layout = LAYOUTS[2]
    codes = random_codes(layout, random_grains(layout, 2))
    torn = codes.indices.clone()
    torn[0, 0, 0] = (torn[0, 0, 0] + 1) % layout.codebook_size
    with pytest.raises(GraincodeError, match="coarse cell"):
        GrainCodes.checked(codes.grains, torn, layout)
    with pytest.raises(GraincodeError, match="expected 0 to 1"):
        GrainCodes.checked(codes.grains + 1, codes.indices, layout)
    with pytest.raises(GraincodeError, match="shape"):
        GrainCodes.checked(codes.grains, codes.indices[:, :4], layout)


def test_layouts_survive_their_config():
    for layout in LAYOUTS:
        assert CodeLayout(**layout.to_config()) == layout


def test_a_layout_without_an_order_is_by_regions_and_without_starts():
    config = LAYOUTS[2].to_config()
    assert (config.pop("last_grain_order"), config.pop("grain_starts")) == ("regions", False)
    assert CodeLayout(**config) == LAYOUTS[2]


def test_codes_of_one_layout_fit_models_of_other_orders_and_no_other_size():
    layout = LAYOUTS[2]
    check_layouts(layout, replace(layout, last_grain_order="rows", grain_starts=True, classes=0), "codes", "a model")
    with pytest.raises(GraincodeError, match="codes do not fit a model: codebook_size 256 instead of 9; take"):
        check_layouts(layout, replace(layout, codebook_size=9), "codes", "a model")
