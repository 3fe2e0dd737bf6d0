"""The machine that a job runs on, as Accelerate sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from graincode.core.errors import GraincodeError

_DEFAULT_THREADS = torch.get_num_threads()


@dataclass(frozen=True)
class Hardware:
    """What `conf/hardware` gives.

    Attributes:
        device: "cpu" or "gpu".
        mixed_precision: of training, "no" or "bf16"; codes, samples and figures are made in float32.
        workers: processes that load data; 0 loads in the main one, best for data sets that lie in memory.
        threads: CPU threads of one process; None leaves torch's choice.
        tf32: whether float32 matrix products may use TF32.
    """

    device: Literal["cpu", "gpu"] = "cpu"
    mixed_precision: Literal["no", "bf16"] = "no"
    workers: int = 0
    threads: int | None = None
    tf32: bool = True

    def accelerator(self) -> Accelerator:
        """Set torch up and give the Accelerator.

        Raises:
            GraincodeError: a GPU is asked for and there is none.
        """
        if self.device == "gpu" and not torch.cuda.is_available():
            raise GraincodeError("hardware=gpu, but torch finds no CUDA device: type hardware=cpu")
        torch.set_num_threads(self.threads or _DEFAULT_THREADS)
        AcceleratorState._reset_state(reset_partial_state=True)  # a sweep runs several jobs in one process
        torch.set_float32_matmul_precision("high" if self.tf32 and self.device == "gpu" else "highest")
        return Accelerator(cpu=self.device == "cpu", mixed_precision=self.mixed_precision)
