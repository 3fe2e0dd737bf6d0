"""Codes and images from a generator. `graincode-sample --help` shows the configuration."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from graincode.config.job import build, job_main, open_run, resolve_path
from graincode.core.codes import GrainCodes
from graincode.core.errors import GraincodeError
from graincode.core.images import to_uint8
from graincode.core.layout import check_layouts
from graincode.core.prompts import CodeMask, CodePrefix
from graincode.data.codes import CodeDataset
from graincode.data.images import open_image
from graincode.distributed import collectives
from graincode.evaluation.samples import balanced_labels, draw, gathered
from graincode.export import load_pair
from graincode.files import replacing
from graincode.generator import Generator
from graincode.jobs.dry import dry_run
from graincode.pictures import grid
from graincode.sampling import AutoSampler
from graincode.tokenizer import DQVAE


def run(cfg: DictConfig) -> float:
    """Draw, decode and keep; gives seconds per image."""
    cfg.generator_path = str(resolve_path(cfg, "generator_path", "train_generator", "export"))
    cfg.tokenizer_path = str(resolve_path(cfg, "tokenizer_path", "train_tokenizer", "export"))
    sampler: AutoSampler = build(cfg.sampler)
    hardware = build(cfg.hardware)
    device = hardware.machine().device
    made, decodes = load_pair(cfg.generator_path, cfg.tokenizer_path, device, cfg.precision)
    if hardware.compile and not cfg.debug.dry:  # which counts what the operations of eager steps cost
        made.module.compile_sampling()
    sampler = made.module.resolve(sampler)
    if cfg.debug.dry:
        parts = {"generator": made.module, "tokenizer": decodes.module}
        label = torch.zeros(1).long()

        def one() -> None:
            list(draw(made.module, decodes.module, sampler, label, cfg.seed, 1))

        return dry_run(one, parts, "one sample", training=False)
    if not _asked(cfg):
        given, original, inputs, cfg.given = None, None, {}, None
        labels = balanced_labels(cfg.num_samples, made.module.classes, cfg.classes)
    else:
        given, original, labels, inputs = _given(cfg, made.module)
    with open_run("sample", cfg, generator=made.identity, tokenizer=decodes.identity, **inputs) as run:
        if (result := run.result) is not None:
            return run.report_finished(result)
        began = time.perf_counter()
        drawn = draw(made.module, decodes.module, sampler, labels, cfg.seed, cfg.batch_size, given)
        images, codes = gathered(drawn, made.module.layout)
        seconds = (time.perf_counter() - began) / cfg.num_samples
        mean_length = float(codes.lengths.double().mean())
        columns = _columns(made.module.classes, cfg.classes)
        shown = images[:400]
        if given is not None:
            columns = len(original)
            known = given[:columns].known_cells
            shown = torch.cat([*_shown(decodes.module, original, known), images[: columns * max(400 // columns, 1)]])
        collectives.on_main(lambda: _write(run.path, images, codes, labels, grid(shown, columns, 2)))
        if collectives.is_main():
            about = (
                f"{cfg.num_samples} samples of {mean_length:.1f} codes, drawn and decoded at {1 / seconds:.3g} images/s"
            )
            print(f"{about}: {run.path / 'samples.png'}")
        return run.finish(seconds, mean_length=mean_length, samples=cfg.num_samples, classes=made.module.classes)


def _columns(classes: int, chosen: list[int] | None) -> int:
    """How many samples stand in a row: one of each class, unless some were chosen, or they are many."""
    return classes if chosen is None and 0 < classes <= 20 else 10


def _asked(cfg: DictConfig) -> dict[str, Any]:
    """What is to be given."""
    if cfg.given is None:
        return {}
    keys = ("grains", "regions", "keep", "redraw", "mask", "map")
    asked = {key: cfg.given[key] for key in keys if cfg.given[key] not in (None, False)}
    if cfg.given.unit == "pixel" and not asked.keys() & {"keep", "redraw"}:
        raise GraincodeError("given.unit=pixel without a box: type given.unit=region, or given.redraw=[8,8,24,24]")
    return asked


def _given(cfg: DictConfig, generator: Generator) -> tuple[CodePrefix | CodeMask, GrainCodes, Tensor, dict[str, str]]:
    """What is given of each sample; the images that it comes from, the samples' labels, and what identifies them."""
    asked = _asked(cfg)
    area = next((key for key in ("keep", "redraw", "mask") if key in asked), None)
    if len(asked.keys() - ({"map"} if area else set())) > 1:
        both = " and ".join(f"given.{key}={value}" for key, value in asked.items())
        raise GraincodeError(f"{both}: type one of them")
    cfg.given.codes_path = str(resolve_path(cfg, "given.codes_path", "extract_codes", "codes"))
    dataset = CodeDataset(cfg.given.codes_path, cfg.given.split)
    check_layouts(dataset.layout, generator.layout, f"codes of {cfg.given.codes_path}", "this generator")
    count = min(cfg.given.images, len(dataset), cfg.num_samples)
    batch = dataset[[i % count for i in range(cfg.num_samples)]]
    codes = GrainCodes(batch.codes.grains, batch.codes.indices, generator.layout)
    labels, inputs = batch.labels, {"codes": dataset.identity}
    if cfg.classes is not None:  # all images in the first class, then in the next
        rows = balanced_labels(-(-cfg.num_samples // count), generator.classes, cfg.classes)
        labels = rows.repeat_interleave(count)[: cfg.num_samples]
    prefix: CodePrefix | CodeMask
    if area == "mask":
        prefix = CodeMask.of_pixels(codes, _white(cfg, codes.layout.image_size), cfg.given.map)
        inputs["mask"] = hashlib.sha256(Path(cfg.given.mask).read_bytes()).hexdigest()[:16]
    elif area is not None:
        in_pixels = cfg.given.unit == "pixel"
        size = codes.layout.image_size if in_pixels else codes.layout.grids[0]
        inside = _inside(cfg, area, size)
        make = CodeMask.of_pixels if in_pixels else CodeMask.of_regions
        prefix = make(codes, inside if area == "keep" else ~inside, cfg.given.map)
    elif cfg.given.grains is not None:
        prefix = CodePrefix.of_grains(codes, cfg.given.grains)
    elif cfg.given.regions is not None:
        prefix = CodePrefix.of_regions(codes, cfg.given.regions)
    else:
        prefix = CodePrefix.of_map(codes)
    generator.accept(prefix)
    if area is not None and bool(prefix[:count].known_cells.all()):
        raise GraincodeError(
            f"given.{area}={cfg.given[area]} keeps all codes of all images: give less, so that some are drawn"
        )
    return prefix, codes[:count], labels, inputs


def _inside(cfg: DictConfig, key: str, size: tuple[int, int]) -> Tensor:
    """(height, width) bool, what is inside the box of a key."""
    box, (height, width) = list(cfg.given[key]), size
    if len(box) != 4 or not (0 <= box[0] < box[2] <= height and 0 <= box[1] < box[3] <= width):
        raise GraincodeError(
            f"given.{key}={box}: expected [top,left,bottom,right] within {height} x {width} {cfg.given.unit}s; type "
            f"for example given.{key}=[0,0,{height},{max(width // 2, 1)}]"
        )
    inside = torch.zeros(size, dtype=torch.bool)
    inside[box[0] : box[2], box[1] : box[3]] = True
    return inside


def _white(cfg: DictConfig, size: tuple[int, int]) -> Tensor:
    """(height, width) bool, where the image given.mask is nearer to white than to black, or to transparent."""
    cfg.given.mask = str(Path(cfg.given.mask).expanduser().resolve())
    image = open_image(cfg.given.mask, f"given.mask={cfg.given.mask}", "RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("L")
    if (image.height, image.width) != size:
        raise GraincodeError(
            f"given.mask={cfg.given.mask} has {image.height} x {image.width} pixels: expected {size[0]} x {size[1]}, "
            "as of the images; type given.mask= a file of that size"
        )
    return torch.from_numpy(np.array(image)) >= 128


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
    job_main("sample")


if __name__ == "__main__":
    main()
