"""What is lost when trainings are killed, or their disk fills up, or their states rot?

    make soak ARGS="--minutes 15 --seed 0 --only NAME --record"
    make soak ARGS="--writes 200"      what writes.py does instead

Trains both stages with tiny models on the CPU, once undisturbed (the references), and then again and again with faults:
each disturbed run starts anew, goes on with the same command, and must end with the weights and the log of its
reference. `--record` writes results.json and results.md beside this file. Exit status 1 if anything was lost.
Cost: 15 minutes of two CPU cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import writes
from PIL import Image

JOBS = {1: "train_tokenizer", 2: "train_generator"}
STEPS, EVALUATIONS, VALIDATION_IMAGES = 40, (20, 40), 1500
DATA = ["data=image_folder", "data.root=images", "data.image_size=32"]
SETTINGS = {
    1: [*DATA, "tokenizer.size.channels=8", "tokenizer.code_dim=8", "tokenizer.codebook_size=32"],
    2: ["codes_path=reference-1/extract_codes/run/codes", "generator.size.width=32",
        "generator.size.position_layers=1", "generator.size.content_layers=1"],
}  # fmt: skip
TRAINER = [
    f"trainer.steps={STEPS}", "trainer.batch_size=4", "trainer.warmup_steps=2", "trainer.log_every=2",
    "trainer.eval_every=20", "trainer.eval_images=64", "trainer.checkpoint_every=5", "hardware.threads=1",
    "logging=none",
]  # fmt: skip
LONG_EVALUATION = f"trainer.eval_images={VALIDATION_IMAGES}"
LIMIT_SECONDS, LAST_START_SECONDS = 180, 45  # of any process; before the end
KILLED = "SIGKILL at random moments"
AIMS = {"clock": 5, "training": 2, "state": 6, "evaluation": 3, "best": 1, "export": 2, "log": 1, "result": 1}  # odds


@dataclass
class Outcome:
    """What came of one disturbed run.

    Attributes:
        fault: its name.
        stage: 1 or 2.
        processes: of the run.
        what: happened, in words.
        kills: for each the victim, what the run was doing as seen from outside, and the seconds since its start.
        problems: all that was not as it should be.
        is_equal: whether the exported weights are the reference's, byte for byte.
    """

    fault: str
    stage: int
    processes: int
    what: str = ""
    kills: list[dict[str, str | float]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    is_equal: bool = False

    def expect(self, condition: bool, problem: str) -> None:
        """Note a problem unless the condition holds."""
        if not condition:
            self.problems.append(problem)


class Job:
    """A training command in a process of its own, and what can be seen of it from outside.

    Args:
        root: the workspace.
        name: of the runs directory in it.
        stage: 1 or 2.
        processes: of the run.
        more: overrides.
    """

    def __init__(self, root: Path, name: str, stage: int, processes: int = 1, *more: str) -> None:
        self.name, self.processes, self.folder = name, processes, root / name / JOBS[stage] / "run"
        self.before, self.began = self.temporaries(), time.time_ns()
        words = [*SETTINGS[stage], *TRAINER, f"hardware.num_processes={processes}", f"runs_dir={name}", *more]
        self.process = command(root, JOBS[stage], *words)

    def newest(self) -> int:
        """Step of the newest state, or 0."""
        return max((int(path.name[5:]) for path in (self.folder / "state").glob("step_*")), default=0)

    def temporaries(self) -> set[Path]:
        """What has a temporary name."""
        folders = (self.folder, self.folder / "state", self.folder / "export", self.folder.parent)
        return {path for folder in folders for path in folder.glob(".*")}

    def writes(self, start: str) -> bool:
        """Whether something with such a temporary name has come up since the command began."""
        return any(path.name.startswith(start) for path in self.temporaries() - self.before)

    def logged(self, step: int, kind: str = "train") -> bool:
        """Whether the log has a line of a step."""
        return self.is_started() and f'{{"step": {step}, "{kind}/' in (self.folder / "log.jsonl").read_text()

    def is_started(self) -> bool:
        """Whether the loop has opened the log."""
        file = self.folder / "log.jsonl"
        return file.is_file() and file.stat().st_mtime_ns >= self.began

    def evaluates(self, step: int) -> bool:
        """Whether the state before an evaluation is saved, and its metrics are not yet logged."""
        return self.is_started() and self.newest() == step and not self.logged(step, "val")

    def doing(self) -> str:
        """What the run does, by its files."""
        for start, what in ((".step_", "a state"), (".best", "best.json"), (".export", "the export"),
                            (".result", "the result"), (".latest", "the link latest")):  # fmt: skip
            if self.writes(start):
                return f"writing {what}"
        if not self.is_started():
            return "starting"
        if (self.folder / "log.jsonl").stat().st_size == 0:
            return "opening the log"
        if (self.folder / "result.json").is_file():
            return "ending"
        if any(self.evaluates(step) for step in EVALUATIONS):
            return "evaluating"
        return "exporting" if self.logged(STEPS, "val") else "training"

    def until(self, seen: Callable[[], bool], pause: float = 0.0001) -> bool:
        """Wait until something is to be seen; False if the command ended, or hung, before."""
        while self.process.poll() is None and time.time_ns() - self.began < LIMIT_SECONDS * 1e9:
            if seen():
                return True
            time.sleep(pause)
        return False

    def workers(self) -> list[int]:
        """Process numbers of the children."""
        file = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        with suppress(OSError):
            return [int(number) for number in file.read_text().split()]
        return []

    def kill(self, victim: int | None = None) -> str:
        """SIGKILL to a worker, or to the command itself; gives what the run was doing."""
        os.kill(self.process.pid if victim is None else self.workers()[victim], signal.SIGKILL)
        if self.processes == 1:
            self.process.wait()
        return self.doing()

    def finish(self) -> tuple[int, str]:
        """Exit status and output, when it and its workers have ended; -1 for a command that hangs."""
        workers = self.workers()
        try:
            output, _ = self.process.communicate(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            for pid in (*self.workers(), self.process.pid):
                os.kill(pid, signal.SIGKILL)
            return -1, f"hangs for {LIMIT_SECONDS} s"
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{pid}").exists() for pid in workers):
            if time.monotonic() > deadline:
                return -1, "workers outlive the command"
            time.sleep(0.05)
        return self.process.returncode, output


def command(root: Path, job: str, *words: str) -> subprocess.Popen[str]:
    """Start a job with one thread in the workspace."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", f"graincode.jobs.{job}", "run_name=run", *words], cwd=root, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(root / "temporary")},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def prepare(root: Path) -> None:
    """Images and references: both stages on one and on two processes."""
    (root / "temporary").mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", VALIDATION_IMAGES)):
        for index in range(count):
            busy = index % 2 == 0
            pixels = rng.integers(0, 256, (32, 32, 3)) if busy else np.full((32, 32, 3), index % 256)
            pixels[:10] = rng.integers(0, 256, (1, 1, 3))
            folder = root / "images" / split / ("busy" if busy else "smooth")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:04d}.png")

    def reference(stage: int, processes: int) -> None:
        status, output = Job(root, f"reference-{processes}", stage, processes).finish()
        assert status == 0, output

    def others() -> None:
        reference(1, 1)
        tokenizer = f"tokenizer_path=reference-1/{JOBS[1]}/run/export"
        extraction = command(root, "extract_codes", *DATA, tokenizer, "runs_dir=reference-1")
        output, _ = extraction.communicate()
        assert extraction.returncode == 0, output
        reference(2, 1)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(others), pool.submit(reference, 1, 2)]:
            done.result()
    reference(2, 2)


def judge(root: Path, outcome: Outcome, job: Job, kinds: tuple[str, ...] = ("train/", "val/")) -> str:
    """Let the last command finish, and compare what it leaves with the reference; gives its output."""
    status, output = job.finish()
    outcome.expect(status == 0, f"the last command ended with {status}: {output[-300:]}")
    folder, like = job.folder, root / f"reference-{outcome.processes}" / job.folder.relative_to(root / job.name)
    weights = "export/weights.safetensors"
    outcome.is_equal = (folder / weights).is_file() and (folder / weights).read_bytes() == (like / weights).read_bytes()
    outcome.expect(outcome.is_equal, "other weights")
    outcome.expect((folder / "result.json").is_file(), "no result.json")
    outcome.expect((folder.parent / "latest").exists(), "the link latest is missing")
    left = Counter(path.name.split("-")[0] for path in job.temporaries())
    outcome.expect(not left, f"left behind: {', '.join(f'{name}-*' for name in sorted(left))}")
    found, expected = (metrics(file / "log.jsonl", kinds) for file in (folder, like))
    # what two processes had metered when a state was saved is added up in another order
    tolerance = 0 if outcome.processes == 1 else 1e-9
    same = found.keys() == expected.keys() and all(
        math.isclose(found[key], expected[key], rel_tol=tolerance) for key in found
    )
    outcome.expect(
        same, f"{len(expected.keys() - found.keys())} of {len(expected)} metrics are missing in the log, or differ"
    )
    return output


def metrics(file: Path, kinds: tuple[str, ...]) -> dict[tuple[int, str], float]:
    """A log's metrics of some kinds, by step and name."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {(line["step"], name): value for line in lines for name, value in line.items() if name.startswith(kinds)}


def killed(root: Path, outcome: Outcome, name: str, rng: random.Random) -> None:
    """SIGKILL at one to four random moments, of the command or of one of its processes."""
    job = Job(root, name, outcome.stage, outcome.processes)
    while (not outcome.kills or (len(outcome.kills) < 4 and rng.random() < 0.5)) and job.until(moment(job, rng)):
        victim = rng.choice([None, 0, 1]) if len(job.workers()) == 2 else None
        who, died = "the command" if victim is None else f"process {victim}", time.monotonic()
        outcome.kills.append({"victim": who, "after_seconds": round((time.time_ns() - job.began) / 1e9, 2)})
        outcome.kills[-1]["while"] = job.kill(victim)
        status, output = job.finish()
        outcome.expect(status != -1 and time.monotonic() - died < 60, f"{who} was killed: {output[-300:]}")
        if victim is not None and not (job.folder / "result.json").is_file():
            told = f"error: {who} of 2 was killed by SIGKILL" in output
            outcome.expect(status == 1 and told, f"{who} was killed, status {status}: {output[-300:]}")
        job = Job(root, name, outcome.stage, outcome.processes)
    judge(root, outcome, job)


def moment(job: Job, rng: random.Random) -> Callable[[], bool]:
    """A random moment of a run's life: by the clock, or a little after something was to be seen."""
    clock, step, delay = rng.uniform(0, 7 * job.processes), rng.randrange(0, STEPS, 5), rng.random()
    evaluation, aim = rng.choice(EVALUATIONS), rng.choices(list(AIMS), list(AIMS.values()))[0]
    if aim == "clock":
        return lambda: time.time_ns() > job.began + clock * 1e9
    sight, longest = {
        "training": (lambda: job.logged(step + 2), 0.2),
        "state": (lambda: job.newest() >= step and job.writes(".step_"), 0.01),
        "evaluation": (lambda: job.evaluates(evaluation), 0.2),
        "best": (lambda: job.writes(".best"), 0),
        "export": (lambda: job.writes(".export"), 0.01),
        "log": (lambda: (job.folder / "log.jsonl").stat().st_size == 0, 0),
        "result": (lambda: (job.folder / "result.json").is_file(), 0),
    }[aim]

    def comes() -> bool:
        if not (job.is_started() and sight()):
            return False
        if longest:
            time.sleep(delay * longest)
        return True

    return comes


def damaged(root: Path, outcome: Outcome, name: str, rng: random.Random, how: str) -> None:
    """The newest state is damaged when the run goes on."""
    job, step = Job(root, name, outcome.stage), rng.choice([18, 28])
    job.until(lambda: job.logged(step))
    job.kill()
    job.finish()
    newest = job.newest()
    file = job.folder / f"state/step_{newest:09d}" / ("state.json" if how == "empty" else "state.pt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes({"flip": content, "truncate": content[: len(content) // 2], "empty": b""}[how])
    output = judge(root, outcome, Job(root, name, outcome.stage))
    outcome.expect(f"step_{newest:09d} is damaged" in output, "the damaged state is not named")
    outcome.expect(f"going on from step {newest - 5}" in output, "it does not go on from the state before")
    outcome.what = f"{file.name} of step {newest} named as damaged, went on from {newest - 5}"


def reopened(root: Path, outcome: Outcome, name: str, rng: random.Random) -> None:
    """A run that goes on is killed as soon as it touches its log, three times."""
    job = Job(root, name, outcome.stage)
    job.until(lambda: job.logged(28))
    job.kill()
    job.finish()
    lines = []
    for _ in range(3):
        job = Job(root, name, outcome.stage)
        lines.append(len((job.folder / "log.jsonl").read_text().splitlines()))
        job.until(job.is_started, pause=0)
        job.kill()
        job.finish()
    lines.append(len((job.folder / "log.jsonl").read_text().splitlines()))
    outcome.what = f"lines before and after each of three kills: {', '.join(map(str, lines))}"
    judge(root, outcome, Job(root, name, outcome.stage))


def full(root: Path, outcome: Outcome, name: str, rng: random.Random, victim: str) -> None:
    """The disk is full when something is written, and has room again later."""
    more = {"state": [], "log": ["trainer.checkpoint_every=100"], "export": [LONG_EVALUATION]}[victim]
    more = [*more, "trainer.keep_checkpoints=9"]  # none is pruned, which would make room
    with small_disk(root / name) as is_mounted:
        job, ballast = Job(root, name, outcome.stage, 1, *more), root / name / "ballast"
        sights = {"state": lambda: job.logged(12), "log": lambda: job.logged(20, "val"),
                  "export": lambda: job.newest() == STEPS}  # fmt: skip
        job.until(sights[victim])
        size = (job.folder / f"state/step_{job.newest():09d}/state.pt").stat().st_size
        room = {"state": size // 2, "log": 1, "export": 65536}[victim]
        if is_mounted:
            with suppress(OSError), ballast.open("wb", buffering=0) as file:
                while (disk := os.statvfs(root / name)).f_bavail * disk.f_frsize > room:
                    file.write(bytes(disk.f_frsize))
        else:
            resource.prlimit(job.process.pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        status, output = job.finish()
        kept, errors = job.newest(), [line for line in output.splitlines() if "rror: " in line]
        clear = len(errors) == 1 and errors[0].startswith("error: ") and "Traceback" not in output
        outcome.expect(status not in (0, -1), f"it ended with {status}")
        outcome.expect(clear, f"no single line says what is wrong: {' / '.join(dict.fromkeys(errors))}")
        ballast.unlink(missing_ok=True)
        output = judge(root, outcome, Job(root, name, outcome.stage, 1, *more), ("train/",))
        outcome.expect(f"going on from step {kept}" in output, f"it did not go on from step {kept}")
        where, what = "tmpfs" if is_mounted else "RLIMIT_FSIZE", "one error line" if clear else "a traceback"
        outcome.what = f"{where}, status {status}, {what}, went on from {kept}"


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A tmpfs at a new folder; where this process may not mount one, False, and a plain folder."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    is_mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def rank_killed(root: Path, outcome: Outcome, name: str, rng: random.Random) -> None:
    """One of two processes is killed in training."""
    job, victim = Job(root, name, outcome.stage, outcome.processes), outcome.stage % 2
    job.until(lambda: job.logged(12))
    job.kill(victim)
    died = time.monotonic()
    status, output = job.finish()
    seconds, says = time.monotonic() - died, f"error: process {victim} of 2 was killed by SIGKILL"
    outcome.expect(status == 1 and says in output, f"status {status}, not told: {output[-300:]}")
    outcome.expect(seconds < 60, f"it took {seconds:.0f} s to end")
    outcome.what = f"process {victim} killed, named; all ended after {seconds:.1f} s, went on from {job.newest()}"
    judge(root, outcome, Job(root, name, outcome.stage, outcome.processes))


def stopped(root: Path, outcome: Outcome, name: str, rng: random.Random) -> None:
    """SIGTERM during an evaluation."""
    job = Job(root, name, outcome.stage, 1, LONG_EVALUATION)
    job.until(lambda: job.evaluates(EVALUATIONS[0]))
    time.sleep(0.05)
    job.process.send_signal(signal.SIGTERM)
    outcome.expect(job.evaluates(EVALUATIONS[0]), "the evaluation was over when the signal was sent")
    sent = time.monotonic()
    status, output = job.finish()
    said = output.splitlines()[-1]
    outcome.expect(status == 75 and said.startswith("stopped by SIGTERM"), f"it ended with {status}: {said}")
    outcome.what = f"status {status} after {time.monotonic() - sent:.1f} s, went on from {job.newest()}"
    judge(root, outcome, Job(root, name, outcome.stage, 1, LONG_EVALUATION), ("train/",))


FAULTS: dict[str, Callable[[Path, Outcome, str, random.Random], None]] = {
    "newest state truncated": partial(damaged, how="truncate"),
    "bit flipped in the newest state": partial(damaged, how="flip"),
    "state.json of the newest emptied": partial(damaged, how="empty"),
    "disk full for a state": partial(full, victim="state"),
    "disk full for the log": partial(full, victim="log"),
    "disk full for the export": partial(full, victim="export"),
    "SIGKILL while the log is opened again": reopened,
    "one of two processes killed": rank_killed,
    "SIGTERM during evaluation": stopped,
    KILLED: killed,
}


def plan(only: str | None) -> Iterator[tuple[str, int, int]]:
    """Fault, stage and processes of each run: every single fault once in each stage, then kills without end."""
    for fault, stage in itertools.product(FAULTS, JOBS):
        if fault != KILLED and only in (None, fault):
            yield fault, stage, 2 if FAULTS[fault] is rank_killed else 1
    for index in itertools.count() if only in (None, KILLED) else ():
        yield KILLED, 1 + index % 2, 2 if index % 8 > 5 else 1


def undergo(root: Path, seed: int, index: int, fault: str, stage: int, processes: int) -> Outcome:
    """One disturbed run; an error of this script counts as a loss."""
    outcome = Outcome(fault, stage, processes)
    try:
        FAULTS[fault](root, outcome, f"run-{index}", random.Random(f"{seed} {index}"))
    except Exception as error:
        outcome.problems.append(f"{type(error).__name__}: {error}")
    outcome.problems = [problem.replace(f"{root}/", "") for problem in outcome.problems]
    what = outcome.what or ", ".join(f"{kill['victim']} killed {kill['while']}" for kill in outcome.kills)
    print(f"{index}: {fault}, stage {stage} x {processes}: {what}: {outcome.problems or 'nothing lost'}", flush=True)
    return outcome


def table(outcomes: list[Outcome]) -> str:
    """A row for each fault; kills by stage and number of processes."""
    rows: dict[str, list[Outcome]] = {}
    for one in sorted(outcomes, key=lambda one: (list(FAULTS).index(one.fault), one.stage, one.processes)):
        where = f", stage {one.stage}, {'one process' if one.processes == 1 else 'two processes'}"
        rows.setdefault(one.fault + (where if one.fault == KILLED else ""), []).append(one)
    lines = ["| fault | runs | what happened | bit-equal | lost |", "|---|---|---|---|---|"]
    for fault, group in rows.items():
        what = "; ".join(f"stage {one.stage}: {one.what}" for one in group if one.what)
        kills = Counter(str(kill["while"]) for one in group for kill in one.kills)
        if kills:
            what = f"{kills.total()} kills: " + ", ".join(f"{n} {doing}" for doing, n in kills.most_common())
        lost = Counter(problem for one in group for problem in one.problems)
        lost = "; ".join(f"{problem} ({n} of {len(group)})" for problem, n in lost.items()) or "nothing"
        equal = sum(one.is_equal for one in group)
        equal = "yes" if equal == len(group) else f"{equal} of {len(group)}"
        lines.append(f"| {fault} | {len(group)} | {what} | {equal} | {lost} |".replace("\n", " "))
    return "\n".join(lines)


def main() -> None:
    """Make the references, disturb runs until the time is over, and say what was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=FAULTS, metavar="NAME", help=", ".join(FAULTS))
    parser.add_argument("--record", action="store_true", help="write results.json and results.md")
    parser.add_argument("--writes", type=int, metavar="COUNT", help="kill so many jobs at a change to a file instead")
    arguments = parser.parse_args()
    if arguments.writes is not None:
        sys.exit(writes.main(arguments.writes, arguments.seed, arguments.record))
    began, lock, runs = time.monotonic(), threading.Lock(), enumerate(plan(arguments.only))
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="graincode-soak-") as folder:
        root = Path(folder).resolve()
        prepare(root)

        def work() -> None:
            while time.monotonic() - began < 60 * arguments.minutes - LAST_START_SECONDS:
                with lock:
                    run = next(runs, None)
                if run is None:
                    return
                outcomes.append(undergo(root, arguments.seed, run[0], *run[1]))

        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(work) for _ in range(2)]:
                done.result()
    kills = [kill["while"] for one in outcomes for kill in one.kills]
    text = (
        f"{table(outcomes)}\n\nSeed {arguments.seed}, {(time.monotonic() - began) / 60:.1f} minutes, two runs at once. "
        f"{len(outcomes)} disturbed runs, each from its first step on; {sum(bool(one.kills) for one in outcomes)} of "
        f"them were killed at random moments, {len(kills)} times in all, {kills.count('writing a state')} times while "
        f"a state was written.\n"
    )
    print(text)
    if arguments.record:
        here = Path(__file__).parent
        (here / "results.json").write_text(json.dumps([asdict(one) for one in outcomes], indent=1) + "\n")
        (here / "results.md").write_text(text)
    sys.exit(any(one.problems for one in outcomes))


if __name__ == "__main__":
    main()
