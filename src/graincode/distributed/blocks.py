"""Blocks that trade time for memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class CheckpointedBlock(nn.Module):
    """A block that can compute its activations anew in the backward pass; also what is compiled and sharded."""

    recompute = False

    def __call__(self, *args: Any) -> Any:
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(super().__call__, *args, use_reentrant=False)
        return super().__call__(*args)


def compile_blocks(module: nn.Module) -> None:
    """Let all such blocks of a module go through torch.compile."""
    allow_graphs(64)
    for part in module.modules():
        if isinstance(part, CheckpointedBlock):
            part.compile()


def allow_graphs(count: int) -> None:
    """Let torch compile a function for so many shapes, which all that runs the same code share, before it gives up."""
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, count)
