"""A study's results in tables and words; the terminal, the page and the README say the same."""

from __future__ import annotations

from rich.table import Table

from hermesflow.benchmarks.study.arms import ARMS
from hermesflow.benchmarks.study.effects import HEADLINE, Change, Effects
from hermesflow.benchmarks.study.runner import BASE, PAIR_DPO
from hermesflow.report.tables import LABELS, SAMPLER_LABELS, format_change, format_points, format_value, tell_verdict
from hermesflow.runtime.files import InputError

NAMES = {BASE: "before self-play"} | {arm: arm for arm in ARMS}
"""Of the arms in tables."""
CLAIMS = (
    ("Does training on images help understanding, beyond what captions alone teach?", "understanding-only",
     ("understanding",)),
    ("Does training on captions help generation, beyond what images alone teach?", "generation-only",
     ("generation", "generation_strict")),
)  # fmt: skip
"""The two sides of training on homologous pairs: question, the arm that lacks the side, and where it would show."""
CONTROL = "positive-control"
SHORT = "no-op", "best-of-4", "grpo+own-drawings", "pair-dpo+grpo"
"""What the short table shows beside the ways of self-play."""
OWN = "own-drawings", "grpo+own-drawings", "merged"
"""Arms that learn answers whose labels the model's own prompts give."""
_ANSWERS = {"better": "yes", "worse": "no, it harms"}


def metric_label(metric: str) -> str:
    """How tables call a metric of a study's lines."""
    if metric in LABELS:
        return LABELS[metric]
    group, *names = metric.split()
    return f"{names[0]}, {SAMPLER_LABELS[names[1]]}" if group == "samplers" else f"asked for {names[0]}"


def metric_groups(effects: Effects) -> dict[str, list[str]]:
    """The metrics of a study's tables, by title: the headline, by sampler, and by what is asked for."""
    return {
        "measured": list(HEADLINE),
        "drawn by steps/temperature": [
            name for name in effects.metrics if name.startswith("samplers ") and name.endswith(" generation_strict")
        ],
        "understanding": [name for name in effects.metrics if name.startswith("understanding_")],
    }


def describe_study(effects: Effects) -> str:
    """How much was measured, in a sentence."""
    seeds = f"{len(effects.seeds)} seed{'s' if len(effects.seeds) > 1 else ''}"
    return (
        f"{seeds} of each arm, {effects.num_prompts} prompts with {effects.num_images} images and "
        f"{effects.num_understanding} real images; changes in points with 95 % intervals over seeds and scenes."
    )


def answer_claims(effects: Effects) -> list[tuple[str, str]]:
    """(question, answer): what becomes of the gap, what of single seeds, and each of CLAIMS whose arms were run."""
    answers = [
        ("How much of the gap closes?", " ".join(_tell_gap(effects, arm) for arm in effects.self_play)),
        ("Is one run enough to see it?", " ".join(_tell_seeds(effects, arm) for arm in effects.self_play)),
    ]
    answers += (
        [("Could this study show a rise of understanding?", _tell_control(effects))] if CONTROL in effects.arms else []
    )
    own = [arm for arm in OWN if arm in effects.arms]
    rises = "; ".join(f"{arm} {format_change(effects.change(arm, 'understanding'))} points" for arm in own)
    answers += [("Does understanding rise without answers from outside?", f"{rises}.")] if own else []
    for question, other, metrics in CLAIMS:
        if other in effects.arms:
            verdicts = []
            for metric in metrics:
                difference = effects.difference(PAIR_DPO, other, metric)
                verdict = _ANSWERS.get(tell_verdict(metric, difference), "not shown")
                verdicts.append(f"{LABELS[metric]}: {verdict}, {format_change(difference)} points")
            answers.append((question, f"{PAIR_DPO} minus {other}: {'; '.join(verdicts)}."))
    return answers


def _tell_control(effects: Effects) -> str:
    change = effects.change(CONTROL, "understanding")
    verdict = "yes" if tell_verdict("understanding", change) == "better" else "not shown"
    return f"{verdict}: right answers from outside change it by {format_change(change)} points ({CONTROL})."


def _tell_gap(effects: Effects, arm: str) -> str:
    closed = effects.closed_gap(arm)
    if closed is None:
        return "There was none that is clear of zero."
    part, low, high = (format_points(value).removeprefix("+") for value in (closed["change"], *closed["ci95"]))
    before, after = (format_value(effects.value(name, "gap")) for name in (BASE, arm))
    return f"{arm}: {part} % of it [{low}, {high}], from {before} to {after} points."


def _tell_seeds(effects: Effects, arm: str) -> str:
    """How many seeds of an arm show the gain by themselves."""
    metric = "generation_strict"
    changes = effects.seed_changes(arm, metric)
    num_better = sum(tell_verdict(metric, change) == "better" for change in changes)
    least, most = (format_change(pick(changes, key=lambda item: item["change"])) for pick in (min, max))
    return (
        f"{arm}, {LABELS[metric]}, each seed by itself: significantly better in {num_better} of {len(changes)}; "
        f"changes from {least} to {most} points."
    )


def tell_difference(metric: str, difference: Change) -> str:
    """In words whether the first of two arms is better."""
    return tell_verdict(metric, difference).replace("change", "difference")


def console_tables(effects: Effects) -> list[Table]:
    """A table for each metric: the arms, their changes, and each way of self-play minus the others."""
    tables = []
    for metric in (metric for group in metric_groups(effects).values() for metric in group):
        table, label = Table(box=None, padding=(0, 2, 0, 0)), metric_label(metric)
        for name in (label, "%", "change", *(f"{main} minus it" for main in effects.self_play)):
            table.add_column(name, min_width=20 if name == label else None)
        table.add_row(NAMES[BASE], format_value(effects.value(BASE, metric)))
        for arm in effects.arms:
            differences = [
                "" if arm == main else _marked(effects.difference(main, arm, metric), "[bold]", "[/bold]")
                for main in effects.self_play
            ]
            change = _marked(effects.change(arm, metric), "[bold]", "[/bold]")
            table.add_row(NAMES[arm], format_value(effects.value(arm, metric)), change, *differences)
        tables.append(table)
    return tables


def markdown(effects: Effects, marker: str = "study") -> str:
    """What stands between the markers of a Markdown file. Bold leaves out zero.

    Args:
        effects: what was measured.
        marker: "study": all tables and answers, without understanding by question, which stands on the page; "study
            short": one table of the ways of self-play, steps alone and best of four: understanding, and strict
            generation by sampler.
    Raises: InputError on another marker.
    """
    if marker not in ("study", "study short"):
        raise InputError(f"<!-- {marker} -->: expected study or study short; correct the marker")
    measured, drawn = list(metric_groups(effects).items())[:2]
    if marker == "study short":
        metrics = ["understanding", *drawn[1]]
        arms = [arm for arm in effects.arms if arm in (*effects.self_play, *SHORT)]
        parts = [[describe_study(effects)], _changes_table(effects, "measured", metrics, arms)]
    else:
        answers = [f"- {question} {answer}" for question, answer in answer_claims(effects)]
        parts = [[describe_study(effects)]]
        for title, metrics in (measured, drawn):
            if metrics:
                parts += [_changes_table(effects, title, metrics, effects.arms)]
                parts += _difference_tables(effects, metrics)
        parts += [answers]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _changes_table(effects: Effects, title: str, metrics: list[str], arms: list[str]) -> list[str]:
    header = [f"{title}: %, change in points", *map(metric_label, metrics)]
    rows = [header, ["---"] * len(header)]
    rows.append([NAMES[BASE], *(format_value(effects.value(BASE, metric)) for metric in metrics)])
    for arm in arms:
        values = (format_value(effects.value(arm, metric)) for metric in metrics)
        changes = (_marked(effects.change(arm, metric)) for metric in metrics)
        rows.append([NAMES[arm], *map(", ".join, zip(values, changes, strict=True))])
    return _piped(rows)


def _difference_tables(effects: Effects, metrics: list[str]) -> list[list[str]]:
    """Each way of self-play minus the other arms."""
    tables = []
    for main in effects.self_play if len(effects.arms) > 1 else ():
        header = [f"{main} minus, in points", *map(metric_label, metrics)]
        rows = [header, ["---"] * len(header)]
        for arm in effects.arms:
            if arm != main:
                rows.append([NAMES[arm], *(_marked(effects.difference(main, arm, metric)) for metric in metrics)])
        tables.append(_piped(rows))
    return tables


def _piped(rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in rows]


def _marked(change: Change, begin: str = "**", end: str = "**") -> str:
    text = format_change(change)
    return f"{begin}{text}{end}" if change["significant"] else text
