"""What is lost when trainings are killed, or their disk fills up, or their states rot?

    make soak ARGS="--minutes 15 --seed 0 --only NAME --record"

Trains both stages with tiny models on the CPU, once undisturbed (the references), and then again and again with faults:
each disturbed run goes on with the same command, and must end with the weights and the log of its reference. With
`--record`, results.json and results.md beside this file are written. Exit status 1 if anything was lost.
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
from PIL import Image

JOBS = {1: "train_tokenizer", 2: "train_generator"}
STEPS, EVALUATIONS = 40, (20, 40)
DATA = ["data=image_folder", "data.root=images", "data.image_size=32"]
SETTINGS = {
    1: [*DATA, "tokenizer.size.channels=8", "tokenizer.code_dim=8", "tokenizer.codebook_size=32"],
    2: [
        "codes_path=reference/extract_codes/run/codes", "generator.size.width=32", "generator.size.position_layers=1",
        "generator.size.content_layers=1",
    ],
}  # fmt: skip
TRAINER = [
    f"trainer.steps={STEPS}", "trainer.batch_size=4", "trainer.warmup_steps=2", "trainer.log_every=2",
    "trainer.eval_every=20", "trainer.eval_images=64", "trainer.checkpoint_every=5", "hardware.threads=1",
    "logging=none",
]  # fmt: skip
VALIDATION_IMAGES = 1500
LIMIT_SECONDS = 180  # of any process
LAST_START_SECONDS = 45  # before the end
AIMS = {"clock": 4, "training": 2, "state": 5, "evaluation": 3, "best": 1, "export": 2, "result": 1}  # and weights


@dataclass
class Outcome:
    """What came of one disturbed run.

    Attributes:
        fault: its name.
        stage: 1 or 2.
        processes: of the run.
        what: happened, in words.
        kills: for each, the moment that was aimed at, the victim, and what the run was doing as seen from outside.
        problems: all that was not as it should be.
        is_equal: whether the exported weights are the reference's, byte for byte.
    """

    fault: str
    stage: int
    processes: int = 1
    what: str = ""
    kills: list[dict[str, str | float]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    is_equal: bool = False

    def expect(self, condition: bool, problem: str) -> None:
        """Note a problem unless the condition holds."""
        if not condition:
            self.problems.append(problem)


class Job:
    """A training command in a child process, and what can be seen of it from outside.

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

    def states(self) -> list[int]:
        """Steps of the states, the oldest first."""
        return sorted(int(path.name[5:]) for path in (self.folder / "state").glob("step_*"))

    def temporaries(self) -> set[Path]:
        """What has a temporary name."""
        folders = (self.folder, self.folder / "state", self.folder / "export", self.folder.parent)
        return {path for folder in folders for path in folder.glob(".*")}

    def writes(self, start: str) -> bool:
        """Whether a file or directory with such a temporary name has come up since the command began."""
        return any(path.name.startswith(start) for path in self.temporaries() - self.before)

    def logged(self, step: int, kind: str = "train") -> bool:
        """Whether the log has a line of a step."""
        file = self.folder / "log.jsonl"
        return file.is_file() and f'{{"step": {step}, "{kind}/' in file.read_text()

    def is_started(self) -> bool:
        """Whether the loop has opened the log."""
        file = self.folder / "log.jsonl"
        return file.is_file() and file.stat().st_mtime_ns >= self.began

    def evaluates(self) -> bool:
        """Whether the state after an evaluation's step is saved, and its figures are not yet logged."""
        newest = max(self.states(), default=0)
        return self.is_started() and newest in EVALUATIONS and not self.logged(newest, "val")

    def doing(self) -> str:
        """What the run does, by its files."""
        names = {
            ".step_": "writing a state", ".best": "writing best.json", ".export": "writing the export",
            ".result": "writing the result", ".latest": "writing the result",
        }  # fmt: skip
        for start, doing in names.items():
            if self.writes(start):
                return doing
        if not self.is_started():
            return "start-up"
        if (self.folder / "result.json").is_file():
            return "after the result"
        if self.evaluates():
            return "evaluation"
        return "export" if self.logged(STEPS, "val") else "training"

    def until(self, seen: Callable[[], bool]) -> bool:
        """Wait until something is to be seen; False if the process ended or the time was over before."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            if seen():
                return True
            time.sleep(0.001)
        return False

    def workers(self) -> list[int]:
        """Process numbers of the children."""
        try:
            return [
                int(n) for n in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            ]
        except OSError:
            return []

    def kill(self, victim: int | None = None) -> str:
        """SIGKILL to a worker, or to the command itself; gives what the run was doing."""
        workers = self.workers()
        os.kill(self.process.pid if victim is None else workers[victim], signal.SIGKILL)
        if self.processes == 1:
            self.process.wait()
        return self.doing()

    def finish(self) -> tuple[int, str]:
        """Exit status and output, when it and all its workers have ended; one that hangs is killed."""
        workers = self.workers()
        try:
            output, _ = self.process.communicate(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            for pid in (self.process.pid, *self.workers()):
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
        [sys.executable, "-m", f"graincode.jobs.{job}", "run_name=run", *words],
        cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(root / "temporary")}, text=True,
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
        status, output = Job(root, name_of_reference(processes), stage, processes).finish()
        assert status == 0, output

    def others() -> None:
        reference(1, 1)
        tokenizer = f"tokenizer_path=reference/{JOBS[1]}/run/export"
        extraction = command(root, "extract_codes", *DATA, tokenizer, "runs_dir=reference")
        output, _ = extraction.communicate()
        assert extraction.returncode == 0, output
        reference(2, 1)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(others), pool.submit(reference, 1, 2)]:
            done.result()
    reference(2, 2)


def name_of_reference(processes: int) -> str:
    """Runs directory of the references."""
    return "reference" if processes == 1 else "reference-2"


def judge(root: Path, outcome: Outcome, job: Job, kinds: tuple[str, ...] = ("train/", "val/")) -> str:
    """Let the last command finish, and compare what it leaves with the reference; gives its output."""
    status, output = job.finish()
    outcome.expect(status == 0, f"the last command ended with {status}: {output[-300:]}")
    folder, like = job.folder, root / name_of_reference(outcome.processes) / job.folder.relative_to(root / job.name)
    pair = [f / "export/weights.safetensors" for f in (folder, like)]
    outcome.is_equal = pair[0].is_file() and pair[0].read_bytes() == pair[1].read_bytes()
    outcome.expect(outcome.is_equal, "other weights")
    outcome.expect((folder / "result.json").is_file(), "no result.json")
    outcome.expect((folder.parent / "latest").exists(), "latest points nowhere")
    if left := sorted(path.name for path in job.temporaries()):
        outcome.problems.append(f"left behind: {', '.join(left)}")
    found, expected = ([line for line in read_log(f) if any(k.startswith(kinds) for k in line)] for f in (folder, like))
    # what two processes have metered when a state is saved is added up in another order
    tolerance = 0 if outcome.processes == 1 else 1e-9
    same = len(found) == len(expected) and all(
        a.keys() == b.keys()
        and all(math.isclose(a[k], b[k], rel_tol=tolerance) for k in a if k.startswith(("step", *kinds)))
        for a, b in zip(found, expected, strict=True)
    )
    outcome.expect(same, "another log")
    return output


def read_log(folder: Path) -> list[dict[str, float]]:
    """Lines of a run's log."""
    file = folder / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def killed(root: Path, outcome: Outcome, name: str, rng: random.Random) -> None:
    """SIGKILL at one to four random moments, of the command or of one of its processes."""
    job = Job(root, name, outcome.stage, outcome.processes)
    while (not outcome.kills or (len(outcome.kills) < 4 and rng.random() < 0.5)) and job.until(moment(job, rng)):
        victim = rng.choice([None, 0, 1]) if len(job.workers()) == 2 else None
        who = "the command" if victim is None else f"process {victim}"
        doing = job.kill(victim)
        seconds, died = (time.time_ns() - job.began) / 1e9, time.monotonic()
        outcome.kills.append({"victim": who, "while": doing, "after_seconds": round(seconds, 2)})
        status, output = job.finish()
        outcome.expect(status != -1 and time.monotonic() - died < 60, f"{who} was killed: {output[-300:]}")
        if victim is not None and not (job.folder / "result.json").is_file():
            told = f"error: {who} of 2 was killed by SIGKILL" in output
            outcome.expect(status == 1 and told, f"{who} was killed, status {status}: {output[-300:]}")
        job = Job(root, name, outcome.stage, outcome.processes)
    judge(root, outcome, job)


def moment(job: Job, rng: random.Random) -> Callable[[], bool]:
    """A random moment of a run's life: by the clock, or a little after something was to be seen."""
    clock, step, delay = rng.uniform(0, 10 * job.processes), rng.randrange(0, STEPS, 5), rng.random()
    evaluation, aim = rng.choice(EVALUATIONS), rng.choices(list(AIMS), AIMS.values())[0]
    sights: dict[str, tuple[Callable[[], bool], float]] = {
        "training": (lambda: job.logged(step + 2), 0.2),
        "state": (lambda: max(job.states(), default=0) >= step and job.writes(".step_"), 0.01),
        "evaluation": (lambda: max(job.states(), default=0) == evaluation and job.evaluates(), 0.3),
        "best": (lambda: job.writes(".best"), 0),
        "export": (lambda: job.writes(".export") or (job.folder / "export").is_dir(), 0.01),
        "result": (lambda: job.writes(".result") or (job.folder / "result.json").is_file(), 0),
    }
    if aim == "clock":
        return lambda: time.time_ns() > job.began + clock * 1e9
    sight, longest = sights[aim]

    def comes() -> bool:
        if not (job.is_started() and sight()):
            return False
        time.sleep(delay * longest)
        return True

    return comes


def damaged(root: Path, outcome: Outcome, name: str, rng: random.Random, damage: Callable[[Path], None]) -> None:
    """The newest state is damaged when the run goes on."""
    job = Job(root, name, outcome.stage)
    step = rng.choice([18, 28])
    job.until(lambda: job.logged(step))
    job.kill()
    job.finish()
    newest, before = job.states()[-1], job.states()[-2]
    damage(job.folder / f"state/step_{newest:09d}")
    output = judge(root, outcome, Job(root, name, outcome.stage))
    outcome.expect(f"step_{newest:09d} is damaged" in output, "the damaged state is not named")
    outcome.expect(f"going on from step {before}" in output, "it does not go on from the state before")
    outcome.what = f"state {newest} named as damaged, went on from {before}"


def truncate(state: Path) -> None:
    """Cut state.pt in half."""
    os.truncate(state / "state.pt", (state / "state.pt").stat().st_size // 2)


def flip(state: Path) -> None:
    """Flip one bit in the middle of state.pt."""
    content = bytearray((state / "state.pt").read_bytes())
    content[len(content) // 2] ^= 16
    (state / "state.pt").write_bytes(content)


def empty(state: Path) -> None:
    """Leave nothing in state.json."""
    (state / "state.json").write_text("")


def full(root: Path, outcome: Outcome, name: str, rng: random.Random, victim: str) -> None:
    """The disk is full when something is written, and has room again later."""
    more = ["trainer.checkpoint_every=100"] if victim == "log" else []
    more += [f"trainer.eval_images={VALIDATION_IMAGES}"] if victim == "export" else []
    with small_disk(root / name) as is_mounted:
        job = Job(root, name, outcome.stage, 1, *more)
        sights = {
            "state": lambda: job.logged(12),
            "log": lambda: job.logged(20, "val"),
            "export": lambda: max(job.states(), default=0) == STEPS,
        }
        job.until(sights[victim])
        size = (job.folder / f"state/step_{job.states()[-1]:09d}/state.pt").stat().st_size
        room, ballast = {"state": size // 2, "log": 1, "export": 65536}[victim], root / name / "ballast"
        if is_mounted:
            with suppress(OSError), ballast.open("wb", buffering=0) as file:
                while (free := os.statvfs(root / name)).f_bavail * free.f_frsize > room:
                    file.write(bytes(free.f_frsize))
        else:
            resource.prlimit(job.process.pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        status, output = job.finish()
        kept = job.states()[-1]
        errors = [line for line in output.splitlines() if "rror: " in line]
        clear = len(errors) == 1 and errors[0].startswith("error: ") and "Traceback" not in output
        outcome.expect(status not in (0, -1), f"it ended with {status}")
        outcome.expect(clear, f"status {status} and no single line that says what is wrong: {' | '.join(errors)}")
        ballast.unlink(missing_ok=True)
        output = judge(root, outcome, Job(root, name, outcome.stage, 1, *more), ("train/",))
        outcome.expect(f"going on from step {kept}" in output, "older states suffered")
        how = "tmpfs" if is_mounted else "RLIMIT_FSIZE"
        outcome.what = f"{how}, status {status}, {'one error line' if clear else 'a traceback'}, went on from {kept}"


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A folder on a tmpfs of its own; gives False, and a plain folder, where this process may not mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    is_mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def rank_killed(root: Path, outcome: Outcome, name: str, rng: random.Random) -> None:
    """One of two processes is killed in training."""
    job = Job(root, name, outcome.stage, outcome.processes)
    job.until(lambda: job.logged(12))
    victim = outcome.stage % 2
    job.kill(victim)
    died = time.monotonic()
    status, output = job.finish()
    seconds, says = time.monotonic() - died, f"error: process {victim} of 2 was killed by SIGKILL"
    outcome.expect(status == 1 and says in output, f"status {status}, not told: {output[-300:]}")
    outcome.expect(seconds < 60, f"it took {seconds:.0f} s to end")
    outcome.what = f"process {victim} killed, named, ended after {seconds:.1f} s"
    judge(root, outcome, Job(root, name, outcome.stage, outcome.processes))


def stopped(root: Path, outcome: Outcome, name: str, rng: random.Random) -> None:
    """SIGTERM during an evaluation."""
    long = f"trainer.eval_images={VALIDATION_IMAGES}"
    job = Job(root, name, outcome.stage, 1, long)
    job.until(lambda: max(job.states(), default=0) == EVALUATIONS[0] and job.evaluates())
    time.sleep(0.1)
    job.process.send_signal(signal.SIGTERM)
    outcome.expect(job.evaluates(), "the evaluation was over when the signal was sent")
    sent = time.monotonic()
    status, output = job.finish()
    outcome.expect(status == 75, f"it ended with {status}: {output[-300:]}")
    last = output.splitlines()[-1]
    outcome.expect(last.startswith("stopped by SIGTERM"), f"it said {last}")
    outcome.what = f"status {status} after {time.monotonic() - sent:.1f} s, state {job.states()[-1]} saved"
    judge(root, outcome, Job(root, name, outcome.stage, 1, long), ("train/",))


FAULTS: dict[str, Callable[[Path, Outcome, str, random.Random], None]] = {
    "newest state truncated": partial(damaged, damage=truncate),
    "bit flipped in the newest state": partial(damaged, damage=flip),
    "newest state.json emptied": partial(damaged, damage=empty),
    "disk full for a state": partial(full, victim="state"),
    "disk full for the log": partial(full, victim="log"),
    "disk full for the export": partial(full, victim="export"),
    "a process of two killed": rank_killed,
    "SIGTERM during evaluation": stopped,
}
KILLED = "SIGKILL at random moments"


def plan(only: str | None) -> Iterator[tuple[str, int, int]]:
    """Fault, stage and processes of each run: every single fault once in each stage, then kills without end."""
    for fault, stage in itertools.product(FAULTS, JOBS):
        if only in (None, fault):
            yield fault, stage, 2 if fault == "a process of two killed" else 1
    for index in itertools.count() if only in (None, KILLED) else ():
        yield KILLED, 1 + index % 2, 2 if index % 8 > 5 else 1


def undergo(root: Path, seed: int, index: int, fault: str, stage: int, processes: int) -> Outcome:
    """One disturbed run; an error of this script counts as a loss."""
    outcome, name = Outcome(fault, stage, processes), f"run-{index}"
    try:
        FAULTS.get(fault, killed)(root, outcome, name, random.Random(f"{seed} {index}"))
    except Exception as error:
        outcome.problems.append(f"{type(error).__name__}: {error}")
    outcome.problems = [problem.replace(f"{root}/", "") for problem in outcome.problems]
    print(
        f"{fault}, stage {stage}, processes: {processes}: {outcome.what or outcome.kills} {outcome.problems}",
        flush=True,
    )
    return outcome


def table(outcomes: list[Outcome]) -> str:
    """A row for each fault; kills by stage and number of processes."""
    rows: dict[str, list[Outcome]] = {}
    for one in outcomes:
        where = f", stage {one.stage}, {'one process' if one.processes == 1 else 'two processes'}"
        rows.setdefault(one.fault + (where if one.fault == KILLED else ""), []).append(one)
    lines = ["| fault | runs | what happened | bit-equal | lost |", "|---|---|---|---|---|"]
    for fault, group in sorted(rows.items(), key=lambda row: (KILLED not in row[0], row[0])):
        what = dict.fromkeys(f"stage {one.stage}: {one.what}" for one in group if one.what)
        kills = Counter(kill["while"] for one in group for kill in one.kills)
        if kills:
            counts = ", ".join(f"{count} {doing}" for doing, count in kills.most_common())
            what = {f"{kills.total()} kills: {counts}": None}
        lost = dict.fromkeys(problem for one in group for problem in one.problems)
        equal = sum(one.is_equal for one in group)
        equal = "yes" if equal == len(group) else f"{equal} of {len(group)}"
        lines.append(f"| {fault} | {len(group)} | {'; '.join(what)} | {equal} | {'; '.join(lost) or 'nothing'} |")
    return "\n".join(lines)


def main() -> None:
    """Make the references, disturb runs until the time is over, and say what was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", choices=[*FAULTS, KILLED], metavar="NAME", help=f"one of: {', '.join(FAULTS)}, {KILLED}"
    )
    parser.add_argument("--record", action="store_true", help="write results.json and results.md")
    arguments = parser.parse_args()
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
    minutes = (time.monotonic() - began) / 60
    kills = [kill for one in outcomes for kill in one.kills]
    text = (
        f"{table(outcomes)}\n\nSeed {arguments.seed}, {minutes:.1f} minutes; {len(outcomes)} disturbed runs, of which "
        f"{sum(bool(one.kills) for one in outcomes)} were killed, {len(kills)} times, "
        f"{sum(kill['while'] == 'writing a state' for kill in kills)} of them while a state was written. None had a past in common."
    )
    print(text)
    if arguments.record:
        here = Path(__file__).parent
        (here / "results.json").write_text(json.dumps([asdict(one) for one in outcomes], indent=1) + "\n")
        (here / "results.md").write_text(text + "\n")
    sys.exit(any(one.problems for one in outcomes))


if __name__ == "__main__":
    main()
