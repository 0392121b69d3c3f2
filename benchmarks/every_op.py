"""Calls every op at tiny shapes and compares it with the reference: what compute-sanitizer watches.

usage: python -m hermesflow.benchmarks.every_op [--device cpu|cuda] [--backend NAME ...]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from hermesflow.benchmarks import attention_cases, op_cases
from hermesflow.benchmarks.case import Case
from hermesflow.kernels import registry
from hermesflow.kernels.checks import FLOAT_DTYPES

SHAPE = "tiny"


def tiny_cases(device: torch.device) -> Iterator[Case]:
    """Every case, in every dtype that it may have."""
    for op, sizes in op_cases.SHAPES[SHAPE].items():
        has_dtype = isinstance(sizes[-1], torch.dtype)
        for dtype in FLOAT_DTYPES if has_dtype else [None]:
            yield op_cases.BUILDERS[op](*(sizes[:-1] if has_dtype else sizes), *([dtype] if dtype else []), device)
    for dtype in FLOAT_DTYPES:
        yield from attention_cases.span_cases(replace(attention_cases.SHAPES[SHAPE], dtype=dtype), device)


def main() -> int:
    """Returns: the exit code: 1 if a result is wrong or nothing could run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", action="append", metavar="NAME", help="may be repeated [all that can run]")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    num_right = num_wrong = 0
    for case in tiny_cases(torch.device(arguments.device)):
        for backend, reason in registry.backends()[case.op].items():
            if reason or (arguments.backend and backend not in arguments.backend):
                continue
            try:
                wrong = case.check(backend)
            except registry.BackendError as refusal:
                print(refusal)
                continue
            num_right, num_wrong = num_right + (wrong is None), num_wrong + (wrong is not None)
            print(f"{case.name} {case.dtype} {backend}: {wrong or 'right'}", flush=True)
    print(f"every op: {num_right} passed, {num_wrong} failed")
    return int(num_wrong > 0 or num_right == 0)


if __name__ == "__main__":
    sys.exit(main())
