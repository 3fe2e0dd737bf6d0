"""Sampling by recorded steps draws what eager sampling draws. The graphs are pretended: no GPU is here."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from helpers_generators import MODERN, labels_for, make_ar, make_nar, same
from helpers_pretend import device, unavailable
from launches import drawn, one_launch
from launches import model_of as deep_model
from pretended_graphs import pretended_graphs
from torch._dynamo.testing import CompileCounterWithBackend

from graincode.core.layout import CodeLayout
from graincode.generator import DGiTAR, NoConditioning, graphs
from graincode.generator.graphs import GraphedSteps, cache_lengths

SMALL = CodeLayout((32, 32), ((16, 16), (8, 8)), 256, 10)


@pytest.fixture
def model_of(monkeypatch):
    """Models that draw by graphs, of cache lengths so small that samples pass through some."""
    monkeypatch.setattr(graphs, "cache_lengths", lambda capacity: (4, 8, capacity))

    def made(**options):
        model = make_ar(SMALL, dtype=torch.float64, layers=(1, 1), **options)
        model.steps = GraphedSteps(model.states, model.contents, model.stacks, SMALL.max_tokens)
        return model

    with pretended_graphs() as made.recorded:
        yield made


@pytest.mark.parametrize(
    ("options", "guidance"),
    [({}, 1.0), ({"block": MODERN}, 2.0), ({"conditioning": NoConditioning}, 1.0)],
    ids=["plain", "modern", "no classes"],
)
def test_recorded_steps_draw_the_same_samples(options, guidance, model_of):
    model, labels = model_of(**options), labels_for(SMALL, 7)
    sample, steps = partial(model.sample, labels, batch_size=4, guidance_scale=guidance), model.steps
    model.steps = None
    eager, other = sample(), sample(seed=1)
    model.steps = steps
    for expected, seed in ((eager, 0), (other, 1), (eager, 0)):  # each of two batches, whatever caches still hold
        assert same(sample(seed=seed), expected)
    assert len(model_of.recorded) == 2 * 3  # of both steps, at each length


def test_arguments_that_have_not_changed_are_not_copied(model_of):
    model = model_of(block=MODERN)
    steps, stack = model.steps, model.position_transformer
    slots, contents = torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long)
    condition = model.conditioning(torch.tensor([1, 2]))
    cache = steps.caches(2)[0]

    def state():
        cache.reach()
        return steps.states(slots, contents, condition, stack.modulations(condition), cache).clone()

    def expected():
        sequence = torch.zeros(2, int(cache.positions[0]), dtype=torch.long)
        return model.states(sequence, sequence, condition)[:, -1:]

    state()
    for change in (lambda: None, lambda: condition.add_(0.5)):
        change()
        cache.restart()
        torch.testing.assert_close(state(), expected())
    known = steps._recorded[model.states].known
    cache.restart()
    version = known[2]._version
    state()
    assert known[2]._version == version  # the condition
    assert known[2] is not condition


@pytest.mark.slow
@pytest.mark.skipif(bool(unavailable()), reason=unavailable())
def test_the_host_starts_no_more_kernels_for_a_deeper_model():
    most = []
    for layers in ((1, 1), (2, 3)):
        with device() as seen, pretended_graphs(one_launch(seen)):
            model = deep_model(DGiTAR, "modern", layers).eval().requires_grad_(False).to("cuda")
            model.compile_sampling()
            drawn(model, seen)
            most.append(max(drawn(model, seen)))
    assert most[0] == most[1]
    assert most[0][0] < 70


@pytest.mark.parametrize("capacity", [1, 65, 255, 256, 300, 1025, 1360, 5000])
def test_four_lengths_or_fewer_hold_all_tokens(capacity):
    found = cache_lengths(capacity)
    assert len(found) <= 4
    assert found == tuple(sorted(set(found)))
    assert capacity <= found[-1] < capacity + 64
    assert all(length % 64 == 0 for length in found)
    assert all(b <= 2 * a for a, b in pairwise(found))


def test_on_a_cpu_steps_are_not_recorded():
    model = make_ar(SMALL)
    model.compile_sampling()
    assert isinstance(model, DGiTAR)
    assert model.steps is None


@pytest.mark.slow
def test_compiled_blocks_fill_in_the_same_samples(monkeypatch):
    """Of the compiler, only its front end is used."""
    torch._dynamo.reset()
    compiler = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    model = make_nar(SMALL)
    eager = model.sample(labels_for(SMALL, 10), batch_size=4)
    model.compile_sampling()
    assert same(model.sample(labels_for(SMALL, 10), batch_size=4), eager)
    assert compiler.frame_count > 0
    torch._dynamo.reset()
