"""From images to figures with one command: all five jobs in turn, then a page to look at."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from graincode.config.errors import nearest
from graincode.config.job import build
from graincode.config.schema import SCHEMAS
from graincode.config.validate import check
from graincode.core.errors import GraincodeError
from graincode.files import short_hash, write_json
from graincode.jobs.evaluate import table
from graincode.report import write_report

USAGE = """usage: graincode-demo [OVERRIDE ...]

Runs the five jobs in runs/demo and writes a page. An override goes to every job that knows its first word;
with STEP: before it, to that step alone (the evaluations are evaluate_reconstructions and evaluate_samples; the
generator that edits images is train_masked, and takes generator. only so):
  graincode-demo data=image_folder data.root=/my/images data.image_size=32
  graincode-demo train_tokenizer:trainer.steps=200 sampler.temperature=0.9
Other overrides work in another directory (runs/demo-HASH); the same command again goes on where it was."""


# keys that the demo sets so that its steps fit together
_OWN = {"runs_dir", "run_name", "debug", "tokenizer_path", "generator_path", "codes_path"}
MASKED = "train_masked"
DEMO_SAMPLES = ("images.num_samples=1000", "evaluation.subset=4000")  # to stay within ten minutes
GUIDED = ("sampler.guidance_scale=2", "sampler.top_p=0.9")  # chosen on validation images


@dataclass(frozen=True)
class Step:
    """One job of the demo.

    Attributes:
        name: of the step, and of its run.
        job: that it runs.
        arguments: all its overrides.
    """

    name: str
    job: str
    arguments: tuple[str, ...]

    @property
    def command(self) -> str:
        """What to type to run the step alone."""
        return f"graincode-{self.job.replace('_', '-')} {shlex.join(self.arguments)}"


def plan(folder: Path, overrides: Sequence[str] = ()) -> list[Step]:
    """The steps of a demo in `folder`, in order, each with those of the overrides that are its own.

    Raises:
        GraincodeError: an override belongs to no step, or a step cannot be composed with its own.
    """
    tokenizer = f"tokenizer_path={folder}/train_tokenizer/train_tokenizer/export"
    generator = f"generator_path={folder}/train_generator/train_generator/export"
    codes = f"codes_path={folder}/extract_codes/extract_codes/codes"
    features = "features=lite0_112"
    steps = [
        Step("train_tokenizer", "train_tokenizer", ("experiment=tok_fashion",)),
        Step("extract_codes", "extract_codes", (tokenizer, "splits=[train,val]")),
        Step("train_generator", "train_generator", ("experiment=ar_fashion", codes)),
        Step(MASKED, "train_generator", ("experiment=nar_fashion", codes)),
        Step("sample", "sample", (generator, tokenizer)),
        Step("evaluate_reconstructions", "evaluate", (tokenizer, "evaluation=reconstruction", features)),
        Step("evaluate_samples", "evaluate", (generator, tokenizer, "evaluation=generation", features, *DEMO_SAMPLES)),
    ]
    chosen = _assign(steps, overrides)
    complete, labelled = [], True
    for step in steps:
        common = [f"runs_dir={folder}", f"run_name={step.name}"]
        if step.job == "train_generator" and not labelled:
            common.append("generator/conditioning=none")
        if step.name in ("sample", "evaluate_samples") and labelled:
            common.extend(GUIDED)
        complete.append(replace(step, arguments=(*common, *step.arguments, *chosen[step.name])))
        cfg = check(step.job, list(complete[-1].arguments))
        if step.job == "train_tokenizer":
            labelled = bool(build(cfg.data).class_names)
    return complete


def main() -> None:
    """Console entry."""
    overrides = sys.argv[1:]
    if any(override in ("-h", "--help") for override in overrides):
        print(USAGE)
        return
    folder = Path("runs") / (f"demo-{short_hash(overrides)}" if overrides else "demo")
    try:
        run_demo(folder, overrides)
    except GraincodeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def run_demo(folder: Path, overrides: list[str]) -> Path:
    """Run what is left to run in `folder`, and write and give the page.

    Raises:
        GraincodeError: an override belongs to no job, or a job failed.
    """
    steps = plan(folder, overrides)
    timing = folder / "seconds.json"
    for number, step in enumerate(steps, start=1):
        print(f"\n[{number}/{len(steps)}] {step.name}\n  {step.command}", flush=True)
        finished = (folder / step.job / step.name / "result.json").is_file()
        began = time.perf_counter()
        try:
            done = subprocess.run([sys.executable, "-m", f"graincode.jobs.{step.job}", *step.arguments])
        finally:  # an interrupted attempt counts too
            seconds = json.loads(timing.read_text()) if timing.is_file() else {}
            if not finished:
                seconds[step.name] = seconds.get(step.name, 0) + time.perf_counter() - began
                write_json(timing, seconds)
        if done.returncode:
            raise GraincodeError(
                f"{step.name} ended with status {done.returncode}; once that is mended, the same command goes on"
            )
    page = write_report(folder, steps)
    print()
    for step in steps[-2:]:
        print(table(json.loads((folder / step.job / step.name / "metrics.json").read_text())))
    print(f"\n{len(steps)} steps in {sum(seconds.values()) / 60:.1f} minutes. Open {os.path.abspath(page)}")
    return page


def _assign(steps: Sequence[Step], overrides: Sequence[str]) -> dict[str, list[str]]:
    """Which overrides each step gets, by its name."""
    chosen: dict[str, list[str]] = {step.name: [] for step in steps}
    for override in overrides:
        name, prefixed, rest = override.partition(":")
        if prefixed and name in chosen:
            chosen[name].append(rest)
            continue
        word = re.split(r"[./=@]", override.lstrip("+~"))[0]
        takers = [s for s in steps if word in _words(s.job) and not (word == "generator" and s.name == MASKED)]
        if not takers:
            words = {known for step in steps for known in _words(step.job)}
            raise GraincodeError(f"no job of the demo takes {override!r}: {nearest(word, words)}")
        for step in takers:
            chosen[step.name].append(override)
    return chosen


def _words(job: str) -> set[str]:
    """First words of the overrides that a job takes: its top-level keys; experiments are the demo's own choice."""
    return set(SCHEMAS[job].__dataclass_fields__) - _OWN


if __name__ == "__main__":
    main()
