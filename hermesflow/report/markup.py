"""Pieces of HTML for the report. Content is HTML already; titles and alternative texts are escaped here."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hermesflow.evaluation.metrics import MetricPath
from hermesflow.report.tables import find, format_change, format_interval, format_value, interval_of, tell_verdict

_LARGEST_PIXELS = 256  # larger pictures are scaled down, so that the page stays light
_STYLE = Path(__file__).parents[1] / "assets" / "report.css"


def picture(pixels: np.ndarray, alt: str, css_class: str = "") -> str:
    """An <img> that carries its PNG in itself.

    Args:
        pixels: uint8 [H, W, 3].
        alt: what it shows, for those who do not see it.
        css_class: more classes; small pictures also get "small".
    """
    image = Image.fromarray(pixels)
    small = " small" if max(image.size) <= 128 else ""
    image.thumbnail((_LARGEST_PIXELS, _LARGEST_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="{css_class}{small}" alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def value_cell(metrics: dict[str, Any], path: MetricPath) -> str:
    """A <td> with the metric at a path, in per cent, and its interval."""
    interval = format_interval(interval_of(metrics, path))
    return f"<td>{format_value(find(metrics, path))}<small>{interval}</small></td>"


def change_cell(name: str, change: dict[str, Any]) -> str:
    """A <td> with a metric's change, in points, and what it says."""
    verdict = tell_verdict(name, change)
    return f'<td class="{verdict.split()[0]}">{format_change(change)}<small>{verdict}</small></td>'


def scrolling(content: str, name: str) -> str:
    """A box that scrolls sideways by itself, by keyboard too, so that the page never does."""
    return f'<div class="scroll" role="region" aria-label="{escape(name)}" tabindex="0">{content}</div>'


def details(title: str, content: str, opened: bool = False) -> str:
    """Content that opens and closes by its title, which is escaped."""
    return f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>{content}</details>"


def document(title: str, body: str) -> str:
    """A whole page with its style inside."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{_STYLE.read_text("utf-8")}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
