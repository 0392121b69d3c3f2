"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases or trackio, where they are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from .config import TrainConfig
from .distributed import is_main
from .files import InputError

Log = Callable[[Mapping[str, float], int], None]
"""Takes a step's metrics and its number."""
_PROJECT = "hermesflow"


def check_tracker(name: str) -> None:
    """Raise InputError with the fix unless the tracker is "none" or installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise InputError(f"train.tracker {name}: it is not installed; run: pip install {name}, or set it to none")


@contextmanager
def open_tracker(config: TrainConfig, folder: Path) -> Iterator[Log]:
    """A tracker for as long as the block runs; of several processes, the first has it.

    Args:
        config: names the tracker, and is told to it.
        folder: of the run's training; TensorBoard's files go there.
    Yields: the function that takes metrics.
    Raises: InputError if it is not installed.
    """
    check_tracker(config.tracker)
    if config.tracker == "none" or not is_main():
        yield lambda metrics, step: None
    elif config.tracker == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(folder / "tensorboard") as writer:
            yield lambda metrics, step: [writer.add_scalar(name, value, step) for name, value in metrics.items()]
    else:
        service = importlib.import_module(config.tracker)  # trackio has wandb's functions
        service.init(project=_PROJECT, name=str(folder), config=asdict(config))
        try:
            yield lambda metrics, step: service.log(dict(metrics), step=step)
        finally:
            service.finish()
