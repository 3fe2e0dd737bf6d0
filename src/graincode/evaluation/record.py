"""One evaluation from its plan to its record, and the images that were measured, written down without loss."""

from __future__ import annotations

import math
import shutil
import time
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from graincode.core.errors import Damaged, check
from graincode.distributed import collectives
from graincode.evaluation.modes import Mode, Plan
from graincode.evaluation.statistics import cached_statistics, measure
from graincode.evaluation.streams import DatasetStream, ImageStream
from graincode.files import allocate_array, is_number, open_npz, read_json, replacing, write_json

_PNG_END = b"IEND\xaeB`\x82"


def evaluate(mode: Mode, plan: Plan, folder: Path, keep: str | None) -> dict[str, Any]:
    """Measure; write `metrics.json` and what the mode and `keep_images` leave into a folder; returns the record."""
    context, images, reference, clock = plan.context, plan.images, plan.reference, time.perf_counter
    networks, subset, began, waits = context.networks, plan.subset, clock(), []
    real = {
        name: cached_statistics(
            networks, DatasetStream(dataset, *context.loading), subset, context.cache_dir, name in plan.spatial
        )
        for name, dataset in plan.real.items()
    }
    ready, stream = clock(), _timed(keep_images(images, folder, keep), waits)
    how = plan.splits, context.seed, subset, None if images.shows_progress else images.name, "subject" in plan.spatial
    found = measure(networks, stream, images.count, images.mine, *how)
    measured, waited = clock(), sum(waits)
    estimates = mode.estimates(plan, found, real) | images.metrics()
    for name, one in estimates.items():
        finite = math.isfinite(one.value) and math.isfinite(one.std or 0)
        check(name, one.value, "a finite number; look at the reference and at the networks' weights", finite)
    collectives.on_main(lambda: mode.write(plan, found, folder))
    ended, spread = clock(), {name: one for name, one in estimates.items() if one.std is not None}
    seconds = {"real_images": ready - began, "images": waited, "features": measured - ready - waited}
    record = {
        "mode": mode.name,
        "images": images.name,
        "count": images.count,
        "image_size": list(images.image_size),
        "pixels": images.pixels,
        **images.facts,
        "seed": context.seed,
        "batch_size": context.batch_size,
        "reference": reference and reference.name,
        "reference_count": reference and reference.count,
        "reference_hash": None,
        **plan.inputs,
        **images.origin,
        "features": {network.name: network.identity for network in networks.values()},
        "recipes": {network.name: network.recipe for network in networks.values()},
        "settings": plan.settings,
        "metrics": {name: estimate.value for name, estimate in estimates.items()},
        "uncertainty": {name: {"std": one.std, "is": one.over} for name, one in spread.items()},
        "warnings": plan.warnings,
        "seconds": seconds | {"metrics": ended - measured, "all": ended - began},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": str(context.device),
        "processes": collectives.count(),
        "versions": {name: version(name) for name in ("graincode", "torch", "torch-fidelity", "timm")},
    }
    collectives.on_main(lambda: write_json(folder / "metrics.json", record))
    return record


def read_record(folder: Path) -> dict[str, Any]:
    """What `evaluate` wrote into a folder."""
    file, advice = folder / "metrics.json", "the same evaluation writes it again"
    record = read_json(file, {"metrics": dict, "uncertainty": dict, "count": int}, advice)
    for name, value in record["metrics"].items():
        if not is_number(value, float):
            raise Damaged.at(file, f"{name} is {value!r}", advice)
    return record


def _timed(batches: Iterator[Tensor], waits: list[float]) -> Iterator[Tensor]:
    """Batches, and into a list the seconds that were spent waiting for each."""
    began = time.perf_counter()
    for batch in batches:
        waits.append(time.perf_counter() - began)
        yield batch
        began = time.perf_counter()


def keep_images(images: ImageStream, folder: Path, form: str | None) -> Iterator[Tensor]:
    """A stream whose images each process also writes to a folder that all see.

    Args:
        form: "png" for files `images/000000.png`, "npz" for `images.npz` with uint8 (N, H, W, 3) as `arr_0` and labels
            as `arr_1`, None to keep nothing.
    """
    position, raw, shape = images.mine.start, folder / "images.npy", (images.count, *images.image_size, 3)
    if form == "png":
        collectives.on_main(lambda: (folder / "images").mkdir(exist_ok=True))
    elif form == "npz":
        collectives.on_main(lambda: allocate_array(raw, np.uint8, shape))
    for batch in images:
        pixels = batch.permute(0, 2, 3, 1).cpu().numpy() if form else ()
        if form == "npz":
            written = np.load(raw, mmap_mode="r+")
            written[position : position + len(pixels)] = pixels
            written.flush()
        for index, image in enumerate(pixels if form == "png" else (), position):
            Image.fromarray(image).save(folder / "images" / f"{index:06d}.png")
        position += len(pixels)
        yield batch
    collectives.sum_(torch.zeros(1))  # all have written
    if form == "npz":
        collectives.on_main(lambda: _pack(raw, images.labels))


def check_kept(folder: Path, count: int, form: str | None) -> None:
    """Raise Damaged unless what `keep_images` wrote of so many images is there, and none of it is cut."""
    advice = "the same evaluation writes it again"
    if form == "npz":
        try:
            with open_npz(folder / "images.npz") as arrays:  # sizes are compared: a cut one has no index
                if "arr_0" not in arrays.files:
                    raise ValueError("no images")
        except ValueError as error:
            raise Damaged.at(folder / "images.npz", error, advice) from None
    for index in range(count if form == "png" else 0):
        file = folder / "images" / f"{index:06d}.png"
        if not file.is_file() or not file.read_bytes().endswith(_PNG_END):
            raise Damaged.at(file, "it is not there as a whole", advice)


def _pack(raw: Path, labels: Tensor | None) -> None:
    """Move images from an .npy into an .npz beside it, whose entries have no time of day: equal images, equal bytes."""
    with replacing(raw.with_suffix(".npz")) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file, raw.open("rb") as images:
            shutil.copyfileobj(images, file)
        if labels is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
                np.lib.format.write_array(file, labels.numpy(), allow_pickle=False)
    raw.unlink()


def table(record: dict[str, Any]) -> str:
    """The metrics as lines of text, with what they depend on and what is to be said of them."""
    asked = f"; labels {record['labels']}" if record.get("labels") else ""
    lines = [f"{record['mode']}: {record['count']:,} images ({record['images']}{asked}; {record['pixels']})"]
    if record["reference"]:
        count = "an unknown number of" if record["reference_count"] is None else f"{record['reference_count']:,}"
        lines[0] += f" against {record['reference']}, {count} images"
    for name, value in record["metrics"].items():
        spread = record["uncertainty"].get(name)
        lines.append(f"  {name:<44}{value:>12.5g}" + (f" ± {spread['std']:.2g}" if spread else ""))
    lines += [f"  features of {name}: {recipe}" for name, recipe in record["recipes"].items()]
    return "\n".join(lines + [f"  note: {warning}" for warning in record["warnings"]])
