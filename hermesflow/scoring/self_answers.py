"""Self-VQA: how well images show what their record says, by the model's own answers about them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hermesflow.data.records import Question, Record
from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.models.model import Model
from hermesflow.runtime.files import InputError

_LEAST = 1e-3
"""Of a right answer's probability in the logarithm: below it an image is wrong, however sure the judge is."""
AnswerMatcher = Callable[[Sequence[str], Sequence[Sequence[str]]], list[int]]
"""Free answers [Q] and the choices of each -> the index of the choice that each means, -1 for none."""


class SelfAnswer(NamedTuple):
    """What the model answers to one question about one image."""

    question: str
    answer: str
    """The choice it finds most likely, of equally likely ones the first; or the choice that its free answer means, or
    the free answer itself where it means none."""
    expected: str
    """The right answer."""
    probability: float
    """Its probability of the right answer among the question's choices; of a free answer 1 if right, else 0."""


class ImageScore(NamedTuple):
    """How well an image shows what its record says, in the eyes of the model."""

    soft: float
    """Mean over the questions of the probability of the right answer."""
    hard: float
    """Fraction of the questions answered rightly."""
    answers: tuple[SelfAnswer, ...]


class Judged(NamedTuple):
    """What a scorer of images gives an image."""

    score: float
    answers: tuple[SelfAnswer, ...] = ()


def soft(
    model: Model, codes: Tensor, records: Sequence[Record], match_answers: AnswerMatcher | None
) -> list[list[Judged]]:
    """Images int64 [B, n, N] scored by the mean probability of the right answers, [B][n]; see self_vqa."""
    scores = self_vqa(model, codes, records, match_answers)
    return [[Judged(score.soft, score.answers) for score in of_record] for of_record in scores]


def hard(
    model: Model, codes: Tensor, records: Sequence[Record], match_answers: AnswerMatcher | None
) -> list[list[Judged]]:
    """Images int64 [B, n, N] scored by the fraction of questions answered rightly, [B][n]; see self_vqa."""
    scores = self_vqa(model, codes, records, match_answers)
    return [[Judged(score.hard, score.answers) for score in of_record] for of_record in scores]


def log(
    model: Model, codes: Tensor, records: Sequence[Record], match_answers: AnswerMatcher | None
) -> list[list[Judged]]:
    """Images int64 [B, n, N] scored by the log-probability that all answers are right, each at least log 1e-3, [B][n];
    see self_vqa."""
    scores = self_vqa(model, codes, records, match_answers)
    return [[Judged(_log_of(score), score.answers) for score in of_record] for of_record in scores]


def prompt(model: Model, codes: Tensor, records: Sequence[Record], _: AnswerMatcher | None) -> list[list[Judged]]:
    """Images int64 [B, n, N] scored by the log-probability of their record's caption, its end included, as the answer
    to the question for a caption, [B][n]; of a caption that is longer than the model's own, its beginning."""
    return [[Judged(score) for score in of_record] for of_record in _prompt_logprobs(model, codes, records).tolist()]


def mixed(
    model: Model, codes: Tensor, records: Sequence[Record], match_answers: AnswerMatcher | None
) -> list[list[Judged]]:
    """Images int64 [B, n, N] scored by soft times the probability of the record's caption, a token (the geometric
    mean), [B][n]: two judges in one, whose errors differ."""
    lengths = torch.tensor([[len(_caption_ids(model, record)) + 1] for record in records])
    chances = (_prompt_logprobs(model, codes, records) / lengths).exp().tolist()
    scores = soft(model, codes, records, match_answers)
    return [
        [Judged(judged.score * chance, judged.answers) for judged, chance in zip(*of_record, strict=True)]
        for of_record in zip(scores, chances, strict=True)
    ]


def _caption_ids(model: Model, record: Record) -> list[int]:
    return model.encode_text(record.caption)[: model.prompts.max_caption_tokens]


def _prompt_logprobs(model: Model, codes: Tensor, records: Sequence[Record]) -> Tensor:
    """fp64 [B, n]."""
    asked = [[[_caption_ids(model, record)]] for record in records for _ in range(codes.shape[1])]
    question = model.caption_prompt()
    logprobs = model.engine.score_choices(model.view_codes(codes.flatten(0, 1)), [[question]] * len(asked), asked)
    return torch.tensor(logprobs, dtype=torch.float64).view(codes.shape[:2])


def check_record(model: Model, record: Record) -> None:
    """Raises InputError unless images of the record can be judged by its questions."""
    if not record.questions:
        raise InputError(f"record {record.id}: has no questions to judge its images by; add some or leave it out")
    if record.codes is None:
        raise InputError(f"record {record.id}: has no image codes; encode its image with the model's tokenizer")
    model.image_prompt(record.caption)
    for question in _distinct(model, record).questions:
        model.choice_prompt(question.question, question.choices)


def self_vqa(
    model: Model, codes: Tensor, records: Sequence[Record], match_answers: AnswerMatcher | None = None
) -> list[list[ImageScore]]:
    """Has the model answer each record's questions about images of it.

    By default every choice is scored: its probability is the softmax over the question's choices of the log-probability
    of its tokens with the end of text; choices that are one to the model count once. With match_answers the prompt
    lists the choices, the model answers in its own words (greedily), and the answer counts as the choice it means. An
    image's questions share its prefix, and all are asked in one call.

    Args:
        model: the judge.
        codes: int64 [B, n, N], n images of each record.
        records: B records with at least one question each.
        match_answers: finds the choices that free answers mean.
    Returns: the scores, [B][n].
    Raises: ValueError on codes of another shape or a record without questions; InputError on a word that the model does
        not know, or choices that are all one to it; RuntimeError where the model's log-probabilities are not finite.
    Source: self-VQA of HermesFlow (arXiv 2502.12148), section 3, whose code lets the model answer freely; "soft" with
        likelihoods keeps what counting right answers rounds away.
    """
    if codes.dim() != 3 or len(codes) != len(records):
        raise ValueError(
            f"self_vqa: expected codes [B, n, N] for {len(records)} records, got {list(codes.shape)}; "
            "stack the images of each record"
        )
    for record in records:
        if not record.questions:
            raise ValueError(f"self_vqa: expected questions in record {record.id!r}, got none; leave the record out")
    num_images = codes.shape[1]
    asked = [record for record in records for _ in range(num_images)]
    scores = iter(answer_questions(model, model.view_codes(codes.flatten(0, 1)), asked, match_answers))
    return [[next(scores) for _ in range(num_images)] for _ in records]


def answer_questions(
    model: Model, images: Tensor, records: Sequence[Record], match_answers: AnswerMatcher | None = None
) -> list[ImageScore]:
    """As self_vqa, of one image a record as the model sees it: codes int64 [B, N] or features [B, F, D]."""
    records = [_distinct(model, record) for record in records]
    if match_answers is None:
        return _answer_by_likelihood(model, images, records)
    return _answer_freely(model, images, records, match_answers)


def _distinct(model: Model, record: Record) -> Record:
    """The record with each choice once, as the model sees it: a repeat would share its choice's probability. Raises:
    InputError where one choice would be left, which is always right."""
    return replace(record, questions=tuple(_distinct_choices(model, record, item) for item in record.questions))


def _distinct_choices(model: Model, record: Record, question: Question) -> Question:
    choices = model.merge_choices(question.choices, question.answer)
    if len(choices) == 1:
        raise InputError(
            f"record {record.id}: the choices {list(question.choices)} of {question.question!r} are one to the model, "
            "which is always right; give two or more that differ"
        )
    return replace(question, choices=tuple(choices))


def _log_of(score: ImageScore) -> float:
    return sum(math.log(max(answer.probability, _LEAST)) for answer in score.answers)


def _answer_by_likelihood(model: Model, images: Tensor, records: Sequence[Record]) -> list[ImageScore]:
    prompts = [
        [model.choice_prompt(question.question, question.choices) for question in record.questions]
        for record in records
    ]
    logprobs = model.engine.score_choices(
        images,
        [[prompt.question for prompt in asked] for asked in prompts],
        [[prompt.choices for prompt in asked] for asked in prompts],
    )
    return [_likelihood_score(record, rows) for record, rows in zip(records, logprobs, strict=True)]


def _likelihood_score(record: Record, logprobs: Sequence[Any]) -> ImageScore:
    answers = []
    for question, row in zip(record.questions, logprobs, strict=True):
        chances = torch.as_tensor(row, dtype=torch.float64).softmax(0)
        if not chances.isfinite().all():
            raise RuntimeError(
                f"self_vqa: the model's log-probabilities of {list(question.choices)} are not finite for record "
                f"{record.id!r}, question {question.question!r}; its weights may be damaged"
            )
        chances = chances.tolist()
        best = max(range(len(chances)), key=chances.__getitem__)
        right = chances[question.choices.index(question.answer)]
        answers.append(SelfAnswer(question.question, question.choices[best], question.answer, right))
    return ImageScore(
        soft=sum(item.probability for item in answers) / len(answers),
        hard=sum(item.answer == item.expected for item in answers) / len(answers),
        answers=tuple(answers),
    )


def _answer_freely(
    model: Model, images: Tensor, records: Sequence[Record], match_answers: AnswerMatcher
) -> list[ImageScore]:
    questions = [question for record in records for question in record.questions]
    prompts = [
        [model.choices_prompt(question.question, question.choices) for question in record.questions]
        for record in records
    ]
    greedy = SamplingParams(temperature=0.0, max_new_tokens=model.prompts.max_answer_tokens)
    seeds = torch.zeros(len(records), max(map(len, prompts), default=0), 1, dtype=torch.int64)
    said = model.engine.generate_text(images, prompts, sampling=[greedy], seeds=seeds)
    texts = [model.decode_text(ids) for of_image in said for [ids] in of_image]
    found = match_answers(texts, [question.choices for question in questions])
    answers = iter(
        SelfAnswer(
            question.question,
            question.choices[index] if index >= 0 else text,
            question.answer,
            float(index >= 0 and question.choices[index] == question.answer),
        )
        for question, text, index in zip(questions, texts, found, strict=True)
    )
    scores = []
    for record in records:
        of_image = tuple(next(answers) for _ in record.questions)
        right = sum(answer.probability for answer in of_image) / len(of_image)
        scores.append(ImageScore(soft=right, hard=right, answers=of_image))
    return scores
