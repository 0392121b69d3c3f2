"""A picture of a study: each arm's change of each metric with its interval."""

from __future__ import annotations

from pathlib import Path

from hermesflow.benchmarks.roofline import check_matplotlib
from hermesflow.benchmarks.study.effects import HEADLINE, Effects
from hermesflow.benchmarks.study.findings import NAMES, describe_study, metric_groups, metric_label
from hermesflow.report.tables import tell_verdict
from hermesflow.runtime.files import atomic_write

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

    metrics = [*HEADLINE, *metric_groups(effects)["drawn by steps/temperature"]]
    num_columns = len(HEADLINE)
    num_rows = -(-len(metrics) // num_columns)
    figure = Figure(figsize=(13, 0.6 + num_rows * (1 + 0.36 * len(effects.arms))), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False).flatten()
    for axes in panels[len(metrics) :]:
        axes.set_visible(False)
    for axes, metric in zip(panels, metrics, strict=False):
        axes.axvline(0, color="#333333", linewidth=1)
        for row, arm in enumerate(effects.arms):
            change = effects.change(arm, metric)
            color = _COLORS.get(tell_verdict(metric, change), _NO_CHANGE)
            low, high = (100 * end for end in change["ci95"])
            axes.plot([low, high], [row, row], color=color, linewidth=2)
            axes.plot(100 * change["change"], row, "o", color=color)
        axes.set(title=metric_label(metric), xlabel="change in points")
        axes.grid(axis="x", color="#dddddd")
    axes.set_yticks(range(len(effects.arms)), [NAMES[arm] for arm in effects.arms])
    axes.set_ylim(len(effects.arms) - 0.5, -0.5)
    figure.suptitle(describe_study(effects), fontsize=9)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
