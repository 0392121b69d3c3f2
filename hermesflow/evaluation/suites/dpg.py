"""DPG-Bench (ELLA, arXiv 2403.05135): long prompts, of which questions ask that build on each other.

Its files and results: TencentQQGYLab/ELLA, dpg_bench/compute_dpg_bench.py. That code leaves out the first question of
the file; here it is asked.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from hermesflow.evaluation.suites.suite import (
    Marks,
    Suite,
    SuiteFile,
    SuitePrompt,
    SuiteQuestion,
    marks_of_answers,
    unique,
)
from hermesflow.runtime.files import InputError, read_text, shown

_COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
_DETAIL = re.compile(r"^(.*), \((\d+), (\d+), (\d+), (\d+)\), (.*), ([^,]*)$")


class DPG(Suite):
    """Prompts are dpg_bench.csv; the images of one are a square in one file."""

    images_per_prompt = 4

    def read_prompts(self, path: Path) -> list[SuitePrompt]:
        """See Suite."""
        try:
            rows = list(csv.DictReader(io.StringIO(read_text(path)), strict=True))
        except csv.Error as error:
            raise InputError(f"{path}: is no table ({error}); restore it from its source") from error
        found: dict[str, list[dict]] = {}
        for number, row in enumerate(rows, 2):
            missing = [name for name in _COLUMNS if not isinstance(row.get(name), str) or not row[name].strip()]
            if missing:
                raise InputError(f"{path}, row {number}: has no {missing[0]}; restore it from its source")
            found.setdefault(row["item_id"], []).append(row)
        if not found:
            raise InputError(f"{path}: holds nothing; restore it from its source")
        prompts = [
            SuitePrompt(id=id, text=rows[0]["text"], questions=_questions(path, id, rows)) for id, rows in found.items()
        ]
        for prompt in prompts:
            if prompt.id != PurePosixPath(prompt.id).name or prompt.id.startswith("."):
                raise InputError(f"{path}: item_id {shown(prompt.id)} cannot name a file; restore it from its source")
        return unique(path, prompts)

    def files_of(self, prompt: SuitePrompt, number: int, num_images: int) -> list[SuiteFile]:
        """See Suite."""
        return [SuiteFile(path=f"{prompt.id}.png", images=tuple(range(num_images)))]

    def read_results(self, path: Path, prompts: Sequence[SuitePrompt]) -> Marks:
        """See Suite: the judge's scores (..._results.txt), or its answers (..._results_detail.txt)."""
        known = {prompt.id: prompt for prompt in prompts}
        lines = [line for line in read_text(path).split("\n") if line.strip()]
        answers: dict[str, dict[str, dict[str, str]]] = {}
        marks: Marks = {}
        for number, line in enumerate(lines, 1):
            detail = _DETAIL.match(line)
            name, *values = [detail[1]] if detail else line.split(", ")
            prompt = known.get(PurePosixPath(name).name.partition(".")[0])
            try:
                scores = [float(value) for value in values[:-1]]
            except ValueError:
                continue  # its summary
            if prompt is None:
                if not detail and not scores:
                    continue
                raise InputError(f"{path}, line {number}: {shown(name)} is no image of these prompts; give its own")
            if detail:
                of_image = answers.setdefault(prompt.id, {}).setdefault(",".join(detail.group(2, 3, 4, 5)), {})
                of_image[detail[6]] = "1" if detail[7] == "yes" else "0"
            else:
                marks.setdefault(prompt.id, {}).setdefault("score", []).extend(scores)
        if answers:
            digits = {
                id: [
                    "".join(image.get(item.question, "0") for item in known[id].questions) for image in images.values()
                ]
                for id, images in answers.items()
            }
            marks |= marks_of_answers(self, prompts, digits)
        if not marks:
            raise InputError(f"{path}: holds no scores of these prompts; give what compute_dpg_bench.py wrote")
        return marks


SUITE = DPG()


def _questions(path: Path, id: str, rows: Sequence[dict]) -> tuple[SuiteQuestion, ...]:
    try:
        numbers = [int(row["proposition_id"]) for row in rows]
        needs = [[int(part) for part in row["dependency"].split(",")] for row in rows]
    except ValueError as error:
        raise InputError(f"{path}: item {shown(id)}: {error}; restore it from its source") from error
    place = {number: row for row, number in enumerate(numbers)}
    return tuple(
        SuiteQuestion(
            question=row["question_natural_language"],
            group=row["tuple"].partition("(")[0].strip(),
            needs=tuple(place[need] for need in of_row if need in place),
        )
        for row, of_row in zip(rows, needs, strict=True)
    )
