"""The page that shows a study: one HTML file with its pictures inside, which needs neither network nor script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from hermesflow.benchmarks.study.arms import ARMS, arm_config
from hermesflow.benchmarks.study.effects import HEADLINE, Change, Effects
from hermesflow.benchmarks.study.findings import (
    NAMES,
    answer_claims,
    describe_study,
    metric_groups,
    metric_label,
    tell_difference,
)
from hermesflow.benchmarks.study.runner import BASE
from hermesflow.config import Config
from hermesflow.evaluation.builtin import draw_images, held_out
from hermesflow.models import open_model
from hermesflow.report.charts import Measured, forest_chart
from hermesflow.report.markup import document, picture, scrolling
from hermesflow.report.tables import LABELS, format_change, format_value, tell_verdict
from hermesflow.runtime.files import write_text

_NUM_SHOWN = 6  # prompts


def write_page(config: Config, effects: Effects) -> Path:
    """Writes index.html into the study's folder.

    Args:
        config: the study's settings.
        effects: what it measured.
    Returns: the page's path.
    Raises: InputError if the page cannot be written, or a model of the study is damaged.
    """
    path, arms = config.run_folder / "index.html", effects.arms
    listed = "".join(f"<li><b>{escape(arm)}</b>: {escape(ARMS[arm].description)}</li>" for arm in arms)
    answers = "".join(f"<p><b>{escape(asked)}</b> {escape(answer)}</p>" for asked, answer in answer_claims(effects))
    lead = ". ".join(
        f"{arm}: " + ", ".join(f"{LABELS[metric]} {format_change(effects.change(arm, metric))}" for metric in HEADLINE)
        for arm in effects.self_play
    )
    changes = "".join(_changes(effects, title, metrics) for title, metrics in metric_groups(effects).items() if metrics)
    body = f"""<p class="over">Study {escape(config.run.name)}</p>
<h1>Self-play against its controls</h1>
<p class="lead">Self-play changes, in points. {escape(lead)}.</p>
<p class="note">{escape(describe_study(effects))} All arms are measured on the same scenes, prompts and drawing seeds;
seeds and scenes are resampled alike for all. Where an interval holds zero, nothing is shown.</p>
{answers}
<section><h2>The arms</h2><ul class="note">{listed}</ul></section>
{changes}"""
    write_text(path, document(f"{config.run.name}: self-play against its controls", body + _pictures(config, effects)))
    return path


def _changes(effects: Effects, title: str, metrics: Sequence[str]) -> str:
    """A group of metrics: changes to before self-play, and each way of self-play minus the other arms."""
    arms = effects.arms
    base = _row(NAMES[BASE], [f"<td>{format_value(effects.value(BASE, metric))} %</td>" for metric in metrics])
    changes = {arm: [effects.change(arm, metric) for metric in metrics] for arm in arms}
    section = f"""
<section><h2>{escape(title.capitalize())}: changes to before self-play</h2>{_forests(metrics, changes, tell_verdict)}
{_table(metrics, changes, tell_verdict, base)}</section>"""
    for main in effects.self_play if len(arms) > 1 else ():
        less = {arm: [effects.difference(main, arm, metric) for metric in metrics] for arm in arms if arm != main}
        section += f"""
<section><h2>{escape(title.capitalize())}: {main} minus each other arm</h2>{_forests(metrics, less, tell_difference)}
{_table(metrics, less, tell_difference)}</section>"""
    return section


def _forests(metrics: Sequence[str], changes: dict[str, list[Change]], tell: Callable[[str, Change], str]) -> str:
    """A forest plot for each metric; changes has each arm's, in the order of the metrics."""
    cards = ""
    for index, metric in enumerate(metrics):
        found = [(NAMES[arm], of_arm[index]) for arm, of_arm in changes.items()]
        rows = [(name, Measured(item["change"], *item["ci95"]), tell(metric, item)) for name, item in found]
        title = metric_label(metric)
        cards += f'<div class="card"><h4>{escape(title.capitalize())}</h4>{forest_chart(title, rows)}</div>'
    return f'<div class="split wide">{cards}</div>'


def _table(
    metrics: Sequence[str], changes: dict[str, list[Change]], tell: Callable[[str, Change], str], first: str = ""
) -> str:
    """A row for each arm, after a first one."""
    heads = "".join(f"<th>{escape(metric_label(metric))}</th>" for metric in metrics)
    rows = first
    for arm, of_arm in changes.items():
        cells = [(format_change(item), tell(metric, item)) for metric, item in zip(metrics, of_arm, strict=True)]
        rows += _row(arm, [f'<td class="{word.split()[0]}">{text}<small>{word}</small></td>' for text, word in cells])
    table = f'<table class="results"><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table>'
    return scrolling(table, "results")


def _row(name: str, cells: Sequence[str]) -> str:
    return f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>"


def _pictures(config: Config, effects: Effects) -> str:
    """For the first prompts what the model draws before, and each arm of the first seed after; empty without models."""
    models = {BASE: config.model}
    for arm in effects.arms:
        of_arm = arm_config(config, arm, effects.seeds[0])
        folder = of_arm.run_folder / f"round-{of_arm.selfplay.num_rounds}" / "model"
        if folder.exists():
            models[arm] = replace(config.model, name=str(folder))
    if len(models) == 1:
        return ""
    shown = replace(config.drawn_by(config.eval), images_per_prompt=1)
    records = held_out(shown)[1][: min(_NUM_SHOWN, shown.num_prompts)]
    drawn = {arm: draw_images(open_model(model), records, shown)[:, 0] for arm, model in models.items()}
    articles = ""
    for index, record in enumerate(records):
        figures = "".join(
            f"<figure>{picture(images[index], f'{record.caption}, drawn by {NAMES[arm]}')}"
            f"<figcaption>{escape(NAMES[arm])}</figcaption></figure>"
            for arm, images in drawn.items()
        )
        articles += f"""
<article class="card record"><header><h3>{escape(record.caption)}</h3></header>
<div class="images" style="--least: 104px">{figures}</div></article>"""
    return f"""
<section><h2>Drawn with the same seed</h2>
<p class="note">The first prompts, not chosen by their results; arms of seed {effects.seeds[0]}.</p>
{articles}</section>"""
