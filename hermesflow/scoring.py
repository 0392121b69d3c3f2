"""How good candidates are: images by the model's own answers about them, captions by likeness to the true one."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hermesflow.files import InputError
from hermesflow.models import Model
from hermesflow.prompting import choice_prompt
from hermesflow.records import Record

BERT = "bert-large-uncased"
"""The scorer of the published code."""
_BERT_BATCH = 64


class SelfAnswer(NamedTuple):
    """What the model answers to one question about one image."""

    question: str
    answer: str
    """The choice it finds most likely; of equally likely ones the first."""
    expected: str
    """The right answer."""
    probability: float
    """Its probability of the right answer among the question's choices."""


class ImageScore(NamedTuple):
    """How well an image shows what its record says, in the eyes of the model."""

    soft: float
    """Mean over the questions of the probability of the right answer."""
    hard: float
    """Fraction of the questions answered rightly."""
    answers: tuple[SelfAnswer, ...]


def self_vqa(model: Model, codes: Tensor, records: Sequence[Record]) -> list[list[ImageScore]]:
    """Has the model answer each record's questions about images of it, by scoring every choice.

    A choice's probability is the softmax over the question's choices of the log-probability of its tokens with the end
    of text; an image's questions share its prefix and all are scored in one call.

    Args:
        model: the judge.
        codes: int64 [B, n, N], n images of each record.
        records: B records with at least one question each.
    Returns: the scores, [B][n].
    Raises: ValueError on codes of another shape or a record without questions; InputError on a word that the model does
        not know; RuntimeError where the model's log-probabilities are not finite.
    Source: self-VQA of HermesFlow (arXiv 2502.12148), section 3; "soft" keeps what counting right answers rounds away.
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
    prompts = [[choice_prompt(model, question) for question in record.questions] for record in records]
    logprobs = model.engine.score_choices(
        codes.flatten(0, 1),
        [[prompt.question for prompt in asked] for asked in prompts for _ in range(num_images)],
        [[prompt.choices for prompt in asked] for asked in prompts for _ in range(num_images)],
    )
    return [
        [_image_score(record, logprobs[index * num_images + image]) for image in range(num_images)]
        for index, record in enumerate(records)
    ]


def token_f1(caption: str, truth: str) -> float:
    """F1 over the multiset of words and pairs of neighbouring words; the pairs make the order count mildly.

    Args:
        caption: what was written.
        truth: what it is held against.
    Returns: 0 to 1; 1 for the same words in the same order (case and punctuation aside), 0 where either has no words.
    """
    found, wanted = _grams(caption), _grams(truth)
    common = (found & wanted).total()
    return 2 * common / max(found.total() + wanted.total(), 1)


def caption_scores(scorer: str, captions: Sequence[str], truth: str, *, bert_name: str = BERT) -> list[float]:
    """Likeness of captions to the true caption.

    Args:
        scorer: "token_f1", or "bert" for the cosine of the [CLS] states of a BERT.
        captions: any number of texts.
        truth: the true caption.
        bert_name: for "bert": a model of the Hugging Face hub, or the folder of one.
    Returns: one score a caption, at most 1.
    Raises: ValueError on another scorer; InputError if the BERT cannot be had.
    Source: HermesFlow (arXiv 2502.12148) and its code: bert-large-uncased, last layer, [CLS].
    """
    if scorer == "token_f1":
        return [token_f1(caption, truth) for caption in captions]
    if scorer == "bert":
        states = _bert_states([truth, *captions], bert_name)
        return torch.cosine_similarity(states[1:], states[:1], dim=1).tolist()
    raise ValueError(f"caption_scores: expected scorer 'token_f1' or 'bert', got {scorer!r}; name one of them")


def _image_score(record: Record, logprobs: Sequence[Any]) -> ImageScore:
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


def _grams(text: str) -> Counter:
    words = re.findall(r"\w+", text.lower())
    return Counter(words) + Counter(zip(words, words[1:], strict=False))


@torch.inference_mode()
def _bert_states(texts: Sequence[str], name: str) -> Tensor:
    """The last layer's states of [CLS], fp32 [len(texts), D]."""
    tokenizer, bert = _load_bert(name)
    states = []
    for start in range(0, len(texts), _BERT_BATCH):
        batch = list(texts[start : start + _BERT_BATCH])
        inputs = tokenizer(batch, return_tensors="pt", padding=True, truncation=True)
        states.append(bert(**inputs).last_hidden_state[:, 0].float())
    return torch.cat(states)


@functools.lru_cache(maxsize=1)
def _load_bert(name: str) -> tuple[Any, Any]:
    try:
        from transformers import AutoModel, AutoTokenizer

        return AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name).eval()
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{name}: this BERT cannot be loaded ({reason}); fetch it once with a network connection, or "
            "set curation.caption_scorer to token_f1"
        ) from error
