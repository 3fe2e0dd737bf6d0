"""Stage 1: train a tokenizer. `graincode-train-tokenizer --help` shows the configuration."""

from __future__ import annotations

import logging

import torch
from omegaconf import DictConfig
from torch import Tensor

from graincode.core.codes import CodeLayout
from graincode.core.images import to_uint8
from graincode.core.losses import Term, weighted_sum
from graincode.data.images import ImageBatch, ImageSource
from graincode.data.loader import in_order
from graincode.engine.config import build, job_main, open_run, with_layout
from graincode.engine.dry import dry_run
from graincode.engine.loop import train
from graincode.passes import ReconstructionPass
from graincode.pictures import density_maps, grain_maps, grid
from graincode.tokenizer import DQVAE, ReconstructionObjective

log = logging.getLogger(__name__)

EVALUATION_BATCH = 250


class TokenizerStage:
    """Images and a tokenizer, as the training loop sees them."""

    def __init__(self, module: DQVAE, objective: ReconstructionObjective, source: ImageSource, workers: int) -> None:
        self.module, self.objective, self.workers = module, objective, workers
        self.dataset, self.validation = source.split("train"), source.split("val")
        self.device = torch.device("cpu")

    def terms(self, module: torch.nn.Module, batch: ImageBatch) -> dict[str, Term]:
        """See `Stage`."""
        self.device = batch.images.device
        return self.objective(batch.images, module(batch.images))

    @torch.no_grad()
    def evaluate(self, limit: int) -> dict[str, float]:
        """Reconstruction error (less is better: MSE in [0, 1]) and use of the codebook, on validation images."""
        reconstructions = ReconstructionPass(
            self.module, self.validation, EVALUATION_BATCH, limit, device=self.device, workers=self.workers
        )
        for _ in reconstructions:
            pass
        figures = reconstructions.figures()
        return {"objective": figures["mse"], **figures}

    @torch.no_grad()
    def pictures(self) -> dict[str, Tensor]:
        """The first validation images over their density map, grain map and reconstruction."""
        images = self.validation[range(min(8, len(self.validation)))].images.to(self.device)
        routing, cells = self.module.router(images), self.module.layout.grains
        rows = [
            to_uint8(images),
            density_maps(routing.density, self.module.layout.image_size),
            grain_maps(images, routing.grains, cells),
            to_uint8(self.module.detokenize(self.module.tokenize(images))),
        ]
        return {
            "original, density, grains, reconstruction": grid(torch.cat([row.cpu() for row in rows]), len(images), 2)
        }


def run(cfg: DictConfig) -> float:
    """Train and export; gives the mean squared error on validation images, in [0, 1]."""
    source: ImageSource = build(cfg.data)
    layout = CodeLayout(source.image_size, cfg.tokenizer.grains, cfg.tokenizer.codebook_size, len(source.class_names))
    config = with_layout(cfg.tokenizer.model, layout)
    torch.manual_seed(cfg.seed)
    module: DQVAE = build(config)
    objective: ReconstructionObjective = build(cfg.tokenizer.objective)
    if cfg.debug.dry:
        return _dry(module, objective)
    hardware = build(cfg.hardware)
    with open_run("train_tokenizer", cfg) as run:
        if (result := run.result) is not None:
            return run.report_finished(result)
        stage = TokenizerStage(module, objective, source, hardware.workers)
        accelerator = hardware.accelerator()
        batches = in_order(stage.dataset, EVALUATION_BATCH, workers=hardware.workers)
        calibration = module.to(accelerator.device).calibrate(batch.images.to(accelerator.device) for batch in batches)
        shares = (f"{100 * calibration[f'achieved_{g}']:.1f} %" for g in range(layout.num_grains))
        log.info("share of the training regions at each grain: %s", ", ".join(shares))
        figures = train(
            stage, accelerator, build(cfg.optimizer), cfg.trainer, cfg.seed, hardware.workers, run.path,
            cfg.logging.tensorboard,
        )  # fmt: skip
        run.export("tokenizer", config, module, data=stage.dataset.name)
        return run.finish(figures["objective"], figures=figures, calibration=calibration)


def _dry(module: DQVAE, objective: ReconstructionObjective) -> float:
    images = torch.rand(1, 3, *module.layout.image_size) * 2 - 1
    module.calibrate([torch.rand(64, *images.shape[1:]) * 2 - 1])

    def step() -> None:
        weighted_sum(objective(images, module(images))).backward()

    parts = {name: getattr(module, name) for name in ("encoder", "quantizer", "decoder")}
    return dry_run(step, parts, "one training step, one image", training=True)


def main() -> None:
    """Console entry."""
    job_main("train_tokenizer", run)


if __name__ == "__main__":
    main()
