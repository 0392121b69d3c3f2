"""Measurement on held-out scenes: understanding by known answers, generation by the oracle, and how they change.

Understanding is how many balanced questions about real images the model answers rightly: they ask by every template of
the world, and as often for what is not there as for what is. Generation is how many questions of the record its own
images of the captions answer rightly in the eyes of the oracle, which reads pixels alone. The record's questions asked
of real images are reported beside the balanced ones: all that they ask is there, so that a model which leans to "yes"
does well by them. Every prompt, image seed and resample is a pure function of the settings, so that two models are
compared on the same draws.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from rich.console import Console

from hermesflow.config import Config, EvalConfig
from hermesflow.data.records import Record
from hermesflow.engine.decoders.masked import ImageSamplingParams
from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.evaluation.stats import percentile_interval, rank_correlation, resample_ratios, roc_auc
from hermesflow.models.family import open_model
from hermesflow.models.images import resize_images
from hermesflow.models.model import Model
from hermesflow.report.tables import MetricPath, print_metrics
from hermesflow.runtime.files import write_json
from hermesflow.runtime.progress import track
from hermesflow.runtime.seeds import candidate_seeds
from hermesflow.scoring.captions import overlap_f1, token_f1
from hermesflow.scoring.self_vqa import self_vqa
from hermesflow.worlds import oracle, shapes

BEST_OF = 4
"""Images of a prompt of which the model's own judge picks one, for best_of_4_strict."""
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
    Returns: {"settings", "metrics", "records"}, ready for JSON. See measure for the metrics. A record holds what was
        measured of it: "balanced" and "answered", a digit a question (1 right, 0 wrong) about the real image, of the
        balanced questions, whose "kinds" stand beside them, and of the record's own; "drawn", such a text for each
        image drawn of its caption by the default sampler, and "samplers", {name: {"drawn", "scores"}} with the model's
        own scores of the images; "caption", "caption_f1" and "caption_exact"; null where it was not asked or not drawn.
    Raises: InputError if the model does not know the world's words.
    """
    scenes, records = held_out(config)
    rows = [_empty_row(record) for record in records]
    asked, num_understanding = rows[: config.num_understanding], config.num_understanding
    scenes_drawn = np.stack([record.image for record in records[:num_understanding]])
    codes = model.encode_images(resize_images(scenes_drawn, model.image_size))
    for row, answered in zip(asked, _answer_questions(model, codes, records), strict=True):
        num_own = len(row["element_types"])
        row |= {"answered": answered[:num_own], "balanced": answered[num_own:]}
    for row, text, record, scene in zip(asked, _write_captions(model, codes), records, scenes, strict=False):
        exact = shapes.parse_caption(text) == shapes.scene_facts(scene)
        row |= {"caption": text, "caption_f1": token_f1(text, record.caption), "caption_exact": exact}
    for name, sampling in samplers_of(model, config).items():
        judged = _judge_drawings(model, records[: config.num_prompts], config, sampling)
        for row, (drawn, scores) in zip(rows, judged, strict=False):
            row["samplers"][name] = {"drawn": drawn, "scores": scores}
    default = model.sampling_of(config)
    for row in rows[: config.num_prompts]:
        row["drawn"] = row["samplers"][sampler_name(default)]["drawn"]
    settings = asdict(config) | asdict(default) | {"samplers": list(config.samplers)}
    return {"settings": settings, "metrics": measure(rows), "records": rows}


def sampler_name(sampling: ImageSamplingParams) -> str:
    """How results call a way to draw: "STEPS/TEMPERATURE", such as "4/0.7"."""
    return f"{sampling.num_steps}/{sampling.temperature:g}"


def samplers_of(model: Model, config: EvalConfig) -> dict[str, ImageSamplingParams]:
    """The ways to draw that a model is measured by, by name: the default one first, then config.samplers."""
    default = model.sampling_of(config)
    given = [default]
    for text in config.samplers:
        num_steps, temperature = text.split("/")
        given.append(replace(default, num_steps=int(num_steps), temperature=float(temperature)))
    return {sampler_name(sampling): sampling for sampling in given}


def held_out(config: EvalConfig) -> tuple[list[shapes.Scene], list[Record]]:
    """The scenes that a model is measured on, and their records in the same order."""
    scenes = shapes.sample_scenes(config.split, max(config.num_prompts, config.num_understanding), config.seed)
    records = [
        shapes.make_record(scene, f"{config.split}-{config.seed}-{index:05d}", np.random.default_rng(scene.seed))
        for index, scene in enumerate(scenes)
    ]
    return scenes, records


def draw_images(model: Model, records: Sequence[Record], config: EvalConfig) -> np.ndarray:
    """The images that a model is measured by, drawn by the default sampler, uint8 [len(records), images_per_prompt, H,
    W, 3]; they fit into memory.

    Args:
        model: draws them.
        records: any of held_out.
        config: how many, and how they are drawn.
    """
    codes = _draw(model, records, config, model.sampling_of(config))
    images = model.decode_images(codes.flatten(0, 1))
    return images.reshape(*codes.shape[:2], *images.shape[1:])


def measure(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of measured records.

    Args:
        rows: "records" of evaluate, at least one. Those of before balanced questions were asked have "answered" and
            "drawn" alone; their understanding is that by record questions.
    Returns: fractions in [0, 1], each with "NAME_ci95" [low, high]: "understanding" (balanced questions),
        "understanding_record_questions", "generation" and "generation_strict" (images right in full) by the default
        sampler, "gap" (understanding less generation), "caption_f1", "caption_exact"; "understanding_by_kind": {kind};
        "samplers": {name: {"generation", "generation_strict", "best_of_4_strict"}}, the last of the image that the
        model itself scores best among the first four; "judge": {"spearman", "auc"}, how well those scores agree with
        the oracle on the default sampler's images; "by_category", "by_element_type" and counts.
    """
    categories = sorted({row["category"] for row in rows})
    by_category = {}
    for category in categories:
        members = [row for row in rows if row["category"] == category]
        values = _nest_values({path: sums for path, sums in _sums(members).items() if len(path) == 1})
        by_category[category] = values | {"count": len(members)}
    return _nest_values(_sums(rows)) | {
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
    rows = before["records"], after["records"]
    if [_measured_of(row) for row in rows[0]] != [_measured_of(row) for row in rows[1]]:
        raise ValueError(
            f"paired_change: expected the same records measured before and after, got {len(rows[0])} and "
            f"{len(rows[1])} that differ; evaluate both with the same settings"
        )
    (old, old_samples), (new, new_samples) = (_values_and_samples(_sums(half)) for half in rows)
    changes: dict[str, Any] = {}
    for path in new:
        interval = percentile_interval(new_samples[path] - old_samples[path])
        if interval is not None:
            significant = not interval[0] <= 0 <= interval[1]
            change = {"change": float(new[path] - old[path]), "ci95": interval, "significant": significant}
            _inside(changes, path)[path[-1]] = change
    return changes


def _measured_of(row: dict[str, Any]) -> tuple:
    """What of a record was measured, whatever came out."""
    drawn = {name: len(item["drawn"]) for name, item in row.get("samplers", {}).items()}
    return row["id"], row["answered"] is None, len(row.get("balanced") or ""), len(row["drawn"] or ()), drawn


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
        parts: (records, their candidates, the pairs made of them), of which images, and captions in pairs, are used;
            one part at a time is in memory.
    Returns: "spearman" of score and the oracle's fraction right over all images and "spearman_within" a record (mean);
        "auc" of the score for images right in full; "mean_score" and "mean_oracle"; "best_strict", "mean_strict" and
        "worst_strict", the fraction of images right in full, chosen by score within each record; "win_better",
        "win_worse" and "tie", fractions of pairs by the oracle; "caption_win_truer", "caption_win_less_true" and
        "caption_tie", of pairs of captions by the F1 of the facts that they state, and "caption_win_exact", those whose
        win states just the facts; "num_images", "num_pairs" and "num_caption_pairs". None where there is nothing to
        compare.
    Raises: ValueError if a candidate's record is not among the records.
    """
    judged = [_judge_part(model, *part) for part in parts]
    scores, fractions, strict, win, lose, win_caption, lose_caption = (
        np.concatenate([np.zeros(0), *(part[index] for part in judged)]) for index in range(7)
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
        "caption_win_truer": _mean(win_caption > lose_caption),
        "caption_win_less_true": _mean(win_caption < lose_caption),
        "caption_tie": _mean(win_caption == lose_caption),
        "caption_win_exact": _mean(win_caption == 1),
        "num_images": len(scores),
        "num_pairs": len(win),
        "num_caption_pairs": len(win_caption),
    }


def _judge_part(
    model: Model, records: Sequence[Record], candidates: pa.Table, pairs: pa.Table
) -> tuple[np.ndarray, ...]:
    """By image, record by record, score, the oracle's fraction right, and whether all is; by pair the fraction right of
    win and of lose; by pair of captions how true win and lose are; and the number of images of each record that has
    any."""
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
    captions = pairs.filter(pc.is_valid(pairs["win_caption"])).select(["caption", "win_caption", "lose_caption"])
    win_caption, lose_caption = (
        np.array([caption_truth(row[f"{role}_caption"], row["caption"]) for row in captions.to_pylist()])
        for role in ("win", "lose")
    )
    sizes = [len(list(group)) for _, group in itertools.groupby(ids)]
    return scores, fractions, strict, win, lose, win_caption, lose_caption, sizes


def caption_truth(text: str, truth: str) -> float:
    """How true a caption of the built-in world is: F1 of the facts that it states against those of the true one, 0 to
    1; 1 where it states all of them and no others, whatever its wording."""
    return overlap_f1(*(Counter(shapes.parse_caption(caption)) for caption in (text, truth)))


def _empty_row(record: Record) -> dict[str, Any]:
    return {
        "id": record.id,
        "category": record.category,
        "element_types": [question.element_type for question in record.questions],
        "kinds": [shapes.question_kind(question) for question in record.balanced_questions],
        "balanced": None,
        "answered": None,
        "drawn": None,
        "samplers": {},
        "caption": None,
        "caption_f1": None,
        "caption_exact": None,
    }


def _answer_questions(model: Model, codes: torch.Tensor, records: Sequence[Record]) -> list[str]:
    """For each image a digit a question: 1 where the choice that the model finds most likely is the right one; first of
    the record's own questions, then of the balanced ones."""
    digits = []
    for start in track(range(0, len(codes), _BATCH), "questions", "batches"):
        batch = slice(start, min(start + _BATCH, len(codes)))
        asked = [replace(record, questions=record.questions + record.balanced_questions) for record in records[batch]]
        for [score] in self_vqa(model, codes[batch, None], asked):
            digits.append("".join(str(int(item.answer == item.expected)) for item in score.answers))
    return digits


def _write_captions(model: Model, codes: torch.Tensor) -> list[str]:
    """The greedy caption of each image."""
    greedy = SamplingParams(temperature=0.0, max_new_tokens=model.prompts.max_caption_tokens)
    question, texts = model.caption_prompt(), []
    for start in track(range(0, len(codes), _BATCH), "captions", "batches"):
        batch = codes[start : start + _BATCH]
        seeds = torch.zeros(len(batch), 1, 1, dtype=torch.int64)
        ids = model.engine.extend(batch, [[question]] * len(batch), sampling=[greedy], seeds=seeds)
        texts += [model.decode_text(of_image[0][0]) for of_image in ids]
    return texts


def _judge_drawings(
    model: Model, records: Sequence[Record], config: EvalConfig, sampling: ImageSamplingParams
) -> list[tuple[list[str], list[float]]]:
    """For each record, of each image drawn of its caption, a digit a question, 1 where the oracle's answer is right;
    and the model's own scores of the images."""
    judged = []
    for start in track(range(0, len(records), _BATCH), f"images {sampler_name(sampling)}", "batches"):
        batch = records[start : start + _BATCH]
        codes = _draw(model, batch, config, sampling)
        images = model.decode_images(codes.flatten(0, 1))
        seen = iter(oracle.read(resize_images(images, shapes.IMAGE_SIZE)))
        for record, scores in zip(batch, self_vqa(model, codes, batch), strict=True):
            digits = [_oracle_digits(record, next(seen)) for _ in scores]
            judged.append((digits, [round(score.soft, 6) for score in scores]))
    return judged


def _draw(model: Model, records: Sequence[Record], config: EvalConfig, sampling: ImageSamplingParams) -> torch.Tensor:
    """Codes int64 [len(records), images_per_prompt, N]; what is drawn depends on the record and the image's number."""
    return model.engine.generate(
        [model.image_prompt(record.caption) for record in records],
        num_images=config.images_per_prompt,
        seeds=torch.from_numpy(
            candidate_seeds(config.seed, [record.id for record in records], "image", config.images_per_prompt)
        ),
        **asdict(sampling),
    )


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


Sums = dict[MetricPath, tuple[np.ndarray, np.ndarray]]
"""By metric numerators and denominators float64 [n]: what was right in a record, of how many."""


def _nest_values(sums: Sums) -> dict[str, Any]:
    """Each metric's value and interval; None where there is nothing to measure."""
    values, samples = _values_and_samples(sums)
    result: dict[str, Any] = {}
    for path, value in values.items():
        place = _inside(result, path)
        place[path[-1]] = None if np.isnan(value) else float(value)
        place[f"{path[-1]}_ci95"] = percentile_interval(samples[path])
    return result


def _inside(result: dict[str, Any], path: MetricPath) -> dict[str, Any]:
    """The dict that holds the last of a path's names."""
    for name in path[:-1]:
        result = result.setdefault(name, {})
    return result


def _values_and_samples(sums: Sums) -> tuple[dict[MetricPath, float], dict[MetricPath, np.ndarray]]:
    """Each metric's value, and its values over the resamples; NaN where there is nothing to measure."""
    numerators, denominators = (np.stack(half, axis=1) for half in zip(*sums.values(), strict=True))
    with np.errstate(invalid="ignore"):
        totals = numerators.sum(axis=0) / denominators.sum(axis=0)
    samples = resample_ratios(numerators, denominators)
    return _with_gap(dict(zip(sums, totals, strict=True))), _with_gap(dict(zip(sums, samples.T, strict=True)))


def _with_gap(values: dict[MetricPath, Any]) -> dict[MetricPath, Any]:
    return values | {("gap",): values["understanding",] - values["generation",]}


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
