"""How many entries of a codebook restart at every step, and what does restarting fewer of them give?

    .venv/bin/python experiments/restarts/run.py [SEED ...]

Trains the demo's tokenizer for 300 steps, encodes 4,000 training and 1,000 validation images of Fashion-MNIST with it,
and then learns codebooks of 1024 entries by moving averages of these vectors (the encoder stands still): with few and
with many vectors in each step, and from a poor start, all entries close to 16 places. Rules: ours; "every entry whose
running count is below 1", as in the public code of RQ-VAE and what is built on it, which then sets the count to 1; and
never.
Writes results.json and results.md beside this file. Resumable: rows that are there are not measured again.
Cost: 10 minutes of a CPU core, of which the tokenizer takes one.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from graincode import load_tokenizer
from graincode.core.codes import CodeCells
from graincode.data import FashionMNIST
from graincode.evaluation.pairs import codebook_use
from graincode.files import write_json
from graincode.tokenizer import EMAQuantizer

HERE, RUNS = Path(__file__).parent, Path("runs/restarts")
SIZE, STEPS, WARM_UP = 1024, 600, 200
TRAINING = [f"runs_dir={RUNS}", "run_name=tokenizer", "experiment=tok_fashion", "trainer.steps=300",
            "trainer.eval_every=300", "calibration_images=4000"]  # fmt: skip
CASES = ((256, 4096), (256, 16), (4096, 4096))  # vectors in each step; vectors that the codebook starts from


class CountBelowOne(EMAQuantizer):
    """Restarts every entry whose running count is below 1 with vectors of the batch, and sets its count to 1.

    Where a batch has fewer vectors than restarts are due, vectors return with a little noise.
    Source: kakaobrain/rq-vae-transformer, rqvae/models/rqvae/quantizations.py.
    """

    def __init__(self, codebook_size: int, code_dim: int, decay: float) -> None:
        super().__init__(codebook_size, code_dim, decay, restart_below=0.0)

    @torch.no_grad()
    def update(self, seen: Sequence[tuple[Tensor | None, ...]]) -> Tensor:
        super().update(seen)
        dead = self.counts < 1
        batch, size = seen[-1][0], len(self.counts)
        if len(batch) < size:
            batch = batch.repeat(-(-size // len(batch)), 1)
            batch = batch + torch.randn_like(batch) * 0.01 / batch.shape[1] ** 0.5
        chosen = batch[torch.randperm(len(batch))[:size]]
        for tensor in (self.sums, self.codebook):
            tensor[dead] = chosen[dead]
        self.counts[dead] = 1
        return dead.float().mean()


RULES: dict[str, Callable[[int, int], EMAQuantizer]] = {
    "ours: below 0.05 of the expected count, at most 10 % a step": partial(EMAQuantizer, decay=0.95),
    "ours, decay 0.99": partial(EMAQuantizer, decay=0.99),
    "ours without the limit": partial(EMAQuantizer, decay=0.95, max_restarts=1.0),
    "count below 1": partial(CountBelowOne, decay=0.95),
    "count below 1, decay 0.99": partial(CountBelowOne, decay=0.99),
    "never": partial(EMAQuantizer, decay=0.95, restart_below=0.0),
    "never, decay 0.99": partial(EMAQuantizer, decay=0.99, restart_below=0.0),
}
METRICS = {
    "restarted": "restarted per step, %", "usage": "usage, %", "perplexity": "perplexity",
    "error": "error, % of variance",
}  # fmt: skip


def encoder_vectors() -> tuple[Tensor, Tensor]:
    """(N, D) codes before quantisation, of training and of validation images, and of all grains."""
    subprocess.run([sys.executable, "-P", "-m", "graincode.jobs.train_tokenizer", *TRAINING], check=True)
    tokenizer = load_tokenizer(RUNS / "train_tokenizer" / "tokenizer" / "export")
    found = []
    for split, count in (("train", 4000), ("val", 1000)):
        dataset, parts = FashionMNIST().split(split), []
        for start in range(0, count, 250):
            images = dataset[range(start, start + 250)].images
            with torch.no_grad():
                grains = tokenizer.route(images).grains
                parts += CodeCells.of(grains, tokenizer.layout).gather(tokenizer.encoder(images))
        found.append(torch.cat(parts))
    return found[0], found[1]


def measure(
    make: Callable[[int, int], EMAQuantizer], count: int, first: int, seed: int, train: Tensor, val: Tensor
) -> dict[str, float]:
    """Learn a codebook from `count` vectors a step, `first` of them at first, and look at it with the validation's."""
    torch.manual_seed(seed)
    quantizer = make(SIZE, train.shape[1])
    quantizer.initialize(train[torch.randperm(len(train))[:first]])
    restarted = []
    for _ in range(STEPS):
        found = quantizer(train[torch.randint(len(train), (count,))])
        restarted.append(float(quantizer.update([found.seen])))
    codes = quantizer.nearest(val)
    usage, perplexity = codebook_use(torch.bincount(codes.flatten(), minlength=SIZE))
    error = (quantizer.lookup(codes) - val).square().mean() / (val - val.mean(dim=0)).square().mean()
    return {
        "restarted": 100 * statistics.mean(restarted[WARM_UP:]),
        "usage": 100 * usage,
        "perplexity": perplexity,
        "error": 100 * float(error),
    }


def main() -> None:
    """Measure what is missing and write the tables."""
    seeds = [int(seed) for seed in sys.argv[1:]] or [0, 1, 2]
    path = HERE / "results.json"
    rows = json.loads(path.read_bytes()) if path.is_file() else []
    wanted = [(*case, rule, seed) for case in CASES for rule in RULES for seed in seeds]
    missing = set(wanted) - {(row["vectors"], row["start"], row["rule"], row["seed"]) for row in rows}
    if missing:
        train, val = encoder_vectors()
        for count, first, rule, seed in (item for item in wanted if item in missing):
            metrics = measure(RULES[rule], count, first, seed, train, val)
            rows.append({"vectors": count, "start": first, "rule": rule, "seed": seed, **metrics})
            write_json(path, rows)
            print(rows[-1], flush=True)
    lines = []
    for case in CASES:
        lines += ["", f"| {case[0]} vectors a step, start from {case[1]} | " + " | ".join(METRICS.values()) + " |"]
        lines.append("|---" * (len(METRICS) + 1) + "|")
        for rule in RULES:
            cells = []
            for key in METRICS:
                values = [row[key] for row in rows if (row["vectors"], row["start"], row["rule"]) == (*case, rule)]
                spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3g}{spread}")
            lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Codebooks of {SIZE} entries after {STEPS} steps, seeds {sorted({row['seed'] for row in rows})}; restarts are "
        f"those after step {WARM_UP}; usage, perplexity and error are of the codes of 1,000 validation images. "
        "The encoder stands still, so nothing here tells how a decoder bears entries that move.",
    ]
    (HERE / "results.md").write_text("\n".join(lines[1:]) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
