"""In which order should variable-length codes be unmasked, and does it beat MaskGIT on fixed-length codes, or DGiT-AR?

    .venv/bin/python experiments/generation/masked.py orders      one seed, 2,000 samples against validation images

On Fashion-MNIST, with the tokenizers and the DGiT-AR of `run.py` in its parts wide and deciding, which are run first.
All generators see as many images, and have as many parameters but for a few tables. Two jobs run at a time, one thread
each; the first ones to finish tell how long the part will take. What has finished is not run again, so a part can be
stopped at any time. Writes PART.json, PART.md and PART.png here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

sys.path.insert(0, str(Path(__file__).parents[1]))
from run import DUAL, FIXED32, FIXED64, NETWORK, RUNS, Row, codes_of, extract_all, parameters, parse, sampled, train
from sweep import Figures, run_all, start, table

from graincode.files import replacing, write_json

HERE = Path(__file__).parent
NAR, STEPS = "generator=dgit_nar", (4, 8, 16, 32)
COLUMNS = {
    "steps": "steps", "guidance": "guidance", f"fd_{NETWORK}": "FD", f"is_{NETWORK}": "IS",
    f"class_accuracy_ratio_{NETWORK}": "class", "codes_per_image": "codes", "images_per_second": "images/s",
    "parameters": "parameters",
}  # fmt: skip
ORDERS = {
    "confidence": [],
    "confidence, noise 1": ["sampler.choice_noise=1"],
    "random": ["sampler.order=random"],
    "Halton": ["sampler.order=halton"],
    "coarse first": ["sampler.order=coarse_first"],
    "density -4.5": ["sampler.information_weight=-4.5"],
    "density 4.5": ["sampler.information_weight=4.5"],
    "density 9": ["sampler.information_weight=9"],
    "dense first": ["sampler.order=dense_first"],
}
# with one grain, all other orders are one of these
BY_DENSITY = ("density 4.5", "density 9", "dense first")
PLAIN = ("confidence", "confidence, noise 1", "random", "Halton")
MODELS = {
    "beta 0": Row("nar-beta-0", DUAL, [NAR]),
    "beta 2": Row("nar-beta-2", DUAL, [NAR, "generator.masking.beta=2"]),
    "beta elastic": Row("nar-elastic", DUAL, [NAR, "generator.masking.beta=2", "generator.masking.elastic=true"]),
    "bins 4": Row("nar-bins-4", DUAL, [NAR, "generator.model.density_bins=4"]),
    "MaskGIT, 32": Row("maskgit-32", FIXED32, [NAR]),
    "MaskGIT, 64": Row("maskgit-64", FIXED64, [NAR]),
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
    """

    model: str
    order: str = ""
    steps: int = 0
    guidance: float = 1.0

    @property
    def name(self) -> str:
        """Of the row."""
        return self.model if not self.order else f"{self.model}, {self.order}, {self.steps} steps"

    @property
    def settings(self) -> list[str]:
        """Overrides of the sampler."""
        scale = f"sampler.guidance_scale={self.guidance:g}"
        return ["sampler=masked", f"sampler.steps={self.steps}", *ORDERS[self.order], scale] if self.order else [scale]


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
    "orders": Part(
        [
            *(Cell(model, order, steps) for model in MODELS if model.startswith("beta") for order in ORDERS
              for steps in STEPS),
            *(Cell("bins 4", order, steps) for order in BY_DENSITY for steps in STEPS),
            *(Cell(model, order, steps) for model in MODELS if model.startswith("MaskGIT") for order in PLAIN
              for steps in STEPS),
            *(Cell(model) for model in MODELS if model.startswith("AR")),
        ],
        "wide", [0], 2000, "val",
    ),
}  # fmt: skip


def measure(part: Part, cell: Cell, seed: int, samples: int) -> list[Figures]:
    """The figures of one cell and seed."""
    row = MODELS[cell.model]
    label = "".join(c if c.isalnum() or c == "." else "-" for c in f"{cell.order} {cell.steps} {cell.guidance:g}")
    run = f"{part.source}-{row.name}-{seed}-{samples}-{label}"
    figures = sampled(part.source, row, seed, samples, part.split, run, cell.settings)
    of_model = {"model": cell.model, "order": cell.order, "steps": cell.steps, "guidance": cell.guidance}
    count = parameters(codes_of(part.source, row.tokenizer, seed), row)
    return [{"row": cell.name, "seed": seed, "samples": samples, "parameters": count, **of_model, **figures}]


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
        "samples divided by that of real images. Images/s are of one thread of a machine that does other work too.",
    ]
    with replacing(HERE / f"{name}.md") as partial:
        partial.write_text("\n".join(lines) + "\n")
    plot(HERE / f"{name}.png", rows)


def plot(path: Path, rows: Sequence[Figures]) -> None:
    """Fréchet distance over steps, for each model; and over seconds per image, each model at its best order."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    several = [model for model in models if model.startswith("beta")]
    canvas = Canvas(figsize=(4.2 * (len(several) + 1), 4.4), layout="constrained")
    panels: Sequence[Axes] = canvas.subplots(1, len(several) + 1, squeeze=False)[0]
    colours = ["#333333", "#8d8d8d", "#6f4a8e", "#1b6ca8", "#00a6a6", "#3a7d44", "#e0a030", "#d1703c", "#b3202c"]
    for panel, model in zip(panels, several, strict=False):
        for colour, order in zip(colours, ORDERS, strict=True):
            _line(
                panel, [row for row in rows if row["model"] == model and row["order"] == order], "steps", order, colour
            )
        panel.set(title=f"training: {model}", xlabel="steps")
        panel.set_xticks(STEPS, [str(steps) for steps in STEPS])
    for colour, model in zip(("#333333", "#1b6ca8", "#3a7d44", "#d1703c", "#b3202c", "#6f4a8e", "#00a6a6"), models,
                             strict=False):  # fmt: skip
        mine = [row for row in rows if row["model"] == model]
        best = min(mine, key=lambda row: row[f"fd_{NETWORK}"])["order"]
        chosen = [row | {"seconds": 1 / row["images_per_second"]} for row in mine if row["order"] == best]
        _line(panels[-1], chosen, "seconds", f"{model}{f', {best}' if best else ''}", colour)
    panels[-1].set(title="each at its best order", xlabel="seconds per image, one thread")
    panels[0].set_ylabel(f"Fréchet distance of samples ({NETWORK})")
    if several:
        panels[0].legend(frameon=False, fontsize=7.5)
    panels[-1].legend(frameon=False, fontsize=7.5)
    with replacing(path) as partial:
        canvas.savefig(partial, dpi=150, format="png")


def _line(panel: Axes, rows: Sequence[Mapping[str, float]], x: str, label: str, colour: str) -> None:
    """Means over seeds, by x."""
    places: dict[float, list[Mapping[str, float]]] = {}
    for row in rows:
        places.setdefault(row["steps"], []).append(row)
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
    models = {MODELS[cell.model].name: MODELS[cell.model] for cell in cells.values()}
    start()

    def is_new(job: str, name: str) -> bool:
        return not (RUNS / job / name / "result.json").is_file()

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
        lambda name, seed: measure(part, cells[name], seed, samples), lambda name, seed: True,
        lambda found: write(arguments.part, part, found), arguments.jobs,
    )  # fmt: skip
    print((HERE / f"{arguments.part}.md").read_text())


if __name__ == "__main__":
    main()
