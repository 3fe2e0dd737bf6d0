"""How long to train, and how often to look, evaluate and save."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass
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

    steps: int = MISSING
    batch_size: int = MISSING
    warmup_steps: int = MISSING
    clip_grad_norm: float = MISSING
    ema_decay: float = MISSING
    log_every: int = MISSING
    eval_every: int = MISSING
    eval_images: int = MISSING
    checkpoint_every: int = MISSING
    keep_checkpoints: int = 2
    resume: str = "auto"
    export: str = "last"


@dataclass
class GeneratorTrainerConfig(TrainerConfig):
    """The same for codes, whose number differs from image to image.

    Attributes:
        bucketing_window: steps whose images are dealt out among them by length, so that little is padded; 1: each step
            keeps its own, sorted, so that micro-batches pad less.
    """

    bucketing_window: int = MISSING
