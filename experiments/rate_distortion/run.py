"""Are variable-length codes more accurate than fixed-length ones of the same length, and what makes them so?

    .venv/bin/python experiments/rate_distortion/run.py wide          Fashion-MNIST, one seed, validation images
    .venv/bin/python experiments/rate_distortion/run.py deciding      Fashion-MNIST, three seeds, test images
    .venv/bin/python experiments/rate_distortion/run.py photographs   wallpapers at 64 pixels, test photographs

All rows of a part see as many images, and their steps cost as many FLOPs: a row whose step is cheaper is made wider.
Two trainings run at a time, one thread each; the first one to finish tells how long the part will take. What has
finished is not run again, so a part can be stopped at any time. Writes PART.json, PART.md and PART.png here.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from data.wallpapers import folder_of, prepare
from sweep import Metrics, job, metrics_of, numbers, run_all, start, write_table

from graincode.config.job import build, with_layout
from graincode.config.validate import check
from graincode.core.layout import CodeLayout
from graincode.core.losses import weighted_sum
from graincode.core.rng import SampleRng
from graincode.files import replacing

HERE, RUNS = Path(__file__).parent, Path("runs/rate_distortion")
DUAL, TRIPLE = "[[8,8],[4,4]]", "[[16,16],[8,8],[4,4]]"
# shares of the grains that give 28, 32 and 40 codes on 32 x 32 pixels
RATIOS = {
    DUAL: {28: [0.75, 0.25], 32: [2 / 3, 1 / 3], 40: [0.5, 0.5]},
    TRIPLE: {28: [0.2, 0.5, 0.3], 32: [0.15, 0.479167, 0.370833], 40: [0.1, 0.375, 0.525]},
}
ROUTERS = ("coding", "entropy", "feature", "random")
COLUMNS = {
    "codes_per_image": "codes", "mse": "MSE", "against_fixed": "of fixed length", "psnr_mean": "mean PSNR",
    "ssim": "SSIM", "lite0_distance": "perceptual distance", "rfd_lite0@112": "FD (lite0@112)",
    "codebook_usage": "usage", "bits_per_image": "bits", "against_fixed_bits": "of fixed length, by bits",
    "channels": "width", "gflops": "GFLOPs a step",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A tokenizer that is trained, and the lengths that it is measured at.

    Attributes:
        name: of the run.
        family: rows of one family make one curve.
        settings: overrides.
        at: ratios to measure at, by the length that they stand for; None: as it was trained.
        is_fixed: whether it is one of the fixed-length models that make the curve to beat.
    """

    name: str
    family: str
    settings: Sequence[str]
    at: Mapping[int, list[float] | None] = field(default_factory=lambda: {0: None})
    is_fixed: bool = False


@dataclass(frozen=True)
class Part:
    """A table.

    Attributes:
        rows: of it.
        seeds: of each row.
        steps: of each row.
        split: that it is measured on.
        common: overrides of all rows.
        data: overrides of the evaluation.
        metrics: of the evaluation.
    """

    rows: Sequence[Row]
    seeds: Sequence[int]
    steps: int
    split: str
    common: Sequence[str]
    data: Sequence[str]
    metrics: str


def fixed(grains: Mapping[int, Sequence[tuple[int, int]]]) -> list[Row]:
    """Rows of fixed length: grain sizes by the length that they give."""
    return [
        Row(f"fixed-{length}-{h}x{w}", "fixed length", [f"tokenizer.grains=[[{h},{w}]]", "tokenizer.ratios=[1]",
            "tokenizer/router=entropy"], is_fixed=True)
        for length, sizes in grains.items()
        for h, w in sizes
    ]  # fmt: skip


def variable(grains: str, length: int, router: str, *more: str, name: str = "") -> Row:
    """A specialist for one length."""
    kind = "triple" if grains == TRIPLE else "dual"
    shares = [f"tokenizer.grains={grains}", f"tokenizer.ratios={numbers(RATIOS[grains][length])}"]
    family = f"{kind}, {name or router}"
    row = re.sub(r"[^\w.]+", "-", f"{family} {length}")
    return Row(row, family, [*shares, f"tokenizer/router={router}", *more])


def elastic(grains: str) -> Row:
    """One tokenizer for all lengths."""
    kind, last = ("dual" if grains == DUAL else "triple"), grains.count("[") - 2
    ends = {16 if kind == "dual" else 4: [1.0, *[0.0] * last], 64: [*[0.0] * last, 1.0]}
    shares = [f"tokenizer.grains={grains}", f"tokenizer.ratios={numbers(RATIOS[grains][40])}"]
    settings = [*shares, "tokenizer/router=coding", "tokenizer.router.elastic=true"]
    return Row(f"{kind}-elastic", f"{kind}, elastic", settings, RATIOS[grains] | ends)


FIXED = fixed({16: [(8, 8)], 32: [(4, 8), (8, 4)], 64: [(4, 4)]})
SHARED = ["tokenizer.codebook=shared"]
REPEATED = ["tokenizer.model.decoder.expand=false", "tokenizer.model.decoder.coarse_blocks=0"]
ABLATIONS = [
    variable(DUAL, 28, "coding", *SHARED, name="shared codebook"),
    variable(DUAL, 28, "coding", *REPEATED, name="repeated codes"),
    variable(DUAL, 28, "coding", *SHARED, *REPEATED, name="shared and repeated"),
    variable(DUAL, 28, "coding", "tokenizer.model.decoder.coarse_blocks=0", name="no coarse blocks"),
    variable(DUAL, 28, "coding", "tokenizer.model.decoder.grain_embedding=true", name="grain embedding"),
    variable(DUAL, 28, "coding", "tokenizer.router.density.in_training=gain", name="gain in training"),
    variable(DUAL, 28, "coding", "tokenizer.router.density.of=error", name="error"),
    variable(DUAL, 28, "coding", "tokenizer.router.scope=image", name="constant length"),
    variable(DUAL, 28, "entropy", "tokenizer.router.density.sigma=0.03", name="entropy, sigma 0.03"),
    variable(DUAL, 28, "entropy_wide", name="entropy, sigma 0.065"),
    variable(DUAL, 28, "gradient", name="gradient"),
    variable(DUAL, 28, "variance", name="variance"),
    variable(DUAL, 28, "fixed", name="middle"),
]
QUANTIZERS = [
    variable(DUAL, 28, "coding", f"tokenizer/quantizer={name}", *more, name=name)
    for name, more in {"simvq": [], "fsq": [], "lfq": [], "cosine": []}.items()
]
FASHION = ["data=fashion_mnist"]
WALLPAPERS = ["data=image_folder", f"data.root={folder_of()}", "data.image_size=64", "data.cache=true"]
SPECIALISTS = [
    variable(grains, length, router) for grains in (DUAL, TRIPLE) for length in (28, 32, 40) for router in ROUTERS
]
PHOTOGRAPHS = "[[16,16],[8,8]]"
RATIOS[PHOTOGRAPHS] = RATIOS[DUAL]
PARTS = {
    "wide": Part(
        [*FIXED, *SPECIALISTS, elastic(DUAL), elastic(TRIPLE), *ABLATIONS, *QUANTIZERS], [0], 1500, "val",
        # the default since this table
        [*FASHION, "tokenizer.model.decoder.grain_embedding=false"], FASHION, "[ssim,lite0]",
    ),
    "deciding": Part(
        [*FIXED, *(variable(DUAL, length, "coding") for length in (28, 32, 40)), elastic(DUAL)], [1, 2, 3], 2000,
        "test", FASHION, FASHION, "[fd,ssim,lite0]",
    ),
    "photographs": Part(
        [*fixed({16: [(16, 16)], 32: [(8, 16)], 64: [(8, 8)]}),
         *(variable(PHOTOGRAPHS, 28, router) for router in ("coding", "entropy", "random"))], [0], 2000, "test",
        [*WALLPAPERS, "augmentation.flip=true"], WALLPAPERS, "[fd,ssim,lite0]",
    ),
}  # fmt: skip


def cost(settings: Sequence[str]) -> float:
    """FLOPs of one training step, for each image of the batch."""
    cfg = check("train_tokenizer", list(settings))
    size = cfg.data.get("image_size", 32)
    layout = CodeLayout((size, size), cfg.tokenizer.grains, cfg.tokenizer.codebook_size, 0, cfg.tokenizer.codebook)
    module, images = build(with_layout(cfg.tokenizer.model, layout)), torch.rand(16, 3, size, size) * 2 - 1
    rng = SampleRng(0, torch.arange(16))
    module.initialize([images], rng)
    module.calibrate([images])
    with FlopCounterMode(display=False) as counter:
        weighted_sum(build(cfg.tokenizer.objective, perceptual=None)(images, module(images, rng=rng), 40)).backward()
    return counter.get_total_flops() / len(images)


def widened(common: Sequence[str], row: Row, budget: float) -> tuple[int, float]:
    """The least width, a multiple of 4, whose step costs what the default's does or at most 3 % less; and its FLOPs."""
    for channels in range(32, 64, 4):
        flops = cost([*common, *row.settings, f"tokenizer.size.channels={channels}"])
        if flops >= 0.97 * budget:
            return channels, flops
    raise ValueError(f"{row.name}: no width costs {budget:.3g} FLOPs")


def train_and_measure(part: str, row: Row, seed: int, steps: int, channels: int, gflops: float) -> list[dict[str, Any]]:
    """The metrics of one row and seed, at each of its lengths."""
    chosen, name = PARTS[part], f"{part}-{row.name}-{seed}"
    schedule = [f"trainer.steps={steps}", f"trainer.eval_every={steps}", "trainer.checkpoint_every=500"]
    width = [] if channels == 32 else [f"tokenizer.size.channels={channels}"]
    job(RUNS, "train_tokenizer", name, f"seed={seed}", *chosen.common, *row.settings, *schedule, *width)
    found = []
    for length, ratios in row.at.items():
        run = name + (f"-at-{length}" if ratios else "")
        asked = [f"images.ratios={numbers(ratios)}"] if ratios else []
        job(RUNS, "evaluate", run, "evaluation=reconstruction", f"evaluation.metrics={chosen.metrics}",
            "features=lite0_112", *chosen.data, f"images.split={chosen.split}",
            f"tokenizer_path={RUNS}/train_tokenizer/{name}/export", *asked)  # fmt: skip
        found.append({"row": row.name, "family": row.family, "seed": seed, "is_fixed": row.is_fixed, "steps": steps,
                      "channels": channels, "gflops": gflops, "asked": length, **metrics_of(RUNS, run)})  # fmt: skip
    return found


def against_fixed(rows: Sequence[Mapping[str, Any]], by: str) -> list[float]:
    """Each row's error as a multiple of that of the fixed-length models of its seed at the same length (or bits), on a
    straight line through their logarithms."""
    multiples = []
    for row in rows:
        line = [(math.log(r[by]), math.log(r["mse"])) for r in rows if r["is_fixed"] and r["seed"] == row["seed"]]
        slope, offset = np.polyfit(*zip(*line, strict=True), 1)
        multiples.append(row["mse"] / math.exp(offset + slope * math.log(row[by])))
    return multiples


def write(part: str, rows: list[dict[str, Any]]) -> None:
    """Records, table and plot."""
    for name, by in (("against_fixed", "codes_per_image"), ("against_fixed_bits", "bits_per_image")):
        for row, multiple in zip(rows, against_fixed(rows, by), strict=True):
            row[name] = multiple
    chosen = PARTS[part]
    about = (
        f"Seeds {sorted({row['seed'] for row in rows})}, {chosen.split} images, {rows[0]['steps']} steps of 16 images; "
        "± is the standard deviation over seeds. GFLOPs of a training step are for one image. *Of fixed length* is the "
        "error divided by that of the fixed-length models at the same length, on a line through their logarithms; *by "
        "bits*, at the same number of bits, those of the grain map included."
    )

    def name_of(row: Metrics) -> str:
        return f"{row['row']} at {row['asked']}" if row["asked"] else row["row"]

    groups = write_table(HERE / part, rows, name_of, COLUMNS, "tokenizer", about)
    plot(HERE / f"{part}.png", list(groups.values()))


def plot(path: Path, groups: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Error over length, and over bits; where families have several lengths, others stand in the table alone."""
    points = {group[0]["family"]: sum(g[0]["family"] == group[0]["family"] for g in groups) for group in groups}
    several = any(points[g[0]["family"]] > 1 and not g[0]["is_fixed"] for g in groups)
    groups = [g for g in groups if points[g[0]["family"]] > several and g[0]["codes_per_image"] > 12]
    canvas = Figure(figsize=(11, 4.6), layout="constrained")
    panels = canvas.subplots(1, 2, sharey=True)
    families = list(dict.fromkeys(group[0]["family"] for group in groups))
    colours = ["#333333", "#d1495b", "#1b6ca8", "#3a7d44", "#b07d12", "#6f4a8e", "#00a6a6", "#8c510a", "#5b6770"]
    for panel, key, title in zip(panels, ("codes_per_image", "bits_per_image"), ("codes per image", "bits per image,"
                                 " grain map included"), strict=True):  # fmt: skip
        for index, family in enumerate(families):
            members = [group for group in groups if group[0]["family"] == family]
            points = sorted(
                (statistics.mean(r[key] for r in group), statistics.mean(r["mse"] for r in group),
                 statistics.stdev(r["mse"] for r in group) if len(group) > 1 else 0.0)
                for group in members
            )  # fmt: skip
            x, y, spread = zip(*points, strict=True)
            if members[0][0]["is_fixed"]:
                slope, offset = np.polyfit(np.log(x), np.log(y), 1)
                ends = np.array([min(x), max(x)])
                panel.plot(ends, np.exp(offset + slope * np.log(ends)), color="#333333", linewidth=1, linestyle="--")
            colour = colours[index % len(colours)]
            marker = "osD^v<>P*X"[(index // len(colours)) % 10]
            panel.errorbar(x, y, spread, label=family, color=colour, marker=marker, markersize=4.5, capsize=2,
                           linewidth=1.3 if len(points) > 1 and not members[0][0]["is_fixed"] else 0,
                           elinewidth=1)  # fmt: skip
        panel.set(xscale="log", yscale="log", xlabel=title)
        ticks = [16, 20, 24, 28, 32, 40, 50, 64] if key == "codes_per_image" else [128, 192, 256, 384, 512]
        panel.set_xticks(ticks, ticks)
        low, high = panel.get_ylim()
        errors = [e / 1000 for e in (2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 15, 20, 30) if low <= e / 1000 <= high]
        panel.set_yticks(errors, [f"{error:g}" for error in errors])
        panel.minorticks_off()
        panel.grid(color="#e4e4e4", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("mean squared error")
    canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    with replacing(path) as partial:
        canvas.savefig(partial, dpi=150, format="png")


def main() -> None:
    """Run a part, and write what is known after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--steps", type=int, help="of the default tokenizer, instead of the part's own number")
    parser.add_argument("--only", default="", help="rows whose name has this in it, besides the fixed-length ones")
    arguments = parser.parse_args()
    part = PARTS[arguments.part]
    rows = [row for row in part.rows if row.is_fixed or arguments.only in row.name]
    if part.data is WALLPAPERS:
        prepare()
    start()
    budget = cost([*part.common, *next(row for row in rows if not row.is_fixed).settings])
    widths = {row.name: widened(part.common, row, budget) for row in rows}
    steps, by_name = arguments.steps or part.steps, {row.name: row for row in rows}
    todo = [(row.name, seed) for seed in part.seeds for row in rows]
    print(f"{len(todo)} trainings of {steps} steps, {budget / 1e9:.3f} GFLOPs an image")

    def run(name: str, seed: int) -> list[Metrics]:
        channels, flops = widths[name]
        return train_and_measure(arguments.part, by_name[name], seed, steps, channels, flops / 1e9)

    def is_new(name: str, seed: int) -> bool:
        return not (RUNS / "train_tokenizer" / f"{arguments.part}-{name}-{seed}" / "result.json").is_file()

    def write_known(found: list[Metrics]) -> None:
        seeds = {metrics["seed"] for metrics in found}
        known = {(metrics["row"], metrics["seed"]) for metrics in found}
        if all((row.name, seed) in known for seed in seeds for row in rows if row.is_fixed):
            write(arguments.part, found)

    run_all(todo, run, is_new, write_known, arguments.jobs)
    print((HERE / f"{arguments.part}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
