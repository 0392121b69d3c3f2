"""What a run measured, in words and tables; the terminal and the report say the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

LABELS = {
    "understanding": "understanding",
    "understanding_record_questions": "by record questions",
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

Path = tuple[str, ...]


def is_balanced(metrics: dict[str, Any]) -> bool:
    """Whether understanding was measured by balanced questions; older runs asked those of the records alone."""
    return metrics.get("understanding_record_questions") is not None


def headline_metrics(metrics: dict[str, Any]) -> dict[Path, str]:
    """The metrics of LABELS that there are, with their labels."""
    return {(name,): label for name, label in LABELS.items() if name in metrics}


def sampler_metrics(metrics: dict[str, Any]) -> dict[Path, str]:
    """Generation by each sampler, with a label such as "8/0.7, strict"."""
    return {
        ("samplers", sampler, name): f"{sampler}, {label}"
        for sampler in metrics.get("samplers", {})
        for name, label in SAMPLER_LABELS.items()
    }


def kind_metrics(metrics: dict[str, Any]) -> dict[Path, str]:
    """Understanding by what the balanced questions ask for."""
    kinds = metrics.get("understanding_by_kind", {})
    return {("understanding_by_kind", kind): kind for kind in sorted(kinds) if not kind.endswith("_ci95")}


def find(metrics: dict[str, Any], path: Path) -> Any:
    """What stands at a path of nested dicts; None where there is nothing."""
    value: Any = metrics
    for name in path:
        value = (value or {}).get(name)
    return value


def interval_of(metrics: dict[str, Any], path: Path) -> list[float] | None:
    """The interval of the metric at a path."""
    return find(metrics, (*path[:-1], f"{path[-1]}_ci95"))


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
    for path, label in (headline_metrics(metrics) | sampler_metrics(metrics) | kind_metrics(metrics)).items():
        name = {"samplers": "drawn by ", "understanding_by_kind": "asked for "}.get(path[0], "") + label
        whole.add_row(name, format_value(find(metrics, path)), format_interval(interval_of(metrics, path)))
    # Two fewer, to fit into 80 columns.
    shown = [name for name in LABELS if name not in ("understanding_record_questions", "caption_f1")]
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
    for path, label in headline_metrics(summary["before"]).items():
        table.add_row(label, style="bold")
        for stage, metrics in stages:
            table.add_row(f"  {stage}", *_told_value(metrics, path))
    console.print("Self-play, measured on held-out scenes", table, sep="\n")
    last_stage, last = stages[-1]
    for title, metrics in (("Drawn by (steps/temperature)", sampler_metrics), ("Understanding", kind_metrics)):
        if not (rows := metrics(last)):
            continue
        table = _table()
        for name, justify in ((title, "left"), ("before", "right"), (last_stage, "right"), ("change", "left")):
            table.add_column(name, justify=justify)
        for path, label in rows.items():
            change = find(last, ("change", *path))
            told = f"{format_change(change)} {tell_verdict(path[-1], change)}" if change else ""
            table.add_row(label, *(format_value(find(item, path)) for item in (summary["before"], last)), told)
        console.print("", table, sep="\n")
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
    asked = "balanced questions" if is_balanced(rounds[-1]) else "record questions, which ask only of what is there"
    labels = {"gap": "gap", "generation": "generation", "understanding": f"understanding ({asked})"}
    told = [f"{label}: {_tell(rounds[-1]['change'][name])}" for name, label in labels.items()]
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
    if trust.get("caption_win_truer") is not None:
        lines.append(
            f"the oracle finds the win's caption truer in {_percent(trust['caption_win_truer'])} % of pairs, less true "
            f"in {_percent(trust['caption_win_less_true'])} %; wrong or incomplete in "
            f"{_percent(1 - trust['caption_win_exact'])} %"
        )
    if trust.get("spearman") is not None:
        line = f"rank correlation of the image scores with the oracle {trust['spearman']:.2f}"
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
    """In a word: "better" or "worse", or "no significant change" where the interval holds zero; a gap is to shrink."""
    if not change["significant"]:
        return "no significant change"
    return "better" if (change["change"] > 0) != (name == "gap") else "worse"


def _told_value(metrics: dict[str, Any], path: Path) -> list[str]:
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
    return f"{100 * fraction:.1f}"
