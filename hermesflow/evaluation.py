"""Measurement on held-out scenes: understanding by known answers, generation by the oracle, and how they change.

Understanding is how many questions about real images the model answers rightly; generation is how many questions its
own images of the captions answer rightly in the eyes of the oracle, which reads pixels alone. Every prompt, image seed
and resample is a pure function of the settings, so that two models are compared on the same draws.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from rich.console import Console

from .config import Config, EvalConfig
from .curation import candidate_seed
from .engine.text_decoder import SamplingParams
from .files import write_json
from .images import resize_images
from .models import Model, open_model
from .progress import track
from .prompting import caption_prompt, image_prompt
from .records import Record
from .scoring import self_vqa, token_f1
from .stats import percentile_interval, rank_correlation, resample_ratios, roc_auc
from .summaries import LABELS, print_metrics
from .worlds import oracle, shapes

_RATIOS = ("understanding", "generation", "generation_strict", "caption_f1", "caption_exact")
_BATCH = 64


def run_evaluation(config: Config) -> dict[str, Any]:
    """Measures config.model, prints a table and writes evaluation.json into the run's folder.

    Args:
        config: model, eval and run are used.
    Returns: as evaluate.
    Raises: InputError on a model that is none or cannot draw the built-in world, or an unwritable folder.
    """
    result = {"model": config.model.name} | evaluate(open_model(config.model), config.eval)
    path = config.run_folder / "evaluation.json"
    write_json(path, result)
    console = Console()
    print_metrics(result["metrics"], console)
    console.print(f"evaluation: {path}", soft_wrap=True, highlight=False)
    return result


def evaluate(model: Model, config: EvalConfig) -> dict[str, Any]:
    """Measures a model on the built-in world.

    Args:
        model: the model; where its images are not of 64 x 64 pixels, the world's and its own are resized.
        config: which scenes, how many, and how images are drawn.
    Returns: {"settings", "metrics", "records"}, ready for JSON. A metric is a fraction in [0, 1] with "NAME_ci95"
        [low, high]; metrics also hold by_category, by_element_type and counts. A record holds what was measured of it:
        "answered", a digit a question (1 right, 0 wrong) about the real image; "drawn", such a text for each image
        drawn of its caption; "caption", "caption_f1" and "caption_exact"; null where it was not asked or not drawn.
    Raises: InputError if the model does not know the world's words.
    """
    scenes, records = held_out(config)
    rows = [_empty_row(record) for record in records]
    asked, num_understanding = rows[: config.num_understanding], config.num_understanding
    scenes_drawn = np.stack([record.image for record in records[:num_understanding]])
    codes = model.encode_images(resize_images(scenes_drawn, model.image_size))
    for row, answered in zip(asked, _answer_questions(model, codes, records), strict=True):
        row["answered"] = answered
    for row, text, record, scene in zip(asked, _write_captions(model, codes), records, scenes, strict=False):
        exact = shapes.parse_caption(text) == shapes.scene_facts(scene)
        row |= {"caption": text, "caption_f1": token_f1(text, record.caption), "caption_exact": exact}
    for row, drawn in zip(rows, _judge_drawings(model, records[: config.num_prompts], config), strict=False):
        row["drawn"] = drawn
    drawing = asdict(model.sampling_of(config))
    return {"settings": asdict(config) | drawing, "metrics": measure(rows), "records": rows}


def held_out(config: EvalConfig) -> tuple[list[shapes.Scene], list[Record]]:
    """The scenes that a model is measured on, and their records in the same order."""
    scenes = shapes.sample_scenes(config.split, max(config.num_prompts, config.num_understanding), config.seed)
    records = [
        shapes.make_record(scene, f"{config.split}-{config.seed}-{index:05d}", np.random.default_rng(scene.seed))
        for index, scene in enumerate(scenes)
    ]
    return scenes, records


def draw_images(model: Model, records: Sequence[Record], config: EvalConfig) -> np.ndarray:
    """The images that a model is measured by, uint8 [len(records), images_per_prompt, H, W, 3]; they fit into memory.

    Args:
        model: draws them.
        records: any of held_out.
        config: how many, and how they are drawn.
    """
    codes = model.engine.generate(
        [image_prompt(model, record.caption) for record in records],
        num_images=config.images_per_prompt,
        seeds=_image_seeds(records, config),
        **asdict(model.sampling_of(config)),
    )
    images = model.decode_images(codes.flatten(0, 1))
    return images.reshape(*codes.shape[:2], *images.shape[1:])


def measure(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of measured records.

    Args:
        rows: "records" of evaluate, at least one.
    Returns: "metrics" of evaluate.
    """
    categories = sorted({row["category"] for row in rows})
    by_category = {}
    for category in categories:
        members = [row for row in rows if row["category"] == category]
        by_category[category] = _values_with_intervals(members) | {"count": len(members)}
    return _values_with_intervals(rows) | {
        "by_category": by_category,
        "by_element_type": _by_element_type(rows),
        "num_understanding": sum(row["answered"] is not None for row in rows),
        "num_prompts": sum(row["drawn"] is not None for row in rows),
        "num_images": sum(len(row["drawn"] or ()) for row in rows),
    }


def paired_change(before: dict[str, Any], after: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """How the metrics changed, with the same records resampled in both.

    Args:
        before: from evaluate.
        after: from evaluate, with the same settings.
    Returns: {metric: {"change", "ci95", "significant"}}; significant where the interval leaves out zero.
    Raises: ValueError if the two did not measure the same records.
    """
    rows = before["records"], after["records"]
    ids = [[(row["id"], row["answered"] is None, len(row["drawn"] or ())) for row in half] for half in rows]
    if ids[0] != ids[1]:
        raise ValueError(
            f"paired_change: expected the same records measured before and after, got {len(ids[0])} and {len(ids[1])} "
            "that differ; evaluate both with the same settings"
        )
    totals, samples = zip(*(_values_and_samples(half) for half in rows), strict=True)
    changes = {}
    for name in LABELS:
        interval = percentile_interval(samples[1][name] - samples[0][name])
        if interval is not None:
            change = float(totals[1][name] - totals[0][name])
            significant = not interval[0] <= 0 <= interval[1]
            changes[name] = {"change": change, "ci95": interval, "significant": significant}
    return changes


def summarise(evaluations: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The metrics of a run's evaluations.

    Args:
        evaluations: from evaluate: before self-play, then after each round.
    Returns: (metrics before, [metrics of a round with "change", the paired changes to before]).
    """
    before = evaluations[0]
    rounds = [item["metrics"] | {"change": paired_change(before, item)} for item in evaluations[1:]]
    return dict(before["metrics"]), rounds


def agreement(model: Model, parts: Iterable[tuple[Sequence[Record], pa.Table, pa.Table]]) -> dict[str, Any]:
    """How well the model's own scores of its images agree with the oracle.

    Args:
        model: decodes the image codes.
        parts: (records, their candidates, the pairs made of them), of which images are used; one part at a time is in
            memory.
    Returns: "spearman" of score and the oracle's fraction right over all images and "spearman_within" a record (mean);
        "auc" of the score for images right in full; "mean_score" and "mean_oracle"; "best_strict", "mean_strict" and
        "worst_strict", the fraction of images right in full, chosen by score within each record; "win_better",
        "win_worse" and "tie", fractions of pairs by the oracle; "num_images" and "num_pairs". None where there is
        nothing to compare.
    Raises: ValueError if a candidate's record is not among the records.
    """
    judged = [_judge_part(model, *part) for part in parts]
    scores, fractions, strict, win, lose = (
        np.concatenate([np.zeros(0), *(part[index] for part in judged)]) for index in range(5)
    )
    strict = strict.astype(bool)
    sizes = [size for *_, of_part in judged for size in of_part]
    members = np.split(np.arange(len(scores)), np.cumsum(sizes)[:-1]) if sizes else []
    within = [rank_correlation(scores[index], fractions[index]) for index in members]
    return {
        "spearman": rank_correlation(scores, fractions),
        "spearman_within": _mean([value for value in within if value is not None]),
        "auc": roc_auc(scores, strict),
        "mean_score": _mean(scores),
        "mean_oracle": _mean(fractions),
        "best_strict": _mean([strict[index[scores[index].argmax()]] for index in members]),
        "mean_strict": _mean(strict),
        "worst_strict": _mean([strict[index[scores[index].argmin()]] for index in members]),
        "win_better": _mean(win > lose),
        "win_worse": _mean(win < lose),
        "tie": _mean(win == lose),
        "num_images": len(scores),
        "num_pairs": len(win),
    }


def _judge_part(
    model: Model, records: Sequence[Record], candidates: pa.Table, pairs: pa.Table
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """By image, record by record, score, the oracle's fraction right, and whether all is; by pair the fraction right of
    win and of lose; and the number of images of each record that has any."""
    questions = {record.id: record.questions for record in records}
    images = candidates.filter(pc.equal(candidates["kind"], "image"))
    ids, scores = images["record_id"].to_pylist(), images["score"].to_numpy().astype(np.float64)
    missing = sorted({*ids, *pairs["record_id"].to_pylist()} - questions.keys())
    if missing:
        raise ValueError(f"agreement: expected a record for each candidate, got none for {missing[0]!r}; give all")
    fractions, strict = _judge(model, images["token_ids"].to_pylist(), [questions[name] for name in ids])
    chosen = pairs.filter(pc.is_valid(pairs["win_codes"]))
    about = [questions[name] for name in chosen["record_id"].to_pylist()]
    win, lose = (_judge(model, chosen[f"{role}_codes"].to_pylist(), about)[0] for role in ("win", "lose"))
    sizes = [len(list(group)) for _, group in itertools.groupby(ids)]
    return scores, fractions, strict, win, lose, sizes


def _empty_row(record: Record) -> dict[str, Any]:
    return {
        "id": record.id,
        "category": record.category,
        "element_types": [question.element_type for question in record.questions],
        "answered": None,
        "drawn": None,
        "caption": None,
        "caption_f1": None,
        "caption_exact": None,
    }


def _answer_questions(model: Model, codes: torch.Tensor, records: Sequence[Record]) -> list[str]:
    """For each image a digit a question: 1 where the choice that the model finds most likely is the right one."""
    digits = []
    for start in track(range(0, len(codes), _BATCH), "questions", "batches"):
        batch = slice(start, min(start + _BATCH, len(codes)))
        for [score] in self_vqa(model, codes[batch, None], records[batch]):
            digits.append("".join(str(int(item.answer == item.expected)) for item in score.answers))
    return digits


def _write_captions(model: Model, codes: torch.Tensor) -> list[str]:
    """The greedy caption of each image."""
    greedy = SamplingParams(temperature=0.0, max_new_tokens=model.prompts.max_caption_tokens)
    question, texts = caption_prompt(model), []
    for start in track(range(0, len(codes), _BATCH), "captions", "batches"):
        batch = codes[start : start + _BATCH]
        seeds = torch.zeros(len(batch), 1, 1, dtype=torch.int64)
        ids = model.engine.extend(batch, [[question]] * len(batch), sampling=[greedy], seeds=seeds)
        texts += [model.decode_text(of_image[0][0]) for of_image in ids]
    return texts


def _judge_drawings(model: Model, records: Sequence[Record], config: EvalConfig) -> list[list[str]]:
    """For each record and each image drawn of its caption a digit a question: 1 where the oracle's answer is right."""
    drawn = []
    for start in track(range(0, len(records), _BATCH), "images", "batches"):
        batch = records[start : start + _BATCH]
        images = draw_images(model, batch, config)
        seen = oracle.read(resize_images(images.reshape(-1, *images.shape[2:]), shapes.IMAGE_SIZE))
        for index, record in enumerate(batch):
            of_record = seen[index * config.images_per_prompt : (index + 1) * config.images_per_prompt]
            drawn.append([_oracle_digits(record, image) for image in of_record])
    return drawn


def _image_seeds(records: Sequence[Record], config: EvalConfig) -> torch.Tensor:
    """int64 [len(records), images_per_prompt]: functions of the seed, the record and the image's number alone."""
    numbers = range(config.images_per_prompt)
    rows = [[candidate_seed(config.seed, record.id, "image", number) for number in numbers] for record in records]
    return torch.tensor(rows)


def _oracle_digits(record: Record, seen: oracle.Seen) -> str:
    return "".join(str(int(oracle.answer(item.question, seen) == item.answer)) for item in record.questions)


def _judge(model: Model, codes: list[list[int]], questions: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """The oracle's fraction right float64 [n] and whether all are right bool [n], of images given as codes."""
    marks = []
    for start in range(0, len(codes), _BATCH):
        images = model.decode_images(torch.tensor(codes[start : start + _BATCH], dtype=torch.int64))
        asked, seen_images = questions[start : start + _BATCH], oracle.read(resize_images(images, shapes.IMAGE_SIZE))
        marks += [oracle.score(items, seen) for items, seen in zip(asked, seen_images, strict=True)]
    return np.array([mark[0] for mark in marks]), np.array([mark[1] for mark in marks], dtype=bool)


def _values_with_intervals(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    values, samples = _values_and_samples(rows)
    result: dict[str, Any] = {}
    for name in LABELS:
        result[name] = None if np.isnan(values[name]) else float(values[name])
        result[f"{name}_ci95"] = percentile_interval(samples[name])
    return result


def _values_and_samples(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Each metric's value, and its values over the resamples; NaN where there is nothing to measure."""
    numerators, denominators = _sums(rows)
    with np.errstate(invalid="ignore"):
        totals = numerators.sum(axis=0) / denominators.sum(axis=0)
    samples = resample_ratios(numerators, denominators)
    return _with_gap(dict(zip(_RATIOS, totals, strict=True))), _with_gap(dict(zip(_RATIOS, samples.T, strict=True)))


def _with_gap(values: dict[str, Any]) -> dict[str, Any]:
    return values | {"gap": values["understanding"] - values["generation"]}


def _sums(rows: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Numerators and denominators [n, len(_RATIOS)]: what was right in a record, of how many."""
    numerators, denominators = np.zeros((len(rows), len(_RATIOS))), np.zeros((len(rows), len(_RATIOS)))
    for index, row in enumerate(rows):
        answered, images = row["answered"] or "", row["drawn"] or []
        drawn = "".join(images)
        captioned = row["caption"] is not None
        strict = sum("0" not in image for image in images)
        likeness = (row["caption_f1"], row["caption_exact"]) if captioned else (0, 0)
        numerators[index] = (answered.count("1"), drawn.count("1"), strict, *likeness)
        denominators[index] = (len(answered), len(drawn), len(images), captioned, captioned)
    return numerators, denominators


def _by_element_type(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Fractions right by what a question asks for."""
    marks: dict[str, tuple[list[int], list[int]]] = {}
    for row in rows:
        for number, kind in enumerate(row["element_types"]):
            understood, drawn = marks.setdefault(kind, ([], []))
            understood += [int(row["answered"][number])] if row["answered"] else []
            drawn += [int(image[number]) for image in row["drawn"] or ()]
    return {
        kind: {"understanding": _mean(understood), "generation": _mean(drawn), "count": len(understood)}
        for kind, (understood, drawn) in sorted(marks.items())
    }


def _mean(values: Sequence | np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None
