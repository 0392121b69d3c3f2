"""Where metrics and pictures are shown: TensorBoard, Weights & Biases or trackio, where they are installed."""

from __future__ import annotations

import importlib.util
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hermesflow.runtime.distributed import is_main
from hermesflow.runtime.files import InputError, read_json, write_json


@dataclass(frozen=True)
class Picture:
    """A picture and what is said of it."""

    pixels: np.ndarray
    """uint8 [H, W, 3]."""
    caption: str


@dataclass(frozen=True)
class Table:
    """Texts and numbers by row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]


Log = Callable[[Mapping[str, float | Picture | Table], int], None]
"""Takes the values of a step by their names, and the step's number."""
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
    """A tracker for as long as the block runs; in all processes but the first it takes values and keeps none.

    What the service raises reaches the caller. Resumed training sends the steps after its checkpoint again. TensorBoard
    drops the older ones; W&B continues the same run and keeps the older ones; trackio continues the same run and keeps
    both.

    Args:
        name: of the tracker.
        settings: of the run, which the tracker keeps.
        folder: of the run or its training; TensorBoard's files go there, and tracker.json, which names the service's
            run.
        start: the first step.
    Yields: the function that takes values.
    Raises: InputError if it is not installed.
    """
    check_tracker(name)
    if name == "none" or not is_main():
        yield lambda values, step: None
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

        def log(values: Mapping[str, float | Picture | Table], step: int) -> None:
            for name, value in values.items():
                if isinstance(value, Picture):
                    writer.add_image(name, value.pixels, step, dataformats="HWC")
                    writer.add_text(name, _escape(value.caption), step)
                elif isinstance(value, Table):
                    writer.add_text(name, _markdown(value), step)
                else:
                    writer.add_scalar(name, value, step)
            writer.flush()  # a kill loses what is not on the disk, and a checkpoint may lie after it

        yield log


def _markdown(table: Table) -> str:
    lines = [table.columns, ["---"] * len(table.columns), *([_escape(cell) for cell in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(value: str | float | None) -> str:
    """A value as Markdown that shows it as it is."""
    text = "" if value is None else str(value).strip()  # four spaces at the start would make it code
    return re.sub(r"[^\w ]|_", lambda found: f"&#{ord(found[0])};", text)


@contextmanager
def _service(name: str, settings: Mapping[str, Any], folder: Path) -> Iterator[Log]:
    """W&B, or trackio, which has its functions and knows a run by its name alone."""
    service, path = importlib.import_module(name), folder / "tracker.json"
    if not path.exists():
        write_json(path, {"id": uuid.uuid4().hex[:8]})
    run_id = read_json(path)["id"]
    title = f"{folder} {run_id}".replace("/", " ").strip()  # trackio keeps a run's pictures in a folder of its name
    place = {"id": run_id, "dir": str(folder)} if name == "wandb" else {}
    service.init(project=_PROJECT, name=title, config=dict(settings), resume="allow", **place)

    def convert(value: float | Picture | Table) -> Any:
        if isinstance(value, Picture):
            return service.Image(value.pixels, caption=value.caption)
        if isinstance(value, Table):
            return service.Table(columns=list(value.columns), data=[list(row) for row in value.rows])
        return value

    try:
        yield lambda values, step: service.log({key: convert(value) for key, value in values.items()}, step=step)
    finally:
        service.finish()
