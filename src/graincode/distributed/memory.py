"""How many images are worked on at once: as many as were asked for, or as fit into the memory of the device."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graincode.distributed import collectives

log = logging.getLogger(__name__)

_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container; its text is a number of bytes or "max"
_SHARE = 0.6  # of the memory, as the workspaces of kernels, and what lies between tensors, are not counted


class _Counter(TorchDispatchMode):
    """Counts the bytes of tensors that are made and not yet freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken = {storage._cdata for storage in _storages((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in taken:  # views and what is done in place make nothing
                taken.add(storage._cdata)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes()).atexit = False
        return result

    def _add(self, count: int) -> None:
        self.now += count
        self.most = max(self.most, self.now)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that the tensors which a call makes take at one time, without gradients."""
    with torch.no_grad(), _Counter() as counter:
        call()
    return counter.most


def memory_of(device: torch.device) -> int:
    """Bytes of this process's share of a device's memory that its tensors have not taken; 0: unknown. It does not
    depend on what else runs there, so that the same command works on as many images at once."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory - torch.cuda.memory_allocated(device)
    if not hasattr(os, "sysconf"):
        return 0
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if _LIMIT.is_file() and (limit := _LIMIT.read_text(encoding="utf-8").strip()).isdecimal():
        memory = min(memory, int(limit))
    return memory // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def fitting(asked: int, each: int, device: torch.device) -> int:
    """How many items to work on at once, `asked` or fewer, 1 or more, of `each` bytes; the same on all processes.
    Collective: call it on all of them."""
    memory = memory_of(device)
    fits = max(1, int(_SHARE * memory) // max(each, 1)) if memory else asked
    found = int(collectives.gather_rows(torch.tensor([min(asked, fits)], device=device), equal=True).min())
    if found < asked:
        about = f"each takes {each / 2**30:.2f} of {memory / 2**30:.1f} GiB"
        log.warning("batch_size=%d: %d at once, as %s", asked, found, about)
    return found
