"""Calls ops on every backend and compares them with their references; nothing is timed.

usage: python -m hermesflow.benchmarks.every_op [--device cpu|cuda] [--shape NAME] [--op NAME ...] [--backend NAME ...]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from hermesflow.benchmarks import attention_cases, op_cases
from hermesflow.benchmarks.case import Case
from hermesflow.benchmarks.ops import SHAPES, cases_of, ops_of
from hermesflow.kernels import registry
from hermesflow.kernels.checks import FLOAT_DTYPES


def tiny_cases(op: str, device: torch.device) -> Iterator[Case]:
    """An op's cases at tiny shapes, in every dtype that they may have."""
    for dtype in FLOAT_DTYPES:
        if op == "span_attention":
            yield from attention_cases.span_cases(replace(attention_cases.SHAPES["tiny"], dtype=dtype), device)
        else:
            *sizes, last = op_cases.SHAPES["tiny"][op]
            if isinstance(last, torch.dtype):
                yield op_cases.BUILDERS[op](*sizes, dtype, device)
            elif dtype == FLOAT_DTYPES[0]:
                yield op_cases.BUILDERS[op](*sizes, last, device)


def main() -> int:
    """Returns: the exit code: 1 if a result is wrong or nothing could run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="tiny is tried in every dtype [tiny]")
    parser.add_argument("--op", action="append", metavar="NAME", help="may be repeated [all]")
    parser.add_argument("--backend", action="append", metavar="NAME", help="may be repeated [all that can run]")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    num_right = num_wrong = 0
    device, shape = torch.device(arguments.device), arguments.shape
    for op in arguments.op or ops_of(shape):
        for case in tiny_cases(op, device) if shape == "tiny" else cases_of(op, shape, device):
            for backend, reason in registry.backends()[case.op].items():
                if reason or (arguments.backend and backend not in arguments.backend):
                    continue
                try:
                    wrong = case.check(backend)
                except registry.BackendError as refusal:
                    print(refusal)
                    continue
                except Exception as error:  # whatever a kernel raises; the other backends are tried
                    wrong = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                num_right, num_wrong = num_right + (wrong is None), num_wrong + (wrong is not None)
                print(f"{case.name} {case.dtype} {backend}: {wrong or 'right'}", flush=True)
    print(f"every op: {num_right} passed, {num_wrong} failed")
    return int(num_wrong > 0 or num_right == 0)


if __name__ == "__main__":
    sys.exit(main())
