"""The two stages as the training loop sees them: what is trained, on what, and how it is judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from graincode.core.layout import CodeLayout
from graincode.core.losses import Term
from graincode.core.rng import SampleRng
from graincode.data.loader import Windows


def evaluation_batch(layout: CodeLayout) -> int:
    """Images that are evaluated together: 250, or fewer if they are large or have many codes, for the memory's sake."""
    height, width = layout.image_size
    return max(1, min(250, 2**21 // (height * width), 2**15 // layout.max_tokens))


@dataclass(frozen=True)
class Step:
    """What a player needs to know of a step.

    Attributes:
        number: 1-based.
        rng: random numbers of the batch.
    """

    number: int
    rng: SampleRng


class Player(Protocol):
    """A module with an optimizer and a loss of its own; most stages have one, a GAN has two.

    In each step all players see the same micro-batches in turn, and then make their optimizer steps.
    """

    name: str
    module: nn.Module

    def plays(self, step: int) -> bool:
        """Whether it trains in this 1-based step."""

    def counts(self, batch: Any) -> Mapping[str, Tensor | float]:
        """Counts of the terms of its loss, known before any module has run."""

    def terms(self, wrapped: nn.Module, batch: Any, step: Step) -> Mapping[str, Term]:
        """The terms of its loss on a batch; `wrapped` is its module, and is called once."""

    def histograms(self) -> Mapping[str, Tensor]:
        """What the last batch chose among things, to be logged: (V,) counts by name."""

    def update(self, trained: nn.Module) -> None:
        """After the optimizer step: what is learned without gradients; `trained` is the module, sharded or not."""


class Stage(Protocol):
    """What the training loop trains. `players[0]` is what is evaluated and exported.

    Attributes:
        dataset: to train on.
        windows: within which it is batched by length; None: items have no lengths.
    """

    players: list[Player]
    dataset: Any
    windows: Windows | None

    def prepare(self, batch: Any, rng: SampleRng) -> Any:
        """What the players see of a batch on its device, such as augmented images."""

    def evaluate(self, module: nn.Module, limit: int) -> dict[str, float]:
        """Figures on `limit` validation items, always the same; `objective` is among them, less is better.

        All processes take part, and all get the same.
        """

    def pictures(self, module: nn.Module) -> dict[str, Tensor]:
        """(3, H, W) uint8 images to look at, by name."""
