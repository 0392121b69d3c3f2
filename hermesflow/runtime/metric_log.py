"""metrics.jsonl of a training run, and the speed that stands in it."""

from __future__ import annotations

import itertools
import json
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from hermesflow.engine.model_work import ModelWork, matmul_rate
from hermesflow.kernels.span_tree import SpanTree
from hermesflow.runtime.distributed import is_main, sum_over_ranks, world_size
from hermesflow.runtime.files import InputError, read_bytes, write_problem, write_text

TIMINGS = ("tokens_per_second", "mfu", "peak_memory_gib")
"""Metrics that differ from run to run."""


class MetricLog:
    """Appends a JSON line a step; a resumed run drops later lines first. The first process writes."""

    def __init__(self, path: Path, start: int) -> None:
        """
        Args:
            path: the file.
            start: the first step that is not logged yet.
        Raises: InputError if the file lacks one of the steps before.
        """
        self._path = path
        kept = list(itertools.islice(_records(read_bytes(path)), start)) if path.exists() else []
        if len(kept) < start:
            raise InputError(
                f"{path}: lacks some of the first {start} steps, which a checkpoint has; restore it from a copy, "
                f"or delete {path.parent} and run the same command again to train anew"
            )
        if is_main():
            write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._records = kept

    def add(self, record: dict[str, float]) -> None:
        """Appends one line. Raises: InputError if it cannot be written."""
        self._records.append(record)
        if not is_main():
            return
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            raise write_problem(self._path, error) or error from error

    def tail_means(self, count: int) -> dict[str, float]:
        """Mean of every metric over the last `count` steps that have it; speeds and step numbers are left out."""
        tail = self._records[-count:]
        names = dict.fromkeys(name for record in tail for name in record if name not in ("step", *TIMINGS))
        return {name: float(np.mean([record[name] for record in tail if name in record])) for name in names}


def _records(data: bytes) -> Iterator[dict]:
    """The lines of step 0, 1, ... as long as they are whole; a kill may have cut the last one."""
    for step, line in enumerate(data.splitlines()):
        try:
            record = json.loads(line)
        except ValueError:  # no JSON, no UTF-8
            return
        if not isinstance(record, dict) or record.get("step") != step:
            return
        yield record


class Meter:
    """Counts what the passes of a step compute."""

    def __init__(self, work: ModelWork, device: torch.device, has_reference: bool) -> None:
        """
        Args:
            work: the model's arithmetic.
            device: of this process.
            has_reference: whether the reference computes beside the policy.
        """
        self._work, self._device = work, device
        self._num_forwards = 4 if has_reference else 3  # a backward pass computes twice what a forward pass does
        self._counts = torch.zeros(2, dtype=torch.float64)

    def add(self, tree: SpanTree, num_rows: int) -> None:
        """One pass over a tree, the head on num_rows rows."""
        flops = self._num_forwards * self._work.tree(tree, num_rows).num_flops
        self._counts += torch.tensor([len(tree.token_ids), flops], dtype=torch.float64)

    def rates(self, seconds: float) -> dict[str, float]:
        """TIMINGS of the step, over all processes: packed tokens a second; the exact algorithm's FLOPs as a share of
        the rate of a large matmul, measured once on this device; most memory in use so far, by this process."""
        tokens, flops = sum_over_ranks(self._counts.to(self._device)).tolist()
        rate = matmul_rate(self._device, self._work.dtype) * world_size()
        return {
            "tokens_per_second": tokens / seconds,
            "mfu": flops / seconds / rate,
            "peak_memory_gib": peak_memory_bytes(self._device) / 2**30,
        }


def peak_memory_bytes(device: torch.device) -> int:
    """Of torch's allocator on CUDA, elsewhere of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
