"""Measurement on a user's held-out records, in the form of the built-in one: the gap on anything.

Understanding is how many questions about the records' own images the model answers rightly: their own, and as many of
other records as it takes to ask as often for what is not there (data/balancing.py). Generation is how many of a
record's questions its drawn images answer rightly in the eyes of a judge: the model itself, or an endpoint. The model's
own eyes are the weaker witness, since what it draws wrongly it may see wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from PIL import Image

from hermesflow.config import EvalConfig
from hermesflow.data.encoding import record_views
from hermesflow.data.records import Question, Record
from hermesflow.data.sources import read_records
from hermesflow.data.wording import token_f1
from hermesflow.evaluation.builtin import NUM_SHOWN, answer_digits, draw_codes, write_captions
from hermesflow.evaluation.evaluation import Evaluation, Rows
from hermesflow.evaluation.suites.judges import Endpoint
from hermesflow.models.model import Model
from hermesflow.runtime.files import InputError
from hermesflow.scoring.matching import normalize_text
from hermesflow.scoring.self_answers import self_vqa

_BATCH = 16


class OnRecords(Evaluation):
    """See the module."""

    def parts(self, model: Model, config: EvalConfig) -> list[Callable[[], Rows]]:
        """Of _BATCH records each; rows as those of the built-in measurement, whose oracle is the judge here.

        Raises: InputError if no record can be used, or the endpoint gives no answer.
        """
        most = max(config.num_prompts, config.num_understanding)
        records = read_records(config.data, model, config.questions or None, config.root or None)[:most]
        judge = None if config.judge == "self" else Endpoint(config.judge)
        return [
            partial(_measure, model, config, judge, start, records[start : start + _BATCH])
            for start in range(0, len(records), _BATCH)
        ]

    def settings(self, model: Model, config: EvalConfig) -> dict[str, Any]:
        """The settings with the model's own way to draw filled in."""
        return asdict(config) | asdict(model.sampling_of(config)) | {"samplers": []}


ON_RECORDS = OnRecords()


def _measure(model: Model, config: EvalConfig, judge: Endpoint | None, start: int, records: Sequence[Record]) -> Rows:
    """The rows of the records from the start-th on, which are a batch; without a judge the model judges itself."""
    rows = [_empty_row(record) for record in records]
    asked, drawn = records[: max(0, config.num_understanding - start)], records[: max(0, config.num_prompts - start)]
    if asked:
        views = record_views(model, asked)
        answered, captions = answer_digits(model, views, asked), write_captions(model, views)
        for row, record, digits, text in zip(rows, asked, answered, captions, strict=False):
            count = len(record.questions)
            row |= {"answered": digits[:count], "balanced": digits[count:] if record.balanced_questions else digits}
            same = normalize_text(text) == normalize_text(record.caption)
            row |= {"caption": text, "caption_f1": token_f1(text, record.caption), "caption_exact": same}
    if drawn:
        codes = draw_codes(model, drawn, config, model.sampling_of(config))
        if judge is None:
            marks = [[_own_digits(image) for image in of_record] for of_record in self_vqa(model, codes, drawn)]
        else:
            marks = [_judged(judge, model, *pair) for pair in zip(codes, drawn, strict=True)]
        for number, (row, of_record, of_codes) in enumerate(zip(rows, marks, codes, strict=False), start):
            row["drawn"] = of_record
            if number < NUM_SHOWN:
                row |= {"prompt": records[number].caption, "codes": of_codes.tolist()}
    return rows


def _empty_row(record: Record) -> dict[str, Any]:
    asked = record.image_questions
    return {
        "id": record.id, "category": record.category,
        "element_types": [question.element_type or "other" for question in record.questions],
        "kinds": [_kind(question) for question in asked],
        "balanced": None, "answered": None, "drawn": None, "samplers": {}, "caption": None, "caption_f1": None,
        "caption_exact": None,
    }  # fmt: skip


def _kind(question: Question) -> str:
    """What a question asks for: yes, no, or a kind of fact."""
    if {choice.lower() for choice in question.choices} == {"yes", "no"}:
        return question.answer.lower()
    return question.element_type or "other"


def _own_digits(score: Any) -> str:
    return "".join(str(int(item.answer == item.expected)) for item in score.answers)


def _judged(judge: Endpoint, model: Model, codes: torch.Tensor, record: Record) -> list[str]:
    """Of each image of a record a digit a question."""
    questions: Sequence[Any] = record.questions
    try:
        return [judge(Image.fromarray(pixels), questions) for pixels in model.decode_images(codes)]
    except ConnectionError as error:
        raise InputError(f"eval.judge {judge.model}: {error}; give the same command again") from error
