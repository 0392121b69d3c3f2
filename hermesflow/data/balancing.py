"""Balanced questions for data sets: for what is there a yes, and as often for what is not there a no.

Questions written about captions ask only for what the captions name, so that "yes" is always right. As POPE does (arXiv
2305.10355), each record is also asked for things that other records name and it does not.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from hermesflow.data.records import Question, Record
from hermesflow.data.wording import split_words
from hermesflow.runtime.text import plain_text

THINGS = ("object", "animal", "human", "food")
"""Element types (those of TIFA, arXiv 2303.11897) whose questions make sense where the thing is not there: whether the
dog runs cannot be asked without a dog."""
_TRIES = 64
"""How many of the others' questions are tried for each record."""
_SINGULAR = {"children": "child", "people": "person", "men": "man", "women": "woman", "mice": "mouse", "feet": "foot"}


def balance_questions(records: Sequence[Record]) -> list[Record]:
    """Gives each record balanced questions: its own, and as many answered no as yes where others' questions allow it.

    A question counts as one of yes or no if its choices are those two words. Another record's fits if it asks for one
    of THINGS, answered yes there, and this record's caption and questions name its element in no word. A caption need
    not name all that an image shows, so that some of these answers are wrong. What is chosen depends on the records
    alone.

    Args:
        records: of one data set; those that have balanced questions keep them.
    Returns: the records in their order.
    """
    every = (question for record in records for question in record.questions)
    things = [item for item in every if _answer(item) == "yes" and item.element and item.element_type in THINGS]
    return [record if record.balanced_questions else _balanced(record, things) for record in records]


def yes_share(records: Iterable[Record]) -> float | None:
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
    return next(choice for choice in question.choices if plain_text(choice).lower() == answer)


def _answer(question: Question) -> str | None:
    """ "yes" or "no"; None where a question has other choices."""
    choices = {plain_text(choice).lower() for choice in question.choices}
    return plain_text(question.answer).lower() if choices == {"yes", "no"} else None


def _words(text: str) -> set[str]:
    """Lower-case words in the singular, without articles."""
    return {_singular(word) for word in split_words(text)} - {"a", "an", "the"}


def _singular(word: str) -> str:
    """A noun's singular, or what is the same for both of its forms."""
    if word in _SINGULAR:
        return _SINGULAR[word]
    if len(word) > 3 and word.endswith("ies"):
        return f"{word[:-3]}y"
    if len(word) > 3 and re.search(r"(s|x|z|ch|sh)es$", word):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def describe_one_sided(yes_share: float | None) -> str:
    """Says where questions of yes or no have mostly one answer; empty where they do not.

    Args:
        yes_share: of them the fraction that is answered yes; None without any.
    """
    if yes_share is None or 0.4 <= yes_share <= 0.6:
        return ""
    return (
        f"{100 * yes_share:.1f} % of the yes-or-no questions about its images are answered yes, so that what is "
        "replayed is one-sided; give questions that ask for things their element and element_type (object, animal, "
        "human or food)"
    )
