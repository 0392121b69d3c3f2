"""A function of fixed tensors that is called again and again: on CUDA as a captured graph."""

from __future__ import annotations

from collections.abc import Callable

import torch


class DeviceGraph:
    """Calls a function; on CUDA the first call runs it, the second captures it, and from then on it is replayed.

    The function takes and returns nothing: it reads and writes tensors that stay where they are, in shapes that do not
    change, and never waits for the device. Whoever replays it after new inputs copies them into those tensors.
    Raises: RuntimeError, on CUDA, if the function waits for the device.
    """

    def __init__(self, function: Callable[[], None], device: torch.device) -> None:
        self._function, self._device = function, device
        self._replay: Callable[[], None] | None = None
        self._has_run = False

    def __call__(self) -> None:
        if self._replay is None and self._has_run:
            self._replay = capture(self._function, self._device)
        if self._replay is not None:
            self._replay()
            return
        self._function()
        self._has_run = True


def captures(device: torch.device) -> bool:
    """Whether work on the device can be captured."""
    return device.type == "cuda"


def capture(function: Callable[[], None], device: torch.device) -> Callable[[], None] | None:
    """What replays the function's work on the device; capturing does not run it. None where nothing is captured."""
    if not captures(device):
        return None
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
    return graph.replay
