"""GenEval (arXiv 2310.11513): objects, their number, colors and places; the mean over its six tasks.

Its files and results: djghosh13/geneval, evaluate_images.py and summary_scores.py.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hermesflow.evaluation.suites.suite import (
    Marks,
    Suite,
    SuiteFile,
    SuitePrompt,
    SuiteQuestion,
    entries_of,
    read_lines,
    unique,
)
from hermesflow.runtime.files import InputError, shown

_FILE = re.compile(r"(?:^|[/\\])(\d+)[/\\]samples[/\\](\d+)\.png$")


class GenEval(Suite):
    """Prompts are evaluation_metadata.jsonl; a prompt's id is its folder's name."""

    images_per_prompt = 4
    counts = "all"

    def read_prompts(self, path: Path) -> list[SuitePrompt]:
        """See Suite."""
        entries = entries_of(path, read_lines(path), tag=str, prompt=str, include=list)
        sizes = Counter(entry["tag"] for entry in entries)
        return unique(path, [
            SuitePrompt(
                id=f"{number:05d}", text=entry["prompt"], groups=(entry["tag"],), weight=1 / sizes[entry["tag"]],
                questions=_questions(path, entry), source=entry,
            )
            for number, entry in enumerate(entries)
        ])  # fmt: skip

    def files_of(self, prompt: SuitePrompt, number: int, num_images: int) -> list[SuiteFile]:
        """See Suite."""
        names = (f"{prompt.id}/samples/{image:05d}.png" for image in range(num_images))
        return [SuiteFile(path=name, images=(image,)) for image, name in enumerate(names)]

    def side_files(self, prompts: Sequence[SuitePrompt]) -> dict[str, str]:
        """The entry of each prompt in its folder."""
        return {f"{prompt.id}/metadata.jsonl": json.dumps(prompt.source) for prompt in prompts}

    def read_results(self, path: Path, prompts: Sequence[SuitePrompt]) -> Marks:
        """See Suite: results.jsonl."""
        known, marks = {prompt.id: prompt for prompt in prompts}, {}
        for number, entry in zip(*_numbered(path), strict=True):
            place = _FILE.search(entry["filename"])
            prompt = known.get(f"{int(place[1]):05d}") if place else None
            if prompt is None or prompt.text != entry.get("prompt", prompt.text):
                raise InputError(
                    f"{path}, line {number}: {shown(entry['filename'])} is no image of these prompts; give the results "
                    "of this folder"
                )
            marks.setdefault(prompt.id, {}).setdefault("score", []).append(float(entry["correct"]))
        return marks


SUITE = GenEval()


def _numbered(path: Path) -> tuple[list[int], list[dict]]:
    lines = read_lines(path)
    return [number for number, _ in lines], entries_of(path, lines, filename=str, correct=bool)


def _questions(path: Path, entry: dict) -> tuple[SuiteQuestion, ...]:
    """For a judge that answers: each object, its number, color and place; GenEval's own judge is a detector."""
    found, objects = [], entries_of(path, enumerate(entry["include"]), **{"class": str, "count": int})
    for number, item in enumerate(objects):
        name, count, color = item["class"], item["count"], item.get("color")
        named = f"{color} {name}" if color else name
        if count > 1:
            found.append(SuiteQuestion(question=f"are there exactly {count} {named}s in the image?"))
        else:
            article = "an" if named[:1].lower() in "aeiou" else "a"
            found.append(SuiteQuestion(question=f"is there {article} {named} in the image?"))
        position = item.get("position")
        if position is not None:
            relation, other = position if isinstance(position, list) and len(position) == 2 else (None, None)
            if not isinstance(relation, str) or type(other) is not int or not 0 <= other < number:
                raise InputError(f"{path}: position {shown(position)} of {name} is none; restore it from its source")
            found.append(SuiteQuestion(question=f"is the {name} {relation} the {objects[other]['class']}?"))
    return tuple(found)
