"""T2I-CompBench++ (arXiv 2307.06350): compositions; prompts are the names of its files.

Its files and results: Karine-Huang/T2I-CompBench, BLIPvqa_eval/BLIP_vqa.py and its like, which sort a category's images
by the number in their names and call them by their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hermesflow.evaluation.suites.suite import (
    Marks,
    Suite,
    SuiteFile,
    SuitePrompt,
    entries_of,
    read_json_file,
    unique,
)
from hermesflow.runtime.files import InputError, read_text, shown

_MOST_BYTES = 240


class CompBench(Suite):
    """Prompts are the text file of a category, one a line."""

    images_per_prompt = 10

    def read_prompts(self, path: Path) -> list[SuitePrompt]:
        """See Suite."""
        texts = [line.strip() for line in read_text(path).split("\n") if line.strip()]
        for text in texts:
            if "_" in text or "/" in text or "\0" in text or len(text.encode()) > _MOST_BYTES or text.startswith("."):
                raise InputError(
                    f"{path}: {shown(text)} cannot name a file as the suite's judge reads it (no _ and no /, at most "
                    f"{_MOST_BYTES} bytes); leave it out"
                )
        if not texts:
            raise InputError(f"{path}: holds nothing; restore it from its source")
        return unique(path, [SuitePrompt(id=f"{number:06d}", text=text) for number, text in enumerate(texts)])

    def files_of(self, prompt: SuitePrompt, number: int, num_images: int) -> list[SuiteFile]:
        """See Suite."""
        return [
            SuiteFile(path=f"samples/{prompt.text}_{number * num_images + image:06d}.png", images=(image,))
            for image in range(num_images)
        ]

    def read_results(self, path: Path, prompts: Sequence[SuitePrompt]) -> Marks:
        """See Suite: vqa_result.json."""
        given = read_json_file(path)
        values = enumerate(given if isinstance(given, list) else [given])
        entries = entries_of(path, values, question_id=(int, str), answer=(str, int, float))
        if len(entries) % len(prompts):
            raise InputError(
                f"{path}: has {len(entries)} images, which {len(prompts)} prompts cannot have equally many of; give "
                "the results of this folder"
            )
        per_prompt, marks = len(entries) // len(prompts), {}
        for entry in entries:
            try:
                number, score = int(entry["question_id"]), float(entry["answer"])
            except ValueError as error:
                raise InputError(f"{path}: {error}; restore it from its source") from error
            if not 0 <= number < len(entries):
                raise InputError(f"{path}: question_id {number} is none of {len(entries)} images; restore it")
            marks.setdefault(prompts[number // per_prompt].id, {}).setdefault("score", []).append(score)
        return marks


SUITE = CompBench()
