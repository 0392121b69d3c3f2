"""What the engine's tests share; among it a stand-in for CUDA graphs."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hermesflow.engine import device_graph

WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh", "aten::is_nonzero", "aten::masked_select")
"""What a CUDA graph cannot hold: it waits for the device, or brings data from the host."""


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.name().partition(".")[0] in WAITS:
            raise RuntimeError(f"{func.name()} waits for the device or brings data from the host")
        out = func(*args, **kwargs)
        # Views too: in inference mode what may be a copy, as aten::to, comes here as one of them.
        self.calls.append((func, args, kwargs, tree_leaves(out)))
        return out


def record(function, _device):
    """A replay of the function's operations on the very tensors that they had when it was recorded.

    Unlike a CUDA graph's capture, recording runs the function, so the first replay has been done already.
    """
    recorder = _Recorder()
    with recorder:
        function()
    replays = itertools.count()

    def replay():
        if next(replays) == 0:
            return
        for func, args, kwargs, outs in recorder.calls:
            for new, old in zip(tree_leaves(func(*args, **kwargs)), outs, strict=True):
                if isinstance(new, torch.Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)

    return replay


@pytest.fixture(scope="session")
def layout(naive):
    """The layout of the naive module's tiny models."""
    return naive.LAYOUT


@pytest.fixture
def recorded_graphs(monkeypatch):
    """DeviceGraph replays on the CPU what it recorded, as it does on CUDA; holds the recorded functions' names."""
    names = []

    def capture(function, device):
        replay = record(function, device)
        names.append(getattr(function, "__qualname__", str(function)))
        return replay

    monkeypatch.setattr(device_graph, "capture", capture)
    monkeypatch.setattr(device_graph, "captures", lambda device: True)
    return names
