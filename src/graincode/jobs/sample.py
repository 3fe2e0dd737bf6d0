"""Codes and images from a generator. `graincode-sample --help` shows the configuration."""

from __future__ import annotations

from graincode.config.job import job_main

if __name__ == "__main__":  # before the imports below, so that --help answers at once
    raise SystemExit(job_main("sample"))

import logging
import time
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from graincode.config.job import build, open_run, resolve_path
from graincode.core.codes import GrainCodes
from graincode.data.decoding import open_image
from graincode.distributed import collectives
from graincode.evaluation.samples import SampleStream, balanced_labels, read_samples, warnings_of_classes
from graincode.export import load_pair
from graincode.files import replacing
from graincode.jobs.dry import dry_run
from graincode.jobs.given import find_given
from graincode.pictures import grid

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> float:
    """Draw, decode and keep; returns seconds per image."""
    cfg.generator_path = str(resolve_path(cfg, "generator_path", "train_generator", "export"))
    cfg.tokenizer_path = str(resolve_path(cfg, "tokenizer_path", "train_tokenizer", "export"))
    chosen, hardware = build(cfg.sampler), build(cfg.hardware)
    exports = load_pair(cfg.generator_path, cfg.tokenizer_path, hardware.machine().device, cfg.precision)
    generator, tokenizer = (export.module for export in exports)
    sampler = generator.resolve(chosen)
    if cfg.debug.dry:  # which counts what the operations of eager steps cost
        parts = {"generator": generator, "tokenizer": tokenizer}
        one = SampleStream(generator, tokenizer, sampler, torch.zeros(1).long(), cfg.seed, 1)
        return dry_run(one.gathered, parts, "one sample", training=False)
    if hardware.compile:
        generator.compile_sampling()
    names = exports[0].names("class_names")
    given = find_given(cfg, generator, names, exports[1].identity)
    labels = given.labels if given else balanced_labels(cfg.num_samples, generator.classes, cfg.classes, names)
    for line in warnings_of_classes(exports[0], labels):
        log.warning(line)
    inputs = {"generator": exports[0].identity, "tokenizer": exports[1].identity} | (given.inputs if given else {})
    with open_run("sample", cfg, **inputs) as run:
        if (result := run.finished(lambda: _load(run.path))) is not None:
            return run.report_finished(result)
        began = time.perf_counter()
        stream = SampleStream(generator, tokenizer, sampler, labels, cfg.seed, cfg.batch_size, given and given.prompt)
        images, codes = stream.gathered()
        seconds = (time.perf_counter() - began) / cfg.num_samples
        columns = len(given.codes) if given else _columns(generator.classes, cfg.classes)
        shown = images[: columns * max(400 // columns, 1)]
        if given:
            shown = torch.cat([given.shown(tokenizer), shown])
        mean_length = float(codes.lengths.double().mean())
        collectives.on_main(lambda: _write(run.path, images, codes, labels, grid(shown, columns, 2)))
        if collectives.is_main():
            about = f"{mean_length:.1f} codes, drawn and decoded at {1 / seconds:.3g} images/s"
            print(f"{cfg.num_samples} samples of {about}: {run.path / 'samples.png'}")
        counts = {"samples": cfg.num_samples, "classes": generator.classes}
        return run.finish(seconds, mean_length=mean_length, **counts, **exports[1].imported)


def _columns(classes: int, chosen: list[int] | None) -> int:
    """One for each class, unless some were chosen, or they are many."""
    return classes if chosen is None and 0 < classes <= 20 else 10


def _load(folder: Path) -> None:
    read_samples(folder / "samples.npz")
    open_image(folder / "samples.png")


def _write(folder: Path, images: Tensor, codes: GrainCodes, labels: Tensor, picture: Tensor) -> None:
    with replacing(folder / "samples.npz") as partial:
        np.savez_compressed(
            partial, images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy(),
            grains=codes.grains.byte().numpy(), indices=codes.indices.int().numpy(),
        )  # fmt: skip
    with replacing(folder / "samples.png") as partial:
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(partial)
