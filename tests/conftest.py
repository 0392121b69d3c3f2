"""What several tests share."""

import importlib.util
import itertools
import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hermesflow.engine import device_graph


def pytest_configure():
    """One thread a process, those that tests start included, whatever the shell says: threads of several processes wait
    for one another where they share the cores, and the last digit of a sum depends on how many threads took it."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def naive():
    """The truth that the engine is held to, engine/naive.py, which lies in no package."""
    spec = importlib.util.spec_from_file_location("engine_naive", Path(__file__).parent / "engine" / "naive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def full_disk(tmp_path):
    """A folder on a file system of 64 KiB, all of it in use; needs the right to mount one."""
    folder = tmp_path / "full-disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "hermesflow-test", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("cannot make a small disk: there is no mount command")
    if done.returncode:
        pytest.skip(f"cannot make a small disk: {done.stderr.strip()}")
    try:
        with pytest.raises(OSError), (folder / "filling").open("wb", buffering=0) as filling:
            while True:
                filling.write(bytes(4096))
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def no_folder(tmp_path):
    """A path that cannot become a folder, for root neither: it lies below a regular file."""
    blocker = tmp_path / "a-file"
    blocker.touch()
    return blocker / "folder"


@pytest.fixture(autouse=True)
def _no_backend_chosen(monkeypatch):
    """A backend or debug mode that the developer's shell asks for must not change what the tests test."""
    for name in [name for name in os.environ if name.startswith("HERMESFLOW_")]:
        monkeypatch.delenv(name)


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
