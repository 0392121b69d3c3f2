"""The lines that benchmarks write, one JSON object a case, backend and baseline, and the tables made from them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from hermesflow.runtime.files import InputError, read_bytes, read_text, split_lines, write_text

Line = dict[str, Any]
FIELDS = (
    "bench", "case", "shape", "dtype", "backend", "baseline", "ms_p20", "ms_p50", "ms_p80", "baseline_ms_p50",
    "speedup", "peak_mib", "baseline_peak_mib", "gb_s", "tflop_s", "roof_fraction", "device", "torch", "triton",
    "commit", "date",
)  # fmt: skip
MEASURED = FIELDS[FIELDS.index("ms_p20") : FIELDS.index("device")]


def write_lines(path: Path, lines: Iterable[Line]) -> None:
    """Write JSON lines, all at once. Raises: InputError if the file cannot be written."""
    write_text(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


def read_lines(path: Path) -> list[Line]:
    """Read JSON lines. Raises: InputError if the file is missing, damaged or not of a benchmark."""
    return read_objects(path, FIELDS, "a benchmark")


def read_objects(path: Path, names: Sequence[str], kind: str) -> list[Line]:
    """Read JSON lines that have certain fields.

    Args:
        path: the file.
        names: of the fields that every line must have.
        kind: what such lines are of, for messages.
    Raises: InputError if the file is missing or damaged, or a line lacks a field.
    """
    lines = []
    for number, text in enumerate(split_lines(read_bytes(path).decode("utf-8-sig", "replace")), start=1):
        try:
            line = json.loads(text)
            missing = [name for name in names if name not in line]
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}: line {number} is not a JSON object ({error})") from error
        if missing:
            raise InputError(f"{path}: line {number} is not of {kind}, it lacks {', '.join(missing)}")
        lines.append(line)
    return lines


def update_readme(path: Path, lines: Sequence[Line]) -> None:
    """Write tables of the lines between the markers of a Markdown file, and leave the rest as it is.

    `<!-- results BENCH [BACKEND ...] -->` and `<!-- /results -->`, each on a line of its own, enclose the lines of one
    bench, of all backends or of those that are named.

    Args:
        path: the file.
        lines: of all benches that the markers ask for.
    Raises: InputError if the file has no markers, lines are lacking for one, or it cannot be read or written.
    """

    def table(marker: str) -> str:
        bench, *backends = marker.split()[1:]
        chosen = [line for line in lines if line["bench"] == bench and (not backends or line["backend"] in backends)]
        if not chosen:
            raise InputError(f"{path}: no lines for its marker {marker}; give the files that hold them")
        return markdown_table(chosen)

    replace_marked(path, "results", table, "results ops")


def replace_marked(path: Path, name: str, content: Callable[[str], str], example: str) -> None:
    """Write Markdown between the markers `<!-- NAME ... -->` and `<!-- /NAME -->` of a file, and leave the rest.

    Args:
        path: the file.
        name: of the markers.
        content: from what an opening marker says to what stands below it.
        example: what an opening marker may say, for the message.
    Raises: InputError if the file has no markers, or it cannot be read or written.
    """
    marked = re.compile(rf"<!-- ({name}(?: .+?)?) -->\n.*?<!-- /{name} -->", re.DOTALL)
    updated, count = marked.subn(
        lambda found: f"<!-- {found[1]} -->\n\n{content(found[1])}\n<!-- /{name} -->", read_text(path)
    )
    if count == 0:
        raise InputError(f"{path}: has no markers; add <!-- {example} --> and <!-- /{name} --> where tables belong")
    write_text(path, updated)


def markdown_table(lines: Sequence[Line]) -> str:
    """Tables for the README and benchmarks/results, one a device and bench; of equal measurements the last counts."""
    parts = []
    for line in {(line["bench"], line["device"]): line for line in lines}.values():
        of_run = [other for other in lines if (other["bench"], other["device"]) == (line["bench"], line["device"])]
        versions = f"torch {line['torch']}" + (f", triton {line['triton']}" if line["triton"] else "")
        header, rows = _cells(of_run)
        parts.append(f"{line['device']}, {versions}, commit {line['commit']}, {line['date'][:10]}\n")
        parts += [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
        parts.append("")
    return "\n".join(parts)


def console_table(lines: Sequence[Line], title: str) -> Table:
    """The same for the terminal."""
    header, rows = _cells(lines)
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in header:
        table.add_column(name, overflow="fold")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(*row, end_section=following is not None and following[0] != row[0])
    return table


def _cells(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a row for each case and backend, with a column for each baseline."""
    baselines = list(dict.fromkeys(line["baseline"] for line in lines if line["baseline"]))
    header = ["case", "shape", "backend", "ms", "of the roof", "rate", "peak MiB", *(f"{name}" for name in baselines)]
    measured: dict[tuple, dict[str | None, Line]] = {}
    for line in lines:
        key = tuple(line[name] for name in ("case", "shape", "dtype", "backend"))
        measured.setdefault(key, {})[line["baseline"]] = line
    rows = []
    for (case, shape, dtype, backend), by_baseline in measured.items():
        line = next(iter(by_baseline.values()))
        row = [case, f"{shape}, {dtype}", backend]
        if "failed" in line:
            rows.append([*row, f"failed: {line['failed']}", *[""] * (len(header) - 4)])
            continue
        row += [_number(line["ms_p50"]), _share(line["roof_fraction"]), _rate(line), _number(line["peak_mib"])]
        rows.append(row + [_against(by_baseline.get(name)) for name in baselines])
    return header, rows


def _against(line: Line | None) -> str:
    if line is None:
        return ""
    times, memory = _number(line["speedup"]), _number(line["baseline_peak_mib"])
    return f"{times}x ({_number(line['baseline_ms_p50'])} ms, {memory} MiB)"


def _rate(line: Line) -> str:
    """What a task makes; of an op what bounds it: operations where they are many for each byte, else bytes."""
    if "items_per_s" in line:
        made = [f"{_number(count)} {name}/s" for name, count in line["items_per_s"].items()]
        return ", ".join([*made, f"MFU {_share(line['mfu'])}"])
    if line["tflop_s"] * 1000 > 10 * line["gb_s"]:
        return f"{_number(line['tflop_s'])} TFLOP/s"
    return f"{_number(line['gb_s'])} GB/s"


def _share(fraction: float) -> str:
    return f"{fraction:.0%}" if fraction >= 0.1 else f"{100 * fraction:.2g}%"


def _number(value: float) -> str:
    """Three digits, no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 else f"{value:.5f}"
