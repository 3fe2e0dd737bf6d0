"""Small tokenizers and images for the tests."""

import torch

from graincode.core.layout import CodeLayout
from graincode.core.rng import SampleRng
from graincode.tokenizer import (
    DQVAE,
    EMAQuantizer,
    EntropyDensity,
    FeatureRouter,
    GrainDecoder,
    GrainEncoder,
    QuantileRouter,
    TrunkSize,
)

DUAL = CodeLayout((32, 32), ((8, 8), (4, 4)), 16)
TRIPLE = CodeLayout((64, 64), ((16, 16), (8, 8), (4, 4)), 16)


def make(layout, ratios=None, density=None, patch=2, expand=True, coarse_blocks=1, published=False, **routing):
    """A tokenizer; density "feature" gives it a router that learns, `published` the forms of a published network."""
    torch.manual_seed(0)
    ratios = ratios or [1 / layout.num_grains] * layout.num_grains
    forms = {"extra_blocks": 1, "padding": "end", "upsampling": "own"} if published else {}
    size = TrunkSize(8, [1, 2], blocks=1, attention=[], patch=patch, **forms)
    if density == "feature":
        router = FeatureRouter(layout, 8, ratios, **routing)
    else:
        router = QuantileRouter(layout, density or EntropyDensity(), ratios, **routing)
    return DQVAE(
        layout,
        GrainEncoder(layout, size, 8),
        router,
        EMAQuantizer(layout.codebook_size, 6 if published else 8),
        GrainDecoder(
            layout, size, 8, expand=expand, coarse_blocks=coarse_blocks, position="learned" if published else "fixed"
        ),
        projected_dim=6 if published else None,
    )


def photographs(count, size=(32, 32), seed=0):
    """Smooth on one side, busy on the other, so that densities differ."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, *size, generator=generator) * 2 - 1
    images[..., : size[1] // 2] = images[..., :1, :1]
    return images


def start(tokenizer, images):
    """What training does before its first step."""
    tokenizer.initialize([images], SampleRng(0, torch.arange(len(images))))
    tokenizer.calibrate([images])


def photographs_with_detail(count, size=(32, 32)):
    """Regions of very different difficulty."""
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(count, 3, *size, generator=generator) * 2 - 1
    strength = torch.rand(count, 1, size[0] // 16, size[1] // 16, generator=generator)
    return images * strength.repeat_interleave(16, dim=2).repeat_interleave(16, dim=3)


def count_decodes(tokenizer):
    """A list that grows by one at each decode."""
    seen = []
    tokenizer.decoder.register_forward_hook(lambda *_: seen.append(1))
    return seen
