"""What the training loop trains: a stage, and its trainables, which it wraps and gives optimizers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graincode.core.errors import GraincodeError, brief
from graincode.core.losses import Term
from graincode.core.rng import SampleRng
from graincode.data.loader import Windows
from graincode.distributed.hardware import Machine
from graincode.tokenizer import Quantized, Routing

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Step:
    """What a trainable needs to know of a step: its 1-based number, and the random numbers of the batch."""

    number: int
    rng: SampleRng


@dataclass(frozen=True)
class StepOutput:
    """What a trainable's forward pass returns.

    Attributes:
        terms: of its loss, and what is only reported, by name; the rest has no gradients.
        reconstruction: (B, 3, H, W) images, which a discriminator learns to distinguish from the batch's.
        codes: of each codebook.
        routing: the grains of the batch's regions.
        observed: sums that an adversary learns from.
    """

    terms: Mapping[str, Term]
    reconstruction: Tensor | None = None
    codes: tuple[Quantized, ...] = ()
    routing: Routing | None = None
    observed: Tensor | None = None


class Trainable(ABC):
    """A module with a loss and an optimizer of its own; a GAN has two, which see the same micro-batches in turn."""

    name: str
    module: nn.Module

    def trains(self, step: int) -> bool:
        """Whether it trains in this 1-based step."""
        return True

    def counts(self, batch: Any) -> Mapping[str, Tensor | float]:
        """Counts of its loss's terms, known before its module has run; terms without one here count images."""
        return {}

    @abstractmethod
    def forward(self, wrapped: nn.Module, batch: Any, step: Step, before: StepOutput | None) -> StepOutput:
        """Call its module once, `wrapped` as it is in training; `before` is the output of the trainable before it."""

    def histograms(self, output: StepOutput) -> Mapping[str, Tensor]:
        """(V,) counts of what was chosen among V things, to be logged by name."""
        return {}

    def update(self, trained: nn.Module, outputs: Sequence[StepOutput]) -> None:
        """After the optimizer step, learn without gradients from the codes and routing of each micro-batch; `trained`
        is its module, sharded or not."""
        return


@dataclass
class Prepared:
    """A trainable with its module's DDP wrapper, optimizer and base learning rates."""

    trainable: Trainable
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    base_rates: list[float]

    @classmethod
    def on(cls, machine: Machine, trainable: Trainable, make_optimizer: MakeOptimizer) -> Prepared:
        """A trainable on a machine, with the optimizer that is made from its parameter groups."""
        wrapped, optimizer = machine.prepare(trainable.module, lambda module: make_optimizer(parameter_groups(module)))
        return cls(trainable, wrapped, optimizer, [group["lr"] for group in optimizer.param_groups])

    @property
    def trained(self) -> nn.Module:
        """The module without the wrapper that exchanges gradients."""
        return self.wrapped.module if isinstance(self.wrapped, nn.parallel.DistributedDataParallel) else self.wrapped


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Parameters in two groups: those that weight decay may shrink, and norms, biases and embeddings."""
    layers = [part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d) and part.weight.ndim > 1]
    decayed, parameters = {id(part.weight) for part in layers}, [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) in decayed]},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]


def try_optimizer(make_optimizer: MakeOptimizer) -> MakeOptimizer:
    """The same, a `functools.partial`, tried on one number; a GraincodeError if it does not take its settings."""
    try:
        make_optimizer([{"params": [nn.Parameter(torch.zeros(1))]}])
    except (TypeError, ValueError) as error:
        settings = " ".join(f"{name}={value}" for name, value in make_optimizer.keywords.items())
        raise GraincodeError(f"{settings}: {brief(error)}") from error
    return make_optimizer


@dataclass(frozen=True)
class Evaluation:
    """Metrics on validation items, `objective` (less is better) among them, and (3, H, W) uint8 pictures by name."""

    metrics: dict[str, float]
    pictures: dict[str, Tensor] = field(default_factory=dict)


class Stage(Protocol):
    """What the training loop trains.

    Attributes:
        trainables: modules with their losses; the first one is evaluated and exported.
        dataset: training items.
        windows: for batches by length; None if items have no lengths.
    """

    trainables: list[Trainable]
    dataset: Any
    windows: Windows | None

    def prepare(self, batch: Any, rng: SampleRng) -> Any:
        """What trainables see of a batch on its device, such as augmented images."""

    def evaluate(self, module: nn.Module, limit: int, draw: bool = False) -> Evaluation:
        """Metrics on `limit` validation items, the same each time and on all processes; with `draw`, pictures too.
        Collective: call it on all processes."""
