"""GenAI-Bench (arXiv 2406.13743): prompts by skill, scored by VQAScore.

Its files and results: linzhiqiu/t2v_metrics, genai_bench/.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import torch

from hermesflow.evaluation.suites.suite import (
    Marks,
    Suite,
    SuiteFile,
    SuitePrompt,
    entries_of,
    read_json_file,
    unique,
)
from hermesflow.runtime.files import InputError, reason_of, shown

_SKILLS = "genai_skills.json"


class GenAI(Suite):
    """Prompts are genai_image.json; genai_skills.json beside it says which skills one asks for."""

    def read_prompts(self, path: Path) -> list[SuitePrompt]:
        """See Suite."""
        given = read_json_file(path)
        items = list(given.items()) if isinstance(given, dict) else []
        entries = entries_of(path, items, prompt=str)
        skills_of: dict[int, list[str]] = {}
        if (path.parent / _SKILLS).is_file():
            skills = read_json_file(path.parent / _SKILLS)
            if not isinstance(skills, dict) or not all(isinstance(value, list) for value in skills.values()):
                raise InputError(f"{path.parent / _SKILLS}: expected lists of prompts by skill; restore it")
            for skill, numbers in skills.items():
                for number in numbers:
                    skills_of.setdefault(int(number) if str(number).isdecimal() else -1, []).append(skill)
        prompts = []
        for (id, _), entry in zip(items, entries, strict=True):
            if not id.isdecimal() or id != PurePosixPath(id).name:
                raise InputError(f"{path}: {shown(id)} is no number of a prompt; restore it from its source")
            prompts.append(SuitePrompt(id=id, text=entry["prompt"], groups=tuple(skills_of.get(int(id), ()))))
        return unique(path, prompts)

    def files_of(self, prompt: SuitePrompt, number: int, num_images: int) -> list[SuiteFile]:
        """See Suite."""
        return [SuiteFile(path=f"{prompt.id}.jpeg", images=(0,))]

    def read_results(self, path: Path, prompts: Sequence[SuitePrompt]) -> Marks:
        """See Suite: evaluate.py's tensor (.pt), a score for each prompt in order, or JSON {prompt: score}."""
        if path.suffix == ".pt":
            try:
                scores = torch.load(path, weights_only=True, map_location="cpu").float().flatten(1).mean(1)
            except Exception as error:  # torch.load raises many kinds
                raise InputError(
                    f"{path}: holds no scores ({reason_of(error)}); give evaluate.py's own file"
                ) from error
            if len(scores) != len(prompts):
                raise InputError(f"{path}: has {len(scores)} scores for {len(prompts)} prompts; give its own results")
            return {prompt.id: {"score": [score]} for prompt, score in zip(prompts, scores.tolist(), strict=True)}
        given, known = read_json_file(path), {prompt.id for prompt in prompts}
        marks = {}
        for id, score in given.items() if isinstance(given, dict) else ():
            if id not in known or type(score) not in (int, float):
                raise InputError(f"{path}: {shown(id)}: {shown(score)} is no score of these prompts; give its own")
            marks[id] = {"score": [float(score)]}
        if not marks:
            raise InputError(f"{path}: holds no scores; give evaluate.py's own file")
        return marks


SUITE = GenAI()
