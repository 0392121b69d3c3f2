"""`hermesflow bench ops`: every op on every backend against the published algorithm, torch.compile and public peers.

An op's tests run first, then each backend's result is compared with the reference on the case's own inputs; what is
not right is not timed. Backends come from the registry, baselines from the cases.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from hermesflow.benchmarks import peers, roofline
from hermesflow.benchmarks.attention_cases import SHAPES as ATTENTION_SHAPES
from hermesflow.benchmarks.attention_cases import span_cases
from hermesflow.benchmarks.case import Call, Case
from hermesflow.benchmarks.lines import MEASURED, Line, console_table, write_lines
from hermesflow.benchmarks.measuring import (
    MIB,
    ROOT,
    Effort,
    Roof,
    as_cuda_graph,
    check_device,
    check_names,
    measure_roof,
    peak_bytes,
    run_facts,
    time_rounds,
)
from hermesflow.benchmarks.op_cases import BUILDERS
from hermesflow.benchmarks.op_cases import SHAPES as OP_SHAPES
from hermesflow.kernels import registry
from hermesflow.runtime.files import InputError

SHAPES = tuple(OP_SHAPES)
OPS = (*BUILDERS, "span_attention")
BASELINES = ("naive", "compile", "liger", "cut_cross_entropy", "trl", "flashinfer", "quack", "flex")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What to measure."""

    device: str = "cpu"
    shape: str = "small"
    """tiny, small or showo-1.3b."""
    ops: Sequence[str] = ()
    """Empty is all."""
    backends: Sequence[str] = ()
    """Empty is every backend that can run."""
    baselines: Sequence[str] = ()
    """Empty is every baseline that can run."""
    out: Path | None = None
    """File of JSON lines."""
    plot: Path | None = None
    """PNG."""
    test: bool = True
    """Run the op's tests first, where they are."""

    def __post_init__(self) -> None:
        check_names("--shape", [self.shape], SHAPES)
        check_names("--op", self.ops, OPS)
        check_names("--backend", self.backends, {name for of_op in registry.backends().values() for name in of_op})
        check_names("--baseline", self.baselines, BASELINES)
        check_device(self.device)
        if self.plot:
            roofline.check_matplotlib()


def run_ops(settings: Settings) -> int:
    """Measure, print the table, write lines and picture.

    Args:
        settings: what to measure and where to write.
    Returns: 0, or 1 if a result was wrong.
    Raises: InputError if nothing could be measured or a file cannot be written.
    """
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)
    device = torch.device(settings.device)
    lines, notes = [], []
    facts = run_facts(device)  # before the file is written, which may make the checkout dirty
    _save(settings, lines)  # a path that cannot be written shows now
    roof = measure_roof(device)
    console.print(f"{facts['device']}: copy {roof.bytes_per_s / 1e9:.3g} GB/s")
    for op in settings.ops or OPS:
        failure = _test_failure(op, console) if settings.test else None
        for case in _cases(op, settings.shape, device):
            console.print(f"{case.name} [{case.shape}, {_dtype(case)}]")
            lines += [line | facts for line in _measure(case, settings, roof, failure, notes)]
            _save(settings, lines)
            torch.compiler.reset()
    if not lines:
        raise InputError(f"bench ops: nothing could be measured ({'; '.join(notes)})")
    title = f"ops, {settings.shape}, {facts['device']}: median ms; times as fast as each baseline (its ms and peak MiB)"
    console.print(console_table(lines, title))
    for note in dict.fromkeys(notes):
        console.print(f"not measured: {note}")
    if settings.plot:
        roofline.plot_roofline(lines, settings.plot)
    return int(any("failed" in line for line in lines))


def _save(settings: Settings, lines: list[Line]) -> None:
    if settings.out:
        write_lines(settings.out, lines)


def _cases(op: str, shape: str, device: torch.device) -> Iterator[Case]:
    torch.manual_seed(0)
    if op == "span_attention":
        yield from span_cases(ATTENTION_SHAPES[shape], device)
    else:
        yield BUILDERS[op](*OP_SHAPES[shape][op], device)


def _test_failure(op: str, console: Console) -> str | None:
    """Run the op's tests; None, or that they fail. Only a source checkout has them."""
    tests = ROOT / "tests" / "kernels" / f"test_{op}.py"
    if not tests.exists():
        console.print(f"{op}: no source checkout, so its tests are not run; its results are compared all the same")
        return None
    console.print(f"{op}: {tests.relative_to(ROOT)}")
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONSAFEPATH": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return None
    console.print(done.stdout[-4000:] + done.stderr[-2000:])
    return f"{tests.name} fails"


def _measure(case: Case, settings: Settings, roof: Roof, failure: str | None, notes: list[str]) -> list[Line]:
    """The case's lines, without what all lines of a run share; what cannot run goes into the notes."""
    backends: dict[str, Call] = {}
    lines = []
    of_op = registry.backends()[case.op]
    for name in settings.backends or of_op:
        reason = of_op.get(name, f"not a backend of {case.op}")
        if reason:
            notes.append(f"{name}: {reason}")
            continue
        try:
            wrong = failure or case.check(name)
        except registry.BackendError as refusal:
            notes.append(str(refusal))
            continue
        except Exception as error:  # whatever a kernel raises makes its gate red; the other backends go on
            wrong = _in_one_line(error)
        if wrong is None:
            backends[name] = partial(case.run, name)
        else:
            lines.append(_line(case, name, None) | dict.fromkeys(MEASURED) | {"failed": wrong})
    baselines = _baselines(case, settings, notes) if backends else {}
    calls = {("backend", name): call for name, call in backends.items()}
    calls |= {("baseline", name): call for name, call in baselines.items()}
    if not backends:
        return lines

    device = roof.device
    peaks = {name: peak_bytes(call, device) / MIB for name, call in calls.items()}
    if case.short and device.type == "cuda":
        calls = {name: _as_graph(case, name, call, notes) for name, call in calls.items()}
    times = time_rounds(calls, device, Effort(seconds=0.05, min_rounds=3) if settings.shape == "tiny" else Effort())
    for name in backends:
        mine = times["backend", name]
        seconds = mine.ms_p50 / 1e3
        measured = asdict(mine) | {
            "peak_mib": peaks["backend", name],
            "gb_s": case.num_bytes / seconds / 1e9,
            "tflop_s": case.num_flops / seconds / 1e12,
            "roof_fraction": roof.seconds(case.num_bytes, case.num_flops, case.dtype) / seconds,
        }
        for baseline in baselines or [None]:
            theirs = times.get(("baseline", baseline))
            compared = {
                "baseline_ms_p50": theirs and theirs.ms_p50,
                "speedup": theirs and theirs.ms_p50 / mine.ms_p50,
                "baseline_peak_mib": peaks.get(("baseline", baseline)),
            }
            values = measured | compared
            lines.append(_line(case, name, baseline) | {field: values[field] for field in MEASURED})
    return lines


def _baselines(case: Case, settings: Settings, notes: list[str]) -> dict[str, Call]:
    """The baselines that run here and compute the same function."""
    ready: dict[str, Callable[[], Call]] = {"naive": lambda: case.naive, "compile": lambda: case.compiled} | case.peers
    calls = {}
    for name, prepare in ready.items():
        if settings.baselines and name not in settings.baselines:
            continue
        try:
            call = prepare()
            if case.agrees(call()):
                calls[name] = call
            else:
                notes.append(f"{name} on {case.name}: its result is another one")
        except peers.Unavailable as reason:
            notes.append(f"{name}: {reason}")
        except Exception as error:  # a library of others must not end our run
            notes.append(f"{name} on {case.name}: {_in_one_line(error)}")
    return calls


def _as_graph(case: Case, name: tuple[str, str], call: Call, notes: list[str]) -> Call:
    try:
        return as_cuda_graph(call)
    except RuntimeError as error:
        notes.append(f"{case.name}: {' '.join(name)} timed without a CUDA graph: {_in_one_line(error)}")
        return call


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _line(case: Case, backend: str, baseline: str | None) -> Line:
    return {
        "bench": "ops", "case": case.name, "shape": case.shape, "dtype": _dtype(case), "backend": backend,
        "baseline": baseline,
    }  # fmt: skip


def _dtype(case: Case) -> str:
    return str(case.dtype).removeprefix("torch.")
