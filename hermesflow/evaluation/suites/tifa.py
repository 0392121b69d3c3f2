"""TIFA (arXiv 2303.11897): questions with choices about each image.

Its files and results: Yushi-Hu/tifa, tifa_score.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from hermesflow.evaluation.suites.suite import (
    Marks,
    Suite,
    SuiteFile,
    SuitePrompt,
    SuiteQuestion,
    entries_of,
    read_json_file,
    unique,
)
from hermesflow.runtime.files import InputError, shown


class TIFA(Suite):
    """Prompts are the file of questions; images.json says which image is whose."""

    def read_prompts(self, path: Path) -> list[SuitePrompt]:
        """See Suite."""
        given = read_json_file(path)
        kinds = {"id": (str, int), "caption": str, "question": str, "choices": list, "answer": str, "element_type": str}
        entries = entries_of(path, enumerate(given if isinstance(given, list) else [given]), **kinds)
        found: dict[str, list[dict]] = {}
        for entry in entries:
            id, choices = str(entry["id"]), entry["choices"]
            if id != PurePosixPath(id).name or id.startswith("."):
                raise InputError(f"{path}: id {shown(id)} cannot name a file; restore it from its source")
            if not all(isinstance(choice, str) for choice in choices) or entry["answer"] not in choices:
                raise InputError(f"{path}: id {shown(id)}: the answer is none of the choices; restore it")
            found.setdefault(id, []).append(entry)
        return unique(path, [
            SuitePrompt(id=id, text=rows[0]["caption"], questions=tuple(
                SuiteQuestion(question=row["question"], choices=tuple(row["choices"]), answer=row["answer"],
                              group=row["element_type"]) for row in rows
            ))
            for id, rows in found.items()
        ])  # fmt: skip

    def files_of(self, prompt: SuitePrompt, number: int, num_images: int) -> list[SuiteFile]:
        """See Suite."""
        return [SuiteFile(path=f"{prompt.id}.png", images=(0,))]

    def side_files(self, prompts: Sequence[SuitePrompt]) -> dict[str, str]:
        """Each prompt's image, relative to this file."""
        return {"images.json": json.dumps({prompt.id: f"{prompt.id}.png" for prompt in prompts}, indent=1)}

    def read_results(self, path: Path, prompts: Sequence[SuitePrompt]) -> Marks:
        """See Suite: what tifa_score_benchmark returns, as JSON."""
        given = read_json_file(path)
        details = given.get("question_details") if isinstance(given, dict) else None
        if not isinstance(details, dict):
            raise InputError(f"{path}: has no question_details; give what tifa_score_benchmark returns, as JSON")
        known, marks = {prompt.id for prompt in prompts}, {}
        for id, questions in details.items():
            if id not in known:
                raise InputError(f"{path}: {shown(id)} is none of these prompts; give the results of this folder")
            asked = list(questions.items()) if isinstance(questions, dict) else []
            rows = entries_of(path, asked, scores=(int, float), element_type=str)
            scores = [float(row["scores"]) for row in rows]
            marks[id] = {"score": [sum(scores) / len(scores)]}
            for row in rows:
                marks[id].setdefault(row["element_type"], []).append(float(row["scores"]))
        return marks


SUITE = TIFA()
