"""From images to metrics with one command: all five jobs in turn, then a page to look at."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from graincode.config.errors import nearest
from graincode.config.job import build
from graincode.config.schema import root_keys
from graincode.config.validate import check
from graincode.core.errors import GraincodeError, print_anything
from graincode.distributed.signals import CHILD
from graincode.files import read_json, short_hash, write_json

USAGE = """usage: make demo [ARGS="OVERRIDE ..."]

Runs the five jobs in runs/demo and writes a page. An override goes to every job that knows its first word;
with STEP: before it, to that step alone (the evaluations are evaluate_reconstructions and evaluate_samples; the
generator that edits images is train_masked, and takes generator. only so):
  make demo ARGS="data=image_folder data.root=/my/images data.image_size=32"
  make demo ARGS="train_tokenizer:trainer.steps=200 sampler.temperature=0.9"
Other overrides work in another directory (runs/demo-HASH); the same command again goes on where it was."""

# keys that the demo sets itself, so that its steps fit together
_OWN = {"experiment", "runs_dir", "run_name", "debug", "tokenizer_path", "generator_path", "codes_path"}
MASKED = "train_masked"
FEWER = ("images.num_samples=1000", "evaluation.subset=4000")  # to stay within ten minutes
GUIDED = ("sampler.guidance_scale=2", "sampler.top_p=0.9")  # chosen on validation images


@dataclass(frozen=True)
class Step:
    """One job: its name, which is its run's too, its overrides, its run's directory, what the overrides compose to."""

    name: str
    job: str
    arguments: tuple[str, ...]
    run: Path
    config: DictConfig

    @property
    def command(self) -> str:
        """What to type to run the step alone."""
        return f"graincode-{self.job.replace('_', '-')} {shlex.join(self.arguments)}"


def plan(folder: Path, overrides: Sequence[str] = ()) -> list[Step]:
    """The steps of a demo in `folder`, in order, each with those of the overrides that are its own.

    Raises:
        GraincodeError: an override belongs to no step, or a step cannot be composed with its own.
    """
    tokenizer, generator = (f"{x}_path={folder}/train_{x}/train_{x}/export" for x in ("tokenizer", "generator"))
    codes, features = f"codes_path={folder}/extract_codes/extract_codes/codes", "features=lite0_112"
    jobs = {
        "train_tokenizer": ("train_tokenizer", "experiment=tok_fashion"),
        "extract_codes": ("extract_codes", tokenizer, "splits=[train,val]"),
        "train_generator": ("train_generator", "experiment=ar_fashion", codes),
        MASKED: ("train_generator", "experiment=nar_fashion", codes),
        "sample": ("sample", generator, tokenizer),
        "evaluate_reconstructions": ("evaluate", tokenizer, "evaluation=reconstruction", features),
        "evaluate_samples": ("evaluate", generator, tokenizer, "evaluation=generation", features, *FEWER),
    }
    chosen = _assign({name: job for name, (job, *_) in jobs.items()}, overrides)
    steps: list[Step] = []
    labelled = True
    for name, (job, *arguments) in jobs.items():
        if job == "train_generator" and not labelled:
            arguments.insert(0, "generator/conditioning=none")
        if name in ("sample", "evaluate_samples") and labelled:
            arguments = [*GUIDED, *arguments]
        arguments = [f"runs_dir={folder}", f"run_name={name}", *arguments, *chosen[name]]
        steps.append(Step(name, job, tuple(arguments), folder / job / name, check(job, arguments)))
        labelled = bool(build(steps[0].config.data).class_names) if len(steps) == 1 else labelled
    return steps


def main() -> None:
    """Console entry."""
    print_anything()
    overrides = sys.argv[1:]
    if {"-h", "--help"} & set(overrides):
        print(USAGE)
        return
    try:
        run_demo(Path("runs") / (f"demo-{short_hash(overrides)}" if overrides else "demo"), overrides)
    except GraincodeError as error:
        print(f"error: {error.line}", file=sys.stderr)
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
    seconds = read_json(timing, {}, "remove it") if timing.exists() else {}
    for number, step in enumerate(steps, start=1):
        print(f"\n[{number}/{len(steps)}] {step.name}\n  {step.command}", flush=True)
        finished, began = (step.run / "result.json").is_file(), time.perf_counter()
        try:
            status = _run(step)
        finally:  # an interrupted attempt counts too
            if not finished:
                seconds[step.name] = seconds.get(step.name, 0) + time.perf_counter() - began
                write_json(timing, seconds)
        if status:
            raise GraincodeError(f"{step.name} ended with status {status}; once it is mended, the same command goes on")

    from page import write_report

    from graincode.evaluation.record import read_record, table  # which imports every model

    config = steps[-2].config
    dataset = build(config.data).split(config.images.split)
    page = write_report(folder, {s.name: s.run for s in steps}, {s.name: s.command for s in steps}, dataset)
    print("", *(table(read_record(step.run)) for step in steps[-2:]), sep="\n")
    print(f"\n{len(steps)} steps in {sum(seconds.values()) / 60:.1f} minutes. Open {os.path.abspath(page)}")
    return page


def _run(step: Step) -> int:
    """Run a step in a process of its own, and give its exit status; modules are not taken from where the user is."""
    command = [sys.executable, "-P", "-m", f"graincode.jobs.{step.job}", *step.arguments]
    return subprocess.run(command, **CHILD).returncode


def _assign(jobs: dict[str, str], overrides: Sequence[str]) -> dict[str, list[str]]:
    """Which overrides each step gets, by its name, from the job of each."""
    words = {job: root_keys(job) - _OWN for job in jobs.values()}
    chosen: dict[str, list[str]] = {name: [] for name in jobs}
    for override in overrides:
        name, prefixed, rest = override.partition(":")
        if prefixed and name in jobs:
            chosen[name].append(rest)
            continue
        word = re.split(r"[./=@]", override.lstrip("+~"))[0]
        takers = [name for name, job in jobs.items() if word in words[job] and (word, name) != ("generator", MASKED)]
        if not takers:
            known = set().union(*words.values())
            raise GraincodeError(f"no job of the demo takes {override!r}: {nearest(word, known)}")
        for name in takers:
            chosen[name].append(override)
    return chosen


if __name__ == "__main__":
    main()
