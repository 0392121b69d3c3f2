"""What a round sends to the tracker: its measurement, drawings and pairs, which show how the rounds differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hermesflow.models.contact_sheet import draw_contact_sheet
from hermesflow.models.model import Model
from hermesflow.runs.run import Run
from hermesflow.runtime.files import ParquetRows, write_json
from hermesflow.runtime.trackers import Picture, Table, open_tracker

NUM_SENT = 8
"""Drawings, pairs of images and pairs of captions, of each the first ones."""


def send_round(run: Run, number: int, evaluation: dict[str, Any]) -> None:
    """Sends a measured round to its train.tracker, once: sent.json notes that it was sent. The step is the round.

    The round's results are on the disk by then, and sending changes none. After an error the same command sends the
    round again.

    Args:
        run: the run, in its first process.
        number: the round; 0 has no pairs.
        evaluation: of the round.
    Raises: InputError as open_tracker and ParquetRows; what the service raises, as in training.
    """
    tracker, sent = run.config.of_round(number).train.tracker, run.path(number, "sent.json")
    if tracker == "none" or sent.exists():
        return
    values = {f"evaluation/{name}": value for name, value in evaluation["metrics"].items() if isinstance(value, float)}
    if ":" not in run.config.eval.suite:  # rows of a user's evaluation may call anything codes
        rows = [row for row in evaluation["records"] if row.keys() >= {"prompt", "codes", "drawn"}]
        values |= _numbered("drawings", _drawings(rows[:NUM_SENT], run.model(number)))
    path = run.path(number, "pairs.parquet")
    if path.exists():
        values |= _numbered("pairs", _image_pairs(_first(path, "win_codes"), run.model(number)))
        if rows := _first(path, "win_caption"):
            values["captions"] = _caption_pairs(rows)
    with open_tracker(tracker, asdict(run.config), run.folder, number) as log:
        log(values, number)
    write_json(sent, {"tracker": tracker})


def _numbered(name: str, pictures: Iterator[Picture]) -> dict[str, Picture]:
    return {f"{name}/{index}": picture for index, picture in enumerate(pictures, 1)}


def _first(path: Path, column: str) -> list[dict[str, Any]]:
    """Rows of the first pairs that have a column."""
    rows = (row for table in ParquetRows(path).each() for row in table.to_pylist())
    return list(islice((row for row in rows if row[column] is not None), NUM_SENT))


def _drawings(rows: Sequence[dict[str, Any]], model: Model) -> Iterator[Picture]:
    for row in rows:
        marks = [f"{digits.count('1')} of {len(digits)} right" for digits in row["drawn"]]
        yield Picture(_side_by_side(row["codes"], marks, model), row["prompt"])


def _image_pairs(rows: Sequence[dict[str, Any]], model: Model) -> Iterator[Picture]:
    for row in rows:
        scores = [f"{role} {row[f'{role}_image_score']:.2f}" for role in ("win", "lose")]
        pixels = _side_by_side([row["win_codes"], row["lose_codes"]], scores, model)
        yield Picture(pixels, f"{row['caption']} ({', '.join(scores)})")


def _side_by_side(codes: Sequence[Sequence[int]], texts: Sequence[str], model: Model) -> np.ndarray:
    """The images uint8 [H, W, 3], each with its text below."""
    images = model.decode_images(torch.tensor(codes, dtype=torch.int64))
    return np.asarray(draw_contact_sheet(list(images), texts, len(images)))


def _caption_pairs(rows: Sequence[dict[str, Any]]) -> Table:
    keys = {"caption": "caption", "win": "win_caption", "win score": "win_caption_score", "lose": "lose_caption",
            "lose score": "lose_caption_score"}  # fmt: skip
    return Table(list(keys), [[row[key] for key in keys.values()] for row in rows])
