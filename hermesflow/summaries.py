"""What a run measured, in words and tables; the terminal and the report say the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

LABELS = {
    "understanding": "understanding",
    "generation": "generation",
    "generation_strict": "strict generation",
    "gap": "gap",
    "caption_f1": "caption likeness",
    "caption_exact": "exact captions",
}
"""What is measured, as tables call it. gap is understanding less generation; strict counts images right in full; exact
captions state the facts of the scene and no others."""


def print_metrics(metrics: dict[str, Any], console: Console) -> None:
    """Prints one evaluation in per cent: the whole with its intervals, then each category.

    Args:
        metrics: "metrics" of hermesflow.evaluation.evaluate.
        console: where it goes.
    """
    asked, drawn, prompts = (metrics[f"num_{name}"] for name in ("understanding", "images", "prompts"))
    whole = _table()
    for name, justify in (("", "left"), ("%", "right"), ("95 % interval", "left")):
        whole.add_column(name, justify=justify)
    for name, label in LABELS.items():
        whole.add_row(label, format_value(metrics[name]), format_interval(metrics[f"{name}_ci95"]))
    shown = [name for name in LABELS if name != "caption_f1"]  # one fewer, to fit into 80 columns
    categories = _table()
    categories.add_column("by category, %")
    for name in shown:
        categories.add_column(LABELS[name], justify="right")
    for category, values in metrics["by_category"].items():
        categories.add_row(category.replace("_", " "), *(format_value(values[name]) for name in shown))
    console.print(f"{asked} real images asked about, {drawn} images drawn for {prompts} prompts")
    console.print(whole, "", categories, sep="\n")


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
    for name, label in LABELS.items():
        table.add_row(label, style="bold")
        for stage, metrics in stages:
            value = f"{format_value(metrics.get(name))} {format_interval(metrics.get(f'{name}_ci95'))}"
            change = metrics.get("change", {}).get(name)
            table.add_row(f"  {stage}", value, *((format_change(change), tell_verdict(name, change)) if change else ()))
    console.print("Self-play, measured on held-out scenes", table, sep="\n")
    if unusable := describe_unusable(summary):
        console.print(unusable, highlight=False, markup=False)
    for number, metrics in enumerate(summary["rounds"], 1):
        for line in describe_round(metrics):
            console.print(f"round {number}: {line}", highlight=False)
    console.print(headline(summary), style="bold", highlight=False)


def headline(summary: dict[str, Any]) -> str:
    """One sentence that says what a run measured.

    Understanding and generation are told beside the gap: one that closes because understanding fell is no success.

    Args:
        summary: what summary.json holds; rounds may be empty.
    """
    before, rounds = summary["before"], summary["rounds"]
    if not rounds:
        return (
            f"Before self-play the model answers {_percent(before['understanding'])} % of the questions about real "
            f"images, and its own images answer {_percent(before['generation'])} %: a gap of "
            f"{_percent(before['gap'])} points."
        )
    told = [f"{name}: {_tell(rounds[-1]['change'][name])}" for name in ("gap", "generation", "understanding")]
    many = f"{len(rounds)} rounds" if len(rounds) > 1 else "1 round"
    return f"After {many}, on {rounds[-1]['num_prompts']} held-out prompts: {'; '.join(told)}."


def describe_unusable(summary: dict[str, Any]) -> str:
    """The records of the data that could not be used, in a line; empty if there are none.

    Args:
        summary: what summary.json holds.
    """
    rejected = summary.get("data", {}).get("rejected", {})
    reasons = ", ".join(f"{count} {reason}" for reason, count in rejected.items())
    return f"data: {sum(rejected.values())} records could not be used: {reasons}" if rejected else ""


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
    if trust.get("spearman") is not None:
        lines.append(f"rank correlation of the image scores with the oracle {trust['spearman']:.2f}")
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
    """In a word: "better" or "worse", or "no significant change" where the interval holds zero; a gap is to shrink."""
    if not change["significant"]:
        return "no significant change"
    return "better" if (change["change"] > 0) != (name == "gap") else "worse"


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
    return f"{100 * fraction:.1f}"
