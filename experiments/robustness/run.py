"""Does an image keep its grain map when it is changed a little?

    .venv/bin/python experiments/robustness/run.py [EXPORT ...]

The share of regions whose grain is another after noise, a change of brightness or JPEG, with half and a quarter of the
regions fine and thresholds from clean training images; for every density that needs no model, and for the routers of
exported tokenizers (of 32 px for Fashion-MNIST, of 64 px for wallpapers). Writes results.json, results.md and
robustness.png beside this file. Resumable: what stands in results.json is not measured again; without the file, all is.
Cost: two minutes of one CPU core and the wallpapers of experiments/data, and four minutes for each export.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from data.wallpapers import folder_of, prepare
from sweep import compressed, noisy

from graincode.core.images import from_uint8, to_uint8
from graincode.core.layout import CodeLayout
from graincode.data import FashionMNIST, ImageFolder, Subset
from graincode.export import load_export
from graincode.files import replacing, write_json
from graincode.tokenizer import (
    EntropyDensity,
    GradientDensity,
    Probe,
    QuantileRouter,
    RandomDensity,
    Routing,
    VarianceDensity,
)

HERE = Path(__file__).parent
DATA = {
    "Fashion-MNIST, 32 px, F8/F4": (FashionMNIST(), CodeLayout((32, 32), ((8, 8), (4, 4)), 256)),
    "wallpapers, 64 px, F16/F8": (
        ImageFolder(str(folder_of()), cache=True),
        CodeLayout((64, 64), ((16, 16), (8, 8)), 256),
    ),
}
TRAIN, TEST, BATCH = 10_000, 2000, 250
FINE = (0.25, 0.5)
DENSITIES = {
    "entropy, sigma 0.01": EntropyDensity(sigma=0.01),
    "entropy, sigma 0.03": EntropyDensity(sigma=0.03),
    "entropy, sigma 0.065": EntropyDensity(sigma=0.065),
    "gradient": GradientDensity(),
    "variance": VarianceDensity(),
    "random": RandomDensity(),
}
NOISES, SHIFTS, QUALITIES = (1, 2, 4), (-8, -4, 4, 8), (95, 85, 70)


def changed_images(images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What is done to (N, 3, H, W) uint8 images, in words, and what comes of it."""
    for std in NOISES:
        yield f"noise {std}", noisy(images, std)
    for shift in SHIFTS:
        yield f"brightness {shift:+d}", (images.int() + shift).clamp(0, 255).to(torch.uint8)
    for quality in QUALITIES:
        yield f"JPEG {quality}", compressed(images, quality)


def look(images: Tensor) -> Probe:
    """What a router that needs no tokenizer sees of images."""
    return Probe(images, list, list)


def routed(router: QuantileRouter, images: Tensor, ratios: Sequence[float]) -> Routing:
    """As `DQVAE.route`."""
    return router(look(images), ratios)


Route = Callable[[Tensor, Sequence[float]], Routing]


@torch.no_grad()
def grain_maps(route: Route, images: Tensor, fine: float) -> Tensor:
    """(N, H0, W0) grains of uint8 images."""
    return torch.cat([route(from_uint8(part), [1 - fine, fine]).grains for part in images.split(BATCH)])


def measured(route: Route, clean: Tensor, changed: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """For each fine ratio, the share that is fine of clean images, and the share that changes with each change."""
    row = {}
    for fine in FINE:
        before = grain_maps(route, clean, fine)
        shares = {name: (grain_maps(route, images, fine) != before) for name, images in changed.items()}
        row[str(fine)] = {"fine": before.double().mean().item()} | {
            name: share.double().mean().item() for name, share in shares.items()
        }
    return row


def measure(rows: list[dict], exports: list[Path]) -> Iterator[dict]:
    """The rows that are still missing."""
    known = {(row["data"], row["density"]) for row in rows}
    loaded = [(path, load_export(path, "tokenizer")) for path in exports]
    for data, (source, layout) in DATA.items():
        routers = {name: QuantileRouter(layout, density, [0.5, 0.5]) for name, density in DENSITIES.items()}
        routes = {name: partial(routed, router) for name, router in routers.items()} | {
            f"{type(export.module.router.density).__name__.removesuffix('Density').lower()} of {path.parent.name}"
            f" ({export.identity[:8]})": export.module.route
            for path, export in loaded if export.module.layout.image_size == layout.image_size
        }  # fmt: skip
        missing = {name: route for name, route in routes.items() if (data, name) not in known}
        if not missing:
            continue
        train, test = (Subset(source.split(split), n) for split, n in (("train", TRAIN), ("test", TEST)))
        clean = to_uint8(test[range(len(test))].images)
        changed = dict(changed_images(clean))
        for name, route in missing.items():
            if name in DENSITIES:
                routers[name].calibrate(
                    look(train[range(start, min(start + BATCH, len(train)))].images)
                    for start in range(0, len(train), BATCH)
                )
            yield {"data": data, "density": name, "images": len(test), "changed": measured(route, clean, changed)}


def draw(rows: list[dict]) -> None:
    """robustness.png: a row of charts for each data set, a column for each kind of change."""
    kinds = {
        "noise": ("standard deviation of the noise, of 255", [str(std) for std in NOISES]),
        "brightness": ("change of brightness, of 255", [f"{shift:+d}" for shift in SHIFTS]),
        "JPEG": ("JPEG quality", [str(quality) for quality in QUALITIES]),
    }
    names = list(dict.fromkeys(_measure(row) for row in rows))
    canvas = Canvas(figsize=(13, 7.6), layout="constrained")
    axes = canvas.subplots(len(DATA), len(kinds), sharey=True, squeeze=False)
    for line, data in zip(axes, DATA, strict=True):
        for axis, (kind, (label, places)) in zip(line, kinds.items(), strict=True):
            for row in (row for row in rows if row["data"] == data):
                name = _measure(row)
                colour = "0.6" if name == "random" else f"C{names.index(name)}"
                for fine, style in zip(FINE, ("--", "-"), strict=True):
                    values = [100 * row["changed"][str(fine)][f"{kind} {place}"] for place in places]
                    axis.plot(places, values, style, color=colour, marker="o", markersize=4, linewidth=1.5,
                              label=name if fine == FINE[-1] else None)  # fmt: skip
            axis.set_yscale("symlog", linthresh=0.1)
            axis.set_yticks([0, 0.1, 1, 10, 50], ["0", "0.1", "1", "10", "50"])
            axis.set(xlabel=label, ylim=(-0.01, 70))
            axis.margins(x=0.08)
            axis.grid(alpha=0.3)
        line[0].set_ylabel("% of the regions that change grain")
        line[1].set_title(f"{data}   (solid: half of the regions fine, dashed: a quarter)", fontsize=10)
    canvas.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names), frameon=False)
    with replacing(HERE / "robustness.png") as partial:
        canvas.savefig(partial, dpi=90)


def _measure(row: dict) -> str:
    """The density of a row, whichever tokenizer it is of."""
    return row["density"].split(" of ")[0]


def write_table(rows: list[dict]) -> None:
    """results.md: per cent of the regions that change grain."""
    changes = [name for name in rows[0]["changed"][str(FINE[0])] if name != "fine"]
    lines = [
        f"Per cent of the regions of {TEST:,} test images whose grain changes. Thresholds are quantiles over {TRAIN:,} "
        "clean training images; *fine* is the share that they make fine of the clean test images (photographs of one "
        "split differ from those of another). *random* is chance: any change of an image draws its map anew. 8 "
        "levels of brightness are 0.97 of the spacing of the entropy's 32 bins, 4 half of it: narrow kernels forgive 8."
    ]
    for data in DATA:
        for fine in FINE:
            lines += ["", f"**{data}, {100 * fine:.0f} % fine**", "",
                      f"| density | fine | {' | '.join(changes)} |", "|---" * (len(changes) + 2) + "|"]  # fmt: skip
            for row in (row for row in rows if row["data"] == data):
                shares = row["changed"][str(fine)]
                cells = " | ".join(f"{100 * shares[name]:.1f}" for name in changes)
                lines.append(f"| {row['density']} | {100 * shares['fine']:.1f} | {cells} |")
    with replacing(HERE / "results.md") as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def main() -> None:
    """Measure what is missing, and write everything."""
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)
    prepare()
    file = HERE / "results.json"
    rows = json.loads(file.read_bytes()) if file.is_file() else []
    for row in measure(rows, [Path(path) for path in sys.argv[1:]]):
        rows.append(row)
        write_json(file, rows)
    draw(rows)
    write_table(rows)


if __name__ == "__main__":
    main()
