"""Stage 2: train a generator on codes. `graincode-train-generator --help` shows the configuration."""

from __future__ import annotations

import logging
import math

import torch
from omegaconf import DictConfig
from torch import Tensor

from graincode.core.codes import GrainCodes
from graincode.core.errors import GraincodeError
from graincode.core.images import to_uint8
from graincode.core.losses import Term, weighted_sum
from graincode.data.codes import CodeBatch, CodeDataset
from graincode.data.loader import in_order
from graincode.engine.config import build, job_main, open_run, resolve_path, with_layout
from graincode.engine.dry import dry_run
from graincode.engine.logging import Meter
from graincode.engine.loop import train
from graincode.export import load_export
from graincode.generator import AutoregressiveObjective, DGiTAR
from graincode.pictures import code_maps, grid
from graincode.tokenizer import DQVAE

log = logging.getLogger(__name__)

EVALUATION_BATCH = 250


class GeneratorStage:
    """Codes and a generator, as the training loop sees them."""

    def __init__(
        self, module: DGiTAR, objective: AutoregressiveObjective, codes_path: str, tokenizer: DQVAE | None
    ) -> None:
        self.module, self.objective, self.tokenizer = module, objective, tokenizer
        self.dataset, self.validation = CodeDataset(codes_path, "train"), CodeDataset(codes_path, "val")
        self.device = torch.device("cpu")

    def terms(self, module: torch.nn.Module, batch: CodeBatch) -> dict[str, Term]:
        """See `Stage`."""
        self.device = batch.labels.device
        return self.objective(module(batch.codes, batch.labels), self.module.layout.num_grains)

    @torch.no_grad()
    def evaluate(self, limit: int) -> dict[str, float]:
        """Bits per image (less is better) and the terms of the loss, on validation codes."""
        meter = Meter()
        for batch in in_order(self.validation, EVALUATION_BATCH, limit):
            meter.add(self.terms(self.module, batch.to(self.device)))
        figures = meter.flush()
        bits = figures.pop("nats_per_image") / math.log(2)
        return {"objective": bits, "bits_per_image": bits, **figures}

    def pictures(self) -> dict[str, Tensor]:
        """Samples and their codes, a colour for each, above those of validation images."""
        count = min(16, len(self.validation))
        real = self.validation[range(count)]
        samples = self.module.sample(real.labels, batch_size=count)
        both = GrainCodes.cat([samples, real.codes])
        shown = {"codes of samples, of images": grid(code_maps(both), count, 4)}
        if self.tokenizer is not None:
            images = to_uint8(self.tokenizer.detokenize(both))
            shown["samples, reconstructions"] = grid(images, count, 2)
        return shown


def run(cfg: DictConfig) -> float:
    """Train and export; gives bits per image on validation codes."""
    cfg.codes_path = str(resolve_path(cfg, "codes_path", "extract_codes", "codes"))
    codes = CodeDataset(cfg.codes_path, "train")
    config = with_layout(cfg.generator.model, codes.layout)
    torch.manual_seed(cfg.seed)
    module: DGiTAR = build(config)
    objective: AutoregressiveObjective = build(cfg.generator.objective)
    if cfg.debug.dry:
        return _dry(module, objective, codes[0])
    hardware = build(cfg.hardware)
    with open_run("train_generator", cfg, codes=codes.identity) as run:
        if (result := run.result) is not None:
            return run.report_finished(result)
        stage = GeneratorStage(module, objective, cfg.codes_path, _decoder_of(codes))
        figures = train(
            stage, hardware.accelerator(), build(cfg.optimizer), cfg.trainer, cfg.seed, hardware.workers, run.path,
            cfg.logging.tensorboard,
        )  # fmt: skip
        run.export("generator", config, module, tokenizer=codes.info["tokenizer"], class_names=list(codes.class_names))
        return run.finish(figures["objective"], figures=figures)


def _decoder_of(codes: CodeDataset) -> DQVAE | None:
    """The tokenizer that made the codes, for pictures alone, if it is still where it was."""
    path = codes.info["tokenizer_path"]
    try:
        export = load_export(path, "tokenizer")
    except GraincodeError:
        export = None
    if export is None or export.identity != codes.info["tokenizer"]:
        log.info("samples are logged as codes, not as images: the tokenizer that made them is no longer at %s", path)
        return None
    return export.module


def _dry(module: DGiTAR, objective: AutoregressiveObjective, batch: CodeBatch) -> float:
    def step() -> None:
        weighted_sum(objective(module(batch.codes, batch.labels), module.layout.num_grains)).backward()

    parts = {name: getattr(module, name) for name in ("embedding", "position_transformer", "content_transformer")}
    return dry_run(step, parts, "one training step, one image", training=True)


def main() -> None:
    """Console entry."""
    job_main("train_generator", run)


if __name__ == "__main__":
    main()
