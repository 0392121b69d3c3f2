"""What a call spends its time on, by torch's profiler: a trace and a table of its operations or kernels."""

from __future__ import annotations

import gzip
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from hermesflow.runtime.files import atomic_write, write_text

NUM_PROFILED = 15
"""Operations in a profile's table."""


def write_profile(
    name: str, run: Callable[[], object], device: torch.device, folder: Path, parts: Sequence[str] = ()
) -> str:
    """Runs a call once and writes folder/NAME.json.gz, a trace for Perfetto or chrome://tracing, and folder/NAME.txt.

    Args:
        name: of the files.
        run: the call.
        device: where it computes; on CUDA the table has kernels, on the CPU operations.
        folder: an existing one.
        parts: names of record_function marks, the first of which holds the others; their sums are added to the table.
    Returns: the table, own times in the order of size.
    Raises: InputError if a file cannot be written.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its start and end on stderr otherwise
    on_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as recorded:
        start = time.perf_counter()
        run()
        if on_cuda:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as outside, atomic_write(folder / f"{name}.json.gz") as temporary:
        trace = Path(outside) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        temporary.write_bytes(gzip.compress(trace.read_bytes()))
    averages = recorded.key_averages()
    spent = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    # On CUDA an operation's row repeats the time of its kernels, which have rows of their own.
    here = [event for event in averages if (event.device_type == DeviceType.CUDA) == on_cuda]
    rows = [(event.key, getattr(event, spent) / 1e6, event.count) for event in here if event.key not in parts]
    rows = sorted(rows, key=lambda row: -row[1])[:NUM_PROFILED]
    lines = [f"{name}: {seconds:.3g} s under the profiler; own time of each {'kernel' if on_cuda else 'operation'}"]
    lines += [f"  {each:9.4f} s  {each / seconds:6.1%}  {count:7d} x  {key[:90]}" for key, each, count in rows]
    if parts:
        total = {event.key: event.cpu_time_total / 1e6 for event in averages if event.key in parts}
        total["elsewhere"] = seconds - total[parts[0]]
        lines += ["parts", *(f"  {total[part]:9.4f} s  {total[part] / seconds:6.1%}  {part}" for part in total)]
    text = "\n".join(lines) + "\n"
    write_text(folder / f"{name}.txt", text)
    return text
