"""`debug=dry`: what a job would cost, counted and not guessed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DebugSettings:
    """What `conf/debug` gives.

    Attributes:
        dry: compose, count parameters, FLOPs and memory, and stop.
    """

    dry: bool = False


def dry_run(call: Callable[[], Any], modules: dict[str, nn.Module], what: str, training: bool) -> float:
    """Carry out one call under counters, and log parameters, FLOPs and memory.

    Args:
        call: does the job's work on one item; its return value is ignored.
        modules: whose parameters are counted, by name.
        what: one item in words, such as "one training step on one image".
        training: whether gradients and two optimizer moments are to be counted too.
    Returns:
        FLOPs of the call (a multiply-add counts as two), matrix products and convolutions alone.
    """
    saved = 0
    seen: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        if tensor.untyped_storage().data_ptr() not in seen:
            seen.add(tensor.untyped_storage().data_ptr())
            saved += tensor.untyped_storage().nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for m in modules.values() for parameter in m.parameters()}
    seen |= weights
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    flops = counter.get_total_flops()
    total = 0
    for name, module in modules.items():
        count = sum(parameter.numel() for parameter in module.parameters())
        total += sum(p.numel() * p.element_size() for p in module.parameters())
        log.info("%-24s %12s parameters", name, f"{count:,}")
    log.info("%-24s %12.2f GFLOPs", what, flops / 1e9)
    log.info(
        "%-24s %12.1f MiB%s",
        "weights",
        total / 2**20,
        "" if not training else ", as much for gradients, twice for moments",
    )
    if training:
        log.info("%-24s %12.1f MiB per item of the batch", "activations kept", saved / 2**20)
    return float(flops)
