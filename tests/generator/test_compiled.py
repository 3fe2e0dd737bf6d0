"""Compiled sampling draws what eager sampling draws. Of the compiler, only its front end is used."""

from functools import partial

import pytest
import torch
from helpers_generators import MODERN, WIDTH, labels_for, make_ar
from torch._dynamo.testing import CompileCounterWithBackend

from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout
from graincode.generator import (
    ClassConditioning,
    DGiTNAR,
    HeterogeneousEmbedding,
    Transformer,
    compiled,
)

BUCKET = 16
SMALL = CodeLayout((32, 32), ((16, 16), (8, 8)), 256, 10)


@pytest.fixture
def compiler(monkeypatch):
    """Counts the graphs that are compiled; buckets are small, so that samples pass through some."""
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(compiled, "BUCKET", BUCKET)
    yield backend
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(("block", "guidance"), [({}, 1.0), (MODERN, 2.0)], ids=["plain", "modern"])
def test_steps_of_fixed_shapes_draw_the_same_samples(block, guidance, compiler):
    layout = SMALL
    model, labels = make_ar(layout, dtype=torch.float64, layers=(1, 1), block=block), labels_for(layout, 7)
    sample = partial(model.sample, labels, batch_size=4, guidance_scale=guidance)
    eager, other = sample(), sample(seed=1)
    model.compile_sampling()
    for expected, seed in ((eager, 0), (other, 1), (eager, 0)):  # each of two batches, whatever caches still hold
        found = sample(seed=seed)
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.grains, expected.grains)
    least = int(eager.lengths.max()) // BUCKET
    assert 2 * least <= compiler.frame_count <= 2 * -(-layout.max_tokens // BUCKET)
    with pytest.raises(GraincodeError, match=r"^drop_finished=True: expected False"):
        sample(drop_finished=True)


@pytest.mark.slow
def test_compiled_blocks_fill_in_the_same_samples(compiler):
    layout = SMALL
    torch.manual_seed(0)
    model = DGiTNAR(
        layout, WIDTH, HeterogeneousEmbedding(layout, WIDTH, index=False), ClassConditioning(layout, WIDTH),
        *(Transformer(WIDTH, 2, 4, causal=False) for _ in range(2)),
    ).eval().double()  # fmt: skip
    eager = model.sample(labels_for(layout, 10), batch_size=4)
    model.compile_sampling()
    found = model.sample(labels_for(layout, 10), batch_size=4)
    assert torch.equal(found.indices, eager.indices)
    assert torch.equal(found.grains, eager.grains)
    assert compiler.frame_count > 0
