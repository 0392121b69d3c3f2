"""A suite's images in its own layout: drawn once, file by file, whoever draws them and however often it is stopped.

FOLDER/  images/ (what the suite's judge is given)  drawing.json (what they were drawn with)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hermesflow.evaluation.suites.presets import PRESETS
from hermesflow.evaluation.suites.suite import Suite, SuiteFile, SuitePrompt
from hermesflow.models.images import open_image
from hermesflow.models.model import Model
from hermesflow.runtime.distributed import barrier, is_main, rank, world_size
from hermesflow.runtime.files import (
    InputError,
    atomic_write,
    read_json,
    remove_leftovers,
    shown,
    write_json,
    write_text,
)
from hermesflow.runtime.progress import track
from hermesflow.runtime.seeds import candidate_seed

IMAGES, SETTINGS = "images", "drawing.json"
_FILES_PER_PASS = 8
_JPEG = {"quality": 95, "subsampling": 0}


def draw_suite(
    model: Model,
    model_name: str,
    name: str,
    suite: Suite,
    prompts: Sequence[SuitePrompt],
    folder: Path,
    *,
    num_images: int,
    seed: int,
    sampling: Any,
    preset: str = "",
) -> Path:
    """Draws what is not there yet; each process of a group draws its share.

    An image is a function of the model, its prompt's id and number, the seed and the sampling alone.

    Args:
        model, model_name: draws, and what it is called.
        name, suite, prompts: the suite.
        folder: where FOLDER/images and FOLDER/drawing.json go.
        num_images: of each prompt.
        seed: of all.
        sampling: how.
        preset: whose settings these are (presets.py), for drawing.json.
    Returns: the folder of images.
    Raises: InputError on another number of images than a file can hold, a prompt that the model does not know, or a
        folder that was drawn with other settings.
    """
    ids = [model.user_prompt(prompt.text, f"prompt {number}") for number, prompt in enumerate(prompts, 1)]
    files = [(row, file) for row, prompt in enumerate(prompts) for file in suite.files_of(prompt, row, num_images)]
    for _, file in files:
        if round(len(file.images) ** 0.5) ** 2 != len(file.images):
            raise InputError(f"eval: {name} puts {num_images} images into a square; draw 1, 4, 9 ...")
    wanted = {
        "suite": name, "model": model_name, "num_prompts": len(prompts), "num_images": num_images, "seed": seed,
        "image_size": model.image_size, "sampling": json.loads(json.dumps(asdict(sampling))),
        "preset": f"{preset}: {PRESETS[preset].source}" if preset else "",
    }  # fmt: skip
    images = folder / IMAGES
    if is_main() and images.is_dir():
        remove_leftovers(images)  # of a stop: a judge would read them
    _check_settings(folder / SETTINGS, wanted)
    if is_main():
        for path, text in suite.side_files(prompts).items():
            if not (images / path).is_file():
                write_text(images / path, text)
    left = [(row, file) for row, file in files[rank() :: world_size()] if not (images / file.path).is_file()]
    for start in track(range(0, len(left), _FILES_PER_PASS), f"{name} images", "passes"):
        _draw(model, left[start : start + _FILES_PER_PASS], ids, prompts, images, seed, sampling)
    barrier()
    return images


def _draw(
    model: Model,
    chosen: Sequence[tuple[int, SuiteFile]],
    ids: Sequence[list[int]],
    prompts: Sequence[SuitePrompt],
    images: Path,
    seed: int,
    sampling: Any,
) -> None:
    wanted = [(row, number) for row, file in chosen for number in file.images]
    seeds = [[candidate_seed(seed, prompts[row].id, "image", number)] for row, number in wanted]
    prompt_ids = [ids[row] for row, _ in wanted]
    codes = model.engine.generate(prompt_ids, num_images=1, seeds=torch.tensor(seeds), sampling=sampling)
    # One by one, since rounding by batch may move a pixel by a level.
    drawn = iter([model.decode_images(codes[row : row + 1, 0])[0] for row in range(len(wanted))])
    for _, file in chosen:
        picture = Image.fromarray(_square([next(drawn) for _ in file.images]))
        with atomic_write(images / file.path) as temporary:
            if file.path.endswith(".png"):
                picture.save(temporary, format="PNG")
            else:
                picture.save(temporary, format="JPEG", **_JPEG)


def _square(pixels: Sequence[np.ndarray]) -> np.ndarray:
    side = round(len(pixels) ** 0.5)
    return np.concatenate([np.concatenate(pixels[row * side : (row + 1) * side], 1) for row in range(side)])


def pictures_of(file: SuiteFile, images: Path) -> list[Image.Image]:
    """The images of a file, cut apart. Raises: InputError if it is missing or no image."""
    whole, side = open_image(images / file.path).convert("RGB"), round(len(file.images) ** 0.5)
    width, height = whole.width // side, whole.height // side
    boxes = [(column * width, row * height) for row in range(side) for column in range(side)]
    return [whole.crop((left, top, left + width, top + height)) for left, top in boxes]


def read_settings(folder: Path) -> dict[str, Any]:
    """Of drawing.json. Raises: InputError if it is missing or damaged."""
    path = folder / SETTINGS
    if not path.is_file():
        raise InputError(f"{folder}: holds no images of a suite; draw them first (without --judge)")
    return read_json(path)


def _check_settings(path: Path, wanted: dict[str, Any]) -> None:
    """Writes them, or compares: what is there and what is drawn now must be of one piece."""
    if path.is_file():
        found = read_json(path)
        for name, value in wanted.items():
            if not isinstance(found, dict) or found.get(name) != value:
                raise InputError(
                    f"{path}: the images there were drawn with another {name} ({shown(found.get(name))}, now "
                    f"{shown(value)}); give the same, or another folder"
                )
    elif is_main():
        write_json(path, wanted)
    barrier()
