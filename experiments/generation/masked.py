"""In which order should variable-length codes be unmasked, and does it beat MaskGIT on fixed-length codes, or DGiT-AR?

    .venv/bin/python experiments/generation/masked.py noise     8 steps: how random a choice, how hot a draw?
    .venv/bin/python experiments/generation/masked.py orders    orders, steps and trainings, with what was chosen
    .venv/bin/python experiments/generation/masked.py models    trainings, blocks and guidance: three seeds
    .venv/bin/python experiments/generation/masked.py masked    the best: three seeds, 10,000 samples, test images

The first three: 2,000 samples against validation images; the first two: one seed. On Fashion-MNIST, with the tokenizers
and the DGiT-AR of `run.py deciding`, which is run first. All generators see as many images, and have as many parameters
but for a few tables. Two jobs run at a time, one thread each; the first ones to finish tell how long the part will
take. What has finished is not run again, so a part can be stopped at any time. Writes PART.json and PART.md here, and a
plot of the first two.
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
from run import PARTS as OTHERS
from sweep import Metrics, run_all, start, table, write_table

from graincode.files import replacing

SOURCE = "deciding"  # the part of run.py whose tokenizers and generators are used
TRAINED = OTHERS[SOURCE]
HERE, BATCH, SECONDS = Path(__file__).parent, 100, (0.002, 0.005, 0.01, 0.02, 0.05)
NAR, STEPS, NOISES = "generator=dgit_nar", (4, 8, 16, 32), (0.5, 1.0, 3.0, 9.0)
# as many parameters as the two stacks of the others
MASKGIT = [NAR, "generator.size.content_layers=4"]
COLUMNS = {
    "calls": "network calls", f"fd_{NETWORK}": "FD", f"is_{NETWORK}": "IS", f"class_accuracy_ratio_{NETWORK}": "class",
    "codes_per_image": "codes", "images_per_second": "images/s", "parameters": "parameters",
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
TRAININGS = ("beta 0", "beta 2", "beta elastic")
MODELS = {
    "beta 0": Row("nar-beta-0", DUAL, [NAR]),
    "beta 2": Row("nar-beta-2", DUAL, [NAR, "generator.masking.beta=2"]),
    "beta elastic": Row("nar-elastic", DUAL, [NAR, "generator.masking.beta=2", "generator.masking.elastic=true"]),
    "modern blocks": Row("nar-modern", DUAL, [NAR, "generator/block=modern"]),
    "MaskGIT, 32": Row("maskgit-32", FIXED32, MASKGIT),
    "MaskGIT, 64": Row("maskgit-64", FIXED64, MASKGIT),
    "AR": Row("dual", DUAL),
    "AR, raster 32": Row("raster-32", FIXED32),
}
COLOURS = dict(
    zip(
        [*ORDERS, *MODELS],
        [
            "#333333", "#8d8d8d", "#1b6ca8", "#00a6a6", "#3a7d44", "#e0a030", "#d1703c", "#b3202c",
            "#000000", "#5b8fb9", "#7fb069", "#8c510a", "#f08a4b", "#c2185b", "#6f4a8e", "#9b8bd0",
        ],
        strict=True,
    )
)  # fmt: skip


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
        guidance = "" if self.guidance == 1 else f", guidance {self.guidance:g}"
        if not self.order:
            return self.model + guidance
        noise = "" if self.noise is None else f", noise {self.noise:g}"
        grains = "" if self.grain_steps == 4 else f", {self.grain_steps} for the map"
        heat = "" if self.temperature is None else f", temperature {self.temperature:g}"
        return f"{self.model}, {self.order}{noise}{heat}, {self.steps} steps{grains}{guidance}"

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
            noise = found["choice_temperature"] = NOISE if self.noise is None else self.noise
            if "information_weight" in own:
                own["information_weight"] *= noise
        if self.temperature is not None:
            own["temperature"] = self.temperature
        return found | {"steps": self.steps} | ({} if self.has_no_map else {"grain_steps": self.grain_steps}) | own

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
        seeds: of each cell.
        samples: of each cell and seed.
        split: that they are measured against.
    """

    cells: Sequence[Cell]
    seeds: Sequence[int]
    samples: int
    split: str


PARTS = {
    "noise": Part(
        [
            *(Cell("beta 0", order, 8, noise=noise) for order in NOISY for noise in NOISES),
            *(Cell(model, "confidence", 8, noise=noise) for model in MODELS if model.startswith("MaskGIT")
              for noise in NOISES),
            *(Cell("beta 0", order, 8, temperature=heat) for order in QUIET for heat in TEMPERATURES),
            *(Cell("beta 0", order, 8, temperature=heat) for order in ("confidence", "density 2")
              for heat in TEMPERATURES[1:]),
            *(Cell("beta 0", order, 8, grain_steps=8) for order in NOISY),
        ],
        [1], 2000, "val",
    ),
    "orders": Part(
        [
            *(Cell(model, order, steps) for model in TRAININGS for order in ORDERS for steps in STEPS),
            *(Cell(model, "confidence", steps) for model in MODELS if model.startswith("MaskGIT") for steps in STEPS),
            *(Cell(model) for model in MODELS if model.startswith("AR")),
        ],
        [1], 2000, "val",
    ),
    "models": Part(
        [
            *(Cell(model, order, 8) for model in TRAININGS for order in ("confidence", "density 2")),
            *(Cell("modern blocks", "confidence", 8, scale) for scale in (1.0, 1.5)),
            Cell("beta 0", "confidence", 8, 1.5),
            *(Cell("MaskGIT, 32", "confidence", 8, scale) for scale in (1.0, 1.5)),
            *(Cell("AR", guidance=scale) for scale in (1.0, 1.5)),
        ],
        [1, 2, 3], 2000, "val",
    ),
    "masked": Part(
        [
            *(Cell("beta 0", order, 8) for order in ("confidence", "density 2", "random")),
            Cell("beta 0", "confidence", 4), Cell("MaskGIT, 32", "confidence", 8), Cell("AR"),
        ],
        [1, 2, 3], 10_000, "test",
    ),
}  # fmt: skip


def model_of(cell: Cell) -> Row:
    """The row of a cell's model, with the settings that `run.py` trains it with, if it does."""
    row = MODELS[cell.model]
    return next((other for other in TRAINED.rows if other.name == row.name), row)


def run_name(part: Part, cell: Cell, seed: int, samples: int) -> str:
    """Of the evaluation of one cell and seed."""
    plain = f"{SOURCE}-{MODELS[cell.model].name}-{seed}"
    if not cell.order and (samples, part.split) == (TRAINED.samples, TRAINED.split):
        return f"{plain}-at-{cell.guidance:g}"  # as `run.py` has it
    plain += f"-{samples}"
    settings = "-".join(f"{key.replace('_', '')}-{value}" for key, value in sorted(cell.settings.items()))
    return f"{plain}-{settings}"


def measure(part: Part, cell: Cell, seed: int, samples: int) -> list[Metrics]:
    """The metrics of one cell and seed."""
    row = model_of(cell)
    sampler = [f"sampler.{k}={v:g}" if isinstance(v, float) else f"sampler.{k}={v}" for k, v in cell.settings.items()]
    metrics = sampled(
        SOURCE, row, seed, samples, part.split, run_name(part, cell, seed, samples),
        ["sampler=masked", *sampler] if cell.order else sampler,
    )  # fmt: skip
    count = parameters(codes_of(SOURCE, row.tokenizer, seed), row)
    calls = {} if cell.calls is None else {"calls": cell.calls}
    return [{"row": cell.name, "seed": seed, "samples": samples, "parameters": count, **vars(cell), **calls, **metrics}]


def add_speeds(part: Part, cells: Mapping[str, Cell], rows: Sequence[Metrics]) -> None:
    """Images per second, by the models of the first seed; neither the order nor beta takes time, so that cells which
    differ in these alone are timed once."""

    def key(cell: Cell) -> str:
        model = "beta" if cell.model in TRAININGS else cell.model
        return f"{model} {cell.steps} {cell.grain_steps} {cell.guidance}"

    timed = {name: cell for name, cell in cells.items() if (cell.noise, cell.temperature) == (None, None)}
    rng = {key(cell): (trained(SOURCE, MODELS[cell.model].name, part.seeds[0]), cell.settings)
             for cell in timed.values()}  # fmt: skip
    seconds = seconds_per_image(rng, BATCH)
    for row in rows:
        if row["row"] in timed:
            row["images_per_second"] = 1 / seconds[key(timed[row["row"]])]


def write(name: str, part: Part, rows: list[Metrics]) -> None:
    """Records, table and plot."""
    about = (
        f"Seeds {sorted({row['seed'] for row in rows})}; {rows[0]['samples']:,} samples against the {part.split} "
        f"images, in the features of {NETWORK}; ± is the standard deviation over seeds. Noise {NOISE:g} (random and "
        "Halton: none, and temperature 0.6) and 4 steps for the grain map, unless the row says otherwise. *Class* is "
        "the accuracy of samples divided by that of real images. *Network calls* are those of the contents and of the "
        f"grain map. Images/s are of one thread, batches of {BATCH}, the tokenizer not counted, all generators in "
        "turn; cells that differ only in order or beta are timed once."
    )
    if name == "orders":
        about = "\n".join(["Means and standard deviations over trainings:", "", *by_order(rows), "", about])
    write_table(HERE / name, rows, lambda row: row["row"], COLUMNS, "generator, order, steps", about)
    if (draw := {"noise": plot_noise, "orders": plot_orders}.get(name)) is not None:
        draw(HERE / f"{name}.png", rows)


def by_order(rows: Sequence[Metrics]) -> list[str]:
    """A table of each order's metrics by steps, means over trainings."""
    kinds = {"FD": f"fd_{NETWORK}", "IS": f"is_{NETWORK}", "class": f"class_accuracy_ratio_{NETWORK}"}
    groups: dict[str, list[Metrics]] = {}
    for order in ORDERS:
        for model in TRAININGS:
            mine = [row for row in rows if (row["model"], row["order"]) == (model, order)]
            found = {f"{kind}, {row['steps']}": row[key] for kind, key in kinds.items() for row in mine}
            groups.setdefault(order, []).append(found)
    titles = [f"{kind}, {steps}" for kind in kinds for steps in STEPS]
    return table(groups, dict(zip(titles, titles, strict=True)), "order; metric, steps")


def plot_noise(path: Path, rows: Sequence[Metrics]) -> None:
    """Fréchet distance at 8 steps over the noise of the choice, and over the temperature."""
    canvas = Canvas(figsize=(12.6, 4.4), layout="constrained")
    variable, hot, fixed = panels = canvas.subplots(1, 3)
    hot.sharey(variable)
    for order in ORDERS:
        mine = [row for row in rows if (row["model"], row["order"]) == ("beta 0", order)]
        _line(variable, [row for row in mine if row["noise"] is not None], "noise", order, COLOURS[order])
        _line(hot, [row for row in mine if row["temperature"] is not None], "temperature", order, COLOURS[order])
    for model in MODELS:
        if model.startswith("MaskGIT"):
            _line(fixed, [row for row in rows if row["model"] == model], "noise", model, COLOURS[model])
    for panel, title, x, ticks in (
        (variable, "DGiT-NAR, 8 steps", "noise of the choice", NOISES),
        (hot, "DGiT-NAR, 8 steps", "temperature", TEMPERATURES),
        (fixed, "fixed-length codes, confidence, 8 steps", "noise of the choice", NOISES),
    ):
        _finish(panel, title, x, ticks)
    panels[0].set_ylabel(f"Fréchet distance of samples ({NETWORK})")
    _save(canvas, path)


def plot_orders(path: Path, rows: Sequence[Metrics]) -> None:
    """Fréchet distance over steps, a panel for each training; and over seconds per image, all in the default order."""
    canvas = Canvas(figsize=(16.8, 4.6), layout="constrained")
    panels: Sequence[Axes] = canvas.subplots(1, len(TRAININGS) + 1)
    for panel, model in zip(panels, TRAININGS, strict=False):
        panel.sharey(panels[0])
        for order in ORDERS:
            mine = [row for row in rows if (row["model"], row["order"]) == (model, order)]
            _line(panel, mine, "steps", order, COLOURS[order])
        _finish(panel, f"DGiT-NAR, training: {model}", "steps", STEPS, legend=model == TRAININGS[0])
    for model in MODELS:
        mine = [row for row in rows if row["model"] == model and row["order"] in ("", "confidence")]
        mine = [row | {"seconds": 1 / row["images_per_second"]} for row in mine if "images_per_second" in row]
        _line(panels[-1], mine, "seconds", model, COLOURS[model], "s")
    _finish(panels[-1], "order of confidence, 4 to 32 steps; AR", "seconds per image, one thread", SECONDS)
    panels[0].set_ylabel(f"Fréchet distance of samples ({NETWORK})")
    _save(canvas, path)


def _line(panel: Axes, rows: Sequence[Metrics], x: str, label: str, colour: str, marker: str = "o") -> None:
    """Fréchet distances of rows, by x."""
    points = sorted((row[x], row[f"fd_{NETWORK}"]) for row in rows)
    if points:
        panel.plot(*zip(*points, strict=True), marker=marker, markersize=4, linewidth=1.3, label=label, color=colour)


def _finish(panel: Axes, title: str, x: str, ticks: Sequence[float], legend: bool = True) -> None:
    """What all panels have."""
    panel.set(title=title, xlabel=x, xscale="log")
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    panel.grid(color="#e4e4e4", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    if legend and panel.get_legend_handles_labels()[0]:
        panel.legend(frameon=False, fontsize=7.5)


def _save(canvas: Canvas, path: Path) -> None:
    with replacing(path) as partial:
        canvas.savefig(partial, dpi=150, format="png")


def main() -> None:
    """Run a part, and write what is known after each row."""
    arguments = parse(__doc__, PARTS)
    part = PARTS[arguments.part]
    samples = arguments.samples or part.samples
    cells = {cell.name: cell for cell in part.cells if arguments.only in cell.name}
    models = {(row := model_of(cell)).name: row for cell in cells.values()}
    start()

    def is_new(job: str, name: str) -> bool:
        return not (RUNS / job / name / "result.json").is_file()

    found: list[Metrics] = []

    def keep(rows: list[Metrics]) -> None:
        found[:] = rows
        write(arguments.part, part, rows)

    def fit(name: str, seed: int) -> list[Metrics]:
        train(SOURCE, models[name], seed, arguments.steps)
        return []

    print(
        f"{len(models) * len(part.seeds)} trainings of {arguments.steps} steps, then {len(cells)} x {len(part.seeds)}"
    )
    sources = {(model.tokenizer, seed) for seed in part.seeds for model in models.values()}
    extract_all(SOURCE, sources, arguments.jobs)
    run_all(
        [(name, seed) for seed in part.seeds for name in models], fit,
        lambda name, seed: is_new("train_generator", f"{SOURCE}-{name}-{seed}"), lambda _: None, arguments.jobs,
    )  # fmt: skip
    run_all(
        [(name, seed) for seed in part.seeds for name in cells],
        lambda name, seed: measure(part, cells[name], seed, samples),
        lambda name, seed: is_new("evaluate", run_name(part, cells[name], seed, samples)),
        keep, arguments.jobs,
    )  # fmt: skip
    add_speeds(part, cells, found)
    write(arguments.part, part, found)
    print((HERE / f"{arguments.part}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
