"""Members of a sweep, and the table and plot that it leaves."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from graincode.files import write_json
from graincode.runs.table import MEMBER, collect_sweep


@contextmanager
def sweep_member() -> Iterator[None]:
    """Have the run in this block noted as a member of the sweep that it belongs to, if it belongs to one."""
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        yield
        return
    file = Path(hydra.sweep.dir).absolute() / "members" / f"{hydra.job.num}.json"
    os.environ[MEMBER] = str(file)
    try:
        yield
    except BaseException:  # ends the sweep: what has finished is still worth a table
        collect_sweep(file.parents[1])
        raise
    finally:
        del os.environ[MEMBER]
    if file.is_file():
        write_json(file, json.loads(file.read_bytes()) | {"overrides": list(hydra.overrides.task)})


class SweepTable(Callback):
    """Hydra's callback that writes table.csv and plot.png when a sweep has ended."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Collect the metrics of all members of the sweep."""
        collect_sweep(Path(config.hydra.sweep.dir))
