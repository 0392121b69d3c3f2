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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from hermesflow.config import EvalConfig, parse_sampler
from hermesflow.data.records import Record
from hermesflow.data.wording import overlap_f1, token_f1
from hermesflow.engine.decoders.masked import ImageSamplingParams
from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.evaluation.evaluation import Evaluation, Parts, Rows
from hermesflow.evaluation.stats import rank_correlation, roc_auc
from hermesflow.models.images import resize_images
from hermesflow.models.model import Model
from hermesflow.runtime.files import InputError
from hermesflow.runtime.progress import track
from hermesflow.runtime.seeds import candidate_seeds
from hermesflow.scoring.self_answers import answer_questions, self_vqa
from hermesflow.worlds import oracle, shapes

_BATCH = 64
NUM_SHOWN = 8
"""Prompts whose drawings are kept, to be looked at."""


class Builtin(Evaluation):
    """The measurement on held-out scenes; images of another size than 64 x 64 pixels are resized."""

    known_sources = ("shapes",)

    def parts(self, model: Model, config: EvalConfig) -> list[Callable[[], Rows]]:
        """See Evaluation; each measures _BATCH records.

        Returns: of each record "balanced" and "answered", a digit a question (1 right, 0 wrong) about the real image,
            of the balanced questions, whose "kinds" stand beside them, and of the record's own; "drawn", such a text
            for each image drawn of its caption by the default sampler, and "samplers", {name: {"drawn", "scores"}} with
            the model's own scores of the images; "caption", "caption_f1" and "caption_exact"; null where it was not
            asked or not drawn. The first NUM_SHOWN records alone have "prompt" and "codes", what the default sampler
            drew, to be looked at.
        Raises: InputError if the model does not know the world's words.
        """
        if not {"temperature", "num_steps"} & _names(model.sampling):
            raise InputError(
                "eval.suite builtin: draws by steps and temperatures, and the model's family has neither; name another "
                "eval.suite"
            )
        scenes, records = held_out(config)
        return [
            partial(_measure, model, config, start, scenes[start : start + _BATCH], records[start : start + _BATCH])
            for start in range(0, len(records), _BATCH)
        ]

    def settings(self, model: Model, config: EvalConfig) -> dict[str, Any]:
        """The settings with the model's own way to draw filled in."""
        return asdict(config) | asdict(model.sampling_of(config)) | {"samplers": list(config.samplers)}

    def judge_candidates(self, model: Model, parts: Parts) -> dict[str, Any]:
        """Agreement with the oracle."""
        return agreement(model, parts)


BUILTIN = Builtin()


def _measure(
    model: Model, config: EvalConfig, start: int, scenes: Sequence[shapes.Scene], records: Sequence[Record]
) -> Rows:
    """The rows of the records from the start-th on, which are a batch."""
    rows = [_empty_row(record) for record in records]
    asked, drawn = records[: max(0, config.num_understanding - start)], records[: max(0, config.num_prompts - start)]
    if asked:
        images = model.view_pixels(resize_images(np.stack([record.image for record in asked]), model.image_size))
        for row, answered in zip(rows, answer_digits(model, images, asked), strict=False):
            num_own = len(row["element_types"])
            row |= {"answered": answered[:num_own], "balanced": answered[num_own:]}
        for row, text, record, scene in zip(rows, write_captions(model, images), records, scenes, strict=False):
            exact = shapes.parse_caption(text) == shapes.scene_facts(scene)
            row |= {"caption": text, "caption_f1": token_f1(text, record.caption), "caption_exact": exact}
    default = sampler_name(model, model.sampling_of(config))
    for name, sampling in samplers_of(model, config).items() if drawn else ():
        judged = _judge_drawings(model, drawn, config, sampling)
        for number, (digits, scores, codes) in enumerate(judged):
            row = rows[number]
            row["samplers"][name] = {"drawn": digits, "scores": scores}
            if name == default:
                row["drawn"] = digits
            if name == default and start + number < NUM_SHOWN:
                row |= {"prompt": records[number].caption, "codes": codes.tolist()}
    return rows


def sampler_name(model: Model, sampling: Any) -> str:
    """How results call a way to draw: "STEPS/TEMPERATURE", such as "4/0.7"; code by code each code is a step, and a
    flow has the temperature 1."""
    steps = getattr(sampling, "num_steps", model.layout.num_image_tokens)
    return f"{steps}/{getattr(sampling, 'temperature', 1):g}"


def samplers_of(model: Model, config: EvalConfig) -> dict[str, Any]:
    """The ways to draw that a model is measured by, by name: the default one first, then config.samplers, of whose
    steps and temperatures those count that the model's images are drawn by."""
    default = model.sampling_of(config)
    given = [default]
    for text in config.samplers:
        values = parse_sampler(text)
        given.append(replace(default, **{name: values[name] for name in values if name in _names(default)}))
    return {sampler_name(model, sampling): sampling for sampling in given}


def _names(sampling: Any) -> set[str]:
    return {item.name for item in fields(sampling)}


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
    codes = draw_codes(model, records, config, model.sampling_of(config))
    images = model.decode_images(codes.flatten(0, 1))
    return images.reshape(*codes.shape[:2], *images.shape[1:])


def agreement(model: Model, parts: Parts) -> dict[str, Any]:
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


def answer_digits(model: Model, images: torch.Tensor, records: Sequence[Record]) -> list[str]:
    """For each image a digit a question: 1 where the choice that the model finds most likely is the right one; first of
    the record's own questions, then of the balanced ones."""
    digits = []
    for start in track(range(0, len(images), _BATCH), "questions", "batches"):
        batch = slice(start, min(start + _BATCH, len(images)))
        asked = [replace(record, questions=record.questions + record.balanced_questions) for record in records[batch]]
        for score in answer_questions(model, images[batch], asked):
            digits.append("".join(str(int(item.answer == item.expected)) for item in score.answers))
    return digits


def write_captions(model: Model, images: torch.Tensor) -> list[str]:
    """The greedy caption of each image."""
    greedy = SamplingParams(temperature=0.0, max_new_tokens=model.prompts.max_caption_tokens)
    question, texts = model.caption_prompt(), []
    for start in track(range(0, len(images), _BATCH), "captions", "batches"):
        batch = images[start : start + _BATCH]
        seeds = torch.zeros(len(batch), 1, 1, dtype=torch.int64)
        ids = model.engine.generate_text(batch, [[question]] * len(batch), sampling=[greedy], seeds=seeds)
        texts += [model.decode_text(of_image[0][0]) for of_image in ids]
    return texts


def _judge_drawings(
    model: Model, records: Sequence[Record], config: EvalConfig, sampling: ImageSamplingParams
) -> Iterator[tuple[list[str], list[float], torch.Tensor]]:
    """For each record, of each image drawn of its caption, a digit a question, 1 where the oracle's answer is right;
    the model's own scores of the images; and their codes int64 [n, N]."""
    for start in track(range(0, len(records), _BATCH), f"images {sampler_name(model, sampling)}", "batches"):
        batch = records[start : start + _BATCH]
        codes = draw_codes(model, batch, config, sampling)
        images = model.decode_images(codes.flatten(0, 1))
        seen = iter(oracle.read(resize_images(images, shapes.IMAGE_SIZE)))
        for record, of_record, scores in zip(batch, codes, self_vqa(model, codes, batch), strict=True):
            digits = [_oracle_digits(record, next(seen)) for _ in scores]
            yield digits, [round(score.soft, 6) for score in scores], of_record


def draw_codes(
    model: Model, records: Sequence[Record], config: EvalConfig, sampling: ImageSamplingParams
) -> torch.Tensor:
    """Codes int64 [len(records), images_per_prompt, N]; what is drawn depends on the record and the image's number."""
    return model.engine.generate(
        [model.image_prompt(record.caption) for record in records],
        num_images=config.images_per_prompt,
        seeds=torch.from_numpy(
            candidate_seeds(config.seed, [record.id for record in records], "image", config.images_per_prompt)
        ),
        sampling=sampling,
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


def _mean(values: Sequence | np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None
