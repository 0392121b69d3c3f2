"""What a call spends its time on, by torch's profiler, and what limits its kernels, by Nsight Compute.

python -m hermesflow.benchmarks.profiling REPORT [...]       # REPORT.ncu-rep, or what ncu --csv --page raw printed
"""

from __future__ import annotations

import argparse
import csv
import gzip
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from hermesflow.engine.phases import PHASES
from hermesflow.runtime.files import InputError, atomic_write, read_text, split_lines, write_text

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
        parts: names of record_function marks, the first of which holds the others.
    Returns: the table, own times in the order of size; after it the sums of the parts, and of the engine's phases.
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
    named = {*parts, *PHASES}
    rows = [(event.key, getattr(event, spent) / 1e6, event.count) for event in here if event.key not in named]
    rows = sorted(rows, key=lambda row: -row[1])[:NUM_PROFILED]
    lines = [f"{name}: {seconds:.3g} s under the profiler; own time of each {'kernel' if on_cuda else 'operation'}"]
    lines += [f"  {each:9.4f} s  {each / seconds:6.1%}  {count:7d} x  {key[:90]}" for key, each, count in rows]
    whole = "device_time_total" if on_cuda else "cpu_time_total"
    total = {event.key: getattr(event, whole) / 1e6 for event in here if event.key in named}
    phases = {name: total.pop(name) for name in PHASES if name in total}
    for title, sums, inside in (
        ("parts", total, total.get(parts[0], 0.0) if parts else 0.0),
        ("phases", phases, sum(phases.values())),
    ):
        if sums:
            sums["elsewhere"] = seconds - inside
            lines += [title, *(f"  {sums[name]:9.4f} s  {sums[name] / seconds:6.1%}  {name}" for name in sums)]
    text = "\n".join(lines) + "\n"
    write_text(folder / f"{name}.txt", text)
    return text


# The names of its metrics are those of the sections SpeedOfLight, Occupancy and LaunchStats of Nsight Compute.
_PERCENT = "pct_of_peak_sustained_elapsed"
NCU_METRICS = {
    "time": "gpu__time_duration.sum",
    "memory": f"gpu__compute_memory_throughput.avg.{_PERCENT}",
    "dram": f"gpu__dram_throughput.avg.{_PERCENT}",
    "compute": f"sm__throughput.avg.{_PERCENT}",
    "occupancy": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
_SECONDS = {"ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3, "s": 1, "second": 1}
_BUSY = 60.0
"""Per cent of its peak from which on a unit limits a kernel, as Nsight Compute's rules have it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelReport:
    """A launch as Nsight Compute saw it; shares are per cent, None where the report lacks them."""

    kernel: str
    seconds: float | None
    memory: float | None
    """Of the busiest part of the memory system: L1, L2 or DRAM."""
    dram: float | None
    compute: float | None
    """Of the busiest pipeline of the multiprocessors."""
    occupancy: float | None
    """Of the warps that a multiprocessor can hold."""
    registers: int | None
    """Of a thread."""

    @property
    def limiter(self) -> str:
        """memory, compute, both, or latency where neither is busy."""
        shares = {"memory": self.memory or 0.0, "compute": self.compute or 0.0}
        if max(shares.values()) < _BUSY:
            return "latency"
        return "both" if min(shares.values()) >= _BUSY else max(shares, key=shares.get)


def read_ncu(path: Path) -> list[KernelReport]:
    """The launches of a report of Nsight Compute.

    Args:
        path: FILE.ncu-rep, which ncu is called to print, or the text that `ncu --csv --page raw` printed.
    Raises: InputError if ncu is missing, or the text has no such table.
    """
    if path.suffix == ".ncu-rep":
        command = ["ncu", "--import", str(path), "--csv", "--page", "raw"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise InputError(f"{path}: ncu is not found; install Nsight Compute, or give its CSV") from None
        if done.returncode:
            reason = done.stderr.strip().partition("\n")[0][:200]
            raise InputError(f"{path}: ncu failed ({reason}); open it with the ncu that wrote it")
        text = done.stdout
    else:
        text = read_text(path)
    # What the program and ncu print comes before the table; its first row after the names has units.
    rows = list(csv.reader(line for line in split_lines(text) if line.startswith('"')))
    start = next((number for number, row in enumerate(rows) if "Kernel Name" in row), None)
    if start is None or len(rows) < start + 2:
        raise InputError(f"{path}: no table of Nsight Compute; make one: ncu --csv --page raw --import FILE.ncu-rep")
    names, units, *launches = rows[start:]
    unit = dict(zip(names, units, strict=False))
    return [_kernel_report(dict(zip(names, launch, strict=False)), unit) for launch in launches]


def _kernel_report(values: dict[str, str], unit: dict[str, str]) -> KernelReport:
    def number(name: str) -> float | None:
        text = values.get(NCU_METRICS[name], "").replace(",", "")  # 1,234.5
        return float(text) if text and text not in ("n/a", "nan") else None

    time, registers = number("time"), number("registers")
    return KernelReport(
        kernel=values["Kernel Name"],
        seconds=None if time is None else time * _SECONDS[unit[NCU_METRICS["time"]]],
        registers=None if registers is None else int(registers),
        **{name: number(name) for name in ("memory", "dram", "compute", "occupancy")},
    )


def ncu_table(reports: Sequence[KernelReport]) -> str:
    """A line a launch: time, per cent of the roofs, what limits it, registers, occupancy."""

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = ["       us memory % DRAM % compute % limiter registers warps %  kernel"]
    for one in reports:
        us = None if one.seconds is None else 1e6 * one.seconds
        shares = f"{shown(one.memory, '.1f'):>8} {shown(one.dram, '.1f'):>6} {shown(one.compute, '.1f'):>9}"
        rest = f"{one.limiter:>7} {shown(one.registers, 'd'):>9} {shown(one.occupancy, '.1f'):>7}"
        lines.append(f"{shown(us, '.1f'):>9} {shares} {rest}  {one.kernel[:60]}")
    return "\n".join(lines)


def main() -> int:
    """Returns: the exit code: 2 if a report cannot be read."""
    parser = argparse.ArgumentParser(description="what limits the kernels of reports of Nsight Compute")
    parser.add_argument("reports", nargs="+", type=Path)
    try:
        for path in parser.parse_args().reports:
            print(f"{path}\n{ncu_table(read_ncu(path))}")
    except InputError as error:
        print(f"profiling: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
