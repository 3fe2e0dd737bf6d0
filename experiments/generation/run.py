"""Is generating coarse regions first, position and content in turn, better than a raster scan over fixed-length codes?

    .venv/bin/python experiments/generation/run.py wide        one seed, 5,000 samples against validation images
    .venv/bin/python experiments/generation/run.py deciding    three seeds, 10,000 samples against test images

On Fashion-MNIST, with the tokenizers that `experiments/rate_distortion/run.py` trained in its part of the same name,
which is run first. All generators see as many images; width and layers are the same, and so but for a few tables are
parameters. Two jobs run at a time, one thread each; the first one to finish tells how long the part will take. What has
finished is not run again, so a part can be stopped at any time. Writes PART.json, PART.md and PART.png here.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure as Canvas

from graincode.api import load_generator
from graincode.config.job import build, with_layout
from graincode.config.validate import check
from graincode.core.sequences import to_sequences
from graincode.data import CodeDataset
from graincode.files import replacing

sys.path.insert(0, str(Path(__file__).parents[1]))
from sweep import Metrics, job, metrics_of, run_all, seconds_in_turn, start, write_table

HERE, RUNS, TOKENIZERS = Path(__file__).parent, Path("runs/generation"), Path("runs/rate_distortion/train_tokenizer")
DATA, NETWORK = "data=fashion_mnist", "lite0@112"
COLUMNS = {
    "guidance": "guidance", f"fd_{NETWORK}": "FD", f"is_{NETWORK}": "IS", f"class_accuracy_ratio_{NETWORK}": "class",
    "bits_per_image": "bits", "position_bits": "of positions", "place_bits": "by place",
    f"rfd_{NETWORK}": "FD of reconstructions",
    "mse": "their MSE",
    "codes_per_image": "codes", "images_per_second": "images/s", "images_per_second_dropping": "finished dropped",
    "parameters": "parameters",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A generator.

    Attributes:
        name: of the run.
        tokenizer: whose codes it makes, a row of the other study.
        settings: overrides of its training.
    """

    name: str
    tokenizer: str
    settings: Sequence[str] = ()

    def with_defaults(self, settings: Sequence[str]) -> Row:
        """The row with settings that are its own only where it has none of that name."""
        own = {setting.split("=")[0] for setting in self.settings}
        return replace(self, settings=[*(one for one in settings if one.split("=")[0] not in own), *self.settings])


@dataclass(frozen=True)
class Part:
    """A table.

    Attributes:
        rows: of it.
        seeds: of each row.
        samples: of each row, seed and guidance.
        split: that they are measured against.
        scales: of guidance, for the rows of the claim; others are sampled without, or not at all.
    """

    rows: Sequence[Row]
    seeds: Sequence[int]
    samples: int
    split: str
    scales: Sequence[float]


# what the wide table was made with, before it said what is better
BEFORE = ["generator/block=gpt", "generator.objective.position_weight=2", "trainer.bucketing_window=1"]
# of all rows: rows of the last grain's grid are better (see published/generator.py), and came later
ORDER = "generator.sequence.last_grain_order=regions"
DUAL, FIXED32, FIXED64 = "dual-coding-32", "fixed-32-4x8", "fixed-64-4x4"
CLAIM = [
    Row("dual", DUAL),
    Row("raster-32", FIXED32),
    Row("raster-64", FIXED64),
    Row("gpt-32", FIXED32, ["generator=gpt"]),
    Row("gpt-64", FIXED64, ["generator=gpt"]),
]
TITLES = {
    "dual": "DGiT-AR, 32 variable-length codes",
    "raster-32": "raster order, 32 fixed-length codes",
    "raster-64": "raster order, 64 fixed-length codes",
    "gpt-32": "plain decoder, 32 fixed-length codes",
    "gpt-64": "plain decoder, 64 fixed-length codes",
}
ABLATIONS = [
    Row("dual-entropy", "dual-entropy-32"),
    Row("dual-no-grain", DUAL, ["generator.model.embedding.grain=false"]),
    Row("dual-no-index", DUAL, ["generator.model.embedding.index=false"]),
    Row("dual-shared-positions", DUAL, ["generator.model.embedding.position=shared"]),
    Row("dual-modelled", DUAL, ["generator.model.last_positions=modelled", "generator.objective.position_weight=1"]),
    Row("dual-given-map", DUAL, ["generator.model.grain_map=given"]),
    Row("dual-modern", DUAL, ["generator/block=modern"]),
    Row("dual-batches-by-length", DUAL, ["trainer.bucketing_window=32"]),
]
# by their bits alone, which tell more of a model than samples do where codes are the same
BLOCKS = [
    Row(f"dual-{name}", DUAL, [f"generator.block.{setting}"])
    for name, setting in {
        "rms": "norm=rms", "swiglu": "mlp=swiglu", "qk-norm": "qk_norm=true", "rotary": "rotary=true",
        "adaln": "adaln=true",
    }.items()
]  # fmt: skip
NAMES_OF_CLAIM, NAMES_OF_BLOCKS = ({row.name for row in rows} for rows in (CLAIM, BLOCKS))
PARTS = {
    "wide": Part([row.with_defaults(BEFORE) for row in [*CLAIM, *ABLATIONS, *BLOCKS]], [0], 5000, "val", [1.0, 1.5]),
    "deciding": Part(CLAIM[:4], [1, 2, 3], 10_000, "test", [1.0, 1.5]),
}


_composing = threading.Lock()  # Hydra composes one configuration at a time


def codes_of(part: str, tokenizer: str, seed: int) -> Path:
    """Where the codes of a tokenizer are."""
    return RUNS / "extract_codes" / f"{part}-{tokenizer}-{seed}" / "codes"


def extract(part: str, tokenizer: str, seed: int) -> list[Metrics]:
    """Make a tokenizer's codes, which have no metrics."""
    path = TOKENIZERS / f"{part}-{tokenizer}-{seed}" / "export"
    if not path.is_dir():
        raise SystemExit(f"{path} is missing: run experiments/rate_distortion/run.py {part} first")
    job(RUNS, "extract_codes", f"{part}-{tokenizer}-{seed}", DATA, f"tokenizer_path={path}",
        "splits=[train,val]")  # fmt: skip
    return []


def extract_all(part: str, sources: Collection[tuple[str, int]], jobs: int) -> None:
    """Make the codes of tokenizers and seeds, each once."""
    run_all(
        sorted(sources, key=lambda source: source[1]),
        lambda tokenizer, seed: extract(part, tokenizer, seed),
        lambda tokenizer, seed: not (codes_of(part, tokenizer, seed) / "codes.json").is_file(),
        lambda _: None,
        jobs,
    )


def train(part: str, row: Row, seed: int, steps: int) -> None:
    """Train a generator, once."""
    job(RUNS, "train_generator", f"{part}-{row.name}-{seed}", f"seed={seed}",
        f"codes_path={codes_of(part, row.tokenizer, seed)}", ORDER, *row.settings, f"trainer.steps={steps}",
        f"trainer.eval_every={steps}")  # fmt: skip


def sampled(part: str, row: Row, seed: int, samples: int, split: str, run: str, sampler: Sequence[str]) -> Metrics:
    """The metrics of samples of a generator."""
    job(RUNS, "evaluate", run, f"seed={seed}", *pair(part, row, seed), "features=lite0_112", "evaluation.floor=false",
        "evaluation.metrics=[fd,is,class_consistency]", f"images.num_samples={samples}", f"reference.split={split}",
        *sampler)  # fmt: skip
    return metrics_of(RUNS, run)


def seconds_per_image(
    rng: Mapping[str, tuple[Path, dict[str, Any]]], images: int, batch: int | None = None
) -> dict[str, float]:
    """Of one thread, the tokenizer not counted: medians of draws in turn.

    Args:
        rng: name to the export of a generator and settings of its sampler.
        images: of each draw.
        batch: images in a batch; None for all of them.
    """
    generators = {path: load_generator(path) for path, _ in rng.values()}
    labels = torch.arange(images) % 10
    calls = {
        name: partial(generators[path].sample, labels, batch_size=batch or images, **settings)
        for name, (path, settings) in rng.items()
    }
    spent = seconds_in_turn({name: lambda repeat, call=call: call(seed=repeat) for name, call in calls.items()})
    return {name: seconds / images for name, seconds in spent.items()}


def add_speeds(part: str, rows: Sequence[Metrics]) -> None:
    """Images per second of the claim's rows, by the generators of the part's first seed."""
    rng = {}
    for row in rows:
        if row["row"] in NAMES_OF_CLAIM and row["seed"] == PARTS[part].seeds[0]:
            path = trained(part, row["row"], row["seed"])
            rng[f"{row['row']} {row['guidance']}"] = path, {"guidance_scale": row["guidance"]}
    seconds = seconds_per_image(rng, 2500, 250)
    for row in rows:
        if (name := f"{row['row']} {row['guidance']}") in seconds:
            row["images_per_second"] = 1 / seconds[name]


def trained(part: str, row: str, seed: int) -> Path:
    """The export of a generator."""
    return RUNS / "train_generator" / f"{part}-{row}-{seed}" / "export"


def pair(part: str, row: Row, seed: int) -> list[str]:
    """Overrides that name a generator and its tokenizer."""
    return [f"generator_path={trained(part, row.name, seed)}",
            f"tokenizer_path={TOKENIZERS}/{part}-{row.tokenizer}-{seed}/export", DATA]  # fmt: skip


def train_and_measure(part: str, row: Row, seed: int, steps: int, samples: int) -> list[Metrics]:
    """The metrics of one row and seed, at each scale of guidance."""
    chosen, name = PARTS[part], f"{part}-{row.name}-{seed}"
    train(part, row, seed, steps)
    judged = f"{name}-likelihood"
    job(RUNS, "evaluate", judged, *pair(part, row, seed), "evaluation=likelihood", f"images.split={chosen.split}")
    bits, found = metrics_of(RUNS, judged), []
    common = {
        "row": row.name, "seed": seed, "steps": steps, "samples": samples,
        "parameters": parameters(codes_of(part, row.tokenizer, seed), row),
        "bits_per_image": bits["bits_per_image"],
        "position_bits": sum(value for key, value in bits.items() if key.startswith("bits_position")),
        "place_bits": place_bits(codes_of(part, row.tokenizer, seed)),
        **of_tokenizer(part, row.tokenizer, seed),
    }  # fmt: skip
    if row.name in NAMES_OF_BLOCKS:
        return [common | {"guidance": 1.0}]
    for scale in chosen.scales if row.name in NAMES_OF_CLAIM else [1.0]:
        metrics = sampled(
            part, row, seed, samples, chosen.split, f"{name}-at-{scale:g}", [f"sampler.guidance_scale={scale:g}"]
        )
        found.append({**common, "guidance": scale, **metrics})
    return found


def parameters(codes: Path, row: Row) -> int:
    """Of a generator."""
    with _composing:
        cfg = check("train_generator", [*row.settings, f"codes_path={codes}"])
    model = build(with_layout(cfg.generator.model, CodeDataset(codes, "val").layout))
    return sum(parameter.numel() for parameter in model.parameters())


@cache
def place_bits(codes: Path) -> float:
    """Bits of an image's contents for a model that knows of each code its place alone: their entropies on the training
    codes."""
    dataset = CodeDataset(codes, "train")
    layout, images = dataset.layout, dataset[range(len(dataset))].codes
    tokens = to_sequences(images, ends=False)
    entries = tokens.slots[tokens.is_code] * layout.codebook_size + tokens.contents[tokens.is_code]
    counts = torch.bincount(entries, minlength=layout.num_slots * layout.codebook_size).double()
    counts = counts.view(layout.num_slots, -1)
    nats = torch.special.xlogy(counts, counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).sum()
    return float(-nats / len(images) / math.log(2))


def of_tokenizer(part: str, tokenizer: str, seed: int) -> Metrics:
    """What the record of the other study says of its reconstructions, for samples to be compared with; the Fréchet
    distance is not in all of its parts."""
    record = json.loads((HERE.parent / "rate_distortion" / f"{part}.json").read_bytes())
    found = next(row for row in record if (row["row"], row["seed"]) == (tokenizer, seed))
    return {key: found[key] for key in (f"rfd_{NETWORK}", "mse") if key in found}


def write(part: str, rows: list[Metrics]) -> None:
    """Records, table and plot."""
    about = (
        f"Seeds {sorted({row['seed'] for row in rows})}; {rows[0]['steps']} steps of 16 images; {rows[0]['samples']:,} "
        f"samples against the {PARTS[part].split} images, in the features of {NETWORK}; ± is the standard deviation "
        "over seeds. *Class* is the accuracy of samples divided by that of real images. *Bits* are those of an image "
        "of the split, grain map included; across tokenizers they compare only beside the tokenizer's error. *By "
        "place*: those of the contents, for a model that knows the place of each code alone. Images/s are of one "
        "thread, batches of 250, the tokenizer not counted, all generators in turn, 2,500 images each; records "
        "of before continuous batching have batches that take as long as their longest image, and with finished ones "
        "dropped."
    )
    groups = write_table(
        HERE / part, rows, lambda row: f"{row['row']}, {row['guidance']:g}", COLUMNS, "generator", about
    )
    plot(HERE / f"{part}.png", {(rows[0]["row"], rows[0]["guidance"]): rows for rows in groups.values()})


def plot(path: Path, groups: Mapping[tuple[str, float], Sequence[Metrics]]) -> None:
    """Fréchet distances, a bar for each scale of guidance and a dot for each seed."""
    names = list(dict.fromkeys(name for (name, _), rows in groups.items() if f"fd_{NETWORK}" in rows[0]))
    scales = sorted({scale for _, scale in groups})
    canvas = Canvas(figsize=(8, 0.42 * len(names) + 1.2), layout="constrained")
    panel = canvas.subplots()
    for index, scale in enumerate(scales):
        colour = ("#1b6ca8", "#d1495b", "#3a7d44")[index % 3]
        for place, name in enumerate(names):
            values = [row[f"fd_{NETWORK}"] for row in groups.get((name, scale), []) if f"fd_{NETWORK}" in row]
            if not values:
                continue
            height = place + (index - (len(scales) - 1) / 2) * 0.36
            label = f"guidance {scale:g}" if place == 0 else None
            panel.barh(height, sum(values) / len(values), 0.34, color=colour, alpha=0.75, label=label)
            panel.plot(values, [height] * len(values), ".", color="#222222", markersize=4)
    panel.set_yticks(range(len(names)), [TITLES.get(name, name) for name in names])
    panel.invert_yaxis()
    panel.set_xlabel(f"Fréchet distance of samples ({NETWORK}), lower is better")
    panel.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    for place, name in enumerate(names):  # what the tokenizer itself leaves
        found = [row[f"rfd_{NETWORK}"] for row in groups[name, scales[0]] if f"rfd_{NETWORK}" in row]
        if found:
            label = "reconstructions" if place == 0 else None
            panel.plot([sum(found) / len(found)] * 2, [place - 0.36, place + 0.36], color="#222222", label=label)
    canvas.legend(frameon=False, fontsize=9, loc="outside upper center", ncols=3)
    with replacing(path) as new:
        canvas.savefig(new, dpi=150, format="png")


def parse(about: str, parts: Iterable[str]) -> argparse.Namespace:
    """The command line of both studies of this folder."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--jobs", type=int, default=2, help="jobs at a time")
    parser.add_argument("--steps", type=int, default=3000, help="of each generator")
    parser.add_argument("--samples", type=int, help="instead of the part's own number")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    return parser.parse_args()


def main() -> None:
    """Run a part, and write what is known after each row."""
    arguments = parse(__doc__, PARTS)
    part, name = PARTS[arguments.part], arguments.part
    rows = {row.name: row for row in part.rows if arguments.only in row.name}
    samples = arguments.samples or part.samples
    start()
    sources = {(row.tokenizer, seed) for seed in part.seeds for row in rows.values()}
    print(
        f"codes of {len(sources)} tokenizers, then {len(rows) * len(part.seeds)} generators of {arguments.steps} steps"
    )
    extract_all(name, sources, arguments.jobs)
    found: list[Metrics] = []

    def keep(rows: list[Metrics]) -> None:
        found[:] = rows
        write(name, rows)

    run_all(
        [(row, seed) for seed in part.seeds for row in rows],
        lambda row, seed: train_and_measure(name, rows[row], seed, arguments.steps, samples),
        lambda row, seed: not trained(name, row, seed).with_name("result.json").is_file(),
        keep,
        arguments.jobs,
    )
    add_speeds(name, found)
    write(name, found)
    print((HERE / f"{name}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
