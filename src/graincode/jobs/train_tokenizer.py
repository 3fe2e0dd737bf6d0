"""Stage 1: train a tokenizer. `graincode-train-tokenizer --help` shows the configuration."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial

import torch
from omegaconf import DictConfig
from torch import Tensor

from graincode.config.job import build, job_main, open_run, with_layout
from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout
from graincode.core.losses import weighted_sum
from graincode.core.rng import SampleRng
from graincode.data.images import ImageSource, Subset
from graincode.data.loader import Schedule, in_order
from graincode.distributed.hardware import Hardware
from graincode.evaluation.streams import evaluation_batch
from graincode.export import export_run, load_weights
from graincode.jobs.dry import dry_run
from graincode.networks.perceptual import PerceptualDistance
from graincode.tokenizer import DQVAE, Adversary, ReconstructionObjective
from graincode.training.loop import train
from graincode.training.settings import TrainerConfig
from graincode.training.tokenizer_stage import TokenizerStage

log = logging.getLogger(__name__)

CALIBRATION_IMAGES = 4096  # unless told otherwise, where thresholds follow the weights


def run(cfg: DictConfig) -> float:
    """Train and export; gives the mean squared error on validation images, in [0, 1]."""
    hardware: Hardware = build(cfg.hardware)
    trainer: TrainerConfig = build(cfg.trainer)
    source: ImageSource = build(cfg.data)
    chosen = cfg.tokenizer
    layout = CodeLayout(
        source.image_size, chosen.grains, chosen.codebook_size, len(source.class_names), chosen.codebook
    )
    config = with_layout(cfg.tokenizer.model, layout)
    torch.manual_seed(cfg.seed)
    module: DQVAE = build(cfg.tokenizer.model)
    # a dry run is without it: it would have to load its weights, or download them
    perceptual: PerceptualDistance | None = None if cfg.debug.dry else build(cfg.tokenizer.perceptual) or None
    objective: ReconstructionObjective = build(cfg.tokenizer.objective, perceptual=perceptual)
    adversary: Adversary | None = build(cfg.tokenizer.adversary) or None
    if cfg.debug.dry:
        return _dry(module, objective)
    hides = hardware.strategy == "fsdp" or hardware.mixed_precision == "fp16"
    if adversary is not None and hides:
        raise GraincodeError(
            "tokenizer/adversary=patch looks at the gradients of one layer, which sharding and loss scaling hide: type "
            "hardware.strategy=ddp hardware.mixed_precision=bf16"
        )
    if adversary is not None:
        if adversary.start_step >= trainer.steps:
            raise GraincodeError(
                f"tokenizer.adversary.start_step={adversary.start_step}: the discriminator would never train in "
                f"trainer.steps={trainer.steps}; type tokenizer.adversary.start_step={trainer.steps // 2}"
            )
        with torch.no_grad():  # so that images it cannot take are refused now, and not when it starts
            adversary(torch.zeros(1, 3, *source.image_size))
    inputs = {} if cfg.init_from is None else {"init_from": load_weights(module, cfg.init_from, "tokenizer")}
    if perceptual is not None:
        perceptual.load(source.image_size)
        inputs["perceptual"] = perceptual.identity
    machine = hardware.machine(training=True)
    with open_run("train_tokenizer", cfg, **inputs) as run:
        if (result := run.result) is not None:
            return run.report_finished(result)
        dataset = source.split("train")

        def calibration(limit: int | None) -> Iterator[Tensor]:
            shown = dataset if limit is None else Subset(dataset, min(limit, len(dataset)))
            for batch in in_order(shown, evaluation_batch(layout), workers=hardware.workers, shared=True):
                yield batch.images.to(machine.device)

        # thresholds that follow the weights are measured again and again, each time with a decode or more
        limit = cfg.calibration_images or (CALIBRATION_IMAGES if module.router.is_learned else None)

        def start() -> None:
            if cfg.init_from is None:
                first = Schedule(len(dataset), len(dataset), cfg.seed)
                order = first.indices(range(min(len(dataset), 4096)))
                places = torch.arange(len(order), device=machine.device)
                images = (dataset[order[i : i + 32]].images.to(machine.device) for i in range(0, len(order), 32))
                module.initialize(images, SampleRng(cfg.seed, places))
            report_shares(module.calibrate(calibration(limit)))

        def report_shares(report: dict[str, float]) -> None:
            if report:
                shares = (f"{100 * report[f'achieved_{g}']:.1f} %" for g in range(layout.num_grains))
                log.info("share of the training regions at each grain: %s", ", ".join(shares))

        stage = TokenizerStage(
            module, objective, adversary, dataset, source.split("val"), build(cfg.augmentation), hardware.workers,
            partial(calibration, limit),
        )  # fmt: skip
        trained, metrics = train(
            stage, machine, build(cfg.optimizer), trainer, cfg.seed, run, build(cfg.logging), start
        )
        if trained.router.is_learned:
            report_shares(trained.calibrate(calibration(limit)))
        export_run(run.path, "tokenizer", config, trained, data=dataset.name)
        return run.finish(metrics["objective"], metrics=metrics)


def _dry(module: DQVAE, objective: ReconstructionObjective) -> float:
    images = torch.rand(1, 3, *module.layout.image_size) * 2 - 1
    count = -(-512 // module.layout.num_regions)  # few of large images: some routers decode them all
    module.calibrate([torch.rand(count, *images.shape[1:]) * 2 - 1])
    rng = SampleRng(0, torch.arange(1))
    module.initialize([images], rng)

    def step() -> None:
        weighted_sum(objective(images, module(images, rng=rng), module.router.nominal_length)).backward()

    parts = {name: getattr(module, name) for name in ("encoder", "router", "quantizers", "decoder")}
    log.info("without perceptual loss and discriminator:")
    return dry_run(step, parts, "one training step, one image", training=True)


def main() -> None:
    """Console entry."""
    job_main("train_tokenizer")


if __name__ == "__main__":
    main()
