"""Do published forms of the tokenizer make DQVAE++ better, at equal cost?

    .venv/bin/python experiments/published/tokenizer.py

The default tokenizer on Fashion-MNIST (F8/F4, half of the regions fine, 40 codes an image), with one published form
after the other, and with those of the network together; three seeds, as many FLOPs each: a form that makes a step
dearer gets fewer of them. Errors are of 1,000 validation images, after each training's last step. Jobs run one after
the other on one thread. What has finished is not run again, so the study can be stopped at any time. Writes
tokenizer.json and tokenizer.md here.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from graincode.config.job import build, with_layout
from graincode.config.validate import check
from graincode.core.layout import CodeLayout
from graincode.core.losses import weighted_sum
from graincode.core.rng import SampleRng
from graincode.jobs.dry import dry_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from sweep import Metrics, job, run_all, seconds_in_turn, start, write_table

HERE, RUNS = Path(__file__).parent, Path("runs/published")
NETWORK = {
    "padding": ["tokenizer.size.padding=end"],
    "blocks": ["tokenizer.size.extra_blocks=1"],
    "width": ["tokenizer.size.upsampling=own"],
    "position": ["tokenizer.model.decoder.position=learned"],
    "projections": ["tokenizer.model.projected_dim=16"],
}
ROWS = {
    "default": [],
    **NETWORK,
    "together": [setting for settings in NETWORK.values() for setting in settings],
    "cells": ["tokenizer.objective.commitment_per=cells"],
    "uniform": ["tokenizer.quantizer.start=uniform"],
    "crops": ["augmentation=flip", "augmentation.crop=0.75"],
    "unit": ["tokenizer.quantizer.unit=true"],
}
TITLES = {
    "default": "default",
    "padding": "downsampling pads right and below only",
    "blocks": "one residual block more in each decoder level",
    "width": "upsampling keeps its width",
    "position": "learned frequencies of the position",
    "projections": "linear maps around the quantizer",
    "together": "these five together",
    "cells": "commitment divided by all finest cells",
    "uniform": "codebook from small uniform numbers",
    "crops": "random crops and flips",
    "unit": "codebook of unit length (LlamaGen)",
}
COLUMNS = {
    "mse": "1000 MSE", "difference": "against the default, same seed, %", "seeds_better": "seeds better",
    "psnr": "PSNR of it, dB", "usage": "codebook used, %", "steps": "steps", "ms": "ms a step",
    "parameters": "parameters, thousands",
}  # fmt: skip


class Costs:
    """What a training step of each form takes."""

    def __init__(self, names: list[str]) -> None:
        self._steps, self.flops, self.parameters = {}, {}, {}
        for name in names:
            cfg = check("train_tokenizer", ["data=fashion_mnist", *ROWS[name]])
            settings = cfg.tokenizer
            layout = CodeLayout((32, 32), settings.grains, settings.codebook_size, 10, settings.codebook)
            with_layout(settings.model, layout)
            torch.manual_seed(0)
            module, objective = build(settings.model), build(settings.objective, perceptual=None)
            self.flops[name] = dry_tokenizer(module, objective)
            self.parameters[name] = sum(parameter.numel() for parameter in module.parameters())
            self._steps[name] = module.train(), objective, torch.optim.Adam(module.parameters(), lr=1e-4)

    def milliseconds(self) -> dict[str, float]:
        """Of each form, measured in turn."""
        images = torch.rand(16, 3, 32, 32) * 2 - 1

        def step(name: str, repeat: int) -> None:
            module, objective, optimizer = self._steps[name]
            optimizer.zero_grad()
            found = module(images, rng=SampleRng(repeat, torch.arange(16)))
            weighted_sum(objective(images, found, module.router)).backward()
            optimizer.step()
            module.update([found.quantized], [found.routing])

        calls = {name: lambda repeat, name=name: step(name, repeat) for name in self._steps}
        return {name: 1000 * seconds for name, seconds in seconds_in_turn(calls, repeats=15).items()}


def measure(costs: Costs, name: str, seed: int, steps: int) -> list[Metrics]:
    """Train a tokenizer for as many FLOPs as the default takes for `steps`."""
    run, own = f"{name}-{seed}", round(steps * costs.flops["default"] / costs.flops[name])
    job(RUNS, "train_tokenizer", run, "data=fashion_mnist", f"seed={seed}", f"trainer.steps={own}",
        f"trainer.eval_every={own}", "calibration_images=1000", *ROWS[name])  # fmt: skip
    found: dict[str, Any] = json.loads((RUNS / "train_tokenizer" / run / "result.json").read_bytes())["metrics"]
    row: Metrics = {"row": name, "seed": seed, "steps": own, "parameters": costs.parameters[name] / 1000}
    return [row | {
        "mse": 1000 * found["mse"], "psnr": found["psnr_of_mean"], "usage": 100 * found["codebook_usage"],
    }]  # fmt: skip


def write(rows: list[Metrics]) -> None:
    """Record and table, with the differences to the default of the same seed."""
    default = {row["seed"]: row for row in rows if row["row"] == "default"}
    better: dict[str, int] = {}
    for row in rows:
        if row["row"] != "default" and (base := default.get(row["seed"])) is not None:
            row["difference"] = 100 * (row["mse"] / base["mse"] - 1)
            better[row["row"]] = better.get(row["row"], 0) + (row["difference"] < 0)
    for row in rows:
        if row["row"] in better:
            row["seeds_better"] = better[row["row"]]
    seeds = sorted({row["seed"] for row in rows})
    about = (
        f"Seeds {seeds} on Fashion-MNIST, F8/F4, 40 codes an image: {rows[0]['steps']} steps of 16 images, and where a "
        "step takes more FLOPs, fewer. Errors of 1,000 validation images in [0, 1]; ± is the standard deviation over "
        "seeds, of the differences too."
    )
    write_table(HERE / "tokenizer", rows, lambda row: TITLES[row["row"]], COLUMNS, "form", about)


def main() -> None:
    """Run all rows and seeds, and write what is known after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--finished", action="store_true", help="write what has finished, and train nothing")
    arguments = parser.parse_args()
    start()
    costs, done = Costs(arguments.only), []

    def keep(rows: list[Metrics]) -> None:
        done[:] = rows
        write(rows)

    def is_new(name: str, seed: int) -> bool:
        return not (RUNS / "train_tokenizer" / f"{name}-{seed}" / "result.json").is_file()

    todo = [(name, seed) for seed in range(arguments.seeds) for name in arguments.only]
    if arguments.finished:
        todo = [key for key in todo if not is_new(*key)]
    run_all(todo, lambda name, seed: measure(costs, name, seed, arguments.steps), is_new, keep, jobs=1)
    for name, milliseconds in costs.milliseconds().items():
        for row in done:
            if row["row"] == name:
                row["ms"] = milliseconds
    write(done)


if __name__ == "__main__":
    main()
