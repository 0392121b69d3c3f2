"""Balanced questions for data sets: for what is there a yes, and as often for what is not there a no.

Questions written about captions ask only for what the captions name, so that "yes" is always right. As POPE does (arXiv
2305.10355), each record is also asked for things that other records name and it does not.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .records import Question, Record

_LOGGER = logging.getLogger(__name__)

THINGS = ("object", "animal", "human", "food")
"""Element types (those of TIFA, arXiv 2303.11897) whose questions make sense where the thing is not there: whether the
dog runs cannot be asked without a dog."""
_LEAST_YES = 0.4
"""Share of either answer below which the questions are said to be one-sided."""
_TRIES = 64
"""Questions of others that are looked at for those that fit."""


def balance_questions(records: Sequence[Record], source: str) -> list[Record]:
    """Gives each record balanced questions: its own, and as many answered no as yes where others' questions allow it.

    A question counts as one of yes or no if its choices are those two words. Another record's fits if it asks for one
    of THINGS, answered yes there, whose element this record's caption and questions name in no word. What is chosen
    depends on the records alone. Where the answers still lean to one side, a warning says so.

    Args:
        records: of one data set; those that have balanced questions keep them.
        source: where they are from, for the warning.
    Returns: the records in their order.
    """
    every = (question for record in records for question in record.questions)
    things = [item for item in every if _answer(item) == "yes" and item.element and item.element_type in THINGS]
    balanced = [record if record.balanced_questions else _balanced(record, things) for record in records]
    share = yes_share(balanced)
    if share is not None and not _LEAST_YES <= share <= 1 - _LEAST_YES:
        _LOGGER.warning(
            "%s: %.0f %% of the yes-or-no questions about its images are answered yes, so that what is measured and "
            "replayed by them is one-sided; give questions that ask for things their element and element_type (%s)",
            source, 100 * share, ", ".join(THINGS),
        )  # fmt: skip
    return balanced


def yes_share(records: Sequence[Record]) -> float | None:
    """The share of image questions of yes or no whose answer is yes; None where there are none."""
    answers = [_answer(question) for record in records for question in record.image_questions]
    known = [answer for answer in answers if answer is not None]
    return known.count("yes") / len(known) if known else None


def _balanced(record: Record, things: list[Question]) -> Record:
    answers = [_answer(question) for question in record.questions]
    missing = answers.count("yes") - answers.count("no")
    if missing <= 0 or not things:
        return record
    named = _words(" ".join([record.caption, *(f"{item.question} {item.element}" for item in record.questions)]))
    rng = np.random.default_rng(list(hashlib.blake2b(record.id.encode(), digest_size=16).digest()))
    fitting = (things[index] for index in rng.integers(len(things), size=_TRIES))
    absent = {item.question: item for item in fitting if not named & _words(item.element)}
    added = [replace(item, answer=_choice(item, "no")) for item in list(absent.values())[:missing]]
    return replace(record, balanced_questions=(*record.questions, *added))


def _choice(question: Question, answer: str) -> str:
    return next(choice for choice in question.choices if choice.lower() == answer)


def _answer(question: Question) -> str | None:
    """ "yes" or "no"; None where a question has other choices."""
    choices = {choice.lower() for choice in question.choices}
    return question.answer.lower() if choices == {"yes", "no"} else None


def _words(text: str) -> set[str]:
    """Lower-case words without articles; those of more than three letters without a plural's s."""
    words = set(re.findall(r"\w+", text.lower())) - {"a", "an", "the"}
    return {word[:-1] if len(word) > 3 and word.endswith("s") else word for word in words}
