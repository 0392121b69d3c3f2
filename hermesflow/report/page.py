"""The page that shows a run: one HTML file with its pictures inside, which needs neither network nor script."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hermesflow.config import Config, load_config
from hermesflow.data.pairs import pair_statistics, read_pairs
from hermesflow.evaluation.builtin import BUILTIN
from hermesflow.evaluation.metrics import MetricPath, is_balanced, summarize
from hermesflow.models.family import open_model
from hermesflow.report.browser import write_browser
from hermesflow.report.charts import CategoryBars, Measured, Stage, category_chart, gap_chart
from hermesflow.report.examples import choose_shown, drawings_section, pairs_section
from hermesflow.report.markup import change_cell, details, document, scrolling, value_cell
from hermesflow.report.tables import (
    LABELS,
    ONE_SIDED,
    describe_cost,
    describe_data,
    find,
    format_value,
    headline,
    headline_metrics,
    is_builtin,
    kind_metrics,
    sampler_metrics,
)
from hermesflow.runtime.files import InputError, StrPath, damaged, read_json, read_parquet, write_text
from hermesflow.training import is_online

_KEPT = {
    "records": "records",
    "kept": "kept",
    "both": "for both sides",
    "generation": "for generation only",
    "understanding": "for understanding only",
}
_AGREEMENT = {
    "win_better": "win truly better",
    "win_worse": "win truly worse",
    "tie": "win and lose equal",
    "mean_score": "image score, mean",
    "mean_oracle": "the oracle's score, mean",
    "best_strict": "best by score right in full",
    "mean_strict": "all images right in full",
    "worst_strict": "worst by score right in full",
    "caption_win_truer": "win's caption truer",
    "caption_win_less_true": "win's caption less true",
    "caption_tie": "captions equally true",
    "caption_win_exact": "win's caption right in full",
}
_INTERVALS = (
    "brackets are 95 % intervals, bootstrapped over records. Changes are to before self-play, paired: the same "
    "records, prompts and seeds. Where an interval holds zero there is no significant change."
)
_RANKS = {
    "spearman": "rank correlation, all images",
    "spearman_within": "rank correlation within a record",
    "auc": "area under the ROC curve",
}


def write_report(run_folder: StrPath) -> Path:
    """Writes report/index.html of a run, finished or not, and the browser of its last round's pairs beside it.

    Args:
        run_folder: the run's folder, runs/NAME.
    Returns: the page's path.
    Raises: InputError if the folder holds no run, a file of it is damaged, its model cannot be loaded, or the page
        cannot be written.
    """
    folder = Path(run_folder)
    settings = folder / "config.toml"
    if not settings.is_file():
        raise InputError(f"{folder}: holds no run (there is no config.toml); give the folder of one, such as runs/demo")
    config = load_config(settings)
    summary, missing = read_summary(folder, config)
    number, last = _last_round_with_pairs(folder, config), len(summary["rounds"])
    has_pairs = not all(_is_online(config, each) for each in range(1, config.selfplay.num_rounds + 1))
    drawn = _drawings(folder, last) if last and is_builtin(summary["before"]) else []
    model = open_model(config.model) if number or drawn else None
    shown = choose_shown(folder / f"round-{number}", model) if number else []
    header, measurements, categories, rounds = _show_summary(config, summary, missing)
    sections = [
        header,
        measurements,
        categories,
        drawings_section(drawn, last, model) if drawn else "",
        pairs_section(shown, number, config.data.source in BUILTIN.known_sources) if has_pairs else "",
        '<p><a href="pairs.html">More pairs of the round, to be filtered</a></p>' if number else "",
        rounds,
        details("Settings of the run", f"<pre>{escape(settings.read_text('utf-8'))}</pre>"),
    ]
    page = folder / "report" / "index.html"
    if number:
        pairs = read_pairs(folder / f"round-{number}" / "pairs.parquet")
        write_browser(pairs, number, model, page.with_name("pairs.html"))
    write_text(page, document(f"{config.run.name} - HermesFlow", "\n".join(sections)))
    return page


def _drawings(folder: Path, number: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Rows of the evaluations before self-play and after a round that kept what was drawn, where both are there."""
    rows = []
    for path in (folder / f"round-{each}" / "evaluation.json" for each in (0, number)):
        found = read_json(path) if path.exists() else {"records": []}
        with _naming(path, "evaluation"):
            rows.append([row for row in found["records"] if row.keys() >= {"prompt", "codes", "drawn"}])
    return list(zip(*rows, strict=False))


def read_summary(folder: Path, config: Config) -> tuple[dict[str, Any], list[str]]:
    """What a run has measured so far.

    Args:
        folder: the run's folder.
        config: its settings.
    Returns: (summary, missing): summary.json, or for a run in progress as much of it as there is, with "before" None
        where nothing was measured; and in words what is not there yet.
    Raises: InputError if a file is damaged.
    """
    if (folder / "summary.json").exists():
        summary = read_json(folder / "summary.json")
        with _naming(folder / "summary.json", "summary"):
            _show_summary(config, summary)
        return summary, []
    evaluations, missing = [], []
    for number in range(config.selfplay.num_rounds + 1):
        path = folder / f"round-{number}"
        if number and not (path / "pairs.parquet").exists() and not _is_online(config, number):
            missing.append(f"the pairs of round {number}")
        if not (path / "evaluation.json").exists():
            missing.append(f"the evaluation of round {number}" if number else "the evaluation before self-play")
        elif len(evaluations) == number:
            evaluations.append(read_json(path / "evaluation.json"))
            with _naming(path / "evaluation.json", "evaluation"):
                before, rounds = summarize([evaluations[0], evaluations[-1]])
                agreement = evaluations[-1].get("agreement", {})
                _show_summary(config, {"before": before, "rounds": [rounds[0] | {"agreement": agreement}]})
    if not evaluations:
        return {"before": None, "rounds": []}, missing
    before, rounds = summarize(evaluations)
    seconds = folder / "round-0" / "seconds.json"
    with _naming(seconds, "seconds"):
        before["seconds"] = read_json(seconds) if seconds.exists() else {}
        describe_cost({"before": before, "rounds": []})
    for number, metrics in enumerate(rounds, 1):
        path = folder / f"round-{number}"
        if not _is_online(config, number):
            metrics["pairs"] = pair_statistics(
                *(read_parquet(path / f"{name}.parquet") for name in ("pairs", "rejected"))
            )
        metrics["agreement"] = evaluations[number].get("agreement", {})
        for name in ("training", "seconds"):
            source = path / f"{name}.json"
            metrics[name] = read_json(source) if source.exists() else {}
            with _naming(source, name):
                _rounds([{name: metrics[name]}])
    return {"before": before, "rounds": rounds}, missing


def _is_online(config: Config, number: int) -> bool:
    """Whether a round has no pairs to show. A user's algorithm that cannot be imported counts as one with pairs."""
    try:
        return is_online(config.of_round(number).selfplay.algorithm)
    except InputError:
        return False


@contextlib.contextmanager
def _naming(path: Path, kind: str) -> Iterator[None]:
    """Trial use of a value from a JSON file: where that fails, the file is not what it should be."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise damaged(path, kind, ValueError(reason)) from error


def _show_summary(config: Config, summary: dict[str, Any], missing: Sequence[str] = ()) -> tuple[str, str, str, str]:
    """All sections that show measurements: header, measurements, categories, rounds."""
    return _header(config, summary, missing), _measurements(summary), _categories(summary), _rounds(summary["rounds"])


def _last_round_with_pairs(folder: Path, config: Config) -> int:
    """0 if there is none."""
    numbers = range(1, config.selfplay.num_rounds + 1)
    return max((number for number in numbers if (folder / f"round-{number}" / "pairs.parquet").exists()), default=0)


def _header(config: Config, summary: dict[str, Any], missing: Sequence[str]) -> str:
    lead = headline(summary) if summary["before"] is not None else "Nothing has been measured yet."
    waiting = ", ".join(missing)
    notice = f'<p class="notice">This run is not finished. Not there yet: {escape(waiting)}.</p>' if missing else ""
    notes = describe_data(summary) + (describe_cost(summary) if summary["before"] is not None else [])
    data = "".join(f'<p class="note">{escape(line)}</p>' for line in notes)
    return (
        f'<header><p class="over">HermesFlow, run {escape(config.run.name)}</p>'
        f"<h1>What self-play changed</h1>{notice}<p class='lead'>{escape(lead)}</p>{data}</header>"
    )


def _stages(summary: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [("before", summary["before"])] + [(f"round {k}", metrics) for k, metrics in enumerate(summary["rounds"], 1)]


def _measurements(summary: dict[str, Any]) -> str:
    """The gap as a chart, and all metrics with their changes as a table."""
    if summary["before"] is None:
        return ""
    if not is_builtin(summary["before"]):
        note = f'<p class="note">{escape(str(summary["before"]["num_records"]))} records; {_INTERVALS}</p>'
        table = _metric_table(headline_metrics(summary["before"]), summary, "results")
        return f"<section><h2>Before and after</h2>{note}{table}</section>"
    stages = [
        Stage(label, _measured(metrics, "understanding"), _measured(metrics, "generation"))
        for label, metrics in _stages(summary)
    ]
    first = summary["before"]
    real, images, prompts = (escape(str(first[f"num_{name}"])) for name in ("understanding", "images", "prompts"))
    asked = (
        f"how many of {escape(str(first['num_questions']))} balanced questions about {real} real images the model "
        "answers rightly: they ask by every template, and as often for what is not there as for what is"
        if is_balanced(first)
        else f"how many questions about {real} real images the model answers rightly"
    )
    notice = "" if is_balanced(first) else f'<p class="notice">{escape(ONE_SIDED)}</p>'
    samplers = _metric_table(sampler_metrics(first), summary, "samplers")
    if samplers:
        samplers = f"""<h2>By sampler</h2><p class="note">Steps and temperature of drawing; a gain should not hang on
one. Best of 4 is the image that the model itself scores best.</p>{samplers}"""
    kinds = _metric_table(kind_metrics(first), summary, "kinds")
    return f"""<section><h2>The gap by round</h2>{notice}
<div class="split wide"><div class="card">{gap_chart(stages)}</div>
<div class="note"><p><b>Understanding</b> is {asked}. <b>Generation</b> is how many questions its own {images} images of
{prompts} prompts answer rightly, read by an oracle that sees pixels alone; <b>strict</b> asks for all of
an image's questions. The <b>gap</b> is understanding less generation.</p>
<p>Bars and {_INTERVALS}</p></div></div>
<h2>Before and after</h2>
{_metric_table(headline_metrics(first), summary, "results")}{samplers}
{f"<h2>Understanding by what is asked</h2>{kinds}" if kinds else ""}</section>"""


def _metric_table(metrics: dict[MetricPath, str], summary: dict[str, Any], name: str) -> str:
    """A row for each metric with its values and changes by round; empty without metrics."""
    heads = "<th>%</th><th>before</th>"
    for number in range(1, len(summary["rounds"]) + 1):
        heads += f"<th>round {number}</th><th>change, in points</th>"
    rows = "".join(_metric_row(path, label, summary) for path, label in metrics.items())
    table = f'<table class="results"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
    return scrolling(table, name) if metrics else ""


def _metric_row(path: MetricPath, label: str, summary: dict[str, Any]) -> str:
    cells = []
    for _, metrics in _stages(summary):
        cells.append(value_cell(metrics, path))
        change = find(metrics, ("change", *path))
        if change:
            cells.append(change_cell(path[-1], change))
        elif "change" in metrics:
            cells.append("<td>-</td>")
    return f"<tr><th>{escape(label)}</th>{''.join(cells)}</tr>"


def _categories(summary: dict[str, Any]) -> str:
    """Bars of three metrics by category, before and after the last round."""
    if summary["before"] is None or "by_category" not in summary["before"]:
        return ""
    last_label, last = _stages(summary)[-1]
    panels = []
    for name in ("understanding", "generation", "generation_strict"):
        rows = []
        for category, values in summary["before"]["by_category"].items():
            after = last["by_category"].get(category, {}) if summary["rounds"] else {}
            rows.append(CategoryBars(category.replace("_", " "), _measured(values, name), _measured(after, name)))
        chart = category_chart(name.partition("_")[0], rows, ("before", last_label))
        panels.append(f'<div class="card"><h4>{escape(LABELS[name].capitalize())}</h4>{chart}</div>')
    after_key = f', <span class="key"></span>after {last_label}' if summary["rounds"] else ""
    return (
        f'<section><h2>By category</h2><p class="note"><span class="key before"></span>before{after_key}; thin lines '
        f'are 95 % intervals</p><div class="split">{"".join(panels)}</div></section>'
    )


def _measured(metrics: dict[str, Any], name: str) -> Measured | None:
    value = metrics.get(name)
    return None if value is None else Measured(value, *metrics[f"{name}_ci95"])


def _rounds(rounds: Sequence[dict[str, Any]]) -> str:
    """What each round's pairs were, how far their scores can be trusted, how training ended, and the time it took."""
    pairs = [metrics.get("pairs", {}) for metrics in rounds]
    trust = [metrics.get("agreement", {}) for metrics in rounds]
    kept = [{label: item.get(name) for name, label in _KEPT.items()} for item in pairs]
    percent = [{label: item.get(name) for name, label in _AGREEMENT.items()} for item in trust]
    ranks = [{label: item.get(name) for name, label in _RANKS.items()} for item in trust]
    judges = [{_RANKS[name]: metrics.get("judge", {}).get(name) for name in ("spearman", "auc")} for metrics in rounds]
    tables = [
        _round_table("Records that gave pairs", kept, str),
        _round_table("Sides of records rejected", [item.get("rejected", {}) for item in pairs], str),
        _round_table("Scores and the oracle, %", percent, format_value),
        _round_table("Candidates' scores and the oracle, by rank", ranks, "{:.2f}".format),
        _round_table("Measured images' own scores and the oracle", judges, "{:.2f}".format),
        _round_table("End of training", [metrics.get("training", {}) for metrics in rounds], "{:.4g}".format),
        _round_table("Seconds", [metrics.get("seconds", {}) for metrics in rounds], "{:.0f}".format),
    ]
    if not any(tables):
        return ""
    return f'<section><h2>How the rounds went</h2><div class="split">{"".join(tables)}</div></section>'


def _round_table(title: str, rounds: Sequence[dict[str, Any]], form: Callable[[Any], str]) -> str:
    """A card with a row for each key that any round has a value for, and a column for each round."""
    keys = dict.fromkeys(key for item in rounds for key, value in item.items() if value is not None)
    if not keys:
        return ""
    rows = ""
    for key in keys:
        cells = ("-" if item.get(key) is None else form(item[key]) for item in rounds)
        rows += f"<tr><td>{escape(key)}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
    heads = "".join(f"<th>round {number}</th>" for number in range(1, len(rounds) + 1))
    table = f'<table class="rounds"><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<div class="card"><h4>{escape(title)}</h4>{scrolling(table, title)}</div>'
