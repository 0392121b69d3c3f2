"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases or trackio, where they are installed."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hermesflow.runtime.distributed import is_main
from hermesflow.runtime.files import InputError, read_json, write_json

Log = Callable[[Mapping[str, float], int], None]
"""Takes a step's metrics and its number."""
_PROJECT = "hermesflow"


def check_tracker(name: str) -> None:
    """Raise InputError with the fix unless the tracker is "none" or installed."""
    if name == "none":
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # a folder of that name, where W&B keeps its files, is no package
        raise InputError(f"train.tracker {name}: it is not installed; run: pip install {name}, or set it to none")


@contextmanager
def open_tracker(name: str, settings: Mapping[str, Any], folder: Path, start: int) -> Iterator[Log]:
    """A tracker for as long as the block runs; in all processes but the first it takes metrics and keeps none.

    Resumed training sends the steps after its checkpoint again. TensorBoard drops the older ones; W&B continues the
    same run and keeps the older ones; trackio continues the same run and keeps both.

    Args:
        name: of the tracker.
        settings: of the run, which the tracker keeps.
        folder: of the run's training; TensorBoard's files go there, and tracker.json, which names the service's run.
        start: the first step.
    Yields: the function that takes metrics.
    Raises: InputError if it is not installed.
    """
    check_tracker(name)
    if name == "none" or not is_main():
        yield lambda metrics, step: None
    elif name == "tensorboard":
        with _tensorboard(folder / "tensorboard", start) as log:
            yield log
    else:
        with _service(name, settings, folder) as log:
            yield log


@contextmanager
def _tensorboard(folder: Path, start: int) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder, purge_step=start) as writer:

        def log(metrics: Mapping[str, float], step: int) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
            writer.flush()  # a kill loses what is not on the disk, and a checkpoint may lie after it

        yield log


@contextmanager
def _service(name: str, settings: Mapping[str, Any], folder: Path) -> Iterator[Log]:
    """W&B, or trackio, which has its functions and knows a run by its name alone."""
    service, path = importlib.import_module(name), folder / "tracker.json"
    if not path.exists():
        write_json(path, {"id": uuid.uuid4().hex[:8]})
    run_id = read_json(path)["id"]
    place = {"id": run_id, "dir": str(folder)} if name == "wandb" else {}
    service.init(project=_PROJECT, name=f"{folder} {run_id}", config=dict(settings), resume="allow", **place)
    try:
        yield lambda metrics, step: service.log(dict(metrics), step=step)
    finally:
        service.finish()
