"""Codes and images from a generator. `graincode-sample --help` shows the configuration."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from graincode import processes
from graincode.core.codes import GrainCodes
from graincode.engine.config import build, job_main, open_run, resolve_path
from graincode.engine.dry import dry_run
from graincode.export import load_pair
from graincode.files import replacing
from graincode.passes import balanced_labels, draw, gathered
from graincode.pictures import grid
from graincode.sampling import AutoregressiveSampler


def run(cfg: DictConfig) -> float:
    """Draw, decode and keep; gives seconds per image."""
    cfg.generator_path = str(resolve_path(cfg, "generator_path", "train_generator", "export"))
    cfg.tokenizer_path = str(resolve_path(cfg, "tokenizer_path", "train_tokenizer", "export"))
    sampler: AutoregressiveSampler = build(cfg.sampler)
    device = build(cfg.hardware).machine().device
    made, decodes = load_pair(cfg.generator_path, cfg.tokenizer_path, device)
    if cfg.debug.dry:
        parts = {"generator": made.module, "tokenizer": decodes.module}
        label = torch.zeros(1).long()

        def one() -> None:
            list(draw(made.module, decodes.module, sampler, label, cfg.seed, 1))

        return dry_run(one, parts, "one sample", training=False)
    labels = balanced_labels(cfg.num_samples, made.module.classes, cfg.classes)
    with open_run("sample", cfg, generator=made.identity, tokenizer=decodes.identity) as run:
        if (result := run.result) is not None:
            return run.report_finished(result)
        began = time.perf_counter()
        images, codes = gathered(
            draw(made.module, decodes.module, sampler, labels, cfg.seed, cfg.batch_size), made.module.layout
        )
        seconds = (time.perf_counter() - began) / cfg.num_samples
        mean_length = float(codes.lengths.double().mean())
        columns = made.module.classes if cfg.classes is None and made.module.classes else 10
        processes.on_main(lambda: _write(run.path, images, codes, labels, columns))
        if processes.is_main():
            print(f"{cfg.num_samples} samples, {mean_length:.1f} codes each: {run.path / 'samples.png'}")
        return run.finish(seconds, mean_length=mean_length, samples=cfg.num_samples, classes=made.module.classes)


def _write(folder: Path, images: Tensor, codes: GrainCodes, labels: Tensor, columns: int) -> None:
    with replacing(folder / "samples.npz") as partial:
        np.savez_compressed(
            partial, images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy(),
            grains=codes.grains.byte().numpy(), indices=codes.indices.int().numpy(),
        )  # fmt: skip
    with replacing(folder / "samples.png") as partial:
        Image.fromarray(grid(images[:400], columns, 2).permute(1, 2, 0).numpy()).save(partial)


def main() -> None:
    """Console entry."""
    job_main("sample", run)


if __name__ == "__main__":
    main()
