"""Do two published forms of the sequence make DGiT-AR better: the last grain row by row, and a start token per grain?

    .venv/bin/python experiments/published/generator.py --demo runs/demo

On the Fashion-MNIST codes of a finished `make demo` (F8/F4, 40 an image), with three seeds of the generator, as many
steps each: bits of a validation image, and the Fréchet distance of samples to the validation images. Jobs run one
after the other on one thread. What has finished is not run again, so the study can be stopped at any time. Writes
generator.json and generator.md here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from sweep import Metrics, job, metrics_of, run_all, start, write_table

HERE, RUNS, NETWORK = Path(__file__).parent, Path("runs/published"), "lite0@112"
ROWS = {
    "regions": ["generator.sequence.last_grain_order=regions"],
    "rows": [],
    "starts": ["generator.sequence.last_grain_order=regions", "generator.sequence.grain_starts=true"],
}
TITLES = {
    "regions": "region by region, no start tokens",
    "rows": "last grain row by row (default)",
    "starts": "region by region, a start token for the fine grain",
}
COLUMNS = {
    "bits_per_image": "bits", "bits_content_0": "of coarse contents", "bits_content_1": "of fine contents",
    "bits_position_0": "of positions", f"fd_{NETWORK}": "FD", f"is_{NETWORK}": "IS", "codes_per_image": "codes",
    "bits_difference": "bits against the first row, same seed", "fd_difference": "FD against it",
}  # fmt: skip


def measure(demo: Path, name: str, seed: int, steps: int, samples: int) -> list[Metrics]:
    """Train a generator and measure it."""
    run = f"{name}-{seed}"
    codes, tokenizer = demo / "extract_codes/latest/codes", demo / "train_tokenizer/latest/export"
    job(RUNS, "train_generator", run, f"codes_path={codes.resolve()}", f"seed={seed}", f"trainer.steps={steps}",
        f"trainer.eval_every={steps}", "trainer.eval_images=250", *ROWS[name])  # fmt: skip
    pair = [f"generator_path={RUNS}/train_generator/{run}/export", f"tokenizer_path={tokenizer.resolve()}",
            "data=fashion_mnist"]  # fmt: skip
    job(RUNS, "evaluate", f"{run}-bits", *pair, "evaluation=likelihood", "images.split=val")
    job(RUNS, "evaluate", f"{run}-samples", *pair, f"seed={seed}", "features=lite0_112", "evaluation.floor=false",
        "evaluation.metrics=[fd,is]", f"images.num_samples={samples}", "reference.split=val")  # fmt: skip
    metrics = metrics_of(RUNS, f"{run}-bits") | metrics_of(RUNS, f"{run}-samples")
    return [{"row": name, "seed": seed, "steps": steps, "samples": samples, **metrics}]


def write(rows: list[Metrics]) -> None:
    """Record and table, with the differences to the first row of the same seed."""
    first = {row["seed"]: row for row in rows if row["row"] == "regions"}
    for row in rows:
        if row["row"] != "regions" and (base := first.get(row["seed"])) is not None:
            row["bits_difference"] = row["bits_per_image"] - base["bits_per_image"]
            row["fd_difference"] = row[f"fd_{NETWORK}"] - base[f"fd_{NETWORK}"]
    seeds = sorted({row["seed"] for row in rows})
    about = (
        f"Seeds {seeds} of the generator on the codes of one tokenizer; {rows[0]['steps']} steps of 16 images; "
        f"{rows[0]['samples']:,} samples against the validation images, in the features of {NETWORK}; ± is the "
        "standard deviation over seeds, of the differences too."
    )
    write_table(HERE / "generator", rows, lambda row: TITLES[row["row"]], COLUMNS, "sequence", about)


def main() -> None:
    """Run all rows and seeds, and write what is known after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="what `make demo` made")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    arguments = parser.parse_args()
    start()
    todo = [(name, seed) for seed in range(arguments.seeds) for name in arguments.only]
    run_all(
        todo,
        lambda name, seed: measure(arguments.demo, name, seed, arguments.steps, arguments.samples),
        lambda name, seed: not (RUNS / "evaluate" / f"{name}-{seed}-samples" / "result.json").is_file(),
        write,
        jobs=1,
    )
    print((HERE / "generator.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
