"""What a run measured, in words and tables; the terminal and the report say the same."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hermesflow.data.balancing import describe_one_sided
from hermesflow.evaluation.metrics import MetricPath, is_balanced, paired_change
from hermesflow.runtime.files import InputError, shown
from hermesflow.runtime.registry import SOURCES

LABELS = {
    "understanding": "understanding",
    "understanding_record_questions": "record questions",
    "generation": "generation",
    "generation_strict": "strict generation",
    "gap": "gap",
    "caption_f1": "caption likeness",
    "caption_exact": "exact captions",
}
"""What is measured, as tables call it. Understanding is by balanced questions, and beside it by the record's own, which
ask only of what is there; gap is understanding less generation; strict counts images right in full; exact captions
state the facts of the scene and no others."""
ONE_SIDED = (
    "Understanding was measured by the questions of the records. They ask only of what is there, so that a model which "
    "leans to yes does well by them; runs of today ask balanced questions."
)
"""What a page says of a run that was measured before balanced questions were asked."""
SAMPLER_LABELS = {"generation": "generation", "generation_strict": "strict", "best_of_4_strict": "best of 4, strict"}
"""What is measured by each sampler, as tables call it."""


def is_builtin(metrics: dict[str, Any]) -> bool:
    """Whether the metrics are those of the built-in measurement."""
    return "by_category" in metrics


def headline_metrics(metrics: dict[str, Any]) -> dict[MetricPath, str]:
    """The metrics of LABELS that there are, with their labels; understanding by record questions alone says so.

    Of another evaluation all metrics, whose names are their labels.
    """
    if not is_builtin(metrics):
        return {path: ", ".join(path).replace("_", " ") for path in _measured_paths(metrics)}
    labels = {(name,): label for name, label in LABELS.items() if name in metrics}
    if not is_balanced(metrics):
        labels["understanding",] = LABELS["understanding_record_questions"]
    return labels


def _measured_paths(metrics: dict[str, Any]) -> Iterator[MetricPath]:
    """Of all metrics, nested ones too: those that have an interval beside them."""
    for name, value in metrics.items():
        if f"{name}_ci95" in metrics:
            yield (name,)
        elif isinstance(value, dict) and name != "change":
            yield from ((name, *path) for path in _measured_paths(value))


def sampler_metrics(metrics: dict[str, Any]) -> dict[MetricPath, str]:
    """Generation by each sampler, with a label such as "8/0.7, strict"."""
    return {
        ("samplers", sampler, name): f"{sampler}, {label}"
        for sampler in metrics.get("samplers", {})
        for name, label in SAMPLER_LABELS.items()
    }


def kind_metrics(metrics: dict[str, Any]) -> dict[MetricPath, str]:
    """Understanding by what the balanced questions ask for."""
    kinds = metrics.get("understanding_by_kind", {})
    return {("understanding_by_kind", kind): kind for kind in sorted(kinds) if not kind.endswith("_ci95")}


def find(metrics: dict[str, Any], path: MetricPath) -> Any:
    """What stands at a path of nested dicts; None where there is nothing."""
    value: Any = metrics
    for name in path:
        value = (value or {}).get(name)
    return value


def interval_of(metrics: dict[str, Any], path: MetricPath) -> list[float] | None:
    """The interval of the metric at a path."""
    return find(metrics, (*path[:-1], f"{path[-1]}_ci95"))


def print_metrics(metrics: dict[str, Any], console: Console) -> None:
    """Prints one evaluation in per cent: the whole with its intervals, then each category.

    Args:
        metrics: "metrics" of evaluate.
        console: where it goes.
    """
    whole = _table()
    for name, justify in (("", "left"), ("%", "right"), ("95 % interval", "left")):
        whole.add_column(name, justify=justify)
    for path, label in (headline_metrics(metrics) | sampler_metrics(metrics) | kind_metrics(metrics)).items():
        name = {"samplers": "drawn by ", "understanding_by_kind": "asked for "}.get(path[0], "") + label
        whole.add_row(escape(name), format_value(find(metrics, path)), format_interval(interval_of(metrics, path)))
    if not is_builtin(metrics):
        console.print(f"{metrics['num_records']} records", whole, sep="\n")
        return
    # Two fewer, to fit into 80 columns.
    shown = [name for name in LABELS if name not in ("understanding_record_questions", "caption_f1")]
    categories = _table()
    categories.add_column("by category, %")
    for name in shown:
        categories.add_column(LABELS[name], justify="right")
    for category, values in metrics["by_category"].items():
        categories.add_row(category.replace("_", " "), *(format_value(values[name]) for name in shown))
    asked, drawn, prompts = (metrics[f"num_{name}"] for name in ("understanding", "images", "prompts"))
    console.print(f"{asked} real images asked about, {drawn} images drawn for {prompts} prompts")
    console.print(*describe_judge(metrics), sep="\n")
    console.print(whole, "", categories, sep="\n")


def changes_between(before: Any, after: dict[str, Any], path: Path) -> dict[str, Any]:
    """How an evaluation differs from an earlier one, by metric, with paired intervals.

    Args:
        before, after: evaluations; the earlier one as it was read from its file.
        path: that file, for messages.
    Raises: InputError if the two did not measure the same records in the same way.
    """
    try:
        if before.get("judge") != after.get("judge") or before.get("suite") != after.get("suite"):
            raise ValueError(f"was judged by {shown(before.get('judge'))}, not by {shown(after.get('judge'))}")
        return paired_change(before, after)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{path}: cannot be compared ({error}); give an evaluation of the same records") from error


def print_change(changes: dict[str, Any], metrics: dict[str, Any], console: Console) -> None:
    """Prints what changes_between gives, for the metrics of the later evaluation."""
    table = _table()
    for name, justify in (("change in points", "left"), ("", "left"), ("", "left")):
        table.add_column(name, justify=justify)
    for place, label in headline_metrics(metrics).items():
        change = find(changes, place)
        if change:
            table.add_row(escape(label), format_change(change), tell_verdict(place[-1], change))
    console.print("", table, sep="\n")


def make_console() -> Console:
    """A console on the standard output, 160 columns wide where that is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 160)


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Prints what a run measured: each metric before and after each round, with its paired change.

    Args:
        summary: what summary.json holds.
        console: where it goes.
    """
    stages = [("before", summary["before"])]
    stages += [(f"round {number}", metrics) for number, metrics in enumerate(summary["rounds"], 1)]
    table = _table()
    for name, justify in (("", "left"), ("%, 95 % interval", "right"), ("change in points", "left"), ("", "left")):
        table.add_column(name, justify=justify)
    for path, label in headline_metrics(summary["before"]).items():
        table.add_row(escape(label), style="bold")
        for stage, metrics in stages:
            table.add_row(f"  {stage}", *_told_value(metrics, path))
    console.print("Self-play, measured on held-out scenes", table, sep="\n")
    last_stage, last = stages[-1]
    for title, metrics in (("Steps/temperature", sampler_metrics), ("Understanding", kind_metrics)):
        if not (rows := metrics(last)):
            continue
        table = _table()
        heads = (title, "left"), ("before", "right"), (last_stage, "right"), ("change in points", "left"), ("", "left")
        for name, justify in heads:
            table.add_column(name, justify=justify)
        for path, label in rows.items():
            change = find(last, ("change", *path))
            shown = format_change(change) if change else ""
            verdict = tell_verdict(path[-1], change) if change and change["significant"] else ""
            table.add_row(
                label, *(format_value(find(item, path)) for item in (summary["before"], last)), shown, verdict
            )
        console.print("", table, sep="\n")
    for line in describe_data(summary):
        console.print(line, highlight=False, markup=False)
    for stage, metrics in stages:
        for line in describe_round(metrics) + describe_judge(metrics):
            console.print(f"{stage}: {line}", highlight=False)
    for line in describe_cost(summary):
        console.print(line, highlight=False, markup=False)
    console.print(headline(summary), style="bold", highlight=False, markup=False)


def headline(summary: dict[str, Any]) -> str:
    """One sentence that says what a run measured.

    It names understanding and generation beside the gap: a gap that closes because understanding fell is no success.

    Args:
        summary: what summary.json holds; rounds may be empty.
    """
    before, rounds = summary["before"], summary["rounds"]
    if not is_builtin(before):
        return _own_headline(before, rounds)
    if not rounds:
        return (
            f"Before self-play the model answers {_percent(before['understanding'])} % of the "
            f"{'balanced ' if is_balanced(before) else ''}questions about real images, and its own images answer "
            f"{_percent(before['generation'])} % of theirs: a gap of "
            f"{_percent(before['gap'])} points."
        )
    asked = "balanced questions" if is_balanced(rounds[-1]) else "record questions, which ask only of what is there"
    labels = {"gap": "gap", "generation": "generation", "understanding": f"understanding ({asked})"}
    changed = [f"{label}: {_tell(rounds[-1]['change'][name])}" for name, label in labels.items()]
    many = f"{len(rounds)} rounds" if len(rounds) > 1 else "1 round"
    return f"After {many}, on {rounds[-1]['num_prompts']} held-out prompts: {'; '.join(changed)}."


def _own_headline(before: dict[str, Any], rounds: Sequence[dict[str, Any]]) -> str:
    """Of an evaluation that is not the built-in one."""
    labels = headline_metrics(before)
    if not rounds:
        values = [f"{label} {format_value(find(before, path))} %" for path, label in labels.items()]
        return f"Before self-play, on {before['num_records']} records: {'; '.join(values)}."
    many = f"{len(rounds)} rounds" if len(rounds) > 1 else "1 round"
    changes = {label: find(rounds[-1], ("change", *path)) for path, label in labels.items()}
    values = [f"{label}: {_tell(change)}" for label, change in changes.items() if change]
    return f"After {many}, on {rounds[-1]['num_records']} records: {'; '.join(values)}."


def describe_judge(metrics: dict[str, Any]) -> list[str]:
    """How well the model's own scores of its images agree with the oracle, in a line where it was measured."""
    judge = metrics.get("judge") or {}
    if judge.get("spearman") is None or judge.get("auc") is None:
        return []
    return [
        f"the model's own scores of these images and the oracle: rank correlation {judge['spearman']:.2f}, "
        f"AUC {judge['auc']:.2f}"
    ]


def describe_cost(summary: dict[str, Any]) -> list[str]:
    """What the phases of a run took, in a line; of a phase that was resumed after a kill, the time since then. None
    where no seconds were noted.

    Args:
        summary: what summary.json holds.
    """
    spent: dict[str, float] = {}
    for metrics in (summary["before"], *summary["rounds"]):
        for phase, seconds in metrics.get("seconds", {}).items():
            spent[phase] = spent.get(phase, 0.0) + seconds
    phases = ", ".join(f"{phase} {spent[phase]:.0f} s" for phase in sorted(spent))
    return [f"time: {sum(spent.values()):.0f} s ({phases})"] if spent else []


def describe_data(summary: dict[str, Any]) -> list[str]:
    """What a reader should know of a run's data: that it was not measured on it, records that could not be used,
    one-sided questions; a line each.

    Args:
        summary: what summary.json holds.
    """
    data = summary.get("data", {})
    rejected, one_sided = data.get("rejected", {}), describe_one_sided(data.get("yes_share"))
    reasons = ", ".join(f"{count} {reason}" for reason, count in rejected.items())
    settings, lines = summary.get("settings", {}), []
    source, measured = (settings.get(name, {}).get(key) for name, key in (("data", "source"), ("eval", "data")))
    if measured:
        lines.append(
            f"measured on {measured}; whether drawings are right is the judge's word: {settings['eval']['judge']}"
        )
    elif summary.get("before") and is_builtin(summary["before"]) and source and source not in SOURCES:
        lines.append(
            f"measured on the built-in world of shapes, not on {source}; eval.data=FILE measures on held-out records"
        )
    if rejected:
        lines.append(f"data: {sum(rejected.values())} records could not be used: {reasons}; rejected.parquet has all")
    return lines + ([f"data: {one_sided}"] if one_sided else [])


def describe_round(metrics: dict[str, Any]) -> list[str]:
    """A round's pairs, the trust its scores deserve, and its time, in a line each; what is not there yet is left out.

    Args:
        metrics: one of the summary's rounds.
    """
    lines = []
    if "pairs" in metrics:
        lines.append(f"{metrics['pairs']['kept']} of {metrics['pairs']['records']} records gave pairs")
    trust = metrics.get("agreement", {})
    if trust.get("win_better") is not None:
        lines.append(
            f"the oracle finds the win better in {_percent(trust['win_better'])} % of pairs, worse in "
            f"{_percent(trust['win_worse'])} %, equal in {_percent(trust['tie'])} %"
        )
    if trust.get("caption_win_truer") is not None:
        lines.append(
            f"the win's caption is truer in {_percent(trust['caption_win_truer'])} % of pairs, less true in "
            f"{_percent(trust['caption_win_less_true'])} %; it is wrong or incomplete in "
            f"{_percent(1 - trust['caption_win_exact'])} %"
        )
    if trust.get("spearman") is not None:
        line = f"rank correlation of the candidates' scores with the oracle {trust['spearman']:.2f}"
        lines.append(line + (f", AUC {trust['auc']:.2f}" if trust.get("auc") is not None else ""))
    if "seconds" in metrics:
        lines.append(", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in metrics["seconds"].items()))
    return lines


def format_value(value: float | None) -> str:
    """A fraction in per cent, such as "61.3"; "-" for None."""
    return "-" if value is None else _percent(value)


def format_interval(interval: Sequence[float] | None) -> str:
    """An interval of fractions in per cent, such as "[58.9, 63.6]"; empty for None."""
    return "" if interval is None else f"[{_percent(interval[0])}, {_percent(interval[1])}]"


def format_points(fraction: float) -> str:
    """A change in points with its sign, such as "+0.4"; "0.0" has none."""
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "\N{MINUS SIGN}")


def format_change(change: dict[str, Any]) -> str:
    """A paired change with its interval in points, such as "+0.4 [-1.3, +2.1]"."""
    low, high = change["ci95"]
    return f"{format_points(change['change'])} [{format_points(low)}, {format_points(high)}]"


def tell_verdict(name: str, change: dict[str, Any]) -> str:
    """In a word: "better" or "worse", or "no significant change" where the interval holds zero.

    A gap is "down" or "up": below zero, or closed by understanding that fell, a smaller one is no better.
    """
    if not change["significant"]:
        return "no significant change"
    words = ("down", "up") if name == "gap" else ("worse", "better")
    return words[change["change"] > 0]


def _told_value(metrics: dict[str, Any], path: MetricPath) -> list[str]:
    """A metric with its interval, and its change with the verdict where there is one."""
    change = find(metrics, ("change", *path))
    value = f"{format_value(find(metrics, path))} {format_interval(interval_of(metrics, path))}"
    return [value, *((format_change(change), tell_verdict(path[-1], change)) if change else ())]


def _table() -> Table:
    """Without lines, so that a row of the closing table fits into 80 columns."""
    return Table(box=None, padding=(0, 1, 0, 0))


def _tell(change: dict[str, Any]) -> str:
    low, high = change["ci95"]
    interval = f"95 % interval {format_points(low)} to {format_points(high)}"
    if not change["significant"]:
        return f"no significant change ({format_points(change['change'])} points, {interval})"
    return f"{'up' if change['change'] > 0 else 'down'} {_percent(abs(change['change']))} points ({interval})"


def _percent(fraction: float) -> str:
    text = f"{100 * fraction:.1f}"
    return "0.0" if text == "-0.0" else text.replace("-", "\N{MINUS SIGN}")
