"""The page that shows a run: one HTML file with its pictures inside, which needs no network and no script."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from PIL import Image

from .charts import CategoryBars, Measured, Stage, category_chart, gap_chart
from .config import Config, load_config
from .evaluation import summarise
from .files import InputError, read_json, read_parquet, write_text
from .models import Model, load_model
from .pairs import PREVIOUS, pair_statistics, read_pairs
from .records import Question
from .summaries import LABELS, describe_round, format_change, format_interval, format_value, headline
from .worlds import oracle

NUM_SHOWN = 10
"""Records whose candidates are shown."""
_LARGEST_PIXELS = 256  # pictures of large models are scaled down, so that the page stays light
_STYLE = Path(__file__).parent / "assets" / "report.css"


@dataclass(frozen=True)
class Shown:
    """A pair and all its record's candidates, best image first; images as rows of a candidates table with "pixels"."""

    pair: dict[str, Any]
    images: list[dict[str, Any]]
    captions: list[dict[str, Any]]
    record_pixels: np.ndarray


def write_report(run_folder: Path) -> Path:
    """Writes report/index.html of a run, finished or not.

    Args:
        run_folder: the run's folder, runs/NAME.
    Returns: the page's path.
    Raises: InputError if the folder holds no run, a file of it is damaged, or the page cannot be written.
    """
    folder = Path(run_folder)
    if not (folder / "config.toml").is_file():
        raise InputError(f"{folder}: holds no run (config.toml is missing); give the folder of a run, such as runs/demo")
    config = load_config(folder / "config.toml")
    summary, missing = read_summary(folder, config)
    shown_round = _last_round_with_pairs(folder, config)
    shown = _choose_shown(folder / f"round-{shown_round}", load_model(config.model.name)) if shown_round else []
    page = folder / "report" / "index.html"
    write_text(page, _page(config, (folder / "config.toml").read_text("utf-8"), summary, missing, shown, shown_round))
    return page


def read_summary(folder: Path, config: Config) -> tuple[dict[str, Any], list[str]]:
    """What a run has measured so far.

    Args:
        folder: the run's folder.
        config: its settings.
    Returns: (summary, missing): summary.json, or for a run in progress as much of it as there is, with "before" None if
        nothing was measured; and what is not there yet, in words.
    Raises: InputError if a file is damaged.
    """
    if (folder / "summary.json").exists():
        return read_json(folder / "summary.json"), []
    evaluations, missing = [], []
    for number in range(config.selfplay.num_rounds + 1):
        where = "before self-play" if number == 0 else f"of round {number}"
        if number and not (folder / f"round-{number}" / "pairs.parquet").exists():
            missing.append(f"the pairs {where}")
        path = folder / f"round-{number}" / "evaluation.json"
        if not path.exists():
            missing.append(f"the evaluation {where}")
        elif len(evaluations) == number:
            evaluations.append(read_json(path))
    if not evaluations:
        return {"before": None, "rounds": []}, missing
    before, rounds = summarise(evaluations)
    for number, metrics in enumerate(rounds, 1):
        tables = (folder / f"round-{number}" / name for name in ("pairs.parquet", "rejected.parquet"))
        metrics["pairs"] = pair_statistics(*(read_parquet(path) for path in tables))
        if "agreement" in evaluations[number]:
            metrics["agreement"] = evaluations[number]["agreement"]
    return {"before": before, "rounds": rounds}, missing


def _last_round_with_pairs(folder: Path, config: Config) -> int:
    """0 if there is none."""
    numbers = range(1, config.selfplay.num_rounds + 1)
    return max((number for number in numbers if (folder / f"round-{number}" / "pairs.parquet").exists()), default=0)


def _choose_shown(round_folder: Path, model: Model) -> list[Shown]:
    """The first pairs of each category in turn, so that what is shown is not chosen by its result."""
    by_category: dict[str, list[dict]] = {}
    for pair in read_pairs(round_folder / "pairs.parquet").to_pylist():
        by_category.setdefault(pair["category"], []).append(pair)
    turns = max(map(len, by_category.values()), default=0)
    pairs = [items[turn] for turn in range(turns) for items in by_category.values() if turn < len(items)][:NUM_SHOWN]
    rows: dict[str, list[dict]] = {pair["record_id"]: [] for pair in pairs}
    for part in sorted((round_folder / "candidates").glob("part-*.parquet")):
        table = read_parquet(part)
        for row in table.filter(pc.is_in(table["record_id"], pc_array(rows))).to_pylist():
            rows[row["record_id"]].append(row)
    return [_shown(pair, rows[pair["record_id"]], model) for pair in pairs]
