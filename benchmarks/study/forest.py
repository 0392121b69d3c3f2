"""A picture of a study: each arm's change of each metric with its interval."""

from __future__ import annotations

from pathlib import Path

from hermesflow.files import atomic_write
from hermesflow.summaries import LABELS, tell_verdict

from ..roofline import check_matplotlib
from .effects import METRICS, Effects
from .findings import NAMES, describe_study

_COLORS = {"better": "#17734a", "worse": "#b3302a"}
_NO_CHANGE = "#777777"


def plot_effects(effects: Effects, path: Path) -> None:
    """Draw the changes to before self-play as a PNG.

    Args:
        effects: of the study.
        path: the PNG.
    Raises: InputError if matplotlib is missing or the file cannot be written.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 1.6 + 0.36 * len(effects.arms)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, metric in zip(figure.subplots(1, len(METRICS), sharey=True), METRICS, strict=True):
        axes.axvline(0, color="#333333", linewidth=1)
        for row, arm in enumerate(effects.arms):
            change = effects.change(arm, metric)
            color = _COLORS.get(tell_verdict(metric, change), _NO_CHANGE)
            low, high = (100 * end for end in change["ci95"])
            axes.plot([low, high], [row, row], color=color, linewidth=2)
            axes.plot(100 * change["change"], row, "o", color=color)
        axes.set(title=LABELS[metric], xlabel="change in points")
        axes.grid(axis="x", color="#dddddd")
    axes.set_yticks(range(len(effects.arms)), [NAMES[arm] for arm in effects.arms])
    axes.set_ylim(len(effects.arms) - 0.5, -0.5)
    figure.suptitle(describe_study(effects), fontsize=9)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
