"""Metrics of samples, reconstructions or any images. `graincode-evaluate --help` shows the configuration."""

from __future__ import annotations

from graincode.config.job import job_main

if __name__ == "__main__":  # before the imports below, so that --help answers at once
    raise SystemExit(job_main("evaluate"))

from pathlib import Path

import torch
from omegaconf import DictConfig

from graincode.config.job import build, open_run, resolve_path
from graincode.core.errors import check
from graincode.distributed import collectives
from graincode.evaluation.record import check_kept, evaluate, read_record, table
from graincode.evaluation.subjects import Context
from graincode.jobs.dry import dry_run
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
        image, known = torch.zeros(1, 3, *source.image_size, dtype=torch.uint8), networks.values()
        modules = {network.name: network.module for network in known}
        return dry_run(lambda: [network(image) for network in known], modules, "features of one image", training=False)

    def find_export(kind: str) -> Path:
        path = resolve_path(cfg, f"{kind}_path", f"train_{kind}", "export")
        cfg[f"{kind}_path"] = str(path)
        return path

    reads = mode.reads(subject, reference)
    if "sampler" not in reads:
        check("precision", cfg.precision, "float32, as no samples are drawn", cfg.precision == "float32")
    context = Context(
        networks, source, build(cfg.sampler), find_export, device, cfg.precision, hardware.compile, cfg.seed,
        cfg.batch_size, hardware.workers, cfg.cache_dir,
    )  # fmt: skip
    plan = mode.plan(subject, reference, context)
    for key in {"data", "sampler", "reference"} - reads:
        cfg[key] = None  # what is not read does not tell two runs apart
    with open_run("evaluate", cfg, **plan.identity) as run:
        if (result := run.finished(lambda: check_kept(run.path, read_record(run.path)["count"], cfg.keep))) is not None:
            collectives.on_main(lambda: update_table(run.path.parent))  # it may have been killed before it did that
            return run.report_finished(result)
        record = evaluate(mode, plan, run.path, cfg.keep)
        if collectives.is_main():
            print(table(record))
            print(f"metrics: {run.path / 'metrics.json'}")
        # where there are Fréchet distances, one of them comes first
        objective = next(iter(record["metrics"].values()), float(record["count"]))
        run.finish(objective, metrics=record["metrics"])
        collectives.on_main(lambda: update_table(run.path.parent))
        return objective
