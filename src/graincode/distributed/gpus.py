"""GPUs of one machine, each for one of several jobs that run there at the same time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from filelock import Timeout

from graincode.core.waiting import Wait
from graincode.locks import locked

_POLL_SECONDS = 0.2


def visible_gpus() -> list[str]:
    """This machine's GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    count = torch.cuda.device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return names[:count] if len(names) >= count and names[0] else list(map(str, range(count)))


@contextmanager
def own_gpus(count: int, folder: Path) -> Iterator[list[str]]:
    """So many of the visible GPUs, held by lock files in a folder that all who share them give; waits until they are
    free. Those who wait are served one after the other, so that none waits for what another has and does not use."""
    with ExitStack() as held:
        taken: list[str] = []
        with locked(folder / "gpus.lock"):
            wait = Wait(f"{count} of the GPUs {', '.join(visible_gpus())}", is_limited=False)
            while True:
                for name in visible_gpus():
                    if name not in taken and len(taken) < count:
                        with suppress(Timeout):
                            held.enter_context(locked(folder / f"gpu_{name}.lock", 0))
                            taken.append(name)
                if len(taken) == count:
                    break
                wait.again()
                time.sleep(_POLL_SECONDS)
        yield taken
