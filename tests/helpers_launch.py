"""What processes do in the tests of launching, in place of a job."""

import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from graincode.core.errors import GraincodeError
from graincode.distributed import collectives
from graincode.distributed.signals import Interruption, Stopped


def work(job, cfg):
    """Note this process's number in the folder, then do what the case says."""
    dist.init_process_group("gloo")
    rank = collectives.rank()
    (Path(cfg.folder) / f"{rank}.pid").write_text(str(os.getpid()))
    if job == "sums":
        return float(collectives.sum_(torch.tensor([rank + 1.0]))) + cfg.more
    if job == "waits":  # stops when it is asked to
        with Interruption() as asked:
            while asked.signal is None:
                time.sleep(0.05)
        raise Stopped(f"stopped by {asked.signal.name}")
    if rank == cfg.victim:
        if job == "is_killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"is_refused": GraincodeError, "crashes": RuntimeError}[job](f"of process {rank}")
    collectives.sum_(torch.zeros(1))  # in which the others wait
    return 0.0
