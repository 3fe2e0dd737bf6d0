"""Faults that happen once: data that change, damaged files, a disk without room, processes that are stopped."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from writes import Trial, compare, results, run

TRAINING, LONG = "train_tokenizer", ("trainer.steps=60", "trainer.checkpoint_every=60", "trainer.eval_every=60")


@dataclass
class Fault:
    """What came of one fault.

    Attributes:
        name: what happens, in words.
        said: by the command that met it, its last line.
        problems: all that was not as it should be.
    """

    name: str
    said: str = ""
    problems: list[str] = field(default_factory=list)

    def expect(self, status: int, found: int, said: str) -> None:
        """Note a problem unless a command ended with a status, and without a traceback."""
        lines = [line for line in said.splitlines() if line.strip()]
        self.said = lines[-1] if lines else ""
        if found != status or "Traceback" in said or (status == 2 and sum("error: " in line for line in lines) != 1):
            self.problems.append(f"status {found}, expected {status}: {said[-300:]}")


def _goes_on(fault: Fault, job: str, where: Path, like: Path, *more: str) -> None:
    """Let the same command end, and compare it with a reference."""
    trial, said = Trial(job), where / "said"
    if status := run(job, where, said, more=more):
        fault.problems.append(f"the last command ended with {status}: {said.read_text()[-300:]}")
    compare(job, where, like, trial)
    fault.problems += trial.problems


def _half(where: Path, like: Path) -> None:
    """A training that was killed half-way."""
    where.mkdir()
    run(TRAINING, where, where / "said", at=int((like / "changes").read_text()) * 3 // 4)


def image_added(fault: Fault, where: Path, like: Path) -> None:
    """An image is added while a training is interrupted."""
    _half(where, like)
    extra = Path("images/train/busy/extra.png")
    shutil.copy("images/train/busy/0000.png", extra)
    try:
        fault.expect(2, run(TRAINING, where, where / "said"), (where / "said").read_text())
    finally:
        extra.unlink()
        shutil.rmtree(where / "cache")  # which holds those images, too
    _goes_on(fault, TRAINING, where, like)


def damaged(fault: Fault, where: Path, like: Path, name: str, content: bytes) -> None:
    """A small file of an interrupted training is damaged, and put back."""
    _half(where, like)
    file = where / "runs" / TRAINING / "run" / name
    before = file.read_bytes() if file.exists() else None
    file.write_bytes(content)
    fault.expect(2, run(TRAINING, where, where / "said"), (where / "said").read_text())
    file.unlink() if before is None else file.write_bytes(before)
    _goes_on(fault, TRAINING, where, like)


def log_cut(fault: Fault, where: Path, like: Path) -> None:
    """The last line of the log of an interrupted training is half there."""
    _half(where, like)
    file = where / "runs" / TRAINING / "run/log.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    _goes_on(fault, TRAINING, where, like)


def summary_cut(fault: Fault, where: Path, like: Path) -> None:
    """The summary of a split is cut while an extraction is interrupted."""
    shutil.copytree(like, where, symlinks=True)
    folder = where / "runs/extract_codes/run"
    (folder / "result.json").unlink()
    file = folder / "codes/train.json"
    file.write_bytes(file.read_bytes()[:-10])
    _goes_on(fault, "extract_codes", where, like)


def codes_cut(fault: Fault, where: Path, like: Path) -> None:
    """A file of codes is cut."""
    where.mkdir()
    shutil.copytree(Path("inputs/codes").resolve(), where / "codes")
    file = where / "codes/train.indices.npy"
    file.write_bytes(file.read_bytes()[:-10])
    status = run("train_generator", where, where / "said", more=(f"codes_path={where}/codes",))
    fault.expect(2, status, (where / "said").read_text())


def no_room(fault: Fault, where: Path, like: Path, job: str, size: int) -> None:
    """Files cannot be larger than some size for a while."""
    where.mkdir()
    if job == "evaluate":  # there is room for what is cached
        shutil.copytree(like / "cache", where / "cache")
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    fault.expect(2, run(job, where, where / "said", before=limit), (where / "said").read_text())
    _goes_on(fault, job, where, like)


def no_cache(fault: Fault, where: Path, like: Path) -> None:
    """A file is in the way of the cache of statistics."""
    (where / "cache").mkdir(parents=True)
    (where / "cache/statistics").touch()
    fault.expect(0, run("evaluate", where, where / "said"), (where / "said").read_text())
    if results("evaluate", where) != results("evaluate", like):
        fault.problems.append("other results")


def _when_it_trains(where: Path, act: Callable[[list[int]], None]) -> Callable[[], None]:
    """What has a process act on its children once it has made some steps."""
    log = where / "runs" / TRAINING / "run/log.jsonl"

    def watch() -> None:
        while not (log.is_file() and log.read_text().count("\n") > 4):
            time.sleep(0.01)
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        act([int(pid) for pid in children])

    return lambda: threading.Thread(target=watch, daemon=True).start()


def worker_stopped(fault: Fault, where: Path, like: Path) -> None:
    """A process that loads data is stopped, and SIGTERM comes."""
    where.mkdir()

    def act(children: list[int]) -> None:
        for pid in children:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    more = (*LONG, "hardware.workers=1")
    fault.expect(75, run(TRAINING, where, where / "said", more=more, before=_when_it_trains(where, act)),
                 (where / "said").read_text())  # fmt: skip
    if status := run(TRAINING, where, where / "said", more=more):
        fault.problems.append(f"the last command ended with {status}")


def rank_stopped(fault: Fault, where: Path, like: Path) -> None:
    """One of two processes is stopped, and the command that started them is killed."""
    where.mkdir()
    noted = where / "said.pids"

    def act(children: list[int]) -> None:
        noted.write_text(" ".join(map(str, children)))
        os.kill(children[-1], signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGKILL)

    more = (*LONG, "hardware.num_processes=2")
    run(TRAINING, where, where / "said", more=more, before=_when_it_trains(where, act))
    time.sleep(5)
    pids = noted.read_text().split()
    if alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        fault.problems.append(f"{len(alive)} of {len(pids)} processes outlive the command")
        for pid in alive:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    fault.said = f"{len(pids)} processes ended with it"
    if status := run(TRAINING, where, where / "said", more=more):
        fault.problems.append(f"the last command ended with {status}: {(where / 'said').read_text()[-300:]}")
    names = [path.name for path in (where / "temporary").iterdir()]
    if left := [name for name in names if "wandb" not in name]:  # which makes some when it is imported
        fault.problems.append(f"left behind: {left}")


FAULTS: dict[str, tuple[str, Callable[[Fault, Path, Path], None]]] = {
    "an image is added while a training is interrupted": (TRAINING, image_added),
    "config.json of an interrupted training is empty": (TRAINING, partial(damaged, name="config.json", content=b"")),
    "config.json of an interrupted training is null": (TRAINING, partial(damaged, name="config.json", content=b"null")),
    "an empty result.json stands in an interrupted training": (
        TRAINING, partial(damaged, name="result.json", content=b"")),
    "the last line of a log is half there": (TRAINING, log_cut),
    "the indices of codes are cut": ("train_generator", codes_cut),
    "the summary of a split is cut": ("extract_codes", summary_cut),
    "there is no room for kept images": ("evaluate", partial(no_room, job="evaluate", size=8000)),
    "there is no room for codes": ("extract_codes", partial(no_room, job="extract_codes", size=4000)),
    "there is no room for a state": (TRAINING, partial(no_room, job=TRAINING, size=100_000)),
    "the cache of statistics cannot be written": ("evaluate", no_cache),
    "a process that loads data is stopped, then SIGTERM": (TRAINING, worker_stopped),
    "one of two processes is stopped, their command killed": (TRAINING, rank_stopped),
}  # fmt: skip


def meet_all(root: Path) -> list[Fault]:
    """Every fault once."""
    found = []
    for index, (name, (job, meet)) in enumerate(FAULTS.items()):
        fault = Fault(name)
        try:
            meet(fault, root / f"fault-{index}", root / "reference" / job)
        except Exception as error:
            fault.problems.append(f"{type(error).__name__}: {error}")
        fault.problems = [problem.replace(f"{root}/", "") for problem in fault.problems]
        fault.said = fault.said.replace(f"{root}/", "")
        print(f"{name}: {fault.said}: {fault.problems or 'nothing lost'}", flush=True)
        found.append(fault)
    return found


def table(faults: list[Fault]) -> str:
    """A row for each fault."""
    rows = [
        f"| {one.name} | {one.said} | {'; '.join(one.problems) or 'nothing'} |".replace("\n", " ") for one in faults
    ]
    return "\n".join(["| fault | what is said | lost |", "|---|---|---|", *rows])
