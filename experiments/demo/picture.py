"""The README's picture, from a finished demo:

.venv/bin/python experiments/demo/picture.py runs/demo
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import graincode
from graincode.core.images import to_uint8
from graincode.data import FashionMNIST
from graincode.pictures import density_maps, grain_maps

SCALE = 4


def main() -> None:
    """Draw the first test image of each class."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    tokenizer = graincode.load_tokenizer(folder / "train_tokenizer/train_tokenizer/export")
    dataset = FashionMNIST().split("test")
    chosen = [int((dataset.labels == label).nonzero()[0]) for label in range(10)]
    images = dataset[chosen].images
    codes = tokenizer.tokenize(images)
    rows = {
        "image": to_uint8(images),
        "density": density_maps(tokenizer.route(images).shown, tokenizer.layout.image_size),
        "codes": grain_maps(images, codes.grains, tokenizer.layout.grains, SCALE),
        "decoded": to_uint8(tokenizer.detokenize(codes)),
    }
    figure, axes = plt.subplots(len(rows), len(chosen), figsize=(10, 4.5), dpi=130)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for column, (axis, picture) in enumerate(zip(line, pictures, strict=True)):
            axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set_visible(False)
            if column == 0:
                axis.set_ylabel(name, fontsize=11)
            if name == "image":
                axis.set_title(f"{int(codes.lengths[column])} codes", fontsize=10)
    figure.tight_layout(pad=0.3)
    figure.savefig(Path(__file__).parent / "codes.png")


if __name__ == "__main__":
    with torch.no_grad():
        main()
