"""Averaged weights, and the one way to use them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from graincode.distributed.hardware import Machine, full_state, load_module_state, module_state


class AveragedWeights:
    """The exponential moving average of a module's parameters; buffers are copied: a codebook is an average already.

    At step n the decay is 1 - n^(-2/3), up to `decay`; with 0 the trained weights themselves are used. `plain` is the
    whole module, which shares its tensors with the one that is trained unless that is sharded.
    """

    def __init__(self, plain: nn.Module, decay: float, machine: Machine) -> None:
        self._plain, self._is_sharded, self._average = plain, machine.is_sharded, None
        if decay > 0:
            from timm.utils import ModelEmaV3  # which imports all of timm's models

            self._average = ModelEmaV3(plain, decay=decay, use_warmup=True, exclude_buffers=True).requires_grad_(False)
            if machine.is_sharded:
                machine.shard(self._average.module)

    def update(self, trained: nn.Module, step: int) -> None:
        """Take in the weights after 1-based `step`; `trained` is unwrapped, but may be sharded."""
        if self._average is not None:
            self._average.update(trained, step=step)

    @contextmanager
    def in_use(self, trained: nn.Module) -> Iterator[nn.Module]:
        """The module to evaluate, sample from or export, in evaluation mode; `trained` is as it was afterwards."""
        module = trained if self._average is None else self._average.module
        if self._is_sharded:
            self._plain.load_state_dict(full_state(module))
            module = self._plain
        was_training = trained.training
        module.eval()
        try:
            with torch.no_grad():
                yield module
        finally:
            trained.train(was_training)

    def state(self) -> dict[str, Any] | None:
        """For a resume state."""
        return None if self._average is None else module_state(self._average.module)

    def load_state(self, state: dict[str, Any] | None) -> None:
        """The inverse of `state`."""
        if self._average is not None and state is not None:
            load_module_state(self._average.module, state)
