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
from graincode.core.codes import CodePrefix, GrainCodes
from graincode.core.errors import GraincodeError
from graincode.core.images import to_uint8
from graincode.data.codes import CodeDataset
from graincode.engine.config import build, job_main, open_run, resolve_path
from graincode.engine.dry import dry_run
from graincode.export import load_pair
from graincode.files import replacing
from graincode.generator import DGiTAR
from graincode.passes import balanced_labels, draw, gathered
from graincode.pictures import grid
from graincode.sampling import AutoregressiveSampler
from graincode.tokenizer import DQVAE, check_layouts


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
    if cfg.given.grains is None and cfg.given.regions is None and not cfg.given.map:
        given, original, inputs, cfg.given = None, None, {}, None
        labels = balanced_labels(cfg.num_samples, made.module.classes, cfg.classes)
    else:
        given, original, labels, inputs = _beginnings(cfg, made.module)
    with open_run("sample", cfg, generator=made.identity, tokenizer=decodes.identity, **inputs) as run:
        if (result := run.result) is not None:
            return run.report_finished(result)
        began = time.perf_counter()
        drawn = draw(made.module, decodes.module, sampler, labels, cfg.seed, cfg.batch_size, given)
        images, codes = gathered(drawn, made.module.layout)
        seconds = (time.perf_counter() - began) / cfg.num_samples
        mean_length = float(codes.lengths.double().mean())
        columns = made.module.classes if cfg.classes is None and made.module.classes else 10
        shown = images[:400]
        if given is not None:
            columns = len(original)
            known = given[:columns].known_cells
            shown = torch.cat([*_shown(decodes.module, original, known), images[: columns * max(400 // columns, 1)]])
        processes.on_main(lambda: _write(run.path, images, codes, labels, grid(shown, columns, 2)))
        if processes.is_main():
            print(f"{cfg.num_samples} samples, {mean_length:.1f} codes each: {run.path / 'samples.png'}")
        return run.finish(seconds, mean_length=mean_length, samples=cfg.num_samples, classes=made.module.classes)


def _beginnings(cfg: DictConfig, generator: DGiTAR) -> tuple[CodePrefix, GrainCodes, Tensor, dict[str, str]]:
    """What is given of each sample; the images that it comes from, their labels in turn, and what identifies them."""
    asked = {key: cfg.given[key] for key in ("grains", "regions", "map") if cfg.given[key] not in (None, False)}
    if len(asked) > 1:
        both = " and ".join(f"given.{key}={value}" for key, value in asked.items())
        raise GraincodeError(f"{both}: type one of them")
    if cfg.classes is not None:
        raise GraincodeError(f"classes={list(cfg.classes)}, but samples take those of what is given: type classes=null")
    cfg.given.codes_path = str(resolve_path(cfg, "given.codes_path", "extract_codes", "codes"))
    dataset = CodeDataset(cfg.given.codes_path, cfg.given.split)
    check_layouts(dataset.layout, generator.layout, f"codes of {cfg.given.codes_path}", "this generator")
    count = min(cfg.given.images, len(dataset), cfg.num_samples)
    batch = dataset[[i % count for i in range(cfg.num_samples)]]
    codes = GrainCodes(batch.codes.grains, batch.codes.indices, generator.layout)
    if cfg.given.grains is not None:
        prefix = CodePrefix.of_grains(codes, cfg.given.grains)
    elif cfg.given.regions is not None:
        prefix = CodePrefix.of_regions(codes, cfg.given.regions)
    else:
        prefix = CodePrefix.of_map(codes)
    return prefix, codes[:count], batch.labels, {"codes": dataset.identity}


def _shown(tokenizer: DQVAE, codes: GrainCodes, known: Tensor) -> list[Tensor]:
    """Images that codes stand for, and what of them is given, the rest grey: twice (B, 3, H, W) uint8."""
    images = to_uint8(tokenizer.detokenize(codes.to(tokenizer.device))).cpu()
    pixels = torch.nn.functional.interpolate(known[:, None].float(), images.shape[2:]).bool()
    return [images, torch.where(pixels, images, torch.full_like(images, 160))]


def _write(folder: Path, images: Tensor, codes: GrainCodes, labels: Tensor, picture: Tensor) -> None:
    with replacing(folder / "samples.npz") as partial:
        np.savez_compressed(
            partial, images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy(),
            grains=codes.grains.byte().numpy(), indices=codes.indices.int().numpy(),
        )  # fmt: skip
    with replacing(folder / "samples.png") as partial:
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(partial)


def main() -> None:
    """Console entry."""
    job_main("sample", run)


if __name__ == "__main__":
    main()
