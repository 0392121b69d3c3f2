"""Charts as inline SVG text: no scripts, no fonts, colors by CSS classes that the page defines for light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from hermesflow.report.tables import format_points


class Measured(NamedTuple):
    """A fraction with its interval."""

    value: float
    low: float
    high: float


class Stage(NamedTuple):
    """A point in a run: before self-play, or after a round."""

    label: str
    understanding: Measured
    generation: Measured


class CategoryBars(NamedTuple):
    """One category before and after; None where it was not measured."""

    label: str
    before: Measured | None
    after: Measured | None


def gap_chart(stages: Sequence[Stage]) -> str:
    """Understanding and generation by round as two lines with interval bars, the gap between them shaded.

    Args:
        stages: at least one.
    Returns: an <svg> element.
    """
    width, height, left, right, top, bottom = 400, 308, 44, 8, 44, 30  # above: the names, and values at 100 %
    low, high, step = _axis(stages)
    spacing = (width - left - right) / len(stages)
    xs = [left + spacing * (index + 0.5) for index in range(len(stages))]

    def y(value: float) -> float:
        return top + (high - value) / (high - low) * (height - top - bottom)

    parts = []
    for tick in range(round((high - low) / step) + 1):
        value = low + tick * step
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(_text("tick", left - 8, y(value) + 4, f"{100 * value:.0f} %", "end"))
    for x, stage in zip(xs, stages, strict=True):
        parts.append(_text("tick", x, height - 10, stage.label, "middle"))
    # A little apart, so that intervals that overlap can be distinguished.
    understood = [(x - 4, y(stage.understanding.value)) for x, stage in zip(xs, stages, strict=True)]
    generated = [(x + 4, y(stage.generation.value)) for x, stage in zip(xs, stages, strict=True)]
    parts.append(f'<polygon class="gap" points="{_points(understood + generated[::-1])}"/>')
    names = ("understanding", "generation")
    for name, other, points in zip(names, names[::-1], (understood, generated), strict=True):
        parts.append(f'<polyline class="line {name}" points="{_points(points)}"/>')
        for (x, point_y), stage in zip(points, stages, strict=True):
            measured: Measured = getattr(stage, name)
            parts.append(_whisker(name, x, y(measured.low), x, y(measured.high)))
            parts.append(f'<circle class="dot {name}" cx="{x:.1f}" cy="{point_y:.1f}" r="4.5"/>')
            # Beyond both intervals, so that neither label covers the other's.
            beside: Measured = getattr(stage, other)
            is_upper = (measured.value, name) > (beside.value, other)
            beyond = y(max(measured.high, beside.high)) - 7 if is_upper else y(min(measured.low, beside.low)) + 17
            parts.append(_text(f"label {name}", x, beyond, f"{100 * measured.value:.1f}", "middle"))
    for (x, top_y), (_, bottom_y), stage in zip(understood, generated, stages, strict=True):
        if bottom_y - top_y > 60:
            gap = 100 * (stage.understanding.value - stage.generation.value)
            parts.append(_text("tick", x, (top_y + bottom_y) / 2 + 4, f"gap {gap:.1f}", "middle"))
    parts.append(_text("label understanding", left, 14, "understanding", "start"))
    parts.append(_text("label generation", left + 116, 14, "generation", "start"))
    alt = "; ".join(
        f"{stage.label}: understanding {100 * stage.understanding.value:.1f} %, "
        f"generation {100 * stage.generation.value:.1f} %"
        for stage in stages
    )
    return _svg(width, height, f"Understanding and generation by round. {alt}", parts)


def category_chart(name: str, rows: Sequence[CategoryBars], labels: tuple[str, str]) -> str:
    """A metric by category as pairs of bars with intervals, from 0 to 100 %.

    Args:
        name: "understanding" or "generation", the class that gives the color.
        rows: one a category.
        labels: what before and after are called in the alternative text.
    Returns: an <svg> element.
    """
    width, left, right, row_height = 340, 116, 54, 46
    height = row_height * len(rows)
    parts, alt = [], []
    for index, row in enumerate(rows):
        top = index * row_height
        parts.append(_text("name", left - 8, top + 27, row.label, "end"))
        for number, (kind, measured) in enumerate((("before", row.before), ("after", row.after))):
            if measured is None:
                continue
            bar_y, full, middle = top + 6 + 17 * number, width - left - right, top + 13 + 17 * number
            parts.append(_bar("track", left, bar_y, full))
            parts.append(_bar(f"bar {name} {kind}", left, bar_y, full * measured.value))
            parts.append(_whisker("ink", left + full * measured.low, middle, left + full * measured.high, middle))
            text = f"{100 * measured.value:.0f} %"
            parts.append(_text("value", width, middle + 4, text, "end"))
            alt.append(f"{row.label} {labels[number]} {text}")
    return _svg(width, height, f"{name} by category: {'; '.join(alt)}", parts)


def forest_chart(title: str, rows: Sequence[tuple[str, Measured, str]]) -> str:
    """Effects as dots with their intervals beside a line at zero, in points.

    Args:
        title: what they are effects on, for the alternative text.
        rows: (label, effect as a fraction, verdict); a verdict of "better" or "worse" gives the color.
    Returns: an <svg> element.
    """
    width, right, top, row_height = 400, 58, 22, 24
    left = max(136, 16 + 8 * max(len(label) for label, _, _ in rows))  # a letter of a name is 8 wide at most
    height = top + row_height * len(rows)
    low, high = min(0.0, *(row[1].low for row in rows)), max(0.0, *(row[1].high for row in rows))
    scale = (width - left - right) / (high - low or 1)

    def x(value: float) -> float:
        return left + (value - low) * scale

    parts = [f'<line class="grid" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{top - 6}" y2="{height}"/>']
    parts.append(_text("tick", x(0), 12, "0", "middle"))
    alt = []
    for index, (label, effect, verdict) in enumerate(rows):
        y, kind = top + row_height * (index + 0.5), verdict if verdict in ("better", "worse") else "ink"
        value = format_points(effect.value)
        parts.append(_text("name", left - 8, y + 4, label, "end"))
        parts.append(_whisker(kind, x(effect.low), y, x(effect.high), y))
        parts.append(f'<circle class="dot {kind}" cx="{x(effect.value):.1f}" cy="{y:.1f}" r="4.5"/>')
        parts.append(_text("value", width, y + 4, value, "end"))
        alt.append(f"{label} {value} [{format_points(effect.low)}, {format_points(effect.high)}], {verdict}")
    return _svg(width, height, f"{title}, in points: {'; '.join(alt)}", parts)


def _axis(stages: Sequence[Stage]) -> tuple[float, float, float]:
    """Low end, high end and step of an axis that holds every interval, at multiples of the step, inside [0, 1]."""
    measured = [item for stage in stages for item in (stage.understanding, stage.generation)]
    least, most = min(item.low for item in measured), max(item.high for item in measured)
    step = 0.1 if most - least > 0.2 else 0.05
    low = max(0.0, (least - step / 2) // step * step)
    high = min(1.0, -(-(most + step / 2) // step) * step)
    return low, high, step


def _text(css_class: str, x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="{css_class}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _bar(css_class: str, x: float, y: float, width: float) -> str:
    return f'<rect class="{css_class}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="14"/>'


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _whisker(name: str, x1: float, y1: float, x2: float, y2: float) -> str:
    """An interval bar with caps across its ends."""
    cap_x, cap_y = (0, 3) if y1 == y2 else (5, 0)
    ends = "".join(f"M{x - cap_x:.1f} {y - cap_y:.1f}L{x + cap_x:.1f} {y + cap_y:.1f}" for x, y in ((x1, y1), (x2, y2)))
    return f'<path class="whisker {name}" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}{ends}"/>'


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
