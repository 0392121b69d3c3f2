"""Scorers of captions by their likeness to the true one, and of free answers by the choice that they mean.

A named scorer is made of the curation settings; see CAPTION_SCORERS and ANSWER_SCORERS in runtime/registry.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from hermesflow.config import CurationConfig
from hermesflow.data.wording import token_f1
from hermesflow.scoring.matching import find_choice, normalize_text
from hermesflow.scoring.self_answers import AnswerMatcher
from hermesflow.scoring.text_models import TextEncoder

CaptionScorer = Callable[[Sequence[Sequence[str]], Sequence[str]], list[list[float]]]
"""Captions [B][n of the record] and the true ones [B] -> scores [B][n], the higher the better."""


def scorer_of(score: Callable[[str, str], float]) -> Callable[[CurationConfig], CaptionScorer]:
    """Makes a scorer of captions of a function (caption, truth) -> score that needs no settings."""

    def scorer(captions: Sequence[Sequence[str]], truths: Sequence[str]) -> list[list[float]]:
        return [[score(text, truth) for text in texts] for texts, truth in zip(captions, truths, strict=True)]

    return lambda config: scorer


def bert_cls(config: CurationConfig) -> CaptionScorer:
    """Cosine of the last layer's [CLS], as HermesFlow (arXiv 2502.12148) and its code have it."""
    fix = "set curation.bert_model to a folder, or curation.caption_scorer to token-f1"
    return _by_cosine(TextEncoder(config.bert_model, "cls", fix))


def sentence(config: CurationConfig) -> CaptionScorer:
    """Cosine of mean-pooled states: Sentence-BERT (arXiv 1908.10084)."""
    return _by_cosine(_sentence_encoder(config.sentence_model))


def sentence_answers(config: CurationConfig) -> AnswerMatcher:
    """The choice whose sentence embedding is the nearest to the answer's."""
    encoder = _sentence_encoder(config.sentence_model)

    def match(answers: Sequence[str], choices: Sequence[Sequence[str]]) -> list[int]:
        return [max(range(len(row)), key=row.__getitem__) for row in _cosines(encoder, choices, answers)]

    return match


def exact_answers(config: CurationConfig) -> AnswerMatcher:
    """The choice that is the answer."""
    return lambda answers, choices: [_find_exact(*pair) for pair in zip(answers, choices, strict=True)]


def normalized_answers(config: CurationConfig) -> AnswerMatcher:
    """The choice that is the answer but for Unicode form, case, punctuation and articles; see find_choice."""
    return lambda answers, choices: [find_choice(*pair) for pair in zip(answers, choices, strict=True)]


def likelihood(config: CurationConfig) -> None:
    """No free answer: choices are scored by their likelihood."""
    return None


EXACT = scorer_of(lambda caption, truth: float(caption == truth))
NORMALIZED = scorer_of(lambda caption, truth: float(normalize_text(caption) == normalize_text(truth)))
TOKEN_F1 = scorer_of(token_f1)


def _find_exact(answer: str, choices: Sequence[str]) -> int:
    return choices.index(answer) if answer in choices else -1


@functools.lru_cache(1)
def _sentence_encoder(name: str) -> TextEncoder:
    """Scorers of captions and of answers share it."""
    return TextEncoder(name, "mean", "set curation.sentence_model to a folder, or choose another scorer")


def _by_cosine(encoder: TextEncoder) -> CaptionScorer:
    return lambda captions, truths: _cosines(encoder, captions, truths)


def _cosines(encoder: TextEncoder, texts: Sequence[Sequence[str]], anchors: Sequence[str]) -> list[list[float]]:
    """Cosine [B][n of the anchor] of texts with their anchor."""
    counts = [len(of_anchor) for of_anchor in texts]
    states = encoder.encode([*anchors, *(text for of_anchor in texts for text in of_anchor)])
    anchor_states = states[: len(anchors)].repeat_interleave(torch.tensor(counts, dtype=torch.int64), dim=0)
    scores = (states[len(anchors) :] * anchor_states).sum(1).clamp(-1, 1)
    return [of_anchor.tolist() for of_anchor in scores.split(counts)]
