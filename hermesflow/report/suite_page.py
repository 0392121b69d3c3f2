"""The page of a suite: its scores by category, the change to an earlier result, and what was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from hermesflow.evaluation.metrics import MetricPath
from hermesflow.evaluation.suites.drawing import IMAGES, pictures_of
from hermesflow.evaluation.suites.suite import Suite, SuitePrompt
from hermesflow.report.markup import change_cell, details, document, picture, scrolling, value_cell
from hermesflow.report.tables import (
    find,
    format_value,
    headline_metrics,
)
from hermesflow.runtime.files import write_text

_MOST_PROMPTS = 24
_MOST_IMAGES = 4


def write_suite_page(
    result: dict[str, Any], suite: Suite, prompts: Sequence[SuitePrompt], folder: Path, changes: dict[str, Any] | None
) -> Path:
    """Writes FOLDER/index.html.

    Args:
        result: of suites.run.judge.
        suite, prompts: the suite.
        folder: that of draw_suite.
        changes: of changes_between, to an earlier result; None for none.
    Returns: the page's path.
    """
    settings = result["settings"]
    name, model, judge = (str(value) for value in (result["suite"], settings["model"], result["judge"]))
    told = ", ".join(f"{key} {value}" for key, value in settings.items() if key not in ("suite", "model") and value)
    body = f"""<header><p class="over">HermesFlow, {escape(name)}</p><h1>{escape(model)}</h1>
<p class="lead">{format_value(result["metrics"].get("score"))} % by {escape(judge)}</p>
<p class="note">{len(prompts)} prompts; brackets are 95 % intervals, bootstrapped over prompts. Scores of two
judges cannot be compared.</p></header>
<section><h2>Scores</h2>{_table(result["metrics"], changes)}</section>
<section><h2>What was drawn</h2><p class="note">Prompts at equal distances in the list, not chosen by their results.</p>
{_drawn(suite, prompts, folder, int(settings["num_images"]), {row["id"]: row["scores"] for row in result["records"]})}
</section>{details("Settings of drawing", f"<p>{escape(told)}</p>")}"""
    path = folder / "index.html"
    write_text(path, document(f"{name}, {model} - HermesFlow", body))
    return path


def _table(metrics: dict[str, Any], changes: dict[str, Any] | None) -> str:
    head = "<th>change, in points</th>" if changes is not None else ""
    rows = "".join(_row(metrics, changes, path, label) for path, label in headline_metrics(metrics).items())
    table = f'<table class="results"><thead><tr><th></th><th>%</th>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return scrolling(table, "scores")


def _row(metrics: dict[str, Any], changes: dict[str, Any] | None, path: MetricPath, label: str) -> str:
    cells, change = value_cell(metrics, path), find(changes or {}, path)
    if change:
        cells += change_cell(path[-1], change)
    elif changes is not None:
        cells += "<td>-</td>"
    return f"<tr><th>{escape(label)}</th>{cells}</tr>"


def _drawn(
    suite: Suite, prompts: Sequence[SuitePrompt], folder: Path, num_images: int, scores: dict[str, dict[str, Any]]
) -> str:
    articles = []
    for row in range(0, len(prompts), max(1, -(-len(prompts) // _MOST_PROMPTS))):
        prompt = prompts[row]
        files = suite.files_of(prompt, row, num_images)[:_MOST_IMAGES]
        files = [file for file in files if (folder / IMAGES / file.path).is_file()]  # a judge elsewhere needs none here
        pictures = [image for file in files for image in pictures_of(file, folder / IMAGES)][:_MOST_IMAGES]
        figures = "".join(f"<figure>{picture(np.asarray(image), prompt.text)}</figure>" for image in pictures)
        right, of = scores[prompt.id]["score"]
        note = f'<p class="note">score {format_value(right / of)} %</p>' if of else ""
        title = f"<header><h3>{escape(prompt.text)}</h3>{note}</header>"
        articles.append(f'<article class="record card">{title}<div class="images">{figures}</div></article>')
    return f'<div class="split">{"".join(articles)}</div>'
