"""Names for the phases of the engine's work, for profilers."""

from __future__ import annotations

import contextlib
import functools
import os
from contextlib import AbstractContextManager

import torch
from torch.profiler import record_function

PHASES = ("prefill", "step", "head", "judge", "pass")
"""The transformer over prompts, and over a step of images or answers; the head and the draws from it; scoring of given
answers; a forward and backward pass of training. Phases are never nested."""
_NOTHING = contextlib.nullcontext()


def phase(name: str) -> AbstractContextManager:
    """A range of one of PHASES: of torch.profiler while it records, of NVTX under Nsight, else nothing.

    A replayed CUDA graph has no ranges, since no Python runs.
    """
    assert name in PHASES, name
    if torch.autograd._profiler_enabled():
        return record_function(name)
    return torch.cuda.nvtx.range(name) if _is_under_nsight() else _NOTHING


@functools.cache
def _is_under_nsight() -> bool:
    """Nsight Systems and Compute name the library that collects NVTX ranges in this variable."""
    return "NVTX_INJECTION64_PATH" in os.environ and torch.cuda.is_available()
