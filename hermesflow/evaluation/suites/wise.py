"""WISE (arXiv 2503.07265): prompts that ask for knowledge, in six fields of unequal weight.

Its files and results: PKU-YuanGroup/WISE, gpt_eval.py (scores of three kinds from 0 to 2) and, since 2026, a judge that
says 0 or 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hermesflow.evaluation.suites.suite import (
    Marks,
    Suite,
    SuiteFile,
    SuitePrompt,
    entries_of,
    read_json_file,
    read_lines,
    unique,
)
from hermesflow.runtime.files import InputError, shown

FIELDS = {"culture": 400, "time": 567, "space": 700, "biology": 800, "physics": 900, "chemistry": 1000}
"""The last prompt_id of each."""
WEIGHTS = {"culture": 0.4, "time": 0.12, "space": 0.12, "biology": 0.12, "physics": 0.12, "chemistry": 0.12}
PARTS = {"consistency": 0.7, "realism": 0.2, "aesthetic_quality": 0.1}
"""Of an image's score by gpt_eval.py."""


class WISE(Suite):
    """Prompts are one of its JSON files, or the folder that holds them."""

    def read_prompts(self, path: Path) -> list[SuitePrompt]:
        """See Suite."""
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        prompts = []
        for file in files:
            given = read_json_file(file)
            values = enumerate(given if isinstance(given, list) else [given])
            for entry in entries_of(file, values, Prompt=str, Explanation=str, prompt_id=int):
                field = next((name for name, last in FIELDS.items() if 1 <= entry["prompt_id"] <= last), "other")
                prompts.append(
                    SuitePrompt(id=str(entry["prompt_id"]), text=entry["Prompt"], groups=(field,), source=entry)
                )
        if not prompts:
            raise InputError(f"{path}: holds nothing; give WISE's data")
        sizes = Counter(prompt.groups[0] for prompt in prompts)
        prompts.sort(key=lambda prompt: int(prompt.id))
        return unique(path, [
            replace(prompt, weight=WEIGHTS.get(prompt.groups[0], 0.12) / sizes[prompt.groups[0]]) for prompt in prompts
        ])  # fmt: skip

    def files_of(self, prompt: SuitePrompt, number: int, num_images: int) -> list[SuiteFile]:
        """See Suite."""
        return [SuiteFile(path=f"{prompt.id}.png", images=(0,))]

    def read_results(self, path: Path, prompts: Sequence[SuitePrompt]) -> Marks:
        """See Suite: lines with prompt_id, and the three scores of gpt_eval.py or one score of 0 or 1."""
        known, marks = {prompt.id for prompt in prompts}, {}
        for number, entry in read_lines(path):
            (entry,) = entries_of(path, [(number, entry)], prompt_id=int)
            parts = (
                {name: entry.get(name) for name in PARTS} if "consistency" in entry else {"score": entry.get("score")}
            )
            most = 2 if "consistency" in entry else 1
            if str(entry["prompt_id"]) not in known or not all(
                type(value) in (int, float) and 0 <= value <= most for value in parts.values()
            ):
                raise InputError(
                    f"{path}, line {number}: {shown(entry)} is no score of these prompts (999 stands for a judge that "
                    "failed); judge it again, or leave it out"
                )
            weights = PARTS if most == 2 else {"score": 1.0}
            score = sum(weights[name] * value for name, value in parts.items()) / most
            marks[str(entry["prompt_id"])] = {"score": [score]}
        if not marks:
            raise InputError(f"{path}: holds no scores; give what WISE's judge wrote")
        return marks


SUITE = WISE()
