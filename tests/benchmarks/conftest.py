"""What the tests of the benchmarks share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads wait for each other where other processes use the cores."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
