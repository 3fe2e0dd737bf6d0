"""Codes and images from a generator. `graincode-sample --help` shows the configuration."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from graincode.core.codes import GrainCodes
from graincode.core.errors import GraincodeError
from graincode.core.images import to_uint8
from graincode.engine.config import build, job_main, open_run, resolve_path
from graincode.engine.dry import dry_run
from graincode.export import load_pair
from graincode.files import replacing
from graincode.generator import DGiTAR
from graincode.pictures import grid
from graincode.sampling import AutoregressiveSampler
from graincode.tokenizer import DQVAE


@dataclass(frozen=True)
class SampleBatch:
    """Attributes:
    images: (B, 3, H, W) uint8.
    codes: they were decoded from.
    labels: (B,) long.
    """

    images: Tensor
    codes: GrainCodes
    labels: Tensor


def run(cfg: DictConfig) -> float:
    """Draw, decode and keep; gives seconds per image."""
    cfg.generator_path = str(resolve_path(cfg, "generator_path", "train_generator", "export"))
    cfg.tokenizer_path = str(resolve_path(cfg, "tokenizer_path", "train_tokenizer", "export"))
    sampler: AutoregressiveSampler = build(cfg.sampler)
    device = build(cfg.hardware).accelerator().device
    made, decodes = load_pair(cfg.generator_path, cfg.tokenizer_path, device)
    if cfg.debug.dry:
        call = lambda: list(draw(made.module, decodes.module, sampler, torch.zeros(1).long(), cfg.seed, 1))  # noqa: E731
        return dry_run(call, {"generator": made.module, "tokenizer": decodes.module}, "one sample", training=False)
    labels = balanced_labels(cfg.num_samples, made.module.layout.classes, cfg.classes)
    with open_run("sample", cfg) as run:
        if (result := run.result) is not None:
            return run.report_finished(result)
        began = time.perf_counter()
        batches = list(draw(made.module, decodes.module, sampler, labels, cfg.seed, cfg.batch_size))
        seconds = (time.perf_counter() - began) / cfg.num_samples
        images, codes = (
            torch.cat([batch.images for batch in batches]),
            GrainCodes.cat([batch.codes for batch in batches]),
        )
        with replacing(run.path / "samples.npz") as partial:
            np.savez_compressed(
                partial, images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy(),
                grains=codes.grains.byte().numpy(), indices=codes.indices.int().numpy(),
            )  # fmt: skip
        shown = images[:400]
        with replacing(run.path / "samples.png") as partial:
            columns = made.module.layout.classes if cfg.classes is None and made.module.layout.classes else 10
            Image.fromarray(grid(shown, columns, 2).permute(1, 2, 0).numpy()).save(partial)
        mean_length = float(codes.lengths.double().mean())
        print(f"{cfg.num_samples} samples, {mean_length:.1f} codes each: {run.path / 'samples.png'}")
        return run.finish(seconds, mean_length=mean_length, samples=cfg.num_samples)


def balanced_labels(count: int, classes: int, chosen: list[int] | None) -> Tensor:
    """(count,) long labels that take the chosen classes (all by default) in turn; zeros if there are no classes.

    Raises:
        GraincodeError: a chosen class is not one of them.
    """
    if chosen is not None and (not classes or min(chosen) < 0 or max(chosen) >= classes):
        raise GraincodeError(f"classes={list(chosen)}: expected labels from 0 to {classes - 1}, such as classes=[0]")
    labels = torch.tensor(list(chosen) if chosen is not None else range(max(classes, 1)))
    return labels[torch.arange(count) % len(labels)]


def draw(
    generator: DGiTAR, tokenizer: DQVAE, sampler: AutoregressiveSampler, labels: Tensor, seed: int, batch_size: int
) -> Iterator[SampleBatch]:
    """Samples for (N,) labels, batch by batch; sample i depends on (seed, i) and its label alone."""
    settings = dataclasses.asdict(sampler)
    device = generator.content_head.weight.device
    with tqdm(total=len(labels), unit=" images", desc="samples", leave=False, mininterval=1.0) as bar:
        for start in range(0, len(labels), batch_size):
            part = labels[start : start + batch_size]
            codes = generator.sample(part, seed, start, batch_size, **settings)
            images = to_uint8(tokenizer.detokenize(codes.to(device))).cpu()
            bar.update(len(part))
            yield SampleBatch(images, codes, part)


def main() -> None:
    """Console entry."""
    job_main("sample", run)


if __name__ == "__main__":
    main()
