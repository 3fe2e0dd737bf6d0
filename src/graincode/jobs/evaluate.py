"""Metrics of samples, reconstructions or any images. `graincode-evaluate --help` shows the configuration."""

from __future__ import annotations

from graincode.config.job import job_main

if __name__ == "__main__":  # before the imports below, so that --help answers at once
    raise SystemExit(job_main("evaluate"))

from collections.abc import Mapping

import torch
from omegaconf import DictConfig

from graincode.config.job import build, open_run, resolve_path
from graincode.core.errors import check
from graincode.distributed import collectives
from graincode.evaluation.record import Evaluation, table
from graincode.evaluation.subjects import Context
from graincode.export import Export, load_export, load_pair
from graincode.jobs.dry import dry_run
from graincode.networks.features import FeatureNetwork
from graincode.runs.table import update_table


def run(cfg: DictConfig) -> float:
    """Measure, write `metrics.json`, and give the first Fréchet distance, or else the first metric."""
    mode = build(cfg.evaluation, features=build(cfg.features))
    subject, reference = build(cfg.images), build(cfg.reference)
    mode.check(subject, reference)
    hardware, source = build(cfg.hardware), build(cfg.data)
    device = hardware.machine().device
    networks = {name: network.to(device) for name, network in mode.networks.items()}
    if cfg.debug.dry:
        return _dry(networks, source.image_size)

    def load_tokenizer() -> Export:
        return load_export(resolve_path(cfg, "tokenizer_path", "train_tokenizer", "export"), "tokenizer", device)

    def load_models() -> tuple[Export, Export]:
        generator_path = resolve_path(cfg, "generator_path", "train_generator", "export")
        tokenizer_path = resolve_path(cfg, "tokenizer_path", "train_tokenizer", "export")
        return load_pair(generator_path, tokenizer_path, device, cfg.precision)

    reads = mode.reads(subject, reference)
    if "sampler" not in reads:
        check("precision", cfg.precision, "float32, as no samples are drawn", cfg.precision == "float32")
    context = Context(
        networks, source, build(cfg.sampler), load_tokenizer, load_models, device, cfg.precision, hardware.compile,
        cfg.seed, cfg.batch_size, hardware.workers, cfg.cache_dir,
    )  # fmt: skip
    evaluation = Evaluation(mode, subject, reference, context)
    for key in {"data", "sampler", "reference"} - reads:
        cfg[key] = None  # what is not read does not tell two runs apart
    with open_run("evaluate", cfg, **evaluation.inputs) as run:
        if (result := run.result) is not None:
            return run.report_finished(result)
        record = evaluation.run(run.path, cfg.keep)
        if collectives.is_main():
            print(table(record))
            print(f"metrics: {run.path / 'metrics.json'}")
        objective = run.finish(evaluation.objective(record), metrics=record["metrics"])
        collectives.on_main(lambda: update_table(run.path.parent))
        return objective


def _dry(networks: Mapping[str, FeatureNetwork], size: tuple[int, int]) -> float:
    images = torch.zeros(1, 3, *size, dtype=torch.uint8)
    modules = {network.name: network.module for network in networks.values()}
    return dry_run(lambda: [network(images) for network in networks.values()], modules, "features of one image", False)
