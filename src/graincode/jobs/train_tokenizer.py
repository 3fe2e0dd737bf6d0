"""Stage 1: train a tokenizer. `graincode-train-tokenizer --help` shows the configuration."""

from __future__ import annotations

from graincode.config.job import job_main

if __name__ == "__main__":  # before the imports below, so that --help answers at once
    raise SystemExit(job_main("train_tokenizer"))

import logging
from collections.abc import Iterator

import torch
from omegaconf import DictConfig
from torch import Tensor

from graincode.config.job import build, open_run, with_layout
from graincode.core.errors import check
from graincode.core.layout import CodeLayout
from graincode.core.rng import SampleRng
from graincode.data.images import Subset, summaries
from graincode.data.loader import Schedule, in_order
from graincode.evaluation.streams import evaluation_batch
from graincode.export import export_run, load_export, load_weights
from graincode.jobs.dry import dry_tokenizer
from graincode.networks.perceptual import PerceptualDistance
from graincode.tokenizer import DQVAE, Adversary, ReconstructionObjective
from graincode.training.loop import Training
from graincode.training.stage import try_optimizer
from graincode.training.tokenizer_stage import TokenizerStage

log = logging.getLogger(__name__)

CALIBRATION_IMAGES = 4096  # by default, where thresholds follow the weights: they are measured repeatedly
_FIRST_IMAGES = 4096  # that codebooks start from


def run(cfg: DictConfig) -> float:
    """Train and export; returns the mean squared error on validation images, in [0, 1]."""
    hardware, trainer, source = build(cfg.hardware), build(cfg.trainer), build(cfg.data)
    settings, size, classes = cfg.tokenizer, source.image_size, len(source.class_names)
    layout = CodeLayout(size, settings.grains, settings.codebook_size, classes, settings.codebook)
    config = with_layout(settings.model, layout)
    torch.manual_seed(cfg.seed)
    module: DQVAE = build(settings.model)
    # a dry run is without it: it would have to load its weights, or download them
    perceptual: PerceptualDistance | None = None if cfg.debug.dry else build(settings.perceptual) or None
    objective: ReconstructionObjective = build(settings.objective, perceptual=perceptual)
    adversary: Adversary | None = build(settings.adversary) or None
    if cfg.debug.dry:
        return dry_tokenizer(module, objective)
    if adversary is not None:
        _check_adversary(adversary, cfg, size)
    inputs = {} if cfg.init_from is None else {"init_from": load_weights(module, cfg.init_from, "tokenizer")}
    if perceptual is not None:
        perceptual.load(size)
        inputs["perceptual"] = perceptual.identity
    optimizer, logs = try_optimizer(build(cfg.optimizer)), build(cfg.logging)
    machine = hardware.machine()
    with open_run("train_tokenizer", cfg, summaries(source, ("train", "val")), **inputs) as run:
        if (result := run.finished(lambda: load_export(run.path / "export", "tokenizer"))) is not None:
            return run.report_finished(result)
        dataset = source.split("train")
        limit = cfg.calibration_images or (CALIBRATION_IMAGES if module.router.is_learned else len(dataset))

        def images() -> Iterator[Tensor]:
            shown = Subset(dataset, limit) if limit < len(dataset) else dataset
            for batch in in_order(shown, evaluation_batch(layout), workers=hardware.workers, shared=True):
                yield batch.to(machine.device).images

        def calibrate(tokenizer: DQVAE) -> None:
            if report := tokenizer.calibrate(images()):
                shares = (f"{100 * report[f'achieved_{g}']:.1f} %" for g in range(layout.num_grains))
                log.info("share of the training regions at each grain: %s", ", ".join(shares))

        def start() -> None:
            if cfg.init_from is None:
                count = min(len(dataset), _FIRST_IMAGES)
                order = Schedule(len(dataset), len(dataset), cfg.seed).indices(range(count))
                first = (dataset[order[i : i + 32]].to(machine.device).images for i in range(0, count, 32))
                module.initialize(first, SampleRng(cfg.seed, torch.arange(count, device=machine.device)))
            calibrate(module)

        data = dataset, source.split("val"), build(cfg.augmentation)
        stage = TokenizerStage(module, objective, adversary, *data, hardware.workers, images)
        trained, metrics = Training(stage, machine, optimizer, trainer, cfg.seed, run, logs, start).run()
        if trained.router.is_learned:
            calibrate(trained)
        export_run(run.path, "tokenizer", config, trained, data=dataset.name)
        return run.finish(metrics["objective"], metrics=metrics)


def _check_adversary(adversary: Adversary, cfg: DictConfig, size: tuple[int, int]) -> None:
    """Refuse now what would fail when the discriminator starts: the gradients of one layer decide its weight."""
    strategy, precision, steps = cfg.hardware.strategy, cfg.hardware.mixed_precision, cfg.trainer.steps
    check("strategy", strategy, "ddp with a discriminator", strategy == "ddp")
    check("mixed_precision", precision, "bf16 or no with a discriminator", precision != "fp16")
    check("start_step", adversary.start_step, f"below trainer.steps={steps}", adversary.start_step < steps)
    with torch.no_grad():
        adversary(torch.zeros(1, 3, *size))
