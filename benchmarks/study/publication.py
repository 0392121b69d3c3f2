"""Runs a study and says what it shows: on the terminal, as a page, in a README and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from hermesflow.benchmarks.lines import Line, replace_marked
from hermesflow.benchmarks.roofline import check_matplotlib
from hermesflow.benchmarks.study.effects import Effects
from hermesflow.benchmarks.study.findings import answer_claims, console_tables, describe_study, markdown
from hermesflow.benchmarks.study.forest import plot_effects
from hermesflow.benchmarks.study.page import write_page
from hermesflow.benchmarks.study.runner import BASE, read_study, run_study
from hermesflow.config import Config


def publish_study(
    config: Config, *, lines: Path | None = None, readmes: Sequence[Path] = (), plot: Path | None = None
) -> None:
    """Measures what is still to be measured, and writes down what all seeds show that have every arm.

    Args:
        config: the study's settings.
        lines: a study.jsonl to show; then nothing is run. It may be of a study that still runs.
        readmes: Markdown files with the markers `<!-- study -->` and `<!-- /study -->`, for all tables, or with
            `<!-- study short -->`, for one.
        plot: a PNG.
    Raises: InputError as run_study and read_study; if no seed is complete, a file cannot be written, or matplotlib is
        missing for the picture.
    """
    if plot:
        check_matplotlib()
    console = Console()
    measured = run_study(config, console) if lines is None else read_study(lines)
    effects = Effects([line for line in measured if line["arm"] == BASE or _is_asked_for(line, config)])
    for table in console_tables(effects):
        console.print(table, "")
    console.print(describe_study(effects), highlight=False, markup=False)
    for question, answer in answer_claims(effects):
        console.print(f"{question} {answer}", highlight=False, markup=False)
    for readme in readmes:
        replace_marked(readme, "study", lambda marker: markdown(effects, marker), "study")
    if plot:
        plot_effects(effects, plot)
    console.print(f"page: {write_page(config, effects)}", soft_wrap=True, highlight=False, markup=False)


def _is_asked_for(line: Line, config: Config) -> bool:
    return line["arm"] in config.study.arms and line["seed"] in config.study.seeds
