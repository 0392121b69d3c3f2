"""What the four benchmarks share: settings, and a run that times contests, writes their lines and shows the table.

A benchmark declares its cases as contests, calls of ours and of baselines that do the same. It compares their results
first: what is not right is not timed.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hermesflow.benchmarks.lines import MEASURED, Line, console_table, write_lines
from hermesflow.benchmarks.measuring import (
    MIB,
    Effort,
    Part,
    Times,
    measure_roof,
    peak_bytes,
    run_facts,
    time_rounds,
)
from hermesflow.engine.model_work import Work
from hermesflow.runtime.files import InputError

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseSettings:
    """What to measure."""

    device: str = "cpu"
    """cpu or cuda."""
    shape: str = "small"
    """One of the benchmark's SHAPES."""
    out: Path | None = None
    """File of JSON lines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings(BaseSettings):
    """What to measure of a whole model."""

    dtype: str = "float32"
    """float32 or bfloat16."""
    cases: Sequence[str] = ()
    """Empty is all."""

    def check(self, shapes: Collection[str], cases: Collection[str]) -> None:
        """Raise InputError unless all of these can be measured."""
        check_names("--shape", [self.shape], shapes)
        check_names("--dtype", [self.dtype], DTYPES)
        check_names("--case", self.cases, cases)
        check_device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        """dtype as torch has it."""
        return getattr(torch, self.dtype)


def check_names(option: str, names: Sequence[str], known: Collection[str]) -> None:
    """Raise InputError unless the option's names are known."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"{option}: expected {', '.join(sorted(known))}, got {unknown[0]!r}")


def check_device(name: str) -> None:
    """Raise InputError unless the device can be measured."""
    if name not in ("cpu", "cuda"):
        raise InputError(f"--device: expected cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device; `hermesflow doctor` says why")


@dataclass(frozen=True, kw_only=True)
class Contest:
    """A case: calls of ours and of baselines, what they need at least and what they make."""

    case: str
    shape: str
    """Its sizes in words."""
    dtype: torch.dtype
    ours: Mapping[str, Part]
    """By backend."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Backends that are not among ours since their results are wrong, and what is wrong."""
    baselines: Mapping[str, Sequence[Part]]
    passes: Sequence[Work]
    """What a call needs at least; one after the other, so that each has a roof of its own."""
    items: Mapping[str, int] = field(default_factory=dict)
    """What a call makes, where its rate counts."""
    more: Line = field(default_factory=dict)
    """Further fields of its lines."""


class Run:
    """One run of a benchmark. Of the fields of its lines, the rates of this device being measured in the same run:

    mfu             FLOPs of all passes / time / matmul rate in the case's dtype; where items are made
    roof_fraction   sum over the passes of max(FLOPs / matmul rate, bytes / copy bandwidth) / time
    """

    def __init__(self, bench: str, settings: BaseSettings, effort: Effort, dtype: torch.dtype | None = None) -> None:
        """Measure the roof and say what it is.

        Args:
            bench: as lines name it.
            settings: already checked.
            effort: how long to time each case.
            dtype: of all cases, if they share one.
        Raises: InputError if settings.out cannot be written.
        """
        self.bench, self.settings, self.effort = bench, settings, effort
        self.device = torch.device(settings.device)
        self.console = Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)
        self.facts = run_facts(self.device)  # before the file is written, which may make the checkout dirty
        self.lines: list[Line] = []
        self.notes: list[str] = []
        """What could not be measured, and why; print_table shows it."""
        self._add()  # a path that cannot be written shows now
        self.roof = measure_roof(self.device)
        rates = f"copy {self.roof.bytes_per_s / 1e9:.3g} GB/s"
        if dtype is not None:
            rates += f", matmul {_name(dtype)} {self.roof.flops_per_s(dtype) / 1e12:.3g} TFLOP/s"
        self.console.print(f"{self.facts['device']}: {rates}")

    def is_right(self, comparisons: Iterable[str | None]) -> bool:
        """Whether none of the comparisons says what is wrong; the first that does is printed and ends them."""
        wrong = next(filter(None, comparisons), None)
        if wrong is not None:
            self.console.print(f"not measured: {wrong}")
        return wrong is None

    def measure(self, *contests: Contest) -> None:
        """Time contests in the same rounds and write their lines; a baseline that they name alike is timed once.

        Raises: InputError if settings.out cannot be written.
        """
        for contest in contests:
            self.console.print(f"{contest.case} [{contest.shape}, {_name(contest.dtype)}]")
            for backend, wrong in contest.failed.items():
                line = _identity(self.bench, contest, backend, None)
                self._add(line | dict.fromkeys(MEASURED) | {"failed": wrong})
        ours = {(of.case, backend): [part] for of in contests for backend, part in of.ours.items()}
        if not ours:
            return
        baselines = {name: parts for of in contests for name, parts in of.baselines.items()}
        calls, device = ours | baselines, self.device
        peaks = {key: max(peak_bytes(part.peak or part.run, device) for part in calls[key]) / MIB for key in calls}
        times = time_rounds(calls, device, self.effort, once=baselines if self.effort.baselines_once else ())
        self.record(contests, times, peaks)

    def record(self, contests: Sequence[Contest], times: Mapping[Any, Times], peaks: Mapping[Any, float]) -> None:
        """Write the lines of contests whose times are known.

        Args:
            contests: their calls are not made.
            times, peaks: times and peak MiB of (case, backend), and of a baseline's name.
        """
        for contest in contests:
            for backend in contest.ours:
                for baseline in contest.baselines or [None]:
                    self._add(self._line(contest, backend, baseline, times, peaks))

    def print_table(self, against: str | None = None) -> None:
        """Show the lines and the notes. Args: against: what baselines are, in words; None: there are none."""
        title = f"{self.bench.replace('_', '-')}, {self.settings.shape}, {self.facts['device']}: median ms"
        title += f"; times as fast as {against} (its ms and peak MiB)" if against else ""
        self.console.print(console_table(self.lines, title))
        for note in dict.fromkeys(self.notes):
            self.console.print(f"not measured: {note}")

    def _add(self, *lines: Line) -> None:
        self.lines += [line | self.facts for line in lines]
        if self.settings.out:
            write_lines(self.settings.out, self.lines)

    def _line(
        self,
        contest: Contest,
        backend: str,
        baseline: str | None,
        times: Mapping[Any, Times],
        peaks: Mapping[Any, float],
    ) -> Line:
        """A line without what all lines of a run share."""
        mine, theirs, dtype = times[contest.case, backend], times.get(baseline), contest.dtype
        seconds, num_flops = mine.ms_p50 / 1e3, sum(work.num_flops for work in contest.passes)
        least = sum(self.roof.seconds(work.num_bytes, work.num_flops, dtype) for work in contest.passes)
        line = _identity(self.bench, contest, backend, baseline) | {
            "ms_p20": mine.ms_p20,
            "ms_p50": mine.ms_p50,
            "ms_p80": mine.ms_p80,
            "baseline_ms_p50": theirs and theirs.ms_p50,
            "speedup": theirs and theirs.ms_p50 / mine.ms_p50,
            "peak_mib": peaks[contest.case, backend],
            "baseline_peak_mib": peaks.get(baseline),
            "gb_s": sum(work.num_bytes for work in contest.passes) / seconds / 1e9,
            "tflop_s": num_flops / seconds / 1e12,
            "roof_fraction": least / seconds,
        }
        if contest.items:
            line["mfu"] = num_flops / seconds / self.roof.flops_per_s(dtype)
            line["items_per_s"] = {name: count / seconds for name, count in contest.items.items()}
        if self.effort.baselines_once:
            scaled = [f"{part.name} x {part.times}" for part in contest.baselines.get(baseline, ()) if part.times > 1]
            line["num_rounds"], line["baseline_rounds"] = mine.num_rounds, theirs.num_rounds if theirs else 0
            line["baseline_scaled"] = ", ".join(scaled) or None
        return line | contest.more


def _identity(bench: str, contest: Contest, backend: str, baseline: str | None) -> Line:
    return {
        "bench": bench,
        "case": contest.case,
        "shape": contest.shape,
        "dtype": _name(contest.dtype),
        "backend": backend,
        "baseline": baseline,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
