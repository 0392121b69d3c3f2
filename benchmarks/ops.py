"""`hermesflow bench ops`: every op on every backend against the published algorithm, torch.compile and public peers.

An op's tests run first, then each backend's result is compared with the reference on the case's own inputs; what is
not right is not timed. Backends come from the registry, baselines from the cases.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from hermesflow.benchmarks import peers, roofline
from hermesflow.benchmarks.attention_cases import SHAPES as ATTENTION_SHAPES
from hermesflow.benchmarks.attention_cases import span_cases
from hermesflow.benchmarks.case import Case
from hermesflow.benchmarks.measuring import ROOT, Call, Effort, Part, as_cuda_graph
from hermesflow.benchmarks.op_cases import BUILDERS
from hermesflow.benchmarks.op_cases import SHAPES as OP_SHAPES
from hermesflow.benchmarks.profiling import write_profile
from hermesflow.benchmarks.runner import BaseSettings, Contest, Run, check_device, check_names
from hermesflow.engine.model_work import Work
from hermesflow.kernels import registry
from hermesflow.runtime.files import InputError, make_folder

SHAPES = tuple(OP_SHAPES)
BASELINES = (
    "none", "naive", "compile", "liger", "cut_cross_entropy", "trl", "flashinfer", "quack", "flex", "cudnn", "flash",
)  # fmt: skip
"""none is no baseline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings(BaseSettings):
    """What to measure."""

    ops: Sequence[str] = ()
    """Empty is all."""
    backends: Sequence[str] = ()
    """Empty is every backend that can run."""
    baselines: Sequence[str] = ()
    """Empty is every baseline that can run."""
    plot: Path | None = None
    """PNG."""
    test: bool = True
    """Run the op's tests first, where they are."""
    profile: Path | None = None
    """Folder of a trace and a table of each case and backend."""

    def __post_init__(self) -> None:
        check_names("--shape", [self.shape], SHAPES)
        check_names("--op", self.ops, ops_of(self.shape))
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
    if settings.profile:
        make_folder(settings.profile)
    run = Run("ops", settings, Effort(seconds=0.05, min_rounds=3) if settings.shape == "tiny" else Effort())
    for op in settings.ops or ops_of(settings.shape):
        failure = _test_failure(op, run.console) if settings.test else None
        for case in cases_of(op, settings.shape, run.device):
            contest = _contest(case, settings, run, failure)
            run.measure(contest)
            if settings.profile:
                _profile(contest, settings, run)
            torch.compiler.reset()
    if not run.lines:
        raise InputError(f"bench ops: nothing could be measured ({'; '.join(run.notes)})")
    run.print_table("each baseline")
    if settings.plot:
        roofline.plot_roofline(run.lines, settings.plot)
    return int(any("failed" in line for line in run.lines))


def _profile(contest: Contest, settings: Settings, run: Run) -> None:
    """A profile of each backend; on CUDA also the commands that ask Nsight Compute what limits its kernels."""
    for backend, part in contest.ours.items():
        name = f"{contest.case}-{backend}".replace("/", "-")
        run.console.print(write_profile(name, part.peak or part.run, run.device, settings.profile), soft_wrap=True)
        if run.device.type == "cuda":
            what = f"--device cuda --shape {settings.shape} --op {contest.case.partition('/')[0]} --backend {backend}"
            report = settings.profile / name
            ncu = f"ncu --set full --clock-control none --launch-count 20 -o {report}"
            run.console.print(
                f"{ncu} {sys.executable} -m hermesflow bench ops {what} --baseline none --no-test", soft_wrap=True
            )
            run.console.print(f"{sys.executable} -m hermesflow.benchmarks.profiling {report}.ncu-rep", soft_wrap=True)


def ops_of(shape: str) -> list[str]:
    """The ops that a shape class has."""
    return [*OP_SHAPES[shape], *(["span_attention"] if shape in ATTENTION_SHAPES else [])]


def cases_of(op: str, shape: str, device: torch.device) -> Iterator[Case]:
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


def _contest(case: Case, settings: Settings, run: Run, failure: str | None) -> Contest:
    """The backends whose results are right against what can run beside them; what cannot run goes into the notes."""
    backends, failed, of_op = {}, {}, registry.backends()[case.op]
    for name in settings.backends or of_op:
        reason = of_op.get(name, f"not a backend of {case.op}")
        if reason:
            run.notes.append(f"{name}: {reason}")
            continue
        try:
            wrong = failure or case.check(name)
        except registry.BackendError as refusal:
            run.notes.append(str(refusal))
            continue
        except Exception as error:  # whatever a kernel raises makes its gate red; the other backends are measured
            wrong = _in_one_line(error)
        if wrong is None:
            backends[name] = partial(case.run, name)
        else:
            failed[name] = wrong
    baselines = _baselines(case, settings.baselines, run.notes) if backends else {}
    return Contest(
        case=case.name,
        shape=case.shape,
        dtype=case.dtype,
        failed=failed,
        passes=[Work(num_flops=case.num_flops, num_bytes=case.num_bytes)],
        ours={name: _timed(case, f"backend {name}", call, run) for name, call in backends.items()},
        baselines={name: [_timed(case, f"baseline {name}", call, run)] for name, call in baselines.items()},
    )


def _baselines(case: Case, names: Sequence[str], notes: list[str]) -> dict[str, Call]:
    """The baselines that run here and compute the same function."""
    ready: dict[str, Callable[[], Call]] = {"naive": lambda: case.naive, "compile": lambda: case.compiled} | case.peers
    calls = {}
    for name, prepare in ready.items():
        if names and name not in names:
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


def _timed(case: Case, name: str, call: Call, run: Run) -> Part:
    """The call as it is timed: a short one on CUDA as a graph."""
    if case.short and run.device.type == "cuda":
        try:
            return Part(run=as_cuda_graph(call), peak=call)
        except RuntimeError as error:
            run.notes.append(f"{case.name}: {name} timed without a CUDA graph: {_in_one_line(error)}")
    return Part(run=call)


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
