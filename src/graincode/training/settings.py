"""How long to train, and how often to look, evaluate and save."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from graincode.core.errors import check


@dataclass(frozen=True)
class TrainerConfig:
    """How long to train, and how often to look, evaluate and save; all in steps.

    Attributes:
        batch_size: items in each step, of all processes and micro-batches together.
        clip_grad_norm: limit of the gradients' norm; 0: none.
        ema_decay: of the averaged weights that are evaluated and exported; 0: the trained ones themselves.
        eval_images: of the validation split, at each evaluation.
        keep_checkpoints: how many of the newest states stay, besides the best.
        resume: "auto" goes on where this run stands, "never" refuses if it stands anywhere, and the path of a state of
            another run starts from it.
        export: the "last" weights, or those of the "best" evaluation.
    """

    steps: int
    batch_size: int
    warmup_steps: int
    clip_grad_norm: float
    ema_decay: float
    log_every: int
    eval_every: int
    eval_images: int
    checkpoint_every: int
    keep_checkpoints: int = 2
    resume: str = "auto"
    export: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.endswith(("_every", "_images", "_window")) or name in ("steps", "batch_size", "keep_checkpoints"):
                check(name, value, "1 or more", value >= 1)
        check("ema_decay", self.ema_decay, "0 (off) to below 1", 0 <= self.ema_decay < 1)


@dataclass(frozen=True)
class GeneratorTrainerConfig(TrainerConfig):
    """The same for codes, whose number differs from image to image.

    Attributes:
        bucketing_window: steps within which batches get similar lengths; 1: each step keeps its own images, sorted, so
            that micro-batches pad less.
    """

    bucketing_window: int = 1
