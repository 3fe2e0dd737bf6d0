"""CUDA graphs on a CPU: what is recorded is done again, on the memory that it was recorded on."""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Graph:
    """The operations of a step with the tensors that they read and write; recording them changes nothing."""

    recorded = 0

    def __init__(self):
        self.calls, self.replays = [], 0

    def replay(self):
        self.replays += 1
        for func, args, kwargs, outs in self.calls:
            for out, new in zip(outs, _tensors(func(*args, **kwargs)), strict=True):
                if out is not new and not func.is_view:
                    out.copy_(new)


class _Recorder(TorchDispatchMode):
    """Results stay where they were made, as in the memory of a graph; what else is written to is put back."""

    def __init__(self, calls):
        super().__init__()
        self.calls, self.before = calls, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func is not torch.ops.aten._local_scalar_dense.default, "a graph cannot wait for a number"
        for argument, value in [*zip(func._schema.arguments, args, strict=False)]:
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.append((value, value.clone()))
        for out in _tensors(kwargs.get("out")):
            self.before.append((out, out.clone()))
        found = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, _tensors(found)))
        return found


def _tensors(value):
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


@contextmanager
def _graph(graph, pool=None):
    recorder = _Recorder(graph.calls)
    with recorder:
        yield
    for tensor, before in reversed(recorder.before):
        tensor.copy_(before)
    Graph.recorded += 1


def pretend_graphs(monkeypatch):
    """Let `torch.cuda` have such graphs."""
    Graph.recorded = 0
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", _graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
