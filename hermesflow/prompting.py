"""What the model is asked, as text ids: the caption question, and a record's questions with their choices."""

from __future__ import annotations

from typing import NamedTuple

from hermesflow.models import Model
from hermesflow.records import Question
from hermesflow.worlds.shapes import CAPTION_QUESTION

MAX_CAPTION_TOKENS = 64
"""Captions are cut here; the longest of the built-in world has 17 words."""


class ChoicePrompt(NamedTuple):
    """A question and its choices as text ids."""

    question: list[int]
    choices: list[list[int]]


def caption_prompt(model: Model) -> list[int]:
    """Text ids of the question that asks for a caption (HermesFlow, arXiv 2502.12148, section 3)."""
    return model.encode_text(CAPTION_QUESTION)


def choice_prompt(model: Model, question: Question) -> ChoicePrompt:
    """Text ids of a question and of each of its choices; the choices are scored, so they are not part of the question.

    Raises: InputError on a word that the model does not know.
    """
    choices = [model.encode_text(choice) for choice in question.choices]
    return ChoicePrompt(model.encode_text(question.question), choices)
