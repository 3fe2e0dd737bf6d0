"""Where the time of a training step goes."""

from __future__ import annotations

import warnings
from collections import Counter

import torch
from engine import BATCH, demo_tokenizer, made_images
from timing import Result
from timm.utils import ModelEmaV3
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from graincode.core.layout import CodeLayout
from graincode.core.losses import weighted_sum
from graincode.core.rng import SampleRng
from graincode.tokenizer import ReconstructionObjective
from graincode.training.stage import parameter_groups

STEPS = 30
# what an operator belongs to: the first of these that its name, or that of what called it, contains
KINDS = {
    "convolution": "convolutions",
    "part router": "router",
    "part quantizer": "quantiser",
    "part optimizer": "optimizer, clipping, moving average",
    "group_norm": "norms", "GroupNorm": "norms",
    "scaled_dot_product": "attention", "ScaledDotProduct": "attention",
    "silu": "activations", "Silu": "activations",
    "upsample": "resampling", "Upsample": "resampling",
    "AccumulateGrad": "gathering gradients",
}  # fmt: skip


def step_shares() -> Result:
    """The demo's stage 1, 32 px, batch 16: the share of a step outside convolutions, and what it is made of."""
    shares = _shares()
    outside = 1 - shares["convolutions"]
    parts = ", ".join(f"{name} {100 * share:.1f}" for name, share in shares.most_common())
    return Result("step, not convolving", 100 * outside, "%", f"in %: {parts}", shares["convolutions"] / outside, "")


def _shares() -> Counter[str]:
    layout, dataset = CodeLayout((32, 32), ((8, 8), (4, 4)), 256), made_images()
    module, objective = demo_tokenizer(layout, dataset[range(64)].images), ReconstructionObjective()
    adam = torch.optim.Adam(parameter_groups(module), lr=4e-3, betas=(0.9, 0.99), fused=True)
    average = ModelEmaV3(module, decay=0.999, use_warmup=True, exclude_buffers=True)
    module.train()
    _mark(module.router, "part router")
    for quantizer in module.quantizers:
        _mark(quantizer, "part quantizer")

    def step(number: int) -> None:
        images, places = dataset[range(BATCH)].images, torch.arange(BATCH * number, BATCH * number + BATCH)
        made = module(images, rng=SampleRng(0, places))
        weighted_sum(objective(images, made, module.router)).backward()
        with record_function("part optimizer"):
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            adam.step()
            adam.zero_grad()
        with record_function("part quantizer"):
            module.update([made.quantized], [made.routing])
        with record_function("part optimizer"):
            average.update(module, step=number)

    for number in range(1, 6):
        step(number)
    with warnings.catch_warnings(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        warnings.simplefilter("ignore")
        for number in range(6, 6 + STEPS):
            step(number)
    seconds: Counter[str] = Counter()
    for event in profiler.events():
        seconds[_kind(event)] += event.self_cpu_time_total
    total = sum(seconds.values())
    return Counter({kind: spent / total for kind, spent in seconds.items()})


def _mark(part: nn.Module, name: str) -> None:
    """Put the calls of a module under a name."""
    forward = part.forward

    def marked(*args, **kwargs):
        with record_function(name):
            return forward(*args, **kwargs)

    part.forward = marked


def _kind(event) -> str:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return next((kind for key, kind in KINDS.items() if any(key in name for name in names)), "other")
