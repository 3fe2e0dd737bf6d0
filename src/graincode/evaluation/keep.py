"""Measured images, written down without loss."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from graincode.distributed import collectives
from graincode.evaluation.streams import ImageStream
from graincode.files import replacing


def keep_images(images: ImageStream, folder: Path, form: str | None) -> Iterator[Tensor]:
    """A stream whose images each process also writes to a folder that all see.

    Args:
        form: "png" for files `images/000000.png`, "npz" for `images.npz` with uint8 (N, H, W, 3) as `arr_0` and labels
            as `arr_1`, None to keep nothing.
    """
    place, raw, shape = images.mine.start, folder / "images.npy", (images.count, *images.image_size, 3)
    if form == "png":
        collectives.on_main(lambda: (folder / "images").mkdir(exist_ok=True))
    elif form == "npz":
        collectives.on_main(lambda: np.lib.format.open_memmap(raw, "w+", np.uint8, shape).flush())
    for batch in images:
        pixels = batch.permute(0, 2, 3, 1).cpu().numpy() if form else ()
        if form == "npz":
            written = np.load(raw, mmap_mode="r+")
            written[place : place + len(pixels)] = pixels
            written.flush()
        for index, image in enumerate(pixels if form == "png" else (), place):
            Image.fromarray(image).save(folder / "images" / f"{index:06d}.png")
        place += len(pixels)
        yield batch
    collectives.sum_(torch.zeros(1))  # all have written
    if form == "npz":
        collectives.on_main(lambda: _pack(raw, images.labels))


def _pack(raw: Path, labels: Tensor | None) -> None:
    """Move images from an .npy into an .npz beside it, whose entries have no time of day: equal images, equal bytes."""
    with replacing(raw.with_suffix(".npz")) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file, raw.open("rb") as images:
            shutil.copyfileobj(images, file)
        if labels is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
                np.lib.format.write_array(file, labels.numpy(), allow_pickle=False)
    raw.unlink()
