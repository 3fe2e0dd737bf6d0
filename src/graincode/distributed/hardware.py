"""The machines that a job runs on: processes, precision, and how a module is spread over devices."""

from __future__ import annotations

import math
import os
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from graincode.core.errors import check
from graincode.core.precision import products
from graincode.core.waiting import limit_waits
from graincode.distributed import collectives
from graincode.distributed.affinity import bind_threads, usable_cores
from graincode.distributed.blocks import CheckpointedBlock, compile_blocks

_DEFAULT_THREADS = torch.get_num_threads()
_MOST = 1024  # processes, workers or threads of one machine


@dataclass(frozen=True)
class Hardware:
    """What `conf/hardware` gives; conf/hardware/cpu.yaml says what each is.

    Nothing here changes results beyond rounding, but for the precision of training. A process that torchrun or another
    launcher started takes part in that launcher's world instead of starting others.
    """

    device: Literal["cpu", "gpu"] = "cpu"
    num_processes: int | None = 1
    strategy: Literal["ddp", "fsdp"] = "ddp"
    num_nodes: int | None = 1
    node_rank: int | None = 0
    main_address: str | None = None
    main_port: int | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    compile: bool = False
    tf32: bool = True
    workers: int = 0
    threads: int | None = None
    peak_tflops: float | None = None
    timeout_minutes: float = 30.0

    def __post_init__(self) -> None:
        nodes, own, processes, parts = self.num_nodes, self.node_rank, self.num_processes, self.gradient_accumulation
        check("num_nodes", nodes, "a number, 1 or more", nodes is not None and nodes >= 1)
        check("node_rank", own, f"0 to num_nodes - 1 = {nodes - 1}", own is not None and 0 <= own < nodes)
        expected = f"1 to {_MOST}, or null for all GPUs"
        check("num_processes", processes, expected, processes is None or 1 <= processes <= _MOST)
        check("gradient_accumulation", parts, "1 or more", parts >= 1)
        check("workers", self.workers, f"0 to {_MOST}", 0 <= self.workers <= _MOST)
        check("threads", self.threads, f"1 to {_MOST}, or null", self.threads is None or 1 <= self.threads <= _MOST)
        check("timeout_minutes", self.timeout_minutes, "above 0, at most 10000", 0 < self.timeout_minutes <= 10_000)
        peak, port = self.peak_tflops, self.main_port
        check("peak_tflops", peak, "a number above 0, or null", peak is None or 0 < peak < math.inf)
        expected = "a free port, 1 to 65535, the same on all machines, such as 29500"
        check("main_port", port, expected, nodes == 1 if port is None else 1 <= port <= 65535)
        allowed = self.mixed_precision != "fp16" or (self.device == "gpu" and self.strategy == "ddp")
        check("mixed_precision", self.mixed_precision, "bf16 on the CPU and with strategy=fsdp", allowed)

    @property
    def local_processes(self) -> int:
        """Processes on this machine."""
        if self.device == "cpu":
            return self.num_processes or 1
        available = torch.cuda.device_count()
        check("device", self.device, "cpu, as torch finds no CUDA device", available > 0)
        count = self.num_processes or available
        check("num_processes", count, f"at most {available}, the number of GPUs", count <= available)
        return count

    @property
    def is_spread(self) -> bool:
        """Whether this process should start others and only watch them."""
        return "LOCAL_RANK" not in os.environ and self.num_nodes * self.local_processes > 1

    def address(self) -> str:
        """Host name of machine 0."""
        if self.main_address is not None or self.num_nodes == 1:
            return self.main_address or "127.0.0.1"
        nodes = os.environ.get("SLURM_JOB_NODELIST")
        check("main_address", None, "the host name of machine 0", nodes is not None)
        names = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return names.stdout.split()[0]

    def machine(self) -> Machine:
        """Set torch up, join the other processes, and give what the job runs on."""
        on_cpu, together = self.device == "cpu", int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        check("device", self.device, "cpu, as torch finds no CUDA device", on_cpu or torch.cuda.is_available())
        limit_waits(self.timeout_minutes)
        if not on_cpu:
            torch.cuda.init()  # by which loaders know that they are to pin their batches
        torch.set_num_threads(self.threads or (cores_each(together) if together > 1 else _DEFAULT_THREADS))
        if on_cpu:
            bind_threads(int(os.environ.get("LOCAL_RANK", 0)), together)
        torch.set_float32_matmul_precision("highest")  # in `Machine.micro_batch` it may be another
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan anew for each length
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
            backend = "gloo" if on_cpu else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, timeout=timedelta(minutes=self.timeout_minutes))
            os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
        AcceleratorState._reset_state(reset_partial_state=True)  # a sweep runs several jobs in one process
        # buffers are kept equal by their owners, who know how to reduce them
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        return Machine(self, Accelerator(cpu=on_cpu, mixed_precision=self.mixed_precision, kwargs_handlers=[ddp]))


def cores_each(processes: int) -> int:
    """CPU cores for each of so many processes; 1 or more."""
    return max(usable_cores() // processes, 1)


class Machine:
    """This process's device and its part in the world, for training."""

    def __init__(self, hardware: Hardware, accelerator: Accelerator) -> None:
        self.hardware, self.accelerator, self.device = hardware, accelerator, accelerator.device
        self.is_sharded = hardware.strategy == "fsdp" and collectives.count() > 1

    def prepare(
        self, module: nn.Module, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A module as training calls it, and the optimizer of its parameters. It shares its tensors with `module`, but
        for the strategy "fsdp" in several processes: a sharded copy, whose weights come back by `full_state`."""
        place(module, self.device)
        if self.is_sharded:
            module = deepcopy(module)
        for part in module.modules():
            if isinstance(part, CheckpointedBlock):
                part.recompute = self.hardware.gradient_checkpointing
        if self.hardware.compile:
            compile_blocks(module)
        if self.is_sharded:
            self.shard(module)
            return module, self.accelerator.prepare_optimizer(make_optimizer(module), device_placement=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)  # newer torch
            wrapped, optimizer = self.accelerator.prepare(module, make_optimizer(module))
        self.accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)  # autocast is the loop's: evaluation has none
        return wrapped, optimizer

    def shard(self, module: nn.Module) -> None:
        """Spread a module's parameters over the processes, block by block. Under bf16 blocks get their weights in it,
        as autocast would make them there; gradients are added up in float32."""
        mesh, policy = init_device_mesh(self.device.type, (collectives.count(),)), MixedPrecisionPolicy()
        if self.hardware.mixed_precision == "bf16":
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for parameter in module.parameters():  # channels_last cannot be sharded
            parameter.data = parameter.data.contiguous()
        for part in module.modules():
            if isinstance(part, CheckpointedBlock):
                fully_shard(part, mesh=mesh, mp_policy=policy)
        fully_shard(module, mesh=mesh)

    def seed(self, number: int) -> None:
        """Seed torch's generator for this device; `torch.manual_seed` sees to all devices, and takes milliseconds."""
        (torch.cuda.manual_seed if self.device.type == "cuda" else torch.default_generator.manual_seed)(number)

    @contextmanager
    def micro_batch(self, wrapped: nn.Module, last: bool) -> Iterator[None]:
        """Around both passes of each micro-batch of a step: gradients are exchanged after the last one alone, and TF32
        is used if it was asked for, as nowhere else."""
        is_sharded = isinstance(wrapped, FSDPModule)
        if is_sharded:
            wrapped.set_requires_gradient_sync(last)
        exchange = nullcontext() if last or is_sharded else self.accelerator.no_sync(wrapped)
        with exchange, products("tf32" if self.hardware.tf32 else "float32", self.device.type):
            yield

    def clip_gradients(self, wrapped: nn.Module, limit: float) -> Tensor:
        """The norm of all gradients, (), before they are scaled down to `limit`."""
        self.accelerator.unscale_gradients()
        norm = torch.nn.utils.clip_grad_norm_(wrapped.parameters(), limit)  # Accelerate's looks at every weight first
        return norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)


def place(module: nn.Module, device: torch.device) -> nn.Module:
    """A module on a device, on a GPU with the weights of convolutions in the order that its fast kernels take."""
    return module.to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.preserve_format)


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's weights as whole tensors, on every process, whether or not it is sharded."""
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in module.state_dict().items()}


def module_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's weights on the CPU, named alike for any strategy and number of processes."""
    states, options = _state_functions(module)
    return states.get_model_state_dict(module, options=options)


def load_module_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """The inverse of `module_state`."""
    states, options = _state_functions(module)
    states.set_model_state_dict(module, state, options=options)


def training_state(wrapped: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and moments, named as by `module_state`."""
    states, options = _state_functions(wrapped)
    optimizer = getattr(optimizer, "optimizer", optimizer)
    moments = None
    if optimizer.state:  # without, torch would make a step to fill it, and so change what comes after
        moments = states.get_optimizer_state_dict(wrapped, optimizer, options=options)
    return {"module": module_state(wrapped), "optimizer": moments}


def load_training_state(wrapped: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The inverse of `training_state`."""
    load_module_state(wrapped, state["module"])
    if state["optimizer"] is not None:
        states, options = _state_functions(wrapped)
        optimizer = getattr(optimizer, "optimizer", optimizer)
        states.set_optimizer_state_dict(wrapped, optimizer, state["optimizer"], options=options)


def _state_functions(module: nn.Module) -> tuple[Any, Any]:
    """torch's functions for states, with their options; only trainings need them, and they import much."""
    from torch.distributed.checkpoint import state_dict

    return state_dict, state_dict.StateDictOptions(full_state_dict=isinstance(module, FSDPModule), cpu_offload=True)
