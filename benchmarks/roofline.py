"""A picture of benchmark lines: each case and backend under the roof of its device."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from hermesflow.benchmarks.lines import Line
from hermesflow.runtime.files import InputError, atomic_write

COLORS = ("#1f6f8b", "#d1603d", "#5a8f3c", "#8a5aa8", "#b8860b", "#555555")


def check_matplotlib() -> None:
    """Raise InputError with the fix unless matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot: matplotlib is not installed; run: pip install matplotlib")


def plot_roofline(lines: Sequence[Line], path: Path) -> None:
    """Draw the lines of one run as a PNG.

    Left: operations a second against operations a byte, with the roofs that roof_fraction was taken of. Right: the
    share of the roof. Cases have numbers, backends colors.

    Args:
        lines: of one device; those without numbers are left out.
        path: the PNG.
    Raises: InputError if matplotlib is missing, nothing was measured or the file cannot be written.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = {
        (line["case"], line["shape"], line["dtype"], line["backend"]): line
        for line in lines
        if line["ms_p50"] is not None
    }
    if not points:
        raise InputError("--plot: nothing was measured")
    numbers = {case: number for number, case in enumerate(dict.fromkeys(key[:3] for key in points), start=1)}
    backends = list(dict.fromkeys(key[3] for key in points))
    color = {name: COLORS[index % len(COLORS)] for index, name in enumerate(backends)}
    figure = Figure(figsize=(13, max(5.5, 0.26 * len(points) + 1.5)), layout="constrained")
    FigureCanvasAgg(figure)
    roof, bars = figure.subplots(1, 2, width_ratios=(1.25, 1))

    _draw_roofs(roof, list(points.values()))
    for (*case, backend), line in points.items():
        place = (_intensity(line), line["tflop_s"] * 1e3)
        roof.scatter(*place, s=150, color=color[backend], alpha=0.85, zorder=3)
        number = str(numbers[tuple(case)])
        roof.annotate(number, place, ha="center", va="center", color="white", fontsize=8, weight="bold", zorder=4)
    roof.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s", title="Under the roof")
    roof.grid(which="major", color="#dddddd")

    names = [f"{numbers[tuple(case)]}  {case[0]}  ({case[1]}, {case[2]})" for *case, _ in points]
    shares = [line["roof_fraction"] * 100 for line in points.values()]
    bars.barh(range(len(points)), shares, color=[color[key[3]] for key in points])
    once = ["" if name in names[:row] else name for row, name in enumerate(names)]
    bars.set_yticks(range(len(points)), once)
    bars.tick_params(axis="y", labelsize=8)
    for row, share in enumerate(shares):
        bars.text(share, row, f" {share:.0f} %" if share >= 1 else f" {share:.1g} %", va="center", fontsize=8)
    bars.invert_yaxis()
    bars.set(xlim=(0, 1.12 * max(100, *shares)), xlabel="per cent of the roof")
    bars.axvline(100, color="#333333", linewidth=1)
    bars.legend(handles=[bars.barh([0], [0], color=color[name], label=name) for name in backends], loc="lower right")
    first = next(iter(points.values()))
    figure.suptitle(f"{first['bench']} on {first['device']}, torch {first['torch']}")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _intensity(line: Line) -> float:
    return line["tflop_s"] * 1e3 / line["gb_s"]


def _draw_roofs(axes, lines: list[Line]) -> None:
    """A slope for the bandwidth and a level for each dtype whose matmul rate bounded a case.

    rate / roof_fraction is the roof above a point: the bandwidth where bytes bind, the matmul rate where operations do.
    """
    gb_s = max(line["gb_s"] / line["roof_fraction"] for line in lines)
    low, high = min(map(_intensity, lines)) / 3, max(map(_intensity, lines)) * 3
    levels = {}
    for line in lines:
        if line["gb_s"] / line["roof_fraction"] < 0.999 * gb_s:
            levels[line["dtype"]] = line["tflop_s"] * 1e3 / line["roof_fraction"]
    end = min(high, max(levels.values(), default=high * gb_s) / gb_s)
    axes.plot([low, end], [low * gb_s, end * gb_s], color="#333333", linewidth=1.5)
    axes.annotate(f"copy {gb_s:.3g} GB/s", (low, low * gb_s), textcoords="offset points", xytext=(14, -4), fontsize=9)
    for dtype, level in levels.items():
        axes.plot([level / gb_s, high], [level, level], color="#333333", linewidth=1.5)
        axes.annotate(f"matmul {dtype} {level / 1e3:.3g} TFLOP/s", (high, level), ha="right", va="bottom", fontsize=9)
