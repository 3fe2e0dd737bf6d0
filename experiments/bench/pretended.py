"""A GPU that is only pretended: tensors that say cuda:0 and are computed on the CPU.

    with pretended() as seen:
        module.to("cuda")
        ...
        seen.clear()
        step()
        print(seen.waits)          # {"item generator/loop.py:12": 1}, say

What would make the host wait for the device, start a kernel, or mix devices is counted by operation and line of source.
Only what passes through torch's dispatcher is seen: not what a kernel does inside, nor how long anything takes. An
operation counts as one launch, a view as none. Autocast changes nothing here.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import graincode

CUDA = torch.device("cuda", 0)
SOURCE = f"{Path(graincode.__file__).parent}/"
# operations whose result, or the size of it, the host needs
WAITING = {
    "_local_scalar_dense": "item", "equal": "equal", "is_nonzero": "bool", "nonzero": "nonzero",
    "masked_select": "masked_select", "_unique2": "unique", "unique_dim": "unique", "bincount": "bincount",
    "histc": "histc",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# operations that start no kernel, besides views
SILENT = {
    "detach", "alias", "lift_fresh", "_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided",
    "new_empty_strided", "is_pinned", "is_same_size", "_fused_sdp_choice", "set_", "_local_scalar_dense",
}  # fmt: skip


@dataclass
class Seen:
    """What was counted, by operation and line of source."""

    waits: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    mixes: Counter[str] = field(default_factory=Counter)

    def wait(self, why: str) -> None:
        """Count one."""
        self.waits[f"{why} {place()}"] += 1

    def clear(self) -> None:
        """Forget all."""
        for counts in vars(self).values():
            counts.clear()


class Pretended(torch.Tensor):
    """A tensor that says that it is on the device; `inner` is on the CPU.

    Autograd, which would look for the device, finds "meta" instead, on which it needs no driver.
    """

    inner: torch.Tensor
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Pretended:
        inner = inner.detach()
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=CUDA, dispatch_device=True,
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return f"Pretended({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        made = Pretended(self.inner.clone())
        made = torch.nn.Parameter(made) if isinstance(self, torch.nn.Parameter) else made
        memo[id(self)] = made.requires_grad_(self.requires_grad)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return torch.device("meta")
        raise RuntimeError(f"{func} of the pretended device outside `pretended()`")


class _Mode(TorchDispatchMode):
    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return torch.device("meta")
        kwargs, name = dict(kwargs or {}), func._schema.name.removeprefix("aten::")
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        ours, onto = [leaf for leaf in leaves if isinstance(leaf, Pretended)], kwargs.get("device")
        to_device = onto is not None and torch.device(onto).type in ("cuda", "meta")
        if name in ("_pin_memory", "is_pinned"):
            return self._pinned(name, *args[:1])
        if not ours and not to_device:
            return func(*args, **kwargs)
        if ours and onto is not None and not to_device and name != "_to_copy":  # memory on the host, like ours
            made = func(*tree_map(_inner, list(args)), **kwargs | {"pin_memory": False})
            made.pretends_to_be_pinned = kwargs.get("pin_memory")
            return made
        if name in ("_to_copy", "copy_"):
            return self._copied(func, name, args, kwargs, to_device)
        self._check(name, args, kwargs, ours, [leaf for leaf in leaves if not isinstance(leaf, Pretended)])
        self._launch(func, name)
        kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
        found = _compute(func, name, *tree_map(_inner, (list(args), kwargs)))
        if name in WAITING and not isinstance(found, torch.Tensor | tuple):
            return found
        known = {id(tensor.inner): tensor for tensor in ours}  # what an operation changes, it returns
        return tree_map(lambda x: _outer(x, known) if isinstance(x, torch.Tensor) else x, found)

    def _pinned(self, name: str, tensor: torch.Tensor) -> Any:
        if name == "is_pinned":
            return getattr(tensor, "pretends_to_be_pinned", False)
        copy = tensor.clone()
        copy.pretends_to_be_pinned = True
        return copy

    def _copied(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], to_device: bool) -> torch.Tensor:
        """`tensor.to` and `copy_`: a copy between devices waits, unless it need not and its memory is pinned."""
        source, target = args[::-1][-2:] if name == "copy_" else (args[0], None)
        non_blocking = kwargs.pop("non_blocking", name == "copy_" and len(args) > 2 and args[2])
        from_device = isinstance(source, Pretended)
        onto = isinstance(target, Pretended) if target is not None else to_device or "device" not in kwargs
        onto = onto or (target is None and from_device and kwargs.get("device") is None)
        if from_device == onto:
            self._launch(func, name)
        else:
            host = source if onto else target
            if not non_blocking or not getattr(host, "pretends_to_be_pinned", False):
                self.seen.wait("copy to the device" if onto else "copy to the host")
        if target is not None:
            _inner(target).copy_(_inner(source))
            return target
        kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
        found = func(_inner(source), **kwargs)
        return Pretended(found) if onto else found

    def _check(self, name: str, args: Any, kwargs: Any, ours: list[Any], others: list[torch.Tensor]) -> None:
        waits: list[str] = []
        if name in WAITING:
            waits.append(WAITING[name])
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            waits.append(name)
        elif name in INDEXING:
            indices = [index for index in args[1] if index is not None]
            waits += ["mask as index" for index in indices if index.dtype in (torch.bool, torch.uint8)]
            moved = [*indices, *args[2:3]] if "put" in name else indices
            waits += ["index or value on the host" for part in moved if not isinstance(part, Pretended)]
        elif name == "where":  # its kernel copies a number to the device first
            waits += ["where with a number" for other in others if other.ndim == 0]
        for why in waits:
            self.seen.wait(why)
        if ours and name not in INDEXING and any(other.ndim > 0 for other in others):
            self.seen.mixes[f"{name} {place()}"] += 1

    def _launch(self, func: Any, name: str) -> None:
        if not getattr(func, "is_view", False) and name not in SILENT:
            self.seen.launches[f"{name} {place()}"] += 1


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Pretended) else value


def _outer(inner: torch.Tensor, known: dict[int, Pretended]) -> Pretended:
    return known[id(inner)] if id(inner) in known else Pretended(inner)


def _compute(func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """The operation on the CPU; by torch's kernels for it, where those of the device have no twin there."""
    aten = torch.ops.aten
    if name == "_fused_sdp_choice":
        return 2  # memory-efficient attention, whose kernels take any mask
    if name == "_scaled_dot_product_efficient_attention":
        q, k, v, mask, _, _, causal = (*args, *(False,) * 7)[:7]
        causal, scale = kwargs.get("is_causal", causal), kwargs.get("scale")
        found = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        return (*found, *torch.zeros(2, dtype=torch.long).unbind())
    if name == "_scaled_dot_product_efficient_attention_backward":
        gradient, q, k, v, mask, out, sums, _, _, _, _, causal = (*args, False)[:12]
        back = aten._scaled_dot_product_flash_attention_for_cpu_backward
        causal, scale = kwargs.get("is_causal", causal), kwargs.get("scale")
        return (*back(gradient, q, k, v, out, sums, 0.0, causal, attn_mask=mask, scale=scale), None)
    if name.startswith("_fused_rms_norm"):
        from torch._decomp import decomposition_table

        return decomposition_table[func](*args, **kwargs)
    return func(*args, **kwargs)


def place() -> str:
    """File and line of the innermost code of ours, or of anything but torch, that runs."""
    frame, other = sys._getframe(1), ""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(SOURCE):
            return f"{name.removeprefix(SOURCE)}:{frame.f_lineno}"
        if not other and "/torch/" not in name and name != __file__:
            other = f"{'/'.join(name.split('/')[-2:])}:{frame.f_lineno}"
        frame = frame.f_back
    return other


@contextmanager
def pretended() -> Iterator[Seen]:
    """Within, the device "cuda" is there, pretended; gives what is counted.

    Raises:
        RuntimeError: torch's private interface is not as this needs it.
    """
    from torch.optim import optimizer
    from torch.utils import _foreach_utils

    seen, generator = Seen(), torch.Generator
    with ExitStack() as stack:
        event = SimpleNamespace(record=lambda: None, synchronize=lambda: seen.wait("event"))
        for name, value in {
            "cuda._lazy_init": None, "cuda.is_available": True, "cuda.is_initialized": True, "cuda.manual_seed": None,
            "cuda.is_bf16_supported": True, "cuda.is_current_stream_capturing": False, "cuda.Event": event,
            "cuda.max_memory_allocated": 0, "cuda.memory_allocated": 0, "cuda.reset_peak_memory_stats": None,
            "cuda.get_device_properties": SimpleNamespace(name="pretended", total_memory=80 << 30),
            "accelerator.is_available": True, "_C._get_accelerator": CUDA, "Generator": generator("cpu"),
        }.items():  # fmt: skip
            stack.enter_context(mock.patch(f"torch.{name}", lambda *_, value=value, **__: value))
        stack.enter_context(mock.patch("torch.cuda.synchronize", side_effect=lambda *_: seen.wait("synchronize")))
        for module in (optimizer, _foreach_utils):
            supported = [*module._foreach_supported_types, Pretended]
            stack.enter_context(mock.patch.object(module, "_foreach_supported_types", supported))
        overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # parameters of another class
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        torch._C._ensureCUDADeviceGuardSet()
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "'pin_memory' argument")
        stack.enter_context(_Mode(seen))
        yield seen
