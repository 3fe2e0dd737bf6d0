"""`debug=dry`: what a job would cost, counted and not guessed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from graincode.core.losses import weighted_sum
from graincode.core.rng import SampleRng
from graincode.tokenizer import DQVAE, EMAQuantizer, ReconstructionObjective

log = logging.getLogger(__name__)


def dry_run(call: Callable[[], Any], modules: Mapping[str, nn.Module], title: str, training: bool) -> float:
    """Carry out one call under counters, and log parameters, FLOPs and memory.

    Args:
        call: does the job's work on one item, which `title` names, such as "one training step on one image".
        modules: whose parameters are counted, by name.
        training: whether gradients and two optimizer moments count too.
    Returns:
        FLOPs of the call (a multiply-add counts as two), matrix products and convolutions alone.
    """
    weights = list({parameter: None for module in modules.values() for parameter in module.parameters()})
    kept: dict[int, int] = {}  # bytes of what is saved for the backward pass, by address

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    for name, module in modules.items():
        log.info("%-24s %12s parameters", name, f"{sum(p.numel() for p in module.parameters()):,}")
    log.info("%-24s %12.2f GFLOPs", title, counter.get_total_flops() / 1e9)
    size = sum(weight.numel() * weight.element_size() for weight in weights) / 2**20
    more = ", as much for gradients, twice for moments" if training else ""
    log.info("%-24s %12.1f MiB%s", "weights", size, more)
    if training:
        activations = sum(kept[address] for address in kept.keys() - {w.untyped_storage().data_ptr() for w in weights})
        log.info("%-24s %12.1f MiB per item of the batch", "activations kept", activations / 2**20)
    return float(counter.get_total_flops())


def dry_tokenizer(module: DQVAE, objective: ReconstructionObjective) -> float:
    """`dry_run` of a training step of a tokenizer on noise."""
    images = torch.rand(1, 3, *module.layout.image_size) * 2 - 1
    rng = SampleRng(0, torch.arange(1))
    module.initialize([images], rng)
    count = -(-512 // module.layout.num_regions)  # few of large images: some routers decode them all
    module.calibrate([torch.rand(count, *images.shape[1:]) * 2 - 1])

    def step() -> None:
        weighted_sum(objective(images, module(images, rng=rng), module.router)).backward()

    parts = {name: part for name, part in module.named_children() if not isinstance(part, nn.Identity)}
    parts["all"] = module
    log.info("without perceptual loss and discriminator:")
    flops = dry_run(step, parts, "one training step, one image", training=True)
    counted = f"{published_count(module):,}"
    log.info("%-24s %12s parameters, as DQ-VAE's code counts: with codebooks, and a row more in each", "all", counted)
    return flops


def published_count(module: DQVAE) -> int:
    """Parameters of a tokenizer as DQ-VAE's code has them: codebooks that are moving averages are among them, each with
    a row that stands for no code."""
    codebooks = [part.codebook for part in module.quantizers if isinstance(part, EMAQuantizer)]
    entries = sum(codebook.numel() + codebook.shape[1] for codebook in codebooks)
    return entries + sum(parameter.numel() for parameter in module.parameters())
