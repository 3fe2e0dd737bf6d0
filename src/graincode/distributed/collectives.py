"""Collectives over torch.distributed; no-ops in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from graincode.core.errors import GraincodeError

T = TypeVar("T")


class OtherProcessFailed(GraincodeError):
    """Process 0 could not do what it does for all; its own error says why."""


def count() -> int:
    """Number of processes of this job, on all machines."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def sum_(tensor: Tensor) -> Tensor:
    """Replace a tensor by its sum over all processes, bit-equal on each, and return it."""
    if count() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_(tensor: Tensor) -> Tensor:
    """Replace a tensor by that of process 0, and return it."""
    if count() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def gather_rows(rows: Tensor, equal: bool = False) -> Tensor:
    """(n, ...) rows, n of each process's own, joined in the order of the processes: (sum of n, ...) on each.

    With `equal`, n is the same on all, which saves an exchange of sizes and a synchronisation.
    """
    if count() == 1:
        return rows
    sizes = [len(rows)] * count()
    if not equal:
        found = torch.zeros(count(), dtype=torch.long, device=rows.device)
        found[rank()] = len(rows)
        sizes = sum_(found).tolist()
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(count())]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def on_main(action: Callable[[], T]) -> T | None:
    """The result of process 0, for which the others wait; None on these, or OtherProcessFailed if process 0 raised."""
    failed = torch.ones(1)
    try:
        result = action() if is_main() else None
        failed.zero_()
    finally:
        if is_main():
            broadcast_(failed)
    if not is_main() and bool(broadcast_(failed)):
        raise OtherProcessFailed("process 0 failed: its error says why")
    return result


def check_agreement(name: str, number: int) -> None:
    """Raise on every process when a number below 2^53 (`name` in words) is not the same on all."""
    found = gather_rows(torch.tensor([number]))
    if bool((found != found[0]).any()):
        leave()
        raise GraincodeError(f"the {len(found)} processes differ in {name}: start them all with the same command")


def leave() -> None:
    """End the process group, once all have come here; without it, a process that ends earlier can abort another."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def items(total: int, batch_size: int = 1) -> range:
    """The part of `range(total)` that is this process's, in whole batches: contiguous, in the order of processes."""
    each = -(-total // (batch_size * count())) * batch_size
    return range(min(rank() * each, total), min((rank() + 1) * each, total))
