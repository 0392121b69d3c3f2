"""Balanced questions for data sets: for what is there a yes, and as often for what is not there a no.

Questions written about captions ask only for what the captions name, so that "yes" is always right. As POPE does (arXiv
2305.10355), each record is also asked for things that other records name and it does not.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache

from hermesflow.data.records import Question, Record, id_digest
from hermesflow.data.wording import split_words
from hermesflow.runtime.text import plain_text

THINGS = ("object", "animal", "human", "food")
"""Element types (those of TIFA, arXiv 2303.11897) whose questions make sense where the thing is not there: whether the
dog runs cannot be asked without a dog."""
_MOST_THINGS = 2**16
_TRIES = 64
"""How many of the others' questions are tried for each record."""
_SINGULAR = {"children": "child", "people": "person", "men": "man", "women": "woman", "mice": "mouse", "feet": "foot"}


class Things(Sequence[Question]):
    """Questions of records that ask for a thing that is there; of very many a sample that is spread over all."""

    def __init__(self, questions: Iterable[Question] = ()) -> None:
        self._kept, self._num_seen, self._rng = [], 0, random.Random(0)
        for question in questions:
            self.add(question)

    def add(self, question: Question) -> None:
        """Keeps a question if it asks for one of THINGS and is answered yes."""
        if _answer(question) != "yes" or not question.element or question.element_type not in THINGS:
            return
        self._num_seen += 1
        if self._num_seen <= _MOST_THINGS:
            self._kept.append(question)
        elif (place := self._rng.randrange(self._num_seen)) < _MOST_THINGS:
            self._kept[place] = question

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Question:
        return self._kept[index]


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
    things = Things(question for record in records for question in record.questions)
    return [balance_record(record, things) for record in records]


def yes_share(records: Iterable[Record]) -> float | None:
    """The share of image questions of yes or no whose answer is yes; None where there are none."""
    num_yes, num_asked = count_answers(records)
    return num_yes / num_asked if num_asked else None


def count_answers(records: Iterable[Record]) -> tuple[int, int]:
    """(how many image questions of yes or no are answered yes, how many there are)."""
    answers = Counter(_answer(question) for record in records for question in record.image_questions)
    return answers["yes"], answers["yes"] + answers["no"]


def balance_record(record: Record, things: Things) -> Record:
    """The record with balanced questions, see balance_questions; one that has some keeps them.

    Args:
        record: of a data set.
        things: of all its questions.
    """
    if record.balanced_questions:
        return record
    answers = [_answer(question) for question in record.questions]
    missing = answers.count("yes") - answers.count("no")
    if missing <= 0 or not things:
        return record
    named = _words(" ".join([record.caption, *(f"{item.question} {item.element}" for item in record.questions)]))
    rng = random.Random(id_digest(record.id))
    absent: dict[str, Question] = {}
    for _ in range(_TRIES):
        if len(absent) == missing:
            break
        thing = things[rng.randrange(len(things))]
        if named.isdisjoint(_element_words(thing.element)):
            absent.setdefault(thing.question, thing)
    added = [replace(item, answer=_choice(item, "no")) for item in absent.values()]
    return replace(record, balanced_questions=(*record.questions, *added))


def _choice(question: Question, answer: str) -> str:
    return next(choice for choice in question.choices if plain_text(choice).lower() == answer)


def _answer(question: Question) -> str | None:
    """ "yes" or "no"; None where a question has other choices."""
    return _yes_or_no(question.choices, question.answer)


@lru_cache(_MOST_THINGS)
def _yes_or_no(choices: tuple[str, ...], answer: str) -> str | None:
    return plain_text(answer).lower() if {plain_text(choice).lower() for choice in choices} == {"yes", "no"} else None


def _words(text: str) -> set[str]:
    """Lower-case words in the singular, without articles."""
    return {_singular(word) for word in split_words(text)} - {"a", "an", "the"}


@lru_cache(_MOST_THINGS)
def _element_words(element: str) -> set[str]:
    return _words(element)


@lru_cache(_MOST_THINGS)
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
