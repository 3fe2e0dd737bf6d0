"""In which order should variable-length codes be unmasked, and does it beat MaskGIT on fixed-length codes, or DGiT-AR?

    .venv/bin/python experiments/generation/masked.py noise     8 steps: how random a choice, how hot a draw?
    .venv/bin/python experiments/generation/masked.py orders    orders, steps and trainings, with what was chosen
    .venv/bin/python experiments/generation/masked.py masked    the best: three seeds, 10,000 samples, test images

The first two: one seed and 2,000 samples against validation images. On Fashion-MNIST, with the tokenizers and the
DGiT-AR of `run.py deciding`, which is run first. All generators see as many images, and have as many parameters but for
a few tables. Two jobs run at a time, one thread each; the first ones to finish tell how long the part will take. What
has finished is not run again, so a part can be stopped at any time. Writes PART.json and PART.md here, and a plot of
the first two.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

sys.path.insert(0, str(Path(__file__).parents[1]))
from run import (
    DUAL,
    FIXED32,
    FIXED64,
    NETWORK,
    RUNS,
    Row,
    codes_of,
    extract_all,
    parameters,
    parse,
    sampled,
    seconds_per_image,
    train,
    trained,
)
from run import PARTS as TRAINED
from sweep import Figures, run_all, start, table

from graincode.files import replacing, write_json

HERE, BATCH, SECONDS = Path(__file__).parent, 100, (0.002, 0.005, 0.01, 0.02, 0.05)
NAR, STEPS, NOISES = "generator=dgit_nar", (4, 8, 16, 32), (0.5, 1.0, 3.0, 9.0)
# as many parameters as the two stacks of the others
MASKGIT = [NAR, "generator.size.content_layers=4"]
COLUMNS = {
    "calls": "network calls", "guidance": "guidance", f"fd_{NETWORK}": "FD", f"is_{NETWORK}": "IS",
    f"class_accuracy_ratio_{NETWORK}": "class", "codes_per_image": "codes", "images_per_second": "images/s",
    "parameters": "parameters",
}  # fmt: skip
# densities weigh as much as is said, times the noise of the choice
ORDERS: dict[str, dict[str, Any]] = {
    "confidence": {},
    "random": {"order": "random", "temperature": 0.6},
    "Halton": {"order": "halton", "temperature": 0.6},
    "coarse first": {"order": "coarse_first"},
    "density -1": {"information_weight": -1.0},
    "density 1": {"information_weight": 1.0},
    "density 2": {"information_weight": 2.0},
    "dense first": {"order": "dense_first"},
}
QUIET = ("random", "Halton")  # take no noise
NOISY, NOISE = [order for order in ORDERS if order not in QUIET], 1.0  # what the part noise says
TEMPERATURES = (0.4, 0.6, 0.8, 1.0)
MATCHED = ("confidence", "density 2", "dense first")  # what the other trainings are sampled with
MODELS = {
    "beta 0": Row("nar-beta-0", DUAL, [NAR]),
    "beta 2": Row("nar-beta-2", DUAL, [NAR, "generator.masking.beta=2"]),
    "beta elastic": Row("nar-elastic", DUAL, [NAR, "generator.masking.beta=2", "generator.masking.elastic=true"]),
    "MaskGIT, 32": Row("maskgit-32", FIXED32, MASKGIT),
    "MaskGIT, 64": Row("maskgit-64", FIXED64, MASKGIT),
    "AR": Row("dual", DUAL),
    "AR, raster 32": Row("raster-32", FIXED32),
}


@dataclass(frozen=True)
class Cell:
    """What is drawn from a model.

    Attributes:
        model: key of MODELS.
        order: key of ORDERS; empty for DGiT-AR.
        steps: of the contents; 0 for DGiT-AR.
        guidance: its scale.
        noise: of the choice, instead of NOISE.
        grain_steps: of the grain map.
        temperature: of the contents, instead of the order's own.
    """

    model: str
    order: str = ""
    steps: int = 0
    guidance: float = 1.0
    noise: float | None = None
    grain_steps: int = 4
    temperature: float | None = None

    @property
    def name(self) -> str:
        """Of the row."""
        if not self.order:
            return self.model
        noise = "" if self.noise is None else f", noise {self.noise:g}"
        grains = "" if self.grain_steps == 4 or self.has_no_map else f", {self.grain_steps} for the map"
        heat = "" if self.temperature is None else f", temperature {self.temperature:g}"
        return f"{self.model}, {self.order}{noise}{heat}, {self.steps} steps{grains}"

    @property
    def has_no_map(self) -> bool:
        """Whether all codes have one grain."""
        return self.model.startswith("MaskGIT")

    @property
    def settings(self) -> dict[str, Any]:
        """Of the sampler."""
        found: dict[str, Any] = {"guidance_scale": self.guidance}
        if not self.order:
            return found
        own = dict(ORDERS[self.order])
        if self.order in NOISY:
            noise = found["choice_noise"] = NOISE if self.noise is None else self.noise
            if "information_weight" in own:
                own["information_weight"] *= noise
        if self.temperature is not None:
            own["temperature"] = self.temperature
        return found | {"steps": self.steps, "grain_steps": self.grain_steps} | own

    @property
    def calls(self) -> int | None:
        """Of the network, for a sample."""
        if not self.order:
            return None
        return self.steps + (0 if self.has_no_map else self.grain_steps)


@dataclass(frozen=True)
class Part:
    """A table.

    Attributes:
        cells: of it.
        source: the part of `run.py` whose tokenizers and generators are used.
        seeds: of each cell.
        samples: of each cell and seed.
        split: that they are measured against.
    """

    cells: Sequence[Cell]
    source: str
    seeds: Sequence[int]
    samples: int
    split: str


PARTS = {
    "noise": Part(
        [
            *(Cell("beta 0", order, 8, noise=noise, grain_steps=8) for order in NOISY for noise in NOISES),
            *(Cell("beta 0", "confidence", 8, noise=3.0, grain_steps=steps) for steps in (2, 4)),
            *(Cell(model, "confidence", 8, noise=noise, grain_steps=8) for model in MODELS
              if model.startswith("MaskGIT") for noise in NOISES),
            *(Cell("beta 0", order, 8, temperature=heat) for order in QUIET for heat in TEMPERATURES),
            *(Cell("beta 0", order, 8, temperature=heat) for order in ("confidence", "density 2")
              for heat in TEMPERATURES[1:3]),
        ],
        "deciding", [1], 2000, "val",
    ),
    "orders": Part(
        [
            *(Cell("beta 0", order, steps) for order in ORDERS for steps in STEPS),
            *(Cell(model, order, steps) for model in ("beta 2", "beta elastic") for order in MATCHED
              for steps in STEPS[:3]),
            *(Cell(model, "confidence", steps) for model in MODELS if model.startswith("MaskGIT") for steps in STEPS),
            *(Cell(model) for model in MODELS if model.startswith("AR")),
        ],
        "deciding", [1], 2000, "val",
    ),
    "masked": Part(
        [
            *(Cell("beta 0", order, 8) for order in ("confidence", "density 2", "random")),
            Cell("beta 0", "confidence", 4), Cell("MaskGIT, 32", "confidence", 8), Cell("AR"),
        ],
        "deciding", [1, 2, 3], 10_000, "test",
    ),
}  # fmt: skip


def model_of(part: Part, cell: Cell) -> Row:
    """The row of a cell's model, with the settings that `run.py` trains it with in its part, if it does."""
    row = MODELS[cell.model]
    return next((other for other in TRAINED[part.source].rows if other.name == row.name), row)


def run_name(part: Part, cell: Cell, seed: int, samples: int) -> str:
    """Of the evaluation of one cell and seed."""
    plain = f"{part.source}-{MODELS[cell.model].name}-{seed}"
    if not cell.order and (samples, part.split) == (TRAINED[part.source].samples, TRAINED[part.source].split):
        return f"{plain}-at-{cell.guidance:g}"  # as `run.py` has it
    plain += f"-{samples}"
    settings = "-".join(f"{key.replace('_', '')}-{value}" for key, value in sorted(cell.settings.items()))
    return f"{plain}-{settings}"


def measure(part: Part, cell: Cell, seed: int, samples: int) -> list[Figures]:
    """The figures of one cell and seed."""
    row = model_of(part, cell)
    sampler = [f"sampler.{k}={v:g}" if isinstance(v, float) else f"sampler.{k}={v}" for k, v in cell.settings.items()]
    figures = sampled(
        part.source, row, seed, samples, part.split, run_name(part, cell, seed, samples),
        ["sampler=masked", *sampler] if cell.order else sampler,
    )  # fmt: skip
    count = parameters(codes_of(part.source, row.tokenizer, seed), row)
    calls = {} if cell.calls is None else {"calls": cell.calls}
    return [{"row": cell.name, "seed": seed, "samples": samples, "parameters": count, **vars(cell), **calls, **figures}]


def add_speeds(part: Part, cells: Mapping[str, Cell], rows: Sequence[Figures]) -> None:
    """Images per second, by the models of the first seed; neither the order nor beta takes time."""

    def key(cell: Cell) -> str:
        model = "beta" if cell.model.startswith("beta") else cell.model
        return f"{model} {cell.steps} {cell.grain_steps} {cell.guidance}"

    timed = [cell for cell in cells.values() if (cell.noise, cell.temperature) == (None, None)]
    draws = {key(cell): (trained(part.source, MODELS[cell.model].name, part.seeds[0]), cell.settings) for cell in timed}
    seconds = seconds_per_image(draws, BATCH)
    by_name = {(cell.name, cell.guidance): 1 / seconds[key(cell)] for cell in timed}
    for row in rows:
        if (row["row"], row["guidance"]) in by_name:
            row["images_per_second"] = by_name[row["row"], row["guidance"]]


def write(name: str, part: Part, rows: list[Figures]) -> None:
    """Records, table and plot."""
    write_json(HERE / f"{name}.json", rows)
    groups: dict[str, list[Figures]] = {}
    for row in rows:
        groups.setdefault(f"{row['row']}, {row['guidance']:g}", []).append(row)
    lines = table(groups, COLUMNS, "generator, order, steps, guidance")
    lines += [
        "",
        f"Seeds {sorted({row['seed'] for row in rows})}; {rows[0]['samples']:,} samples against the {part.split} "
        f"images, in the features of {NETWORK}; ± is the standard deviation over seeds. *Class* is the accuracy of "
        "samples divided by that of real images. *Network calls* are those of the contents and of the grain map. "
        f"Images/s are of one thread, batches of {BATCH}, the tokenizer not counted, all generators in turn.",
    ]
    with replacing(HERE / f"{name}.md") as partial:
        partial.write_text("\n".join(lines) + "\n")
    if len(part.seeds) == 1:
        plot(HERE / f"{name}.png", rows)


def plot(path: Path, rows: Sequence[Figures]) -> None:
    """Fréchet distance over noise; or over steps, and over seconds per image, each model in its best order."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    several = [model for model in models if model.startswith("beta")]
    x = "steps" if all(row["noise"] is None for row in rows) else "noise"
    canvas = Canvas(figsize=(4.2 * (len(several) + 1), 4.4), layout="constrained")
    panels: Sequence[Axes] = canvas.subplots(1, len(several) + 1, squeeze=False, sharey=True)[0]
    colours = ["#333333", "#8d8d8d", "#1b6ca8", "#00a6a6", "#3a7d44", "#e0a030", "#d1703c", "#b3202c"]
    for panel, model in zip(panels, several, strict=False):
        usual = next(row["grain_steps"] for row in rows if row["model"] == model)
        for colour, order in zip(colours, ORDERS, strict=True):
            found = (row for row in rows if (row["model"], row["order"]) == (model, order))
            _line(panel, [row for row in found if row["grain_steps"] == usual], x, order, colour)
        panel.set_title(f"training: {model}")
    last = panels[-1]
    tints = dict(
        zip(MODELS, ["#333333", "#1b6ca8", "#3a7d44", "#d1703c", "#b3202c", "#6f4a8e", "#00a6a6"], strict=True)
    )
    if x == "noise":
        for model in models:
            if model not in several:
                _line(last, [row for row in rows if row["model"] == model], x, f"{model}, confidence", tints[model])
        last.set_title("fixed-length codes")
    else:
        for model in models:
            mine = [row for row in rows if row["model"] == model and "images_per_second" in row]
            at_8 = [row for row in mine if row["steps"] in (0, 8)]
            best = min(at_8, key=lambda row: row[f"fd_{NETWORK}"], default=None)
            if best is not None:
                mine = [
                    row | {"seconds": 1 / row["images_per_second"]} for row in mine if row["order"] == best["order"]
                ]
                _line(last, mine, "seconds", ", ".join(filter(None, (model, best["order"]))), tints[model])
        last.set(title="each in its best order at 8 steps", xlabel="seconds per image, one thread")
        last.set_xticks(SECONDS, [f"{tick:g}" for tick in SECONDS])
    for panel in panels if x == "noise" else panels[:-1]:
        ticks = STEPS if x == "steps" else NOISES
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set_xlabel({"steps": "steps", "noise": "noise of the choice"}[x])
    panels[0].set_ylabel(f"Fréchet distance of samples ({NETWORK})")
    for panel in {panels[0], last}:
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False, fontsize=7.5)
    with replacing(path) as partial:
        canvas.savefig(partial, dpi=150, format="png")


def _line(panel: Axes, rows: Sequence[Mapping[str, float]], x: str, label: str, colour: str) -> None:
    """Means over seeds of each setting, by x."""
    places: dict[tuple[float, ...], list[Mapping[str, float]]] = {}
    for row in rows:
        places.setdefault((row["guidance"], row["steps"], row["noise"] or 0.0, row["grain_steps"]), []).append(row)
    points = [
        (sum(row[x] for row in group) / len(group), sum(row[f"fd_{NETWORK}"] for row in group) / len(group))
        for _, group in sorted(places.items())
    ]
    if points:
        panel.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.3, label=label, color=colour)
    panel.set_xscale("log")
    panel.minorticks_off()
    panel.grid(color="#e4e4e4", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Run a part, and write what is known after each row."""
    arguments = parse(__doc__, PARTS)
    part = PARTS[arguments.part]
    samples = arguments.samples or part.samples
    cells = {f"{cell.name}, {cell.guidance:g}": cell for cell in part.cells if arguments.only in cell.name}
    models = {(row := model_of(part, cell)).name: row for cell in cells.values()}
    start()

    def is_new(job: str, name: str) -> bool:
        return not (RUNS / job / name / "result.json").is_file()

    found: list[Figures] = []

    def keep(rows: list[Figures]) -> None:
        found[:] = rows
        write(arguments.part, part, rows)

    def fit(name: str, seed: int) -> list[Figures]:
        train(part.source, models[name], seed, arguments.steps)
        return []

    print(
        f"{len(models) * len(part.seeds)} trainings of {arguments.steps} steps, then {len(cells)} x {len(part.seeds)}"
    )
    sources = {(model.tokenizer, seed) for seed in part.seeds for model in models.values()}
    extract_all(part.source, sources, arguments.jobs)
    run_all(
        [(name, seed) for seed in part.seeds for name in models], fit,
        lambda name, seed: is_new("train_generator", f"{part.source}-{name}-{seed}"), lambda _: None, arguments.jobs,
    )  # fmt: skip
    run_all(
        [(name, seed) for seed in part.seeds for name in cells],
        lambda name, seed: measure(part, cells[name], seed, samples),
        lambda name, seed: is_new("evaluate", run_name(part, cells[name], seed, samples)),
        keep, arguments.jobs,
    )  # fmt: skip
    add_speeds(part, cells, found)
    write(arguments.part, part, found)
    print((HERE / f"{arguments.part}.md").read_text())


if __name__ == "__main__":
    main()
