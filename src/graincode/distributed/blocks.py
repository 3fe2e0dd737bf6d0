"""Blocks that trade time for memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graincode.core.errors import GraincodeError, brief


class CheckpointedBlock(nn.Module):
    """A block that can compute its activations anew in the backward pass; also what is compiled and sharded."""

    recompute = False

    def __call__(self, *args: Any) -> Any:
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(super().__call__, *args, use_reentrant=False)
        return super().__call__(*args)


class _Trial(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x + 1


def compile_blocks(module: nn.Module) -> None:
    """Let all such blocks of a module go through torch.compile, which is tried first; a GraincodeError if it fails."""
    trial, weight = _Trial(), next(module.parameters())
    trial.compile()
    try:
        trial(torch.zeros(8, device=weight.device))
    except Exception as error:  # no C compiler, no headers of Python, no triton, a driver that does not fit
        raise GraincodeError(f"compile=true: expected false, as torch.compile fails here ({brief(error)})") from error
    allow_graphs(64)
    torch._dynamo.config.optimize_ddp = False  # it would cut graphs at DDP's buckets, which blocks are smaller than
    for part in module.modules():
        if isinstance(part, CheckpointedBlock):
            part.compile()


def allow_graphs(count: int) -> None:
    """Let torch compile a function for so many shapes, which all that runs the same code share, before it gives up."""
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, count)
