"""What the kernels' tests share: every backend that this process can run, and the rules of tolerance and memory.

A test that takes the argument `backend`, in a module with a constant OP, runs once for each backend of that op.
Triton and CUDA need a GPU; where there is none, test_without_a_gpu.py runs those cases in processes of their own: by
Triton's interpreter (TRITON_INTERPRET=1) and by the emulator of CUDA (HERMESFLOW_TEST_EXTENSION names the library
that tests/csrc/build_extension.py makes).
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if "HERMESFLOW_TEST_EXTENSION" in os.environ and "hermesflow.kernels._C" not in sys.modules:
    spec = importlib.util.spec_from_file_location("hermesflow.kernels._C", os.environ["HERMESFLOW_TEST_EXTENSION"])
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])

from hermesflow.kernels import checks, registry  # noqa: E402 - after the extension that it is to find

GPU_BACKENDS, LIBRARIES = ("cuda", "triton"), ("flash_attn", "xformers")
# Ops whose Triton kernels multiply matrices in bf16 or round to it, both of which the interpreter does wrongly.
NO_BF16 = ("linear_logprob", "span_attention", "token_logprob")
INTERPRETED, EMULATED = checks.triton_interprets(), checks.cuda_emulated()
ONLY = ("triton",) if INTERPRETED else ("cuda",) if EMULATED else None  # of a process without a GPU


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One case for each backend of the op that this process can run; libraries that are not installed and
    kernels that need a GPU have none, an extension that was not built shows as a skip."""
    if "backend" not in metafunc.fixturenames or not hasattr(metafunc.module, "OP"):
        return
    import_module(f"hermesflow.kernels.{metafunc.module.OP}")
    cases = []
    for name in registry._registered[metafunc.module.OP]:
        reason = registry._environment_refusal(name)
        absent = name in LIBRARIES or (name in GPU_BACKENDS and not torch.cuda.is_available())
        if (name in ONLY) if ONLY is not None else not (reason and absent):
            cases.append(pytest.param(name, marks=[pytest.mark.skip(reason=reason)] if reason else []))
    metafunc.parametrize("backend", cases)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a process without a GPU: the cases of its backends alone; for Triton little bf16, no torch.compile.

    In the process that starts those, they come first, since each takes long: what is left for the last worker is short.
    """
    if ONLY is None:
        items.sort(key=lambda item: item.path.name != "test_without_a_gpu.py")
        return
    kept = []
    for item in items:
        values = getattr(getattr(item, "callspec", None), "params", {})
        low = any(value is torch.bfloat16 for value in values.values())
        untrusted = INTERPRETED and (low and item.module.OP in NO_BF16 or "compiles" in item.name)
        if values.get("backend") in ONLY and not untrusted:
            kept.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the case's tensors lie: on the GPU if there is one, but for the C++ backend."""
    values = getattr(getattr(request.node, "callspec", None), "params", {})
    on_gpu = torch.cuda.is_available() and ONLY is None and values.get("backend") != "cpu"
    return torch.device("cuda" if on_gpu else "cpu")


@pytest.fixture
def check_error_budget() -> Callable[..., None]:
    """The tolerance rule of all ops: at most twice the error of plain torch in the same dtype, plus a floor."""

    def check(got: Tensor, truth: Tensor, plain: Tensor) -> None:
        """got and plain against the fp64 truth; the floor is four roundings of got's dtype at the truth's scale."""
        assert got.shape == truth.shape
        if not truth.numel():
            return
        floor = 4 * torch.finfo(got.dtype).eps * truth.abs().max().clamp(min=1e-3)
        error, budget = (got.double() - truth).abs().max(), 2 * (plain.double() - truth).abs().max() + floor
        assert error <= budget, f"error {error:.3g} above the budget {budget:.3g}"

    return check


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any result of the operations under it has."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(result) if torch.is_tensor(leaf))])
        return result


@pytest.fixture
def largest_tensor() -> LargestTensor:
    """with largest_tensor as seen: ... afterwards seen.numel is the size of the largest tensor that was made."""
    return LargestTensor()


@pytest.fixture
def peak_bytes() -> Callable[[Callable[[], object]], int]:
    """peak_bytes(function): the most bytes that its allocations on the CPU hold at once, those inside C++ included."""

    def measure(function: Callable[[], object]) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            kept = function()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        assert kept is not None and held >= 0
        return peak

    return measure
