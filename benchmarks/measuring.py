"""How the benchmarks measure: interleaved rounds, peak memory, the roof of the device in the same run.

CUDA: events around each call, a buffer larger than the L2 cache written before it, so that it starts cold; the device
sleeps first, so that a call's launches are queued when it starts, as they are in use; short calls as CUDA graphs. CPU:
perf_counter, threads as torch has them; the calls of the others come in between.

Peak memory is what a call allocates at its worst moment beyond what was there before: temporaries, results, gradients,
no inputs. CUDA: torch's allocator statistics. CPU: the allocations that torch.profiler records, which are those of
torch's allocator, so also what C++ ops make inside themselves; what a library takes by malloc is not seen.
"""

from __future__ import annotations

import datetime
import gc
import itertools
import os
import platform
import subprocess
import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from hermesflow.engine.model_work import matmul_rate

Call = Callable[[], Any]
ROOT = Path(__file__).resolve().parents[1]
"""The checkout, or where the package is installed."""
MIB = 2**20
_HEAD_START = 2_000_000
"""Cycles that the device sleeps before a call is timed: 1 ms at 2 GHz, where Python takes 0.1 ms for an op."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A call, and how many times what is timed holds it."""

    run: Call
    times: int = 1
    name: str = ""
    peak: Call | None = None
    """A shorter call that needs as much memory at its worst moment; None is run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """Percentiles of one contender's times over its rounds."""

    ms_p20: float
    ms_p50: float
    ms_p80: float
    num_rounds: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """How long to measure."""

    seconds: float = 3.0
    """Aim for the rounds of one case."""
    min_rounds: int = 5
    """Rounds, however long they take."""
    max_rounds: int = 200
    """Rounds, however short they are."""
    baselines_once: bool = False
    """Of baselines one round, and further ones only in the seconds left: they are slow."""


def time_rounds(
    calls: Mapping[Hashable, Sequence[Part]], device: torch.device, effort: Effort, once: Collection[Hashable] = ()
) -> dict[Hashable, Times]:
    """Time calls in turn, round by round, each round starting with another one.

    Args:
        calls: key -> the parts whose times add up; each has run before.
        device: where they run.
        effort: rounds.
        once: keys that need one round alone; further ones are timed while there is time.
    Returns: key -> its times.
    """
    time_one = _cuda_timer(device) if device.type == "cuda" else _cpu_ms
    samples: dict[Hashable, list[list[tuple[int, Callable[[], float]]]]] = {key: [] for key in calls}
    keys, end, num_rounds = list(calls), time.perf_counter() + effort.seconds, 0
    while num_rounds < effort.min_rounds or (num_rounds < effort.max_rounds and time.perf_counter() < end):
        first = num_rounds % len(keys)
        for key in keys[first:] + keys[:first]:
            if key not in once or num_rounds == 0 or time.perf_counter() < end:
                samples[key].append([(part.times, time_one(part.run)) for part in calls[key]])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        num_rounds += 1
    return {
        key: percentiles([sum(times * read() for times, read in parts) for parts in rounds])
        for key, rounds in samples.items()
    }


def percentiles(samples: Sequence[float]) -> Times:
    """Of milliseconds."""
    p20, p50, p80 = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return Times(ms_p20=p20, ms_p50=p50, ms_p80=p80, num_rounds=len(samples))


def _cpu_ms(call: Call) -> Callable[[], float]:
    start = time.perf_counter()
    call()
    elapsed = (time.perf_counter() - start) * 1e3
    return lambda: elapsed


def _cuda_timer(device: torch.device) -> Callable[[Call], Callable[[], float]]:
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(max(2 * cache_bytes, 256 << 20), dtype=torch.int8, device=device)

    def time_one(call: Call) -> Callable[[], float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HEAD_START)
        flush.zero_()
        begin.record()
        call()
        end.record()
        return lambda: begin.elapsed_time(end)

    return time_one


def as_cuda_graph(call: Call) -> Call:
    """The call's replay as a CUDA graph. Raises: RuntimeError if it cannot be captured: it waits for the device."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
        # A capture that fails halfway leaves torch's random generator unusable; a wait is what makes it fail.
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_bytes(call: Call, device: torch.device) -> int:
    """Most bytes that one call has allocated at a time."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its start and end on stderr otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes), default=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Roof:
    """What this device reached while the benchmark ran; the best of a few tries."""

    device: torch.device
    bytes_per_s: float
    """Of a copy, bytes read and written."""

    def flops_per_s(self, dtype: torch.dtype) -> float:
        """Of a large square matmul in this dtype."""
        return matmul_rate(self.device, dtype)

    def seconds(self, num_bytes: int, num_flops: int, dtype: torch.dtype) -> float:
        """The least time for this many bytes and operations."""
        return max(num_bytes / self.bytes_per_s, num_flops / self.flops_per_s(dtype))


def measure_roof(device: torch.device) -> Roof:
    """Measure the copy bandwidth; matmul rates are measured when a case asks for its dtype's."""
    source = torch.ones((1 << 30 if device.type == "cuda" else 1 << 27) // 4, device=device)
    target = torch.empty_like(source)
    return Roof(device=device, bytes_per_s=2 * source.nbytes / _best_s(lambda: target.copy_(source), device))


def _best_s(call: Call, device: torch.device) -> float:
    time_one = _cuda_timer(device) if device.type == "cuda" else _cpu_ms
    call()
    reads = [time_one(call) for _ in range(5)]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return min(read() for read in reads) / 1e3


def run_facts(device: torch.device) -> dict[str, Any]:
    """The fields that all lines of a run share."""
    triton = next((found.version for found in metadata.distributions(name="triton")), None)
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    except FileNotFoundError:
        commit = None
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {"device": name, "torch": torch.__version__, "triton": triton, "commit": commit, "date": date}


def _cpu_name() -> str:
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        facts = []
    names = [line.partition(":")[2].strip() for line in facts if line.startswith("model name")]
    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.machine()}, {threads} threads, {capability}"
