"""How long to train, and how often to look, evaluate and save."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from graincode.core.errors import check


@dataclass(frozen=True)
class TrainerConfig:
    """How long to train, and how often to look, evaluate and save; all in steps (see conf/trainer).

    `batch_size` is of all processes and micro-batches together; `resume` is "auto", "never", or the path of a state of
    another run to start from; `export` takes the last weights, or those of the best evaluation.
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
            least = 0 if name in ("warmup_steps", "clip_grad_norm", "ema_decay") else 1
            if not isinstance(value, str):
                check(name, value, f"{least} or more", value >= least)
        check("ema_decay", self.ema_decay, "0 (off) to below 1", self.ema_decay < 1)


@dataclass(frozen=True)
class GeneratorTrainerConfig(TrainerConfig):
    """The same for codes, with the steps within which batches get similar lengths; 1: each keeps its own images."""

    bucketing_window: int = 1
