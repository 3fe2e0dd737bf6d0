"""One of the processes that `launch` starts: `python -P -m graincode.distributed.worker ENTRY JOB FOLDER PARENT`, with
the composed configuration in the folder. An error goes into a file there, and the parent process reports it."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import OmegaConf

from graincode.core.errors import GraincodeError
from graincode.distributed import collectives
from graincode.distributed.collectives import OtherProcessFailed
from graincode.distributed.signals import STATUS, Stopped
from graincode.files import write_json


def work(entry: str, job: str, folder: Path, parent: int) -> int:
    """Run a job as the process that the environment says; gives the exit status."""
    threading.Thread(target=_end_with, args=(parent, folder), daemon=True).start()
    rank = int(os.environ["RANK"])
    logging.basicConfig(format="%(message)s", level=logging.INFO if rank == 0 else logging.ERROR, stream=sys.stdout)
    problem: dict[str, Any] | None = None
    try:
        module, _, name = entry.rpartition(".")
        objective = getattr(importlib.import_module(module), name)(job, OmegaConf.load(folder / "config.yaml"))
        if rank == 0:
            write_json(folder / "objective.json", objective)
    except Stopped as stopped:
        problem = {"status": STATUS, "message": str(stopped)}
    except KeyboardInterrupt:
        return 130
    except OtherProcessFailed:  # that process reports its own error: wait for it
        time.sleep(20)
        return 2
    except GraincodeError as error:
        problem = {"status": 2, "message": error.line}
    except Exception as error:
        echo = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
        problem = {"status": 1, "message": f"process {rank}: {type(error).__name__}: {error}", "echo": echo}
        if not echo:  # which only says that another process has gone
            raise
    finally:
        if problem is not None:
            write_json(folder / f"error_{rank}.json", problem | {"time": time.time()})
    if problem is None or problem["status"] == STATUS:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent when another process is done a little earlier
        collectives.leave()
    return 0 if problem is None else problem["status"]


def _end_with(parent: int, folder: Path) -> None:
    """End this process soon after its parent was killed, and clear what that can no longer clear."""
    while os.getppid() == parent:
        time.sleep(0.5)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(work(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])))
