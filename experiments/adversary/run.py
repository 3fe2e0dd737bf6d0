"""Do reconstructions break when the discriminator starts?

    .venv/bin/python experiments/adversary/run.py [--steps 2400] [--images 500]

Crops of photographs at 64 pixels, 40 codes each on average over the training crops. Three tokenizers, as many steps
each: L1; L1 and perceptual loss; both and a PatchGAN that starts half-way and comes in over a tenth of the steps. Every
twentieth of the steps, the weights as they then are (not averaged) code and decode validation crops. Writes curve.png,
results.json and results.md beside this file. Resumable: what has finished is not run again.
Cost: see `SECONDS`; the prediction is printed first.

The settings are the gentler of two trials of 400 steps (start after 200, 100 validation crops), which differ in four of
them at once: weight 1.0, learning rate 2e-3, betas (0.9, 0.99) and a perceptual weight of 0.1 fell from 12.5 to 9.3 dB
within 100 steps and ended at 12.1; weight 0.2, 1e-3, (0.5, 0.9) and 0.05 rose on, from 13.4 to 14.2 dB.

The perceptual loss and the Fréchet distance look with the same network (at 64 and 112 pixels), which flatters the rows
that have the loss: what it shows is whether the distance jumps when the discriminator starts, and which way.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Canvas
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from data.wallpapers import folder_of, prepare
from sweep import job

from graincode.api import load_tokenizer
from graincode.config.job import build
from graincode.config.validate import check
from graincode.core.images import to_uint8
from graincode.data.images import ImageDataset
from graincode.data.loader import in_order
from graincode.evaluation.metrics import frechet_distance
from graincode.evaluation.statistics import Statistics, measure
from graincode.evaluation.streams import ReconstructionStream
from graincode.files import write_json
from graincode.networks.features import Lite0Features
from graincode.runs.checkpoint import Checkpoints, read_state
from graincode.tokenizer import DQVAE
from graincode.training.trackers import read_log

HERE, RUNS = Path(__file__).parent, Path("runs/adversary")
DATA = ["data=image_folder", f"data.root={folder_of()}", "data.image_size=64", "data.cache=true"]
COMMON = [
    *DATA, "tokenizer.grains=[[16,16],[8,8]]", "tokenizer.size.patch=4", "tokenizer.objective.pixel=l1",
    "augmentation.flip=true", "optimizer.lr=1e-3", "optimizer.betas=[0.5,0.9]", "trainer.batch_size=8",
    "trainer.ema_decay=0", "trainer.keep_checkpoints=1000", "trainer.log_every=10",
]  # fmt: skip
PERCEPTUAL = ["tokenizer/perceptual=lite0"]
PATCH = [
    "tokenizer/adversary=patch", "tokenizer.adversary.weight=0.2", "tokenizer.adversary.discriminator.channels=32",
    "tokenizer.adversary.discriminator.layers=2",
]  # fmt: skip
ROWS = {"l1": [], "perceptual": PERCEPTUAL, "gan": PERCEPTUAL + PATCH}
NAMES = {"l1": "L1", "perceptual": "L1 + perceptual", "gan": "L1 + perceptual + PatchGAN"}
COLOURS = {"l1": "#777777", "perceptual": "#1b6ca8", "gan": "#c0392b"}
SECONDS = {"l1": 0.07, "perceptual": 0.17, "gan": 0.3, "images": 0.012}  # of one core: of a step; of an image measured
POINTS = 20


def settings(row: str, steps: int) -> list[str]:
    """Overrides of a row's training."""
    found = [*COMMON, *ROWS[row], f"trainer.steps={steps}", f"trainer.eval_every={steps}",
             f"trainer.checkpoint_every={max(steps // POINTS, 1)}"]  # fmt: skip
    if row == "gan":
        found += [f"tokenizer.adversary.start_step={steps // 2}", f"tokenizer.adversary.ramp_steps={steps // 10}"]
    return found


network = cache(Lite0Features)


def statistics_of(images: Iterator[Tensor], count: int) -> Statistics:
    """In the features of EfficientNet-Lite0."""
    return measure({"it": network()}, images, count)["it"]


def curve(run: Path, images: ImageDataset, count: int, real: Statistics) -> list[dict[str, float]]:
    """PSNR of the mean error and Fréchet distance of reconstructions, by the weights of each saved state."""
    record, checkpoints = run / f"curve-{count}.json", Checkpoints(run / "state")
    if record.is_file():
        return json.loads(record.read_bytes())
    module: DQVAE = load_tokenizer(run / "export")
    rows = []
    for step in sorted(checkpoints.steps()):
        state = read_state(checkpoints.path(step))
        module.load_state_dict(state["trainables"]["tokenizer"]["module"])
        made = ReconstructionStream(module, images, 50, 0, count)
        distance = frechet_distance(statistics_of(iter(made), count), real).value
        rows.append({"step": step, "psnr": made.metrics()["psnr_of_mean"].value, "fd": distance})
        print(run.name, rows[-1], flush=True)
    write_json(record, rows)
    return rows


def plot(results: dict[str, Any], steps: int) -> None:
    """The curves, and what the discriminator makes of both kinds of images."""
    canvas = Canvas(figsize=(13, 3.6), layout="constrained")
    panels = canvas.subplots(1, 3)
    for row, found in results.items():
        for panel, key in zip(panels, ("psnr", "fd"), strict=False):
            points = [(point["step"], point[key]) for point in found["curve"]]
            panel.plot(*zip(*points, strict=True), "o-", markersize=3, color=COLOURS[row], label=NAMES[row])
    for name, colour in (("logits_real", "#2e7d32"), ("logits_fake", "#c0392b"), ("adaptive_weight", "#b8860b")):
        points = [(line["step"], line[name]) for line in results["gan"]["log"] if name in line]
        panels[2].plot(*zip(*points, strict=True), color=colour, label=name.replace("_", " "))
    titles = ("PSNR of the mean error, dB (validation)", "FD (lite0@112) of reconstructions (validation)",
              "the discriminator: means of logits, weight")  # fmt: skip
    for panel, title in zip(panels, titles, strict=True):
        panel.axvline(steps // 2, color="#999999", linestyle="--", linewidth=1)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("step; dashed: the discriminator starts", fontsize=9)
        panel.set_xlim(0, steps)
        panel.grid(color="#e4e4e4", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, frameon=False)
    panels[1].set_yscale("log")
    ticks = [600, 700, 800, 900, 1000]
    panels[1].set_yticks(ticks, ticks)
    panels[1].minorticks_off()
    canvas.savefig(HERE / "curve.png", dpi=120)


def table(results: dict[str, Any], steps: int, count: int) -> list[str]:
    """The metrics around the start and at the end."""
    start = steps // 2
    lines = ["| | PSNR at the start | worst after it | at the end | FD at the start | worst after it | at the end "
             "| test PSNR | test SSIM | test FD |", "|---" * 10 + "|"]  # fmt: skip
    for row, found in results.items():
        cells = []
        for key, worst in (("psnr", min), ("fd", max)):
            before = [point[key] for point in found["curve"] if point["step"] <= start][-1]
            after = [point[key] for point in found["curve"] if point["step"] > start]
            cells += [before, worst(after), after[-1]]
        cells += [found["test"][key] for key in ("psnr_of_mean", "ssim", "rfd_lite0@112")]
        lines.append(f"| {NAMES[row]} | " + " | ".join(f"{cell:.4g}" for cell in cells) + " |")
    return [
        *lines,
        "",
        f"{steps} steps of 8 crops; the discriminator starts after step {start}. Validation metrics are of the first "
        f"{count} crops, test metrics of all. FD is in the features that the perceptual loss is made of.",
    ]


def main() -> None:
    """Train what has not been trained, measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2400, help="of each training, a multiple of 20")
    parser.add_argument("--images", type=int, default=500, help="of each point of the curve")
    chosen = parser.parse_args()
    steps, count = chosen.steps, chosen.images
    if steps % POINTS or steps <= 0:
        parser.error(f"--steps {steps}: expected a multiple of {POINTS}")
    seconds = steps * (SECONDS["l1"] + SECONDS["perceptual"] + (SECONDS["perceptual"] + SECONDS["gan"]) / 2)
    seconds += SECONDS["images"] * (count * (POINTS * len(ROWS) + 1) + 6 * 4096)
    prepare()
    print(f"about {seconds / 60:.0f} minutes of one core, if nothing has been run before", flush=True)
    validation = build(check("train_tokenizer", COMMON).data).split("val")
    originals = (to_uint8(batch.images) for batch in in_order(validation, 50, count))
    real, results = statistics_of(originals, count), {}
    for row in ROWS:
        name = f"{row}-{steps}"
        job(RUNS, "train_tokenizer", name, *settings(row, steps))
        run = RUNS / "train_tokenizer" / name
        job(RUNS, "evaluate", name, f"tokenizer_path={run}/export", "evaluation=reconstruction",
            "features=lite0_112", *DATA)  # fmt: skip
        record = json.loads((RUNS / "evaluate" / name / "metrics.json").read_bytes())
        log = [
            {"step": line["step"], **{key.removeprefix("train/"): value for key, value in line.items() if "/" in key}}
            for line in read_log(run)
            if "train/loss" in line
        ]
        kept = ("step", "l1", "perceptual", "adversarial", "discriminator", "logits_real", "logits_fake",
                "adaptive_weight", "speed/step_seconds")  # fmt: skip
        results[row] = {
            "settings": settings(row, steps),
            "curve": curve(run, validation, count, real),
            "test": record["metrics"],
            "log": [{key: round(line[key], 5) for key in kept if key in line} for line in log],
        }
    write_json(HERE / "results.json", results)
    plot(results, steps)
    lines = table(results, steps, count)
    (HERE / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
