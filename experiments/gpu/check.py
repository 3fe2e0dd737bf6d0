"""What one device can tell of graincode in at most eight minutes, from a checkout, without a network.

    .venv/bin/python experiments/gpu/check.py                          # on one GPU
    .venv/bin/python experiments/gpu/check.py --device cpu --quick     # a rehearsal of toys, in a minute

A line for each check as it comes; then `check.json` and `check.md` in `--out`. Ends with status 1 if one does not hold.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from functools import partial, partialmethod
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests")]
import equal  # noqa: E402
import helpers  # noqa: E402
import speed  # noqa: E402
from report import Report  # noqa: E402

TRAINER = [*helpers.TINY_TRAINER, "logging=none"]
DATA = ["data=image_folder", "data.image_size=32", "data.test_fraction=0.3"]


def jobs(report: Report) -> None:
    """All five jobs on a folder of small images, with processes that load data."""
    with tempfile.TemporaryDirectory() as folder:
        data = [*DATA, f"data.root={helpers.write_images(Path(folder) / 'images')}"]
        hardware = [f"hardware={'gpu' if report.is_gpu else 'cpu'}", "hardware.workers=2"]
        adversary = ["tokenizer/adversary=patch", "tokenizer.adversary.start_step=2",
                     "tokenizer.adversary.discriminator.layers=2"]  # fmt: skip
        environment = os.environ | {"GRAINCODE_CACHE": f"{folder}/cache"}
        for job, *settings in [
            ("train_tokenizer", *data, *helpers.TINY_TOKENIZER, *TRAINER, *adversary, "hardware.compile=false"),
            ("extract_codes", *data, "precision=tf32"),
            ("train_generator", *helpers.TINY_GENERATOR, *TRAINER),
            ("sample", "num_samples=8", "batch_size=4", "precision=bfloat16"),
            ("evaluate", *data, "evaluation=reconstruction", "features=lite0_112", "evaluation.metrics=[fd,ssim]"),
        ]:
            command, began = [sys.executable, "-P", "-m", f"graincode.jobs.{job}", *settings, *hardware], time.time()
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            error = (done.stderr.strip().splitlines() or ["nothing said"])[-1][:200] if done.returncode else ""
            report.say(f"job {job}", f"{time.time() - began:.0f} s {error}".strip(), done.returncode == 0)


CHECKS = {
    "ceilings": speed.ceilings,
    "numbers": equal.numbers,
    "codes": equal.codes,
    "samples": equal.samples,
    "trainings": equal.trainings,
    "waits": equal.waits,
    "generators": speed.generators,
    "tokenizers": speed.tokenizers,
    "decoding": speed.decoding,
    "masked": speed.masked_samples,
    "jobs": jobs,
    "precisions": equal.precisions,
}


def main() -> int:
    """Run the checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="toys instead of models of published size")
    parser.add_argument("--only", nargs="+", choices=CHECKS, help="some of the checks")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"))
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --device cpu --quick rehearses")
    if asked.device == "cpu":  # all but the compiler
        torch.compile = partial(torch.compile, backend="aot_eager")
        torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    report, began = Report(asked.device, asked.quick), time.time()
    for name in asked.only or CHECKS:
        report.run(name, CHECKS[name])
    device = torch.cuda.get_device_name() if report.is_gpu else "a CPU"
    about = {"device": device, "torch": torch.__version__, "quick": asked.quick, "seconds": round(time.time() - began)}
    report.write(asked.out, about)
    print(f"{len(report.lines)} lines, {len(report.failed)} do not hold: {', '.join(report.failed) or '-'}")
    return int(bool(report.failed))


if __name__ == "__main__":
    raise SystemExit(main())
