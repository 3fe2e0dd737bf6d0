"""Small generators with random weights."""

import torch
from strategies import LAYOUTS

from graincode.generator import ClassConditioning, DGiTAR, DGiTNAR, HeterogeneousEmbedding, Transformer

WIDTH = 32
CLASSED = [layout for layout in LAYOUTS if layout.classes]
MODERN = {"norm": "rms", "mlp": "swiglu", "qk_norm": True, "rotary": True, "adaln": True}


def make_ar(
    layout, conditioning=ClassConditioning, dtype=torch.float32, block=None, layers=(1, 2), parts=None, **options
):
    """A DGiT-AR with weights large enough that nothing it does is close to uniform."""
    model = DGiTAR(
        layout,
        WIDTH,
        HeterogeneousEmbedding(layout, WIDTH, **(parts or {})),
        conditioning(layout, WIDTH),
        *(Transformer(WIDTH, count, 4, **(block or {})) for count in layers),
        **options,
    )
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    return model.eval().to(dtype).requires_grad_(False)


def make_nar(layout, conditioning=ClassConditioning, dtype=torch.float64, block=None, parts=None, **options):
    """A DGiT-NAR with weights large enough that nothing it does is close to uniform."""
    model = DGiTNAR(
        layout,
        WIDTH,
        HeterogeneousEmbedding(layout, WIDTH, index=False, **(parts or {})),
        conditioning(layout, WIDTH),
        *(Transformer(WIDTH, 2, 4, causal=False, **(block or {})) for _ in range(2)),
        **options,
    )
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    return model.eval().to(dtype).requires_grad_(False)


def labels_for(layout, count):
    return torch.arange(count) % layout.classes


def same(a, b):
    return torch.equal(a.grains, b.grains) and torch.equal(a.indices, b.indices)


def untrained(layout):
    """A DGiT-NAR of one grain layer and two content layers, as it starts."""
    torch.manual_seed(0)
    return DGiTNAR(
        layout, WIDTH, HeterogeneousEmbedding(layout, WIDTH, index=False), ClassConditioning(layout, WIDTH),
        Transformer(WIDTH, 1, 4, causal=False), Transformer(WIDTH, 2, 4, causal=False),
    )  # fmt: skip
