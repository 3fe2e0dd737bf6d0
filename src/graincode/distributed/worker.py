"""One of the processes that `launch` starts: `python -P -m graincode.distributed.worker ENTRY JOB FOLDER PARENT`, with
the composed configuration in the folder. An error goes into a file there, and the parent process reports it."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist
from omegaconf import OmegaConf

from graincode.core import waiting
from graincode.core.errors import GraincodeError, OneLineFormatter
from graincode.distributed import collectives
from graincode.distributed.collectives import OtherProcessFailed
from graincode.distributed.signals import STATUS, Stopped, end_with_parent
from graincode.files import write_json


def work(entry: str, job: str, folder: Path, parent: int) -> int:
    """Run a job as the process that the environment says; returns the exit status."""
    end_with_parent(parent)
    rank = int(os.environ["RANK"])
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(OneLineFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, handlers=[handler])
    waiting.log.setLevel(logging.WARNING)  # on every process

    def failed(status: int, message: str, echo: bool = False) -> int:
        about = {"status": status, "message": message, "echo": echo, "time": time.time()}
        write_json(folder / f"error_{rank}.json", about)
        return status

    try:
        module, _, name = entry.rpartition(".")
        objective = getattr(importlib.import_module(module), name)(job, OmegaConf.load(folder / "config.yaml"))
        if rank == 0:
            write_json(folder / "objective.json", objective)
        status = 0
    except Stopped as stopped:
        status = failed(STATUS, str(stopped))
        if not stopped.together:
            return status
    except KeyboardInterrupt:
        return 130
    except OtherProcessFailed:  # that process reports its own error: wait for it
        time.sleep(20)
        return 2
    except GraincodeError as error:
        return failed(2, error.line)
    except Exception as error:
        echo = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
        failed(1, f"process {rank}: {type(error).__name__}: {error}", echo)
        if echo:  # which only says that another process has gone
            return 1
        raise
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent when another process is done a little earlier
    collectives.leave()
    return status


if __name__ == "__main__":
    sys.exit(work(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])))
