"""Trainables as training calls them: wrapped, and with an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graincode.distributed.hardware import Machine
from graincode.training.stage import Trainable

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


@dataclass
class Prepared:
    """A module with its DDP wrapper, optimizer and base learning rates."""

    trainable: Trainable
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    base_rates: list[float]

    @property
    def trained(self) -> nn.Module:
        """The module without the wrapper that exchanges gradients."""
        return self.wrapped.module if isinstance(self.wrapped, nn.parallel.DistributedDataParallel) else self.wrapped


def prepare(trainable: Trainable, machine: Machine, make_optimizer: MakeOptimizer) -> Prepared:
    """A trainable on a machine, with the optimizer that is made from its parameter groups."""
    wrapped, optimizer = machine.prepare(trainable.module, lambda module: make_optimizer(parameter_groups(module)))
    return Prepared(trainable, wrapped, optimizer, [group["lr"] for group in optimizer.param_groups])


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Parameters in two groups: those that weight decay may shrink, and norms, biases and embeddings."""
    decayed = {
        id(part.weight) for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d) and part.weight.ndim > 1
    }
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) in decayed]},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
