"""The scorers that the settings name, opened once: of images, captions and answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from hermesflow.config import ConfigError, CurationConfig, GRPOConfig
from hermesflow.data.records import Record
from hermesflow.models.model import Model
from hermesflow.runtime.files import InputError, reason_of, shown
from hermesflow.runtime.registry import ANSWER_SCORERS, CAPTION_SCORERS, IMAGE_SCORERS, REWARDS, resolve
from hermesflow.scoring.self_answers import AnswerMatcher, Judged

ImageScorer = Callable[[Model, Tensor, Sequence[Record], AnswerMatcher | None], list[list[Judged]]]
"""Model, codes int64 [B, n, N], B records and a matcher of answers -> the images' scores, [B][n]."""
_MOST = 3e38
"""Scores are kept in float32."""


class Scorers:
    """The scorers of images, captions and answers that the settings name, opened once.

    A name such as "my_scorers:likeness" is a function of a module that Python can import:
    - of images: function(images: uint8 [n, H, W, 3], record: Record) -> a finite number for each, the higher the
      better;
    - of captions: function(captions: list[str], truth: str) -> a finite number for each, the higher the better;
    - of answers: function(answer: str, choices: list[str]) -> the index of the choice it means, -1 for none.
    """

    def __init__(self, config: CurationConfig, judge: Model | None = None) -> None:
        """
        Args:
            config: score, caption_scorer, answer_scorer, and the models that they use.
            judge: scores images in place of the model that is given to score_images.
        Raises: InputError if a model or a function cannot be had.
        """
        self._judge = judge
        self._score_images = _image_scorer(IMAGE_SCORERS, config.score, "curation.score")
        caption, is_own = _load(CAPTION_SCORERS, config, "caption_scorer"), ":" in config.caption_scorer
        self._score_captions = _UserCaptions(config.caption_scorer, caption) if is_own else caption(config)
        self.match_answers = find_matcher(config)
        """What finds the choices that free answers mean; None where choices are scored by their likelihood."""

    def score_images(self, model: Model, codes: Tensor, records: Sequence[Record]) -> list[list[Judged]]:
        """How well images show what their record says: in the eyes of the model, or by a function of the user's.

        Args:
            model: the judge unless there is another, which also decodes the images.
            codes: int64 [B, n, N], n images of each record.
            records: B records.
        Returns: the scores, [B][n]; a function's come without answers.
        Raises: as self_vqa; InputError on what a user's function returns.
        """
        return self._score_images(self._judge or model, codes, records, self.match_answers)

    def score_captions(self, captions: Sequence[Sequence[str]], truths: Sequence[str]) -> list[list[float]]:
        """Likeness of captions to the true caption of their record, all records in one pass.

        Args:
            captions: texts [B][n of the record].
            truths: the true captions [B].
        Returns: scores [B][n], at most 1 but for a function of the user's.
        Raises: InputError on what a user's function returns, or a truth that the scorer cannot use.
        """
        return self._score_captions(captions, truths)


def check_scorers(config: CurationConfig) -> None:
    """Raises InputError where a scorer cannot be had: before the work, not after it. Models are not opened."""
    for table, key in (
        (IMAGE_SCORERS, "score"),
        (CAPTION_SCORERS, "caption_scorer"),
        (ANSWER_SCORERS, "answer_scorer"),
    ):
        _load(table, config, key)


def find_matcher(config: CurationConfig) -> AnswerMatcher | None:
    """What finds the choices that free answers mean; None where choices are scored by their likelihood. Raises:
    InputError if it cannot be had."""
    answer, is_own = _load(ANSWER_SCORERS, config, "answer_scorer"), ":" in config.answer_scorer
    return _UserAnswers(config.answer_scorer, answer) if is_own else answer(config)


def find_rewards(config: GRPOConfig) -> list[tuple[ImageScorer, float]]:
    """Each reward with its weight. Raises: InputError if one cannot be had."""
    found = [_image_scorer(REWARDS, name, "grpo.rewards") for name in config.rewards]
    return list(zip(found, config.reward_weights, strict=True))


def _image_scorer(table: dict[str, str], name: str, key: str) -> ImageScorer:
    """A scorer of images of a table, or around a user's function."""
    found = _callable(table, name, key)
    return _UserImages(name, key, found) if ":" in name else found


class _UserImages:
    """A scorer of images around a user's function."""

    def __init__(self, spec: str, key: str, function: Callable[..., Any]) -> None:
        self._spec, self._key, self._function = spec, key, function

    def __call__(self, model: Model, codes: Tensor, records: Sequence[Record], _: Any) -> list[list[Judged]]:
        scores = []
        for of_record, record in zip(codes, records, strict=True):
            images = model.decode_images(of_record)
            returned = _call(self._key, self._spec, self._function, images, record)
            what = f"images of record {record.id!r}"
            numbers = _finite_numbers(f"{self._key} {self._spec}", returned, len(images), what)
            scores.append([Judged(number) for number in numbers])
        return scores


class _UserCaptions:
    """A scorer of captions around a user's function."""

    def __init__(self, spec: str, function: Callable[..., Any]) -> None:
        self._spec, self._function = spec, function

    def __call__(self, captions: Sequence[Sequence[str]], truths: Sequence[str]) -> list[list[float]]:
        return [self._score(list(texts), truth) for texts, truth in zip(captions, truths, strict=True)]

    def _score(self, captions: list[str], truth: str) -> list[float]:
        returned = _call("curation.caption_scorer", self._spec, self._function, list(captions), truth)
        name = f"curation.caption_scorer {self._spec}"
        return _finite_numbers(name, returned, len(captions), f"captions of {truth!r}")


class _UserAnswers:
    """A matcher of answers around a user's function."""

    def __init__(self, spec: str, function: Callable[..., Any]) -> None:
        self._spec, self._function = spec, function

    def __call__(self, answers: Sequence[str], choices: Sequence[Sequence[str]]) -> list[int]:
        return [self._find(answer, list(of_answer)) for answer, of_answer in zip(answers, choices, strict=True)]

    def _find(self, answer: str, choices: list[str]) -> int:
        index = _call("curation.answer_scorer", self._spec, self._function, answer, list(choices))
        if isinstance(index, bool) or not isinstance(index, int) or not -1 <= index < len(choices):
            raise InputError(
                f"curation.answer_scorer {self._spec}: expected the index of one of {len(choices)} choices, "
                f"or -1, for the answer {answer!r}, got {shown(index)}; correct the function"
            )
        return index


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
        others = ", ".join(name for name in ANSWER_SCORERS if name != scorer)
        raise InputError(f"--scorer {scorer}: needs a model and an image; choose {others}, or module:function")
    found = scorers.match_answers([entry["answer"] for entry in entries], [entry["choices"] for entry in entries])
    return [
        entry | {"choice": entry["choices"][index] if index >= 0 else None}
        for entry, index in zip(entries, found, strict=True)
    ]


def _load(table: dict[str, str], config: CurationConfig, key: str) -> Callable[..., Any]:
    """What a setting of curation names, if it can be called."""
    return _callable(table, getattr(config, key), f"curation.{key}")


def _callable(table: dict[str, str], spec: str, key: str) -> Callable[..., Any]:
    function = resolve(table, spec, key)
    if not callable(function):
        name = spec.partition(":")[2]
        raise InputError(f"{key} {spec}: {name} is {shown(function)}, which is no function; name a function")
    return function


def _call(key: str, spec: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a user's function returns."""
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:
        raise InputError(
            f"{key} {spec}: raised {type(error).__name__} ({reason_of(error)}) on {shown(arguments)}; correct "
            "the function (HERMESFLOW_DEBUG=1 shows where)"
        ) from error


def _finite_numbers(name: str, returned: Any, count: int, what: str) -> list[float]:
    """What a user's function returned, if it is as many finite numbers."""
    try:
        numbers = [float(number) for number in returned]
    except (OverflowError, TypeError, ValueError):
        numbers = None
    if numbers is None or len(numbers) != count or not all(abs(number) < _MOST for number in numbers):
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
