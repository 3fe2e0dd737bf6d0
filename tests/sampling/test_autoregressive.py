from dataclasses import replace

import pytest
import torch
from helpers_generators import MODERN, labels_for, make_ar, same
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LAYOUTS, random_codes, random_grains

from graincode.core.errors import GraincodeError
from graincode.core.prompts import CodePrefix
from graincode.core.rng import uniforms
from graincode.core.sequences import from_sequences, to_sequences
from graincode.sampling import AutoregressiveSampler
from graincode.sampling import autoregressive as sampling
from graincode.sampling.settings import Part


class Indifferent:
    """Logits that do not depend on anything, plus an inclination towards the end of a grain."""

    def __init__(self, layout, end):
        self.layout, self.end, self.begun = layout, end, []

    def take(self, slots, contents):
        self.count = len(slots)

    def begin(self, rows, labels, given):
        self.begun += labels.tolist()

    def regions(self):
        logits = torch.zeros(self.count, self.layout.num_regions + 1)
        logits[:, -1] = self.end
        return logits

    def contents(self, slots):
        return torch.zeros(len(slots), self.layout.codebook_size)


@given(st.sampled_from(LAYOUTS), st.integers(0, 2**31), st.floats(-8, 8))
@settings(max_examples=60, deadline=None)
def test_samples_under_the_legality_mask_tile_the_image(layout, seed, end):
    numbers = uniforms(seed, range(5), layout.max_tokens, 2)
    codes = from_sequences(AutoregressiveSampler()(Indifferent(layout, end), layout, numbers))
    assert len(codes) == 5  # from_sequences refuses what does not tile


def test_every_grain_map_can_be_drawn():
    layout = LAYOUTS[5]
    numbers = uniforms(0, range(6000), layout.max_tokens, 2)
    grains = from_sequences(AutoregressiveSampler()(Indifferent(layout, 0.0), layout, numbers)).grains
    assert {tuple(row) for row in grains.flatten(1).tolist()} == {
        (a, b, c, d) for a in range(3) for b in range(3) for c in range(3) for d in range(3)
    }


def test_every_cell_of_every_grid_can_be_drawn():
    layout = LAYOUTS[5]
    codes = make_ar(layout).sample(torch.zeros(300, dtype=torch.long), batch_size=300)
    for g in range(layout.num_grains):
        assert layout.cells_at(codes.grains, g).any(dim=0).all(), f"grain {g}"


def test_greedy_and_truncated_sampling():
    layout = LAYOUTS[2]
    model, labels = make_ar(layout), labels_for(layout, 6)
    greedy = model.sample(labels, seed=1, batch_size=6, top_k=1, region_top_k=1)
    assert torch.equal(greedy.indices, model.sample(labels, seed=2, batch_size=6, top_k=1, region_top_k=1).indices)
    for name, value in (
        ("temperature", 0), ("top_k", -1), ("region_top_k", -1), ("top_p", 0), ("region_top_p", 1.5), ("min_p", 1),
        ("region_min_p", -0.1), ("guidance_schedule", "late"),
    ):  # fmt: skip
        with pytest.raises(GraincodeError, match=rf"^{name}={value}: expected"):
            model.sample(labels, **{name: value})
    likely = model.sample(labels, seed=1, batch_size=6, min_p=1 - 1e-9, region_min_p=1 - 1e-9)
    assert torch.equal(likely.indices, greedy.indices)


ORDERS = pytest.mark.parametrize(
    ("block", "order"), [({}, {}), (MODERN, {}), ({}, {"last_grain_order": "rows", "grain_starts": True})],
    ids=["plain", "modern", "rows and starts"],
)  # fmt: skip


def of_unlike_lengths(layout, count):
    """Codes of which three of four images are all coarse, and complete early."""
    return random_codes(layout, random_grains(layout, count) * (torch.arange(count) % 4 == 0)[:, None, None])


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@ORDERS
def test_a_draw_takes_as_many_steps_as_its_lengths_divided_by_the_rows(block, order, guidance):
    layout = replace(LAYOUTS[2], **order)
    model, labels = make_ar(layout, dtype=torch.float64, block=block), labels_for(layout, 96)
    given, batches, finished = CodePrefix.of_grains(of_unlike_lengths(layout, 96), 1), [], []
    step = model.position_transformer.register_forward_hook(lambda _, args, __: batches.append(len(args[0])))
    settings = {"guidance_scale": guidance, "given": given}
    together = model.sample(labels, batch_size=96, **settings)
    assert len(batches) == int((tokens := to_sequences(together).is_token.sum(dim=1)).max())
    batches.clear()
    continued = model.sample(labels, batch_size=8, on_step=lambda _, complete: finished.append(complete), **settings)
    step.remove()
    assert same(continued, together)
    assert {*batches} == {8 * (1 + (guidance != 1))}
    assert len(batches) <= int(tokens.sum()) / 8 + int(tokens.max())
    assert finished == sorted(finished)
    assert finished[-1] == 96


@pytest.mark.parametrize("every", [2, 5])
def test_how_often_a_sampler_looks_whether_samples_are_complete_changes_nothing(every, monkeypatch):
    layout = LAYOUTS[2]
    model, labels = make_ar(layout, dtype=torch.float64), labels_for(layout, 24)
    settings = {"batch_size": 5, "given": CodePrefix.of_grains(of_unlike_lengths(layout, 24), 1)}
    often = model.sample(labels, **settings)
    monkeypatch.setattr(sampling, "check_every", lambda *_: every)
    assert same(model.sample(labels, **settings), often)


@given(st.integers(0, 2), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**31), st.floats(-4, 4), st.booleans())
@settings(max_examples=40, deadline=None)
def test_samples_do_not_depend_on_when_their_rows_are_free(which, count, rows, seed, end, by_rows):
    """Whatever the lengths, and so the order of arrivals, are: in order, whole, and each as it is drawn alone."""
    layout = replace(LAYOUTS[which + 2], last_grain_order="rows" if by_rows else "regions", grain_starts=by_rows)
    sampler = AutoregressiveSampler()
    numbers = uniforms(seed, range(count), *sampler.numbers(layout))

    def drawn(rows):
        part = lambda samples: Part(samples, numbers[samples], None)  # noqa: E731
        model = Indifferent(layout, end)
        return list(sampler.stream(lambda *_: model, layout, part, count, rows)), model

    parts, model = drawn(rows)
    assert [len(part) for part in parts] == [rows] * (count // rows) + [count % rows] * (count % rows > 0)
    assert sorted(model.begun) == list(range(min(rows, count), count))
    alone = torch.cat([part.slots for part in drawn(1)[0]])
    assert torch.equal(torch.cat([part.slots for part in parts]), alone)
    for part in parts:
        from_sequences(part)  # refuses what does not tile


def test_a_stream_draws_no_more_than_it_is_asked_for():
    layout, begun = LAYOUTS[2], []
    model, labels = make_ar(layout), labels_for(layout, 400)
    hook = model.conditioning.register_forward_hook(lambda _, args, __: begun.append(len(args[0])))
    parts = model.stream(labels, batch_size=4)
    first = [next(parts) for _ in range(2)]
    hook.remove()
    assert [len(part) for part in first] == [4, 4]
    assert sum(begun) <= 8 + 4 * layout.max_tokens // layout.num_regions
    assert same(first[1], model.sample(labels[4:8], first_index=4, batch_size=4))


@pytest.mark.parametrize("order", [{}, {"last_grain_order": "rows", "grain_starts": True}], ids=["default", "both"])
def test_given_codes_are_kept_and_the_rest_is_drawn(order):
    layout = replace(LAYOUTS[5], **order)
    model, labels = make_ar(layout, dtype=torch.float64), labels_for(layout, 6)
    codes = random_codes(layout, random_grains(layout, 6))
    nothing = model.sample(labels, batch_size=4)
    assert torch.equal(
        model.sample(labels, batch_size=4, given=CodePrefix.of_grains(codes, 0)).indices, nothing.indices
    )
    whole = model.sample(labels, batch_size=4, given=CodePrefix.of_grains(codes, layout.num_grains))
    assert torch.equal(whole.indices, codes.indices)
    for count in range(1, layout.num_grains):
        drawn = model.sample(labels, batch_size=4, given=CodePrefix.of_grains(codes, count))
        coarse = codes.grains < count
        assert torch.equal(drawn.grains < count, coarse)
        assert torch.equal(drawn.grains[coarse], codes.grains[coarse])
        cells = layout.expand(coarse, 0)
        assert torch.equal(drawn.indices[cells], codes.indices[cells])
        assert not torch.equal(drawn.indices[~cells], codes.indices[~cells])
    for count in (1, layout.num_regions // 2, layout.num_regions):
        prefix = CodePrefix.of_regions(codes, count)
        again = to_sequences(model.sample(labels, batch_size=4, given=prefix))
        for row, length in enumerate(prefix.lengths.tolist()):
            assert torch.equal(again.slots[row, :length], prefix.sequences.slots[row, :length])
            assert torch.equal(again.contents[row, :length], prefix.sequences.contents[row, :length])
        known = prefix.sequences.slots.clamp(max=layout.num_slots - 1)
        kept = torch.arange(known.shape[1]) < prefix.lengths[:, None]
        regions = layout.slots().region[known].masked_fill(~(kept & prefix.sequences.is_code), -1)
        least = [len(set(row.tolist()) - {-1}) for row in regions]
        assert min(least) >= count if order else set(least) == {count}
        whole = prefix.known_cells.unflatten(2, (2, -1)).unflatten(1, (2, -1)).all(dim=4).all(dim=2)
        assert (whole.sum(dim=(1, 2)) == count).all()
    with pytest.raises(GraincodeError, match="grains=4: expected 0 to 3"):
        CodePrefix.of_grains(codes, 4)
    with pytest.raises(GraincodeError, match="codes of 6 images: expected 2"):
        model.sample(labels[:2], given=prefix)
    theirs = replace(codes, layout=replace(layout, grain_starts=not layout.grain_starts))
    with pytest.raises(GraincodeError, match=r"^given=codes of other classes or order: expected those of .*replace\("):
        model.sample(labels, given=CodePrefix.of_grains(theirs, 1))
    kept = model.sample(labels, batch_size=4, given=CodePrefix.of_grains(replace(theirs, layout=model.layout), 1))
    assert torch.equal(kept.grains == 0, codes.grains == 0)


def test_the_sampler_reports_its_steps_and_what_is_complete():
    layout, steps = LAYOUTS[1], []
    make_ar(layout).sample(labels_for(layout, 2), batch_size=2, on_step=lambda *now: steps.append(now))
    assert steps == [(step, 2 * (step == layout.max_tokens)) for step in range(1, layout.max_tokens + 1)]
