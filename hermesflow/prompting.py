"""What the model is told and asked, as text ids: image prompts, the caption question, questions with their choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from hermesflow.records import Question

if TYPE_CHECKING:
    from hermesflow.models import Model


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """How the models of a family are spoken to."""

    caption_question: str
    """Asks for a caption (HermesFlow, arXiv 2502.12148, section 3)."""
    question: str = "{question}"
    """What stands around each question that the model reads."""
    choices: str = "{question}"
    """A question whose answer is one of {choices}, for an answer in the model's own words."""
    answer: str = "{answer}"
    """An answer as it follows a question: tokenizers tell words after a blank from words that begin a text."""
    max_prompt_tokens: int | None = None
    """Text ids of an image's prompt; longer ones are cut. None: no limit."""
    max_caption_tokens: int = 64
    """Captions are cut here."""
    max_answer_tokens: int = 32
    """Answers in the model's own words are cut here."""


class ChoicePrompt(NamedTuple):
    """A question and its choices as text ids."""

    question: list[int]
    choices: list[list[int]]


def image_prompt(model: Model, text: str) -> list[int]:
    """Text ids of an image's prompt, cut at the length that the model was trained with.

    A text that itself begins with the start of text does not get a second one.
    """
    ids = model.encode_text(text)
    if ids[:1] == [model.layout.sot]:
        ids = ids[1:]
    return ids[: model.prompts.max_prompt_tokens]


def question_prompt(model: Model, question: str) -> list[int]:
    """Text ids of a question, with what the model expects around it."""
    return model.encode_text(model.prompts.question.format(question=question))


def caption_prompt(model: Model) -> list[int]:
    """Text ids of the question that asks for a caption."""
    return question_prompt(model, model.prompts.caption_question)


def choices_prompt(model: Model, question: str, choices: Sequence[str]) -> list[int]:
    """Text ids of a question together with its choices, to be answered in the model's own words."""
    return question_prompt(model, model.prompts.choices.format(question=question, choices=list(choices)))


def answer_ids(model: Model, answer: str) -> list[int]:
    """Text ids of an answer that follows a question."""
    return model.encode_text(model.prompts.answer.format(answer=answer))


def choice_prompt(model: Model, question: Question) -> ChoicePrompt:
    """Text ids of a question and of each of its choices; the choices are scored, so they are not part of the question.

    Raises: InputError on a word that the model does not know.
    """
    choices = [answer_ids(model, choice) for choice in question.choices]
    return ChoicePrompt(question_prompt(model, question.question), choices)
