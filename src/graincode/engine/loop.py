"""The training loop of both stages."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from graincode.core.errors import GraincodeError
from graincode.core.losses import Term, weighted_sum
from graincode.core.schedules import warmup_cosine
from graincode.data.loader import training_loader
from graincode.engine.checkpoint import Checkpoints
from graincode.engine.config import TrainerConfig
from graincode.engine.logging import Meter, RunLog


class Stage(Protocol):
    """What a stage brings to the loop."""

    module: nn.Module
    dataset: Any

    def terms(self, module: nn.Module, batch: Any) -> Mapping[str, Term]:
        """The terms of the loss on one batch, on its device."""
        ...

    def evaluate(self, limit: int) -> dict[str, float]:
        """Figures on the first `limit` validation items; `objective` is among them, less is better."""
        ...

    def pictures(self) -> dict[str, Tensor]:
        """(3, H, W) uint8 images to look at, by name."""
        ...


def train(
    stage: Stage,
    accelerator: Accelerator,
    make_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    trainer: TrainerConfig,
    seed: int,
    workers: int,
    folder: Path,
    tensorboard: bool,
) -> dict[str, float]:
    """Train a stage from where its run stands to the end.

    Every step is a function of (state, seed, step), so an interrupted run that goes on gives what an uninterrupted one
    gives.

    Args:
        stage: module, data and loss; its module is trained in place.
        accelerator: device and precision.
        make_optimizer: from parameter groups.
        trainer: lengths and intervals.
        seed: of batches and dropout.
        workers: processes that load data.
        folder: of the run; states go to `state/`, figures to `log.jsonl`.
        tensorboard: whether to write events too.
    Returns:
        the figures of the last evaluation.
    Raises:
        GraincodeError: the loss is no longer finite.
    """
    optimizer = make_optimizer(parameter_groups(stage.module))
    module, optimizer = accelerator.prepare(stage.module, optimizer)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    checkpoints = Checkpoints(folder / "state")
    step, figures = 0, {}
    if (state := checkpoints.load(accelerator.device)) is not None:
        stage.module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        step, figures = state["step"], state["figures"]
    log, meter = RunLog(folder, step, tensorboard), Meter()
    loader = training_loader(
        stage.dataset, trainer.batch_size, seed, step, trainer.steps, workers, accelerator.device.type == "cuda"
    )
    bar = tqdm(total=trainer.steps, initial=step, unit="step", dynamic_ncols=True, mininterval=1.0)
    began, images = time.perf_counter(), 0
    try:
        for batch in loader:
            step += 1
            factor = warmup_cosine(step, trainer.steps, trainer.warmup_steps)
            for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
                group["lr"] = rate * factor
            torch.manual_seed((seed << 32) + step)
            module.train()
            with accelerator.autocast():
                terms = stage.terms(module, batch.to(accelerator.device))
                loss = weighted_sum(terms)
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(module.parameters(), trainer.clip_grad_norm or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            meter.add({**terms, "loss": Term(loss, 1), "gradient_norm": Term(norm, 1)})
            images += trainer.batch_size
            last = step == trainer.steps
            if step % trainer.log_every == 0 or last:
                values = meter.flush()
                for name, value in values.items():
                    _check_finite(name, value, step, checkpoints)
                rate = images / (time.perf_counter() - began)
                log.scalars(
                    step,
                    {f"train/{name}": value for name, value in values.items()}
                    | {"train/learning_rate": base_rates[0] * factor, "speed/images_per_second": rate},
                )
                bar.set_postfix(loss=f"{values['loss']:.4f}", images_per_s=f"{rate:.0f}", refresh=False)
                began, images = time.perf_counter(), 0
            bar.update()
            if step % trainer.eval_every == 0 or last:
                module.eval()
                figures = stage.evaluate(trainer.eval_images)
                log.scalars(step, {f"val/{name}": value for name, value in figures.items()})
                for name, picture in stage.pictures().items() if tensorboard else ():
                    log.image(step, name, picture)
                began, images = time.perf_counter(), 0
            if step % trainer.checkpoint_every == 0 or last:
                _check_finite("the loss", loss.item(), step, checkpoints)
                checkpoints.save(
                    step,
                    {"module": stage.module.state_dict(), "optimizer": optimizer.state_dict(), "figures": figures},
                )
    finally:
        bar.close()
        log.close()
    stage.module.eval()
    return figures


def _check_finite(name: str, value: float, step: int, checkpoints: Checkpoints) -> None:
    if not math.isfinite(value):
        raise GraincodeError(
            f"{name} is {value} at step {step}: the last good checkpoint is in {checkpoints.folder}; "
            "type a lower optimizer.lr"
        )


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
