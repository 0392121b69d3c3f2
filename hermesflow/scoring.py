"""How good candidates are: images by the model's own answers about them, captions by likeness to the true one."""

from __future__ import annotations

import importlib
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hermesflow.config import ANSWER_SCORERS, ConfigError, CurationConfig
from hermesflow.engine.text_decoder import SamplingParams
from hermesflow.files import InputError, reason_of, shown
from hermesflow.models import Model
from hermesflow.prompting import choice_prompt, choices_prompt
from hermesflow.records import Record
from hermesflow.text_models import TextEncoder
from hermesflow.worlds.shapes import parse_caption

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


class Scorers:
    """The scorers of images, captions and answers that the settings name, opened once; embeddings are remembered.

    A name such as "my_scorers:likeness" is a function of a module that Python can import:
    - of images: function(images: uint8 [n, H, W, 3], record: Record) -> a finite number for each, the higher the
      better;
    - of captions: function(captions: list[str], truth: str) -> a finite number for each, the higher the better;
    - of answers: function(answer: str, choices: list[str]) -> the index of the choice it means, -1 for none.
    """

    def __init__(self, config: CurationConfig) -> None:
        """
        Args:
            config: score, caption_scorer, answer_scorer, and the models that they use.
        Raises: InputError if a model or a function cannot be had.
        """
        self._caption_scorer, self._answer_scorer = config.caption_scorer, config.answer_scorer
        self._score, self._image_function = config.score, None
        self._caption_function = self._answer_function = self._caption_encoder = self._answer_encoder = None
        if ":" in config.score:
            self._image_function = _import_function("score", config.score)
        if ":" in config.caption_scorer:
            self._caption_function = _import_function("caption_scorer", config.caption_scorer)
        if ":" in config.answer_scorer:
            self._answer_function = _import_function("answer_scorer", config.answer_scorer)
        if "sentence" in (config.caption_scorer, config.answer_scorer):
            self._caption_encoder = self._answer_encoder = TextEncoder(
                config.sentence_model, "mean", "set curation.sentence_model to a folder, or choose another scorer"
            )
        if config.caption_scorer == "bert-cls":
            self._caption_encoder = TextEncoder(
                config.bert_model, "cls", "set curation.bert_model to a folder, or curation.caption_scorer to token-f1"
            )

    def score_images(self, model: Model, codes: Tensor, records: Sequence[Record]) -> list[list[ImageScore]]:
        """How well images show what their record says: in the eyes of the model, or by a function of the user's.

        Args:
            model: the judge, which also decodes the images.
            codes: int64 [B, n, N], n images of each record.
            records: B records.
        Returns: the scores, [B][n]; a function's stand for both kinds of score and come without answers.
        Raises: as self_vqa; InputError on what a user's function returns.
        """
        if self._image_function is None:
            return self_vqa(model, codes, records, self.match_answers)
        scores = []
        for of_record, record in zip(codes, records, strict=True):
            images = model.decode_images(of_record)
            returned = _call("score", self._score, self._image_function, images, record)
            what = f"images of record {record.id!r}"
            numbers = _finite_numbers(f"curation.score {self._score}", returned, len(images), what)
            scores.append([ImageScore(soft=number, hard=number, answers=()) for number in numbers])
        return scores

    def score_captions(self, captions: Sequence[Sequence[str]], truths: Sequence[str]) -> list[list[float]]:
        """Likeness of captions to the true caption of their record, all records in one pass.

        Args:
            captions: texts [B][n of the record].
            truths: the true captions [B].
        Returns: scores [B][n], at most 1 but for a function of the user's.
        Raises: InputError on what a user's function returns, or a truth that the scorer cannot use.
        Source: bert-cls: HermesFlow (arXiv 2502.12148) and its code, cosine of the last layer's [CLS]; sentence:
            Sentence-BERT (arXiv 1908.10084), cosine of mean-pooled states.
        """
        if self._caption_scorer in ("bert-cls", "sentence"):
            return _cosines(self._caption_encoder, captions, truths)
        if self._caption_function is not None:
            return [self._score_by_function(list(texts), truth) for texts, truth in zip(captions, truths, strict=True)]
        score = _CAPTION_SCORES[self._caption_scorer]
        return [[score(text, truth) for text in texts] for texts, truth in zip(captions, truths, strict=True)]

    @property
    def match_answers(self) -> AnswerMatcher | None:
        """What finds the choices that free answers mean; None where choices are scored by their likelihood."""
        return None if self._answer_scorer == "likelihood" else self._match_answers

    def _match_answers(self, answers: Sequence[str], choices: Sequence[Sequence[str]]) -> list[int]:
        """Raises: InputError on what a user's function returns."""
        if self._answer_scorer == "sentence":
            scores = _cosines(self._answer_encoder, choices, answers)
            return [max(range(len(row)), key=row.__getitem__) for row in scores]
        find = _CHOICE_FINDERS.get(self._answer_scorer, self._find_by_function)
        return [find(answer, list(of_answer)) for answer, of_answer in zip(answers, choices, strict=True)]

    def _score_by_function(self, captions: list[str], truth: str) -> list[float]:
        returned = _call("caption_scorer", self._caption_scorer, self._caption_function, list(captions), truth)
        return _finite_numbers(
            f"curation.caption_scorer {self._caption_scorer}", returned, len(captions), f"captions of {truth!r}"
        )

    def _find_by_function(self, answer: str, choices: list[str]) -> int:
        index = _call("answer_scorer", self._answer_scorer, self._answer_function, answer, list(choices))
        if isinstance(index, bool) or not isinstance(index, int) or not -1 <= index < len(choices):
            raise InputError(
                f"curation.answer_scorer {self._answer_scorer}: expected the index of one of {len(choices)} choices, "
                f"or -1, for the answer {answer!r}, got {shown(index)}; correct the function"
            )
        return index


def self_vqa(
    model: Model, codes: Tensor, records: Sequence[Record], match_answers: AnswerMatcher | None = None
) -> list[list[ImageScore]]:
    """Has the model answer each record's questions about images of it.

    By default every choice is scored: its probability is the softmax over the question's choices of the log-probability
    of its tokens with the end of text. With match_answers the model is told the choices, answers in its own words
    (greedily), and the answer counts as the choice it means. An image's questions share its prefix, and all are asked
    in one call.

    Args:
        model: the judge.
        codes: int64 [B, n, N], n images of each record.
        records: B records with at least one question each.
        match_answers: finds the choices that free answers mean.
    Returns: the scores, [B][n].
    Raises: ValueError on codes of another shape or a record without questions; InputError on a word that the model does
        not know; RuntimeError where the model's log-probabilities are not finite.
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
    if match_answers is None:
        scores = _answer_by_likelihood(model, codes.flatten(0, 1), asked)
    else:
        scores = _answer_freely(model, codes.flatten(0, 1), asked, match_answers)
    scores = iter(scores)
    return [[next(scores) for _ in range(num_images)] for _ in records]


def score_entries(
    scorer: str, entries: Sequence[Any], config: CurationConfig, source: str = "entries"
) -> list[dict[str, Any]]:
    """Scores texts that stand alone, to try a scorer out.

    Args:
        scorer: a name that curation.caption_scorer or curation.answer_scorer takes.
        entries: all {"caption", "truth"}, or all {"answer", "choices"}.
        config: names the models that the scorers use.
        source: where the entries are from, for messages.
    Returns: each entry with "score", or with "choice": the one that the answer means, or None.
    Raises: InputError on entries of another kind, or a scorer of another kind.
    """
    kind = "answer" if entries and isinstance(entries[0], dict) and "answer" in entries[0] else "caption"
    expected = {"caption": '{"caption": text, "truth": text}', "answer": '{"answer": text, "choices": [texts]}'}[kind]
    for number, entry in enumerate(entries, 1):
        if not _fits(entry, kind):
            raise InputError(f"{source}: entry {number}: expected {expected}, got {shown(entry)}; correct it")
    try:
        chosen = {"caption_scorer": "exact", "answer_scorer": "exact", f"{kind}_scorer": scorer}
        scorers = Scorers(replace(config, **chosen))
    except ConfigError as error:
        raise InputError(f"--scorer {scorer}: {error.reason} for entries {expected}") from error
    if kind == "caption":
        captions, truths = [[entry["caption"]] for entry in entries], [entry["truth"] for entry in entries]
        scores = scorers.score_captions(captions, truths)
        return [entry | {"score": score} for entry, [score] in zip(entries, scores, strict=True)]
    if scorers.match_answers is None:
        raise InputError(
            f"--scorer {scorer}: needs a model and an image; choose {', '.join(ANSWER_SCORERS[1:])}, or module:function"
        )
    found = scorers.match_answers([entry["answer"] for entry in entries], [entry["choices"] for entry in entries])
    return [
        entry | {"choice": entry["choices"][index] if index >= 0 else None}
        for entry, index in zip(entries, found, strict=True)
    ]


def token_f1(caption: str, truth: str) -> float:
    """F1 over the multiset of words and pairs of neighbouring words; the pairs make the order count mildly.

    Args:
        caption: what was written.
        truth: what it is held against.
    Returns: 0 to 1; 1 for the same words in the same order (case and punctuation aside), 0 where either has no words.
    """
    return overlap_f1(_grams(caption), _grams(truth))


def attribute_f1(caption: str, truth: str) -> float:
    """F1 over what two captions of the built-in world state: its facts (see shapes.parse_caption), and each colour and
    shape that they name, so that a wrong colour does not cost the shape.

    Raises: InputError if the true caption states nothing of that world.
    """
    wanted = _attributes(truth)
    if not wanted:
        raise InputError(
            f"caption {truth!r}: states no fact of the built-in world; choose another curation.caption_scorer than "
            "attribute-f1"
        )
    return overlap_f1(_attributes(caption), wanted)


def overlap_f1(found: Counter, wanted: Counter) -> float:
    """F1 of one multiset against another, 0 to 1; 0 where either is empty."""
    return 2 * (found & wanted).total() / max(found.total() + wanted.total(), 1)


def normalise_text(text: str) -> str:
    """Lower-case words split by single blanks, without punctuation and articles.

    Source: the matching of answers of SQuAD (arXiv 1606.05250).
    """
    text = re.sub(r"[^\w\s]|_", "", text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _exact_score(caption: str, truth: str) -> float:
    return float(caption == truth)


def _normalised_score(caption: str, truth: str) -> float:
    return float(normalise_text(caption) == normalise_text(truth))


def _find_exact(answer: str, choices: list[str]) -> int:
    return choices.index(answer) if answer in choices else -1


def _find_normalised(answer: str, choices: list[str]) -> int:
    """Choices that differ only in what is normalised away are told apart where the answer is exact."""
    if answer in choices or not normalise_text(answer):
        return _find_exact(answer, choices)
    return _find_exact(normalise_text(answer), [normalise_text(choice) for choice in choices])


_CAPTION_SCORES = {
    "exact": _exact_score,
    "normalised": _normalised_score,
    "token-f1": token_f1,
    "attribute-f1": attribute_f1,
}
_CHOICE_FINDERS = {"exact": _find_exact, "normalised": _find_normalised}


def _cosines(encoder: TextEncoder, texts: Sequence[Sequence[str]], anchors: Sequence[str]) -> list[list[float]]:
    """Cosine [B][n of the anchor] of texts with their anchor."""
    counts = [len(of_anchor) for of_anchor in texts]
    states = encoder.encode([*anchors, *(text for of_anchor in texts for text in of_anchor)])
    anchor_states = states[: len(anchors)].repeat_interleave(torch.tensor(counts, dtype=torch.int64), dim=0)
    scores = (states[len(anchors) :] * anchor_states).sum(1).clamp(-1, 1)
    return [of_anchor.tolist() for of_anchor in scores.split(counts)]


def _answer_by_likelihood(model: Model, codes: Tensor, records: Sequence[Record]) -> list[ImageScore]:
    """Scores of images int64 [B, N], each of its record."""
    prompts = [[choice_prompt(model, question) for question in record.questions] for record in records]
    logprobs = model.engine.score_choices(
        codes,
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
    model: Model, codes: Tensor, records: Sequence[Record], match_answers: AnswerMatcher
) -> list[ImageScore]:
    """Scores of images int64 [B, N], each of its record."""
    questions = [question for record in records for question in record.questions]
    prompts = [
        [choices_prompt(model, question.question, question.choices) for question in record.questions]
        for record in records
    ]
    greedy = SamplingParams(temperature=0.0, max_new_tokens=model.prompts.max_answer_tokens)
    seeds = torch.zeros(len(records), max(map(len, prompts), default=0), 1, dtype=torch.int64)
    said = model.engine.extend(codes, prompts, sampling=[greedy], seeds=seeds)
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


def _import_function(key: str, spec: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module_name, name = spec.split(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module of the user's may raise anything
        reason = reason_of(error)
        raise InputError(
            f"curation.{key} {spec}: the module {module_name} cannot be imported ({reason}); install it, or set "
            "PYTHONPATH to its folder"
        ) from error
    if not hasattr(module, name):
        raise InputError(f"curation.{key} {spec}: the module {module_name} has no {name}; check the name")
    function = getattr(module, name)
    if not callable(function):
        raise InputError(f"curation.{key} {spec}: {name} is {shown(function)}, which is no function; name a function")
    return function


def _call(key: str, spec: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a user's function returns."""
    try:
        return function(*arguments)
    except Exception as error:
        raise InputError(
            f"curation.{key} {spec}: raised {type(error).__name__} ({reason_of(error)}) on {shown(arguments)}; correct "
            "the function (HERMESFLOW_DEBUG=1 shows where)"
        ) from error


def _finite_numbers(name: str, returned: Any, count: int, what: str) -> list[float]:
    """What a user's function returned, if it is as many finite numbers."""
    try:
        numbers = [float(number) for number in returned]
    except (TypeError, ValueError):
        numbers = None
    if numbers is None or len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise InputError(
            f"{name}: expected a list of {count} finite numbers for the {what}, got {shown(returned)}; correct the "
            "function"
        )
    return numbers


def _fits(entry: Any, kind: str) -> bool:
    if not isinstance(entry, dict):
        return False
    if kind == "caption":
        return isinstance(entry.get("caption"), str) and isinstance(entry.get("truth"), str)
    choices = entry.get("choices")
    texts = [entry.get("answer"), *choices] if isinstance(choices, list) and choices else [None]
    return all(isinstance(text, str) for text in texts)


def _attributes(caption: str) -> Counter:
    facts = parse_caption(caption)
    kinds = [kind for name, kind, *_ in facts if name != "background"]
    kinds += [fact[2] for fact in facts if fact[0] in ("left", "above")]
    return Counter(facts | {("named", word) for kind in kinds for word in kind.split()})


def _grams(text: str) -> Counter:
    words = re.findall(r"\w+", text.lower())
    return Counter(words) + Counter(zip(words, words[1:], strict=False))
