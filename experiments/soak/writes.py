"""What is lost when a job is killed at a change to a file: a write, a rename, an fsync, a removal?

    make soak ARGS="--writes 200 --seed 0 --record"

Every job of the five runs once undisturbed, which gives its reference and counts its changes to files. Each trial then
runs a job in its own directory that dies by SIGKILL right before one of these changes, drawn at random; some die a
second time when they go on. The last command must end with the files of its reference, no more and no fewer, and with
equal results. Before them come the faults of faults.py, each once. A process that has imported everything forks one for
each command, so a trial takes seconds. Linux with a C compiler.
Cost: 21 minutes of one CPU core.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
JOBS = ("train_tokenizer", "extract_codes", "train_generator", "sample", "evaluate")
DATA = ["data=image_folder", "data.root=images", "data.image_size=32", "data.cache=true"]
TRAINER = [
    "trainer.steps=4", "trainer.batch_size=4", "trainer.warmup_steps=1", "trainer.log_every=1", "trainer.eval_every=2",
    "trainer.eval_images=4", "trainer.checkpoint_every=1", "logging=none",
]  # fmt: skip
TOKENIZER, GENERATOR = "tokenizer_path=inputs/tokenizer", "generator_path=inputs/generator"
SETTINGS = {
    "train_tokenizer": [*DATA, *TRAINER, "tokenizer.size.channels=8", "tokenizer.code_dim=8",
                        "tokenizer.codebook_size=32"],
    "extract_codes": [*DATA, TOKENIZER, "splits=[train,val]"],
    "train_generator": ["codes_path=inputs/codes", *TRAINER, "generator.size.width=32",
                        "generator.size.position_layers=1", "generator.size.content_layers=1"],
    "sample": [TOKENIZER, GENERATOR, "num_samples=4"],
    "evaluate": [*DATA, TOKENIZER, "evaluation=reconstruction", "features=lite0_112", "keep=npz", "batch_size=4"],
}  # fmt: skip
OUTPUTS = {"train_tokenizer": "export", "extract_codes": "codes", "train_generator": "export"}
INPUTS = {"train_tokenizer": "tokenizer", "extract_codes": "codes", "train_generator": "generator"}
LIMIT_SECONDS = 120
SECOND_KILLS = 0.3  # share of the trials
PASSING = {"seconds", "finished", "device", "versions"}  # what of records differs from run to run


@dataclass
class Trial:
    """What came of one trial.

    Attributes:
        job: which was killed.
        kills: the changes to files before which it was.
        of: changes of an undisturbed command.
        problems: all that was not as it should be.
        seconds: that it took.
    """

    job: str
    kills: list[int] = field(default_factory=list)
    of: int = 0
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def forked(work: Callable[[], int], said: Path) -> int:
    """The status of a function in a process of its own, whose output goes to a file; negative for a signal."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            status = work()
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    began = time.monotonic()
    while not (found := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() - began > LIMIT_SECONDS:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            return 124
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(found[1])


def run(
    job: str, where: Path, said: Path, at: int = 0, more: Sequence[str] = (), before: Callable[[], None] = lambda: None
) -> int:
    """Exit status of a job whose files are below `where`, killed before the change to a file with the number `at`; at 0
    it ends, and the number of its changes is in `where`/changes."""
    from graincode.config.job import job_main

    def work() -> int:
        os.environ |= {"GRAINCODE_CACHE": f"{where}/cache", "TMPDIR": f"{where}/temporary"}
        tempfile.tempdir = None
        own = ["run_name=run", f"runs_dir={where}/runs", "hardware.threads=1"]
        sys.argv = [f"graincode-{job}", *own, *SETTINGS[job], *more]
        before()
        ctypes.CDLL(None).soak_arm(at)
        status = 0
        try:
            job_main(job)
        except SystemExit as end:
            status = int(end.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
        (where / "changes").write_text(str(ctypes.CDLL(None).soak_seen()))
        return status

    (where / "temporary").mkdir(parents=True, exist_ok=True)
    return forked(work, said)


def files(where: Path) -> set[str]:
    """All files and links below a folder but those of this script."""
    found = (path.relative_to(where) for path in where.rglob("*") if path.is_symlink() or not path.is_dir())
    return {str(path) for path in found if str(path) not in ("changes", "said")}


def results(job: str, where: Path) -> dict[str, object]:
    """What the files of a finished job say, by name."""
    found: dict[str, object] = {}
    for name in files(where / "runs"):
        path = where / "runs" / name
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.suffix in (".safetensors", ".npy", ".npz", ".png"):
            found[name] = path.read_bytes()
        elif path.name == "log.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [
                {k: v for k, v in line.items() if not k.startswith("speed/") and k != "time"} for line in lines
            ]
        elif path.name in ("result.json", "metrics.json"):
            record = json.loads(path.read_text())
            kept = PASSING | ({"objective"} if job == "sample" else set())  # its objective is a time
            found[name] = {k: v for k, v in record.items() if k not in kept}
    return found


def compare(job: str, where: Path, like: Path, trial: Trial) -> None:
    """Note what differs from a reference."""
    found, expected = files(where), files(like)
    for what, names in (("left behind", found - expected), ("missing", expected - found)):
        if names:
            trial.problems.append(f"{what}: {', '.join(sorted(names))[:300]}")
    mine, theirs = results(job, where), results(job, like)
    if different := [name for name in theirs if mine.get(name) != theirs[name]]:
        trial.problems.append(f"other results: {', '.join(different)}")


def attempt(job: str, where: Path, like: Path, of: int, rng: random.Random) -> Trial:
    """Kill a job at one or two of its changes to files, let it end, and compare."""
    trial, said, began = Trial(job, of=of), where / "said", time.monotonic()
    where.mkdir()
    for _ in range(1 + (rng.random() < SECOND_KILLS)):
        trial.kills.append(rng.randint(1, of))
        status = run(job, where, said, trial.kills[-1])
        if status == 0 and len(trial.kills) == 2:  # it had less to do than the first
            break
        if status != -9:
            trial.problems.append(f"status {status} instead of a kill: {said.read_text()[-300:]}")
    status = run(job, where, said)
    if status:
        trial.problems.append(f"the last command ended with {status}: {said.read_text()[-300:]}")
    compare(job, where, like, trial)
    trial.seconds = round(time.monotonic() - began, 2)
    return trial


def prepare(root: Path) -> dict[str, int]:
    """Images, and every job once; gives the number of its changes to files."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        for index in range(count):
            busy = index % 2 == 0
            pixels = rng.integers(0, 256, (32, 32, 3)) if busy else np.full((32, 32, 3), index * 9)
            pixels[:10] = rng.integers(0, 256, (1, 1, 3))
            folder = root / "images" / split / ("busy" if busy else "smooth")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:04d}.png")
    (root / "inputs").mkdir()
    counts = {}
    for job in JOBS:
        where = root / "reference" / job
        where.mkdir(parents=True)
        if status := run(job, where, where / "said"):
            raise SystemExit(f"{job} ended with {status}: {(where / 'said').read_text()[-2000:]}")
        counts[job] = int((where / "changes").read_text())
        if job in OUTPUTS:
            (root / "inputs" / INPUTS[job]).symlink_to(where / "runs" / job / "run" / OUTPUTS[job])
    return counts


def serve(root: Path, counts: dict[str, int], count: int, seed: int) -> list[Trial]:
    """Trials in turn over the jobs, in this process, which has the library of writes.c."""
    trials = []
    print(f"changes to files: {counts}", flush=True)
    for index in range(count):
        job = JOBS[index % len(JOBS)]
        where = root / f"trial-{index}"
        trial = attempt(job, where, root / "reference" / job, counts[job], random.Random(f"{seed} {index}"))
        trial.problems = [problem.replace(f"{root}/", "") for problem in trial.problems]
        trials.append(trial)
        shown = f"{index}: {job} killed before change {' and '.join(map(str, trial.kills))} of {trial.of}"
        print(f"{shown}: {trial.problems or 'nothing lost'} ({trial.seconds} s)", flush=True)
        if not trial.problems:
            subprocess.run(["rm", "-rf", str(where)])
    return trials


def import_all() -> None:
    """Import what the jobs import when they run, so that their processes need not."""
    import importlib

    more = "config.validate", "distributed.launch", *(f"jobs.{job}" for job in JOBS)
    for name in (*(f"graincode.{name}" for name in more), "torch.distributed.checkpoint.state_dict", "timm"):
        importlib.import_module(name)


def table(trials: list[Trial]) -> str:
    """A row for each job."""
    lines = ["| job | changes to files | kills | trials | lost |", "|---|---|---|---|---|"]
    for job in JOBS:
        own = [trial for trial in trials if trial.job == job]
        lost = Counter(problem for trial in own for problem in trial.problems)
        words = "; ".join(f"{problem} ({n})" for problem, n in lost.items()).replace("\n", " ") or "nothing"
        if own:
            lines.append(f"| {job} | {own[0].of} | {sum(len(t.kills) for t in own)} | {len(own)} | {words} |")
    return "\n".join(lines)


def main(count: int, seed: int, record: bool) -> int:
    """Build the library, and run the trials in a process that has it; gives the exit status."""
    import faults

    with tempfile.TemporaryDirectory(prefix="graincode-soak-") as folder:
        library, found = Path(folder) / "writes.so", Path(folder) / "trials.json"
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "writes.c"), "-ldl"], check=True
        )
        code = f"import writes; writes.child({folder!r}, {count}, {seed}, {str(found)!r})"
        paths = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        done = subprocess.run([sys.executable, "-P", "-c", code], env=environment)
        if done.returncode:
            return done.returncode
        recorded = found.read_text()
    said = json.loads(recorded)
    trials, met = [Trial(**one) for one in said["trials"]], [faults.Fault(**one) for one in said["faults"]]
    minutes = sum(trial.seconds for trial in trials) / 60
    text = f"{table(trials)}\n\nSeed {seed}, {len(trials)} trials in {minutes:.1f} minutes.\n\n{faults.table(met)}\n"
    print(text)
    if record:
        (HERE / "writes.json").write_text(f"{recorded}\n")
        (HERE / "writes.md").write_text(text)
    return int(any(one.problems for one in (*trials, *met)))


def child(folder: str, count: int, seed: int, found: str) -> None:
    """The trials, in the process that has the library; they are written to a file."""
    from faults import meet_all

    root = (Path(folder) / "root").resolve()
    root.mkdir()
    os.chdir(root)
    import_all()
    counts = prepare(root)
    faults, trials = meet_all(root), serve(root, counts, count, seed)
    Path(found).write_text(json.dumps({"faults": [*map(asdict, faults)], "trials": [*map(asdict, trials)]}, indent=1))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), 0, False))
