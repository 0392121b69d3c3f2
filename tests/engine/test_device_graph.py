"""DeviceGraph against the recorded stand-in of conftest.py, and on CUDA where there is one."""

import pytest
import torch

from hermesflow.engine.device_graph import DeviceGraph

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


@pytest.mark.parametrize("device", DEVICES)
def test_every_call_runs_once(device):
    total, step = torch.zeros(3, device=device), torch.ones(3, device=device)

    def function():
        total.add_(step.clone().mul(2))

    graph = DeviceGraph(function, torch.device(device))
    for call in range(1, 6):
        graph()
        assert total.tolist() == [2.0 * call] * 3


def test_recorded_graphs_run_once_a_call_and_see_new_inputs(recorded_graphs):
    total, step = torch.zeros(3), torch.ones(3)
    calls = []

    def function():
        calls.append(1)
        view = step[1:]
        total[1:].add_(view * 2)

    graph = DeviceGraph(function, torch.device("cpu"))
    for value in range(1, 6):
        step.fill_(value)
        graph()
    assert total.tolist() == [0.0, 30.0, 30.0] and len(calls) == 2 and len(recorded_graphs) == 1


@pytest.mark.parametrize(
    "wait",
    [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x + torch.tensor([1.0, 2.0])],
    ids=["item", "nonzero", "data from the host"],
)
def test_recorded_graphs_refuse_what_cuda_graphs_cannot_hold(recorded_graphs, wait):
    values = torch.ones(2)
    graph = DeviceGraph(lambda: wait(values), torch.device("cpu"))
    graph()
    with pytest.raises(RuntimeError, match="waits for the device"):
        graph()
