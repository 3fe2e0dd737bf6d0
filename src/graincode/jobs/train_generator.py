"""Stage 2: train a generator on codes. `graincode-train-generator --help` shows the configuration."""

from __future__ import annotations

from graincode.config.job import job_main

if __name__ == "__main__":  # before the imports below, so that --help answers at once
    raise SystemExit(job_main("train_generator"))

import logging
from contextlib import suppress
from dataclasses import replace

import torch
from omegaconf import DictConfig

from graincode.config.job import build, open_run, resolve_path, with_layout
from graincode.core.errors import GraincodeError
from graincode.core.losses import weighted_sum
from graincode.data.codes import CodeDataset
from graincode.export import export_run, load_export, load_weights
from graincode.generator import Generator, GeneratorObjective
from graincode.jobs.dry import dry_run
from graincode.tokenizer import DQVAE
from graincode.training.generator_stage import GeneratorStage
from graincode.training.loop import Training
from graincode.training.stage import try_optimizer

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> float:
    """Train and export; returns the objective on validation codes: bits per image, or the loss."""
    hardware, trainer = build(cfg.hardware), build(cfg.trainer)
    cfg.codes_path = str(resolve_path(cfg, "codes_path", "extract_codes", "codes"))
    codes = CodeDataset(cfg.codes_path, "train")
    config = with_layout(cfg.generator.model, replace(codes.layout, **cfg.generator.get("sequence", {})))
    torch.manual_seed(cfg.seed)
    module: Generator = build(cfg.generator.model)
    objective: GeneratorObjective = build(cfg.generator.objective)
    if cfg.debug.dry:
        item = codes[0]
        parts = {name: part for name, part in module.named_children() if any(True for _ in part.parameters())}

        def step() -> None:
            weighted_sum(objective(module(item.codes, item.labels))).backward()

        return dry_run(step, parts, "one training step, one image", training=True)
    begun = {} if cfg.init_from is None else {"init_from": load_weights(module, cfg.init_from, "generator")}
    optimizer, logs = try_optimizer(build(cfg.optimizer)), build(cfg.logging)
    machine = hardware.machine()
    with open_run("train_generator", cfg, codes=codes.identity, **begun) as run:
        if (result := run.finished(lambda: load_export(run.path / "export", "generator"))) is not None:
            return run.report_finished(result)
        validation, decoder = CodeDataset(cfg.codes_path, "val"), _decoder_of(codes)
        stage = GeneratorStage(module, objective, codes, validation, decoder, trainer.bucketing_window)
        trained, metrics = Training(stage, machine, optimizer, trainer, cfg.seed, run, logs).run()
        made_with = {name: codes.info.get(name) for name in ("tokenizer", "ratios", "psnr")}
        made_with |= {name: codes.info[name] for name in ("tokenizer_imported",) if name in codes.info}
        if module.classes and (absent := codes.absent_classes):
            log.warning("classes without a training image, of which samples show nothing: %s", ", ".join(absent))
            made_with["absent_classes"] = absent
        export_run(run.path, "generator", config, trained, **made_with, class_names=list(codes.class_names))
        return run.finish(metrics["objective"], metrics=metrics)


def _decoder_of(codes: CodeDataset) -> DQVAE | None:
    """The tokenizer that made the codes, for pictures alone, if it is still where it was."""
    path = codes.info["tokenizer_path"]
    with suppress(GraincodeError):
        export = load_export(path, "tokenizer")
        if export.identity == codes.info["tokenizer"]:
            return export.module
    log.info("samples are logged as codes, not as images: the tokenizer that made them is no longer at %s", path)
    return None
