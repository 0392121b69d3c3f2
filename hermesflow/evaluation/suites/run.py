"""hermesflow eval --suite: draws a suite's images, or judges those that were drawn."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hermesflow.config import Config
from hermesflow.evaluation.metrics import measure
from hermesflow.evaluation.suites.drawing import draw_suite, read_settings
from hermesflow.evaluation.suites.judges import judge_suite
from hermesflow.evaluation.suites.presets import with_preset
from hermesflow.evaluation.suites.suite import Suite, rows_of
from hermesflow.models.model import Model
from hermesflow.runtime.files import InputError, write_json
from hermesflow.runtime.registry import SUITES, resolve

_LOGGER = logging.getLogger(__name__)


def find_suite(name: str) -> Suite:
    """A suite of SUITES, or "module:object" of one's own. Raises: InputError if there is none."""
    return resolve(SUITES, name, "--suite", ("read_prompts", "files_of", "read_results"))


def draw(
    config: Config, name: str, prompts: Path, folder: Path, open_model: Callable[[], Model], preset: str = ""
) -> Path:
    """Draws what is not there yet of a suite's images.

    Args:
        config: model, drawing and eval.seed are used.
        name: of the suite.
        prompts: its own list.
        folder: where they go.
        open_model: gives the model.
        preset: a name of PRESETS, whose settings are drawn with; empty for none.
    Returns: the folder that the suite's judge is given.
    Raises: InputError as draw_suite.
    """
    suite = find_suite(name)
    listed = suite.read_prompts(prompts)  # before the model, which takes a while
    config = with_preset(config, preset) if preset else config
    model = open_model()
    return draw_suite(
        model, config.model.name, name, suite, listed, folder, num_images=suite.images_per_prompt,
        seed=config.eval.seed, sampling=model.sampling_of(config.drawn_by(config.eval)),
        preset=preset,
    )  # fmt: skip


def judge(
    name: str, prompts: Path, folder: Path, judge: str, open_model: Callable[[], Model], judge_model: str = ""
) -> tuple[dict[str, Any], Path]:
    """Measures a suite's images by a judge, and writes the result beside them.

    Args:
        name, prompts, folder: those of draw.
        judge, judge_model: see judge_suite.
        open_model: gives the model that answers where the judge is "self".
    Returns: {"suite", "judge", "settings", "metrics", "records"}, and its file.
    Raises: InputError as judge_suite.
    """
    suite = find_suite(name)
    listed, settings = suite.read_prompts(prompts), read_settings(folder)
    if settings.get("suite") != name or settings.get("num_prompts") != len(listed):
        raise InputError(
            f"{folder}: was drawn for {settings.get('num_prompts')} prompts of {settings.get('suite')}, not for these "
            f"{len(listed)} of {name}; give its own"
        )
    marks = judge_suite(suite, listed, folder, judge, model=open_model, judge_model=judge_model)
    missing = [prompt.id for prompt in listed if prompt.id not in marks]
    if missing:
        _LOGGER.warning(
            "%s has nothing about %d of %d prompts, such as %s", judge, len(missing), len(listed), missing[0]
        )
    rows = rows_of(listed, marks)
    result = {"suite": name, "judge": judge, "settings": settings, "metrics": measure(rows), "records": rows}
    path = folder / "evaluation.json"
    write_json(path, result)
    return result, path
