"""Sweeps: each member's result or error is noted, a table and plots are left, however the sweep ends."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from graincode.config.errors import Ending
from graincode.core.errors import GraincodeError
from graincode.distributed.signals import SIGNALS, STATUS

if TYPE_CHECKING:  # it imports torch
    from graincode.distributed.hardware import Hardware

SWEEP = "GRAINCODE_SWEEP"
"""Environment variable: the directory in which the members of this sweep, and of no other, are noted."""

_NONE_FINISHED = "No trials are completed yet", "Record does not exist"  # Optuna's words, where all members failed


_study = ExitStack()  # what holds the study of this process's sweep, if that is one


class SweepStart(Callback):
    """Hydra's callback that gives a sweep its directory of members, in whatever process and directory they run."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Choose the directory, and have signals end the sweep so that it leaves its table; go on with a study."""
        from graincode.config.study import go_on, is_study
        from graincode.runs.table import STUDY

        kind = ""
        if is_study(config):
            kind = STUDY
            try:
                _study.enter_context(go_on(config))
            except GraincodeError as error:  # Hydra would only warn of an error here
                Ending(2, error.line).show()
                sys.exit(2)
        folder = Path(config.hydra.sweep.dir).absolute() / "members"
        os.environ[SWEEP] = str(folder / f"{kind}{time.time_ns():x}-{secrets.token_hex(4)}")
        process = os.getpid()

        def stop(number: int, frame: FrameType | None) -> None:
            if os.getpid() != process:  # a process that loads data has this handler too
                os._exit(128 + number)
            print(f"stopped by {signal.Signals(number).name}: the same command runs what is left", file=sys.stderr)
            sys.exit(STATUS)

        for number in SIGNALS:
            signal.signal(number, stop)


def _leaving_out(refuse: Callable[[BaseException, Sequence[str]], Ending], launcher: Launcher) -> Launcher:
    """A launcher that notes why a member cannot be composed, and launches the others."""
    from graincode.files import write_json

    launch = launcher.launch

    def launch_others(job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        refused: list[int] = []
        for number, overrides in enumerate(job_overrides):
            try:
                launcher.hydra_context.config_loader.load_sweep_config(launcher.config, list(overrides))
            except (HydraException, OmegaConfBaseException, ValueError) as error:
                end = refuse(error, overrides)
                if end.crash is not None:
                    raise
                end.show()
                refused.append(number)
                if os.environ.get("RANK", "0") == "0":
                    note = {"overrides": list(overrides), "status": end.status, "error": end.line}
                    write_json(Path(os.environ[SWEEP]) / f"{initial_job_idx + 1}{number:06}.json", note)
        others = [overrides for number, overrides in enumerate(job_overrides) if number not in refused]
        returns = iter(launch(others, initial_job_idx) if others else ())
        nothing = JobReturn(overrides=[], status=JobStatus.COMPLETED)  # what sweepers take as no value
        return [nothing if number in refused else next(returns) for number in range(len(job_overrides))]

    launcher.launch = launch_others
    return launcher


@contextmanager
def whole_sweep(refuse: Callable[[BaseException, Sequence[str]], Ending]) -> Iterator[None]:
    """Leave the table of a sweep, if the block is one; SystemExit if members failed: 2 if all were refused, else 1.

    Args:
        refuse: what an error makes of a member with these overrides, which cannot be composed.
    """
    os.environ.pop(SWEEP, None)  # a job that a member of a sweep started is none
    check, make = Sweeper.validate_batch_is_legal, Plugins.instantiate_launcher
    Sweeper.validate_batch_is_legal = lambda *_: None  # it would end the sweep before it begins
    Plugins.instantiate_launcher = lambda *args, **kwargs: _leaving_out(refuse, make(*args, **kwargs))
    before = {number: signal.getsignal(number) for number in SIGNALS}
    statuses: list[int] = []
    try:
        yield
    except ValueError as error:
        if not any(words in str(error) for words in _NONE_FINISHED):
            raise
    finally:
        Sweeper.validate_batch_is_legal, Plugins.instantiate_launcher = check, make
        _study.close()
        for number, handler in before.items():
            signal.signal(number, handler)
        if folder := os.environ.pop(SWEEP, None):
            from graincode.runs.table import collect_sweep

            statuses = collect_sweep(Path(folder))
    if failed := [status for status in statuses if status]:
        sys.exit(min(failed))


@contextmanager
def sweep_member(ending: Callable[[BaseException], Ending]) -> Iterator[None]:
    """Note the run in this block as a member of the sweep that it belongs to, if any, and the error that ends it.

    An error does not leave the block, so that the other members run, but for a signal's.
    """
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        yield
        return
    from graincode.files import write_json
    from graincode.runs.table import MEMBER, read_member

    file = Path(os.environ[SWEEP]) / f"{hydra.job.num}.json"
    os.environ[MEMBER] = str(file)
    end = Ending()
    try:
        yield
    except BaseException as error:
        end = ending(error)
        if end.status in (STATUS, 130) or "RANK" in os.environ:  # of torchrun's processes all fail, or none
            raise
        end.show()
    finally:
        del os.environ[MEMBER]
        if os.environ.get("RANK", "0") == "0":
            note = {"overrides": list(hydra.overrides.task), "status": end.status, "error": end.line}
            write_json(file, read_member(file) | note)


@contextmanager
def member_gpus(hardware: Hardware, dry: bool) -> Iterator[list[str]]:
    """GPUs for a member of a sweep alone, once they are free, where others run beside it; else none."""
    hydra = HydraConfig.get()
    beside = hydra.mode == RunMode.MULTIRUN and hydra.runtime.choices.get("hydra/launcher") == "joblib"
    if not beside or dry or hardware.device != "gpu" or hardware.num_nodes != 1:
        yield []
        return
    from graincode.distributed.gpus import own_gpus

    with own_gpus(hardware.local_processes, Path(os.environ[SWEEP])) as gpus:
        yield gpus
