"""CUDA graphs that are only pretended: what is recorded is done again, on the memory that it was recorded on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph:
    """The operations of a step with the tensors that they read and write; recording them changes nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    def replay(self) -> None:
        """Do all of it again."""
        for func, args, kwargs, outs in self.calls:
            for out, new in zip(outs, _tensors(func(*args, **kwargs)), strict=True):
                if out is not new and not func.is_view:
                    out.copy_(new)


class _Recorder(TorchDispatchMode):
    """Results stay where they were made, as in the memory of a graph; what else is written to is put back."""

    def __init__(self, calls: list[Any]) -> None:
        super().__init__()
        self.calls, self.before = calls, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert func is not torch.ops.aten._local_scalar_dense.default, "a graph cannot wait for a number"
        named = [*zip(func._schema.arguments, args, strict=False)]
        named += [(argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs]
        written = [value for argument, value in named if argument.alias_info and argument.alias_info.is_write]
        self.before += [(tensor, tensor.clone()) for tensor in written]
        found = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, _tensors(found)))
        return found


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@contextmanager
def pretended_graphs(kind: type[Graph] = Graph) -> Iterator[list[Graph]]:
    """Within, `torch.cuda` has such graphs; gives those that are recorded."""
    recorded: list[Graph] = []

    @contextmanager
    def record(graph: Graph, pool: Any = None) -> Iterator[None]:
        recorder = _Recorder(graph.calls)
        with recorder:
            yield
        for tensor, before in reversed(recorder.before):
            tensor.copy_(before)
        recorded.append(graph)

    parts = {"CUDAGraph": kind, "graph": record, "graph_pool_handle": lambda: None}
    with mock.patch.multiple(torch.cuda, **parts):
        yield recorded
