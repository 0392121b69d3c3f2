"""The seam of suites: what one says of its prompts, its files and its results.

A suite is one file here, and one line in SUITES of runtime/registry.py. It reads its own list of prompts, which the
user has, says which image goes into which file, and what its judge's result file means.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hermesflow.runtime.files import InputError, read_text, shown

YES_NO = ("yes", "no")


@dataclass(frozen=True, kw_only=True)
class SuiteQuestion:
    """What is asked of an image, with its right answer among the choices.

    group: the category that the answer counts in, beside those of the prompt. needs: numbers of the prompt's questions
    that must be answered rightly for this one to count.
    """

    question: str
    choices: tuple[str, ...] = YES_NO
    answer: str = "yes"
    group: str = ""
    needs: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SuitePrompt:
    """One prompt of a suite.

    id: unique, as results call it. groups: categories that its images count in. weight: of its images in the whole.
    questions: for a judge that answers them; none where only the suite's own judge can tell. source: the suite's entry.
    """

    id: str
    text: str
    groups: tuple[str, ...] = ()
    weight: float = 1.0
    questions: tuple[SuiteQuestion, ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SuiteFile:
    """An image file: its path below the suite's folder, and the numbers of the prompt's images in it, row by row of a
    square where there are several."""

    path: str
    images: tuple[int, ...]


Marks = dict[str, dict[str, list[float]]]
"""Of a result: prompt's id -> metric ("score" of its images, or "GROUP" of its own questions) -> a value an image, or a
question."""


class Suite(ABC):
    """One suite."""

    images_per_prompt: int = 1
    counts: str = "mean"
    """An image's score by its questions: their "mean", or "all" where each must be right."""

    @abstractmethod
    def read_prompts(self, path: Path) -> list[SuitePrompt]:
        """The suite's own list. Raises: InputError if it is missing or damaged."""

    @abstractmethod
    def files_of(self, prompt: SuitePrompt, number: int, num_images: int) -> list[SuiteFile]:
        """Where the prompt's images go; number is its place in the list."""

    def side_files(self, prompts: Sequence[SuitePrompt]) -> dict[str, str]:
        """Text files beside the images, by path."""
        return {}

    @abstractmethod
    def read_results(self, path: Path, prompts: Sequence[SuitePrompt]) -> Marks:
        """What the suite's own judge wrote. Raises: InputError if it is missing, damaged or of other prompts."""


def read_lines(path: Path) -> list[tuple[int, Any]]:
    """The JSON values of a file of lines, with their numbers from 1; empty lines are left out. Raises: InputError."""
    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                found.append((number, json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: no JSON; restore the file from its source") from error
    return found


def entries_of(path: Path, values: Iterable[tuple[Any, Any]], **kinds: type | tuple[type, ...]) -> list[dict[str, Any]]:
    """Entries (place, value), each of which must be an object with these fields of these types.

    Raises: InputError that names the file, the place and the field; or if there are none.
    """
    found = []
    for place, value in values:
        if not isinstance(value, dict):
            raise InputError(f"{path}, entry {place}: expected an object, got {shown(value)}; restore it")
        for name, kind in kinds.items():
            given = value.get(name)
            if not isinstance(given, kind) or isinstance(given, bool) != (kind is bool):
                raise InputError(f"{path}, entry {place}: {name} is {shown(given)}; restore it from its source")
        found.append(value)
    if not found:
        raise InputError(f"{path}: holds nothing; restore it from its source")
    return found


def read_json_file(path: Path) -> Any:
    """The JSON value of a file. Raises: InputError if it is missing, or no JSON."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: no JSON; restore it from its source") from error


def unique(path: Path, prompts: list[SuitePrompt]) -> list[SuitePrompt]:
    """The prompts. Raises: InputError if two have one id, or one has no words."""
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen or not prompt.text.strip():
            raise InputError(
                f"{path}: prompt {shown(prompt.id)} stands there twice, or has no words; restore it from its source"
            )
        seen.add(prompt.id)
    return prompts


def rows_of(prompts: Sequence[SuitePrompt], marks: Marks) -> list[dict[str, Any]]:
    """A row for each prompt (evaluation/metrics.py): "score" of the whole, and "category/GROUP" of each group.

    The whole is the mean over the prompts' weights; prompts without marks have none.
    """
    rows = []
    for prompt in prompts:
        of_prompt = marks.get(prompt.id, {})
        scores = of_prompt.get("score", [])
        found = {"score": [prompt.weight * sum(scores), prompt.weight * len(scores)]}
        for group in prompt.groups:
            found[f"category/{_named(group)}"] = [sum(scores), len(scores)]
        for group, values in of_prompt.items():
            if group != "score":
                found[f"category/{_named(group)}"] = [sum(values), len(values)]
        rows.append({"id": prompt.id, "prompt": prompt.text, "scores": found})
    return rows


def marks_of_answers(suite: Suite, prompts: Sequence[SuitePrompt], answers: Mapping[str, Sequence[str]]) -> Marks:
    """Of a judge that answered the prompts' questions: answers are, by id, a text for each image, a digit a question, 1
    where it is right."""
    found: Marks = {}
    for prompt in prompts:
        of_prompt: dict[str, list[float]] = {}
        for digits in answers.get(prompt.id, ()):
            plain = [float(digit == "1") for digit in digits]
            counted = [
                value * all(plain[need] for need in question.needs)
                for value, question in zip(plain, prompt.questions, strict=True)
            ]
            mean = sum(counted) / len(counted)
            of_prompt.setdefault("score", []).append(float(mean == 1) if suite.counts == "all" else mean)
            for value, question in zip(plain, prompt.questions, strict=True):
                if question.group:
                    of_prompt.setdefault(question.group, []).append(value)
        if of_prompt:
            found[prompt.id] = of_prompt
    return found


def _named(group: str) -> str:
    """A group as a metric may be called."""
    return "".join(char if char.isprintable() and char != "/" else " " for char in group).strip() or "other"
