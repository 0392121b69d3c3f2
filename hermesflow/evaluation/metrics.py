"""Metrics of measured records: values with intervals, paired changes, all from the rows alone.

A row is what one record gave: {"id": name, "scores": {metric: [right, asked]}}, where "a/b" nests a metric. The
built-in measurement keeps its marks question by question instead (see evaluation/builtin.py), as files of before do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hermesflow.evaluation.stats import percentile_interval, rank_correlation, resample_ratios, roc_auc
from hermesflow.runtime.files import shown

BEST_OF = 4
"""Images of a prompt of which the model's own judge picks one, for best_of_4_strict."""
MetricPath = tuple[str, ...]
"""Where a metric stands in nested results, such as ("samplers", "4/0.7", "generation")."""


_RESERVED = {"agreement", "by_category", "by_element_type", "change", "gap", "judge", "pairs", "samplers", "seconds"}
_RESERVED |= {"training", "understanding_by_kind"}


_MOST = 1e15


def is_own(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether the rows carry their own counts, as those of an evaluation that is not the built-in one do."""
    return "scores" in rows[0]


def check_rows(rows: Any) -> None:
    """Raises ValueError unless these can be rows of an evaluation of one's own, as the module says."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"expected a list with a dict for each record, got {shown(rows)}")
    seen: set[str] = set()
    for number, row in enumerate(rows):
        if not isinstance(row.get("id"), str) or row["id"] in seen:
            raise ValueError(f"row {number}: expected an id of its own, a text, got {shown(row.get('id'))}")
        seen.add(row["id"])
    names = set()
    for row in rows:
        scores = row.get("scores")
        if not isinstance(scores, dict) or not scores:
            raise ValueError(f"row {row['id']!r}: expected scores {{metric: [right, asked]}}, got {shown(scores)}")
        for name, counts in scores.items():
            parts = name.split("/") if isinstance(name, str) else [""]
            is_taken = parts[0] in _RESERVED or parts[0].startswith("num_") or "_ci95" in name
            if "" in parts or is_taken or len(parts) > 8 or not name.isprintable():
                raise ValueError(f"row {row['id']!r}: a metric cannot be called {shown(name)}; choose another name")
            if not _are_counts(counts):
                raise ValueError(
                    f"row {row['id']!r}: {name}: expected [right, asked], finite numbers, got {shown(counts)}"
                )
        names |= scores.keys()
    inner = next((name for name in names for other in names if other.startswith(f"{name}/")), None)
    if inner is not None:
        raise ValueError(f"{inner!r} is a metric and holds others; choose another name")


def _are_counts(counts: Any) -> bool:
    if not isinstance(counts, list | tuple) or len(counts) != 2:
        return False
    right, asked = counts
    if not all(type(item) in (int, float) and abs(item) < _MOST for item in counts):
        return False
    return 1 / _MOST < asked or (asked == right == 0)


def measure(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of measured records.

    Args:
        rows: "records" of evaluate, at least one. Those of before balanced questions were asked have "answered" and
            "drawn" alone; their understanding is that by record questions.
    Returns: each metric with "NAME_ci95" [low, high], and "num_records". Of the built-in measurement fractions in
        [0, 1], each with "NAME_ci95": "understanding" (balanced questions),
        "understanding_record_questions", "generation" and "generation_strict" (images right in full) by the default
        sampler, "gap" (understanding less generation), "caption_f1", "caption_exact"; "understanding_by_kind": {kind};
        "samplers": {name: {"generation", "generation_strict", "best_of_4_strict"}}, the last of the image that the
        model itself scores best among the first four; "judge": {"spearman", "auc"}, how well those scores agree with
        the oracle on the default sampler's images; "by_category", "by_element_type" and counts.
    """
    if is_own(rows):
        return _nest_values(rows) | {"num_records": len(rows)}
    categories = sorted({row["category"] for row in rows})
    by_category = {}
    for category in categories:
        members = [row for row in rows if row["category"] == category]
        values = _nest_values(members, most_names=1)
        by_category[category] = values | {"count": len(members)}
    return _nest_values(rows) | {
        "judge": _judge_agreement(rows),
        "by_category": by_category,
        "by_element_type": _by_element_type(rows),
        "num_understanding": sum(row["answered"] is not None for row in rows),
        "num_questions": sum(len(row.get("balanced") or "") for row in rows),
        "num_prompts": sum(row["drawn"] is not None for row in rows),
        "num_images": sum(len(row["drawn"] or ()) for row in rows),
    }


def right_of_asked(row: dict[str, Any]) -> dict[MetricPath, tuple[float, float]]:
    """What was right in a record, of how many, by metric.

    Args:
        row: one of "records" of evaluate.
    Returns: {path: (right, asked)}; a metric is the sum of the one over the sum of the other, gap apart, which is a
        difference of two.
    """
    if "scores" in row:
        return {tuple(name.split("/")): tuple(counts) for name, counts in row["scores"].items()}
    own, balanced, drawn = row["answered"] or "", row.get("balanced"), row["drawn"] or []
    found = {("understanding",): _digits(own if "balanced" not in row else balanced or "")}
    if "balanced" in row:
        found["understanding_record_questions",] = _digits(own)
        for kind, digit in zip(row["kinds"] if balanced else (), balanced or "", strict=True):
            right, asked = found.get(("understanding_by_kind", kind), (0, 0))
            found["understanding_by_kind", kind] = right + int(digit), asked + 1
    found["generation",], found["generation_strict",] = _digits("".join(drawn)), _in_full(drawn)
    for name, item in row.get("samplers", {}).items():
        images, scores = item["drawn"], item["scores"][:BEST_OF]
        best = images[max(range(len(scores)), key=scores.__getitem__)]
        found["samplers", name, "generation"] = _digits("".join(images))
        found["samplers", name, "generation_strict"] = _in_full(images)
        found["samplers", name, f"best_of_{BEST_OF}_strict"] = _in_full([best] if len(scores) == BEST_OF else [])
    captioned = row["caption"] is not None
    for name in ("caption_f1", "caption_exact"):
        found[name,] = (float(row[name]), 1) if captioned else (0, 0)
    return found


def paired_change(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """How the metrics changed, with the same records resampled in both.

    Args:
        before: from evaluate.
        after: from evaluate, with the same settings.
    Returns: {metric: {"change", "ci95", "significant"}}, nested as the metrics are; significant where the interval
        leaves out zero.
    Raises: ValueError if the two did not measure the same records in the same way.
    """
    check_same_records(before, after)
    rows = before["records"], after["records"]
    (old, old_samples), (new, new_samples) = map(_values_and_samples, rows)
    changes: dict[str, Any] = {}
    for path in new:
        interval = percentile_interval(new_samples[path] - old_samples[path])
        if interval is not None:
            significant = not interval[0] <= 0 <= interval[1]
            change = {"change": float(new[path] - old[path]), "ci95": interval, "significant": significant}
            _inside(changes, path)[path[-1]] = change
    return changes


def check_same_records(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raises ValueError unless two evaluations measured the same records in the same way, whatever came out."""
    rows = before["records"], after["records"]
    if len(rows[0]) != len(rows[1]):
        raise ValueError(
            f"measured {len(rows[0])} records before and {len(rows[1])} after; a change needs the same ones"
        )
    for old, new in zip(*rows, strict=True):
        if _measured_of(old) != _measured_of(new):
            raise ValueError(
                f"record {shown(old.get('id'))} before is {shown(new.get('id'))} after, or was asked something else; a "
                "change needs the same records, asked the same"
            )


def _measured_of(row: dict[str, Any]) -> tuple:
    """What of a record was measured, whatever came out."""
    if "scores" in row:
        return row["id"], {name: asked for name, (_, asked) in row["scores"].items()}
    drawn = {name: len(item["drawn"]) for name, item in row.get("samplers", {}).items()}
    return row["id"], row["answered"] is None, len(row.get("balanced") or ""), len(row["drawn"] or ()), drawn


def summarize(evaluations: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The metrics of a run's evaluations.

    Args:
        evaluations: from evaluate: before self-play, then after each round.
    Returns: (metrics before, [metrics of a round with "change", the paired changes to before]).
    """
    before = evaluations[0]
    rounds = [item["metrics"] | {"change": paired_change(before, item)} for item in evaluations[1:]]
    return dict(before["metrics"]), rounds


def is_balanced(metrics: dict[str, Any]) -> bool:
    """Whether understanding was measured by balanced questions; older runs asked those of the records alone."""
    return metrics.get("understanding_record_questions") is not None


Sums = dict[MetricPath, tuple[np.ndarray, np.ndarray]]
"""By metric numerators and denominators float64 [n]: what was right in a record, of how many."""


def _nest_values(rows: Sequence[dict[str, Any]], most_names: int | None = None) -> dict[str, Any]:
    """Each metric's value and interval, None where there is nothing to measure; those of at most so many names."""
    values, samples = _values_and_samples(rows)
    result: dict[str, Any] = {}
    for path, value in values.items():
        if most_names is None or len(path) <= most_names:
            place = _inside(result, path)
            place[path[-1]] = None if np.isnan(value) else float(value)
            place[f"{path[-1]}_ci95"] = percentile_interval(samples[path])
    return result


def _inside(result: dict[str, Any], path: MetricPath) -> dict[str, Any]:
    """The dict that holds the last of a path's names."""
    for name in path[:-1]:
        result = result.setdefault(name, {})
    return result


def _values_and_samples(
    rows: Sequence[dict[str, Any]],
) -> tuple[dict[MetricPath, float], dict[MetricPath, np.ndarray]]:
    """Each metric's value, and its values over the resamples; NaN where there is nothing to measure."""
    sums = _sums(rows)
    numerators, denominators = (np.stack(half, axis=1) for half in zip(*sums.values(), strict=True))
    with np.errstate(invalid="ignore", divide="ignore"):
        totals = numerators.sum(axis=0) / denominators.sum(axis=0)
    samples = resample_ratios(numerators, denominators)
    found = dict(zip(sums, totals, strict=True)), dict(zip(sums, samples.T, strict=True))
    if not is_own(rows):
        for values in found:
            values["gap",] = values["understanding",] - values["generation",]
    return found


def _sums(rows: Sequence[dict[str, Any]]) -> Sums:
    found = [right_of_asked(row) for row in rows]
    sums = {}
    for path in dict.fromkeys(path for row in found for path in row):
        right, asked = np.array([row.get(path, (0, 0)) for row in found], dtype=np.float64).T
        sums[path] = right, asked
    return sums


def _digits(text: str) -> tuple[int, int]:
    return text.count("1"), len(text)


def _in_full(images: Sequence[str]) -> tuple[int, int]:
    return sum("0" not in image for image in images), len(images)


def _judge_agreement(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """How well the model's own scores of the default sampler's images agree with the oracle."""
    scores, fractions, strict = [], [], []
    for row in rows:
        for item in list(row.get("samplers", {}).values())[:1]:  # the default one is the first
            scores += item["scores"]
            fractions += [image.count("1") / len(image) for image in item["drawn"]]
            strict += ["0" not in image for image in item["drawn"]]
    fractions = np.array(fractions)
    return {"spearman": rank_correlation(np.array(scores), fractions), "auc": roc_auc(np.array(scores), strict)}


def _by_element_type(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Fractions right by what the record's questions ask for."""
    marks: dict[str, tuple[list[int], list[int]]] = {}
    for row in rows:
        for number, kind in enumerate(row["element_types"]):
            understood, drawn = marks.setdefault(kind, ([], []))
            understood += [int(row["answered"][number])] if row["answered"] else []
            drawn += [int(image[number]) for image in row["drawn"] or ()]
    return {
        kind: {
            "understanding_record_questions": _mean(understood),
            "generation": _mean(drawn),
            "count": len(understood),
        }
        for kind, (understood, drawn) in sorted(marks.items())
    }


def _mean(values: Sequence | np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None
