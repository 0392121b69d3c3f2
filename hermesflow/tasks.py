"""Single uses of a model on a user's own prompts, images and questions: generate, caption, answer."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from hermesflow import __version__
from hermesflow.config import EvalConfig
from hermesflow.engine.text_decoder import SamplingParams
from hermesflow.files import InputError, atomic_write
from hermesflow.images import read_image
from hermesflow.models import Model
from hermesflow.progress import track
from hermesflow.prompting import caption_prompt

_BATCH_IMAGES = 64
_MAX_ANSWER_TOKENS = 32


class GeneratedImage(NamedTuple):
    """An image, and all that is needed to draw it again."""

    prompt: str
    seed: int
    pixels: np.ndarray


def generate_images(
    model: Model, prompts: Sequence[str], *, num_images: int = 1, seed: int = 0, settings: EvalConfig | None = None
) -> Iterator[GeneratedImage]:
    """Draw images for prompts.

    Args:
        model: the model that draws.
        prompts: one text an image, or several images.
        num_images: images of each prompt.
        seed: seed of the first image; each further one counts up, so any image can be drawn again alone.
        settings: num_steps, guidance_scale and mask_temperature are used; None takes the defaults.
    Yields: the images, prompt by prompt, with pixels uint8 [H, W, 3].
    Raises: InputError on an empty prompt or a word that the model does not know.
    """
    settings = settings or EvalConfig()
    prompt_ids = [_text_ids(model, prompt, f"prompt {number}") for number, prompt in enumerate(prompts, 1)]
    seeds = seed + torch.arange(len(prompts) * num_images).reshape(len(prompts), num_images)
    prompts_per_batch = max(1, _BATCH_IMAGES // num_images)
    for start in track(range(0, len(prompts), prompts_per_batch), "generate", "batches"):
        batch = slice(start, start + prompts_per_batch)
        codes = model.engine.generate(
            prompt_ids[batch],
            num_images=num_images,
            num_steps=settings.num_steps,
            guidance_scale=settings.guidance_scale,
            mask_temperature=settings.mask_temperature,
            seeds=seeds[batch],
        )
        for prompt, row_codes, row_seeds in zip(prompts[batch], codes, seeds[batch].tolist(), strict=True):
            for pixels, image_seed in zip(model.decode_images(row_codes), row_seeds, strict=True):
                yield GeneratedImage(prompt, image_seed, pixels)


def save_image(folder: Path, image: GeneratedImage, settings: dict) -> Path:
    """Write an image as PNG with its prompt, seed and settings in the PNG's text fields.

    Args:
        folder: where it goes; made if need be.
        image: the image.
        settings: what else it was drawn with; kept as JSON.
    Returns: the file's path, named by prompt and seed.
    Raises: InputError if it cannot be written.
    """
    words = re.sub(r"[^a-z0-9]+", "-", image.prompt.lower()).strip("-")[:60].strip("-") or "image"
    path = Path(folder) / f"{words}-seed{image.seed}.png"
    text = PngImagePlugin.PngInfo()
    text.add_itxt("prompt", image.prompt)
    text.add_text("seed", str(image.seed))
    text.add_text("settings", json.dumps(settings))
    text.add_text("Software", f"hermesflow {__version__}")
    with atomic_write(path) as temporary:
        Image.fromarray(image.pixels).save(temporary, format="PNG", pnginfo=text)
    return path


def caption_images(model: Model, paths: Sequence[str | Path]) -> Iterator[dict]:
    """Describe images.

    Args:
        model: the model that looks.
        paths: image files of any size.
    Yields: {"image": path, "caption": text} for each, in order; the caption is the greedy one.
    Raises: InputError if a file is no image; all are read before the first is described.
    """
    images = [read_image(path, model.image_size) for path in paths]
    question = caption_prompt(model)
    for start in track(range(0, len(paths), _BATCH_IMAGES), "caption", "batches"):
        batch = slice(start, start + _BATCH_IMAGES)
        texts = _say(model, images[batch], question, model.prompts.max_caption_tokens)
        for path, text in zip(paths[batch], texts, strict=True):
            yield {"image": str(path), "caption": text}


def answer_question(model: Model, path: str | Path, question: str, choices: Sequence[str] = ()) -> dict:
    """Answer a question about an image.

    Args:
        model: the model that looks.
        path: an image file of any size.
        question: the question.
        choices: the answers to choose from; none lets the model answer freely (greedy).
    Returns: {"image", "question", "answer"}, and with choices "probabilities": {choice: probability}.
    Raises: InputError if the file is no image, the question is empty or has a word that the model does not know, or the
        choices are fewer than two or not distinct.
    """
    choices = [choice.strip() for choice in choices]
    if choices and (len(set(choices)) < max(2, len(choices)) or "" in choices):
        raise InputError(f"choices {','.join(choices)}: expected two or more distinct answers, such as yes,no")
    question_ids = _text_ids(model, question, "question")
    image = read_image(path, model.image_size)
    answer = {"image": str(path), "question": question}
    if not choices:
        return answer | {"answer": _say(model, [image], question_ids, _MAX_ANSWER_TOKENS)[0]}
    choice_ids = [_text_ids(model, choice, "choice") for choice in choices]
    scores = model.engine.score_choices(model.encode_images(image[None]), [[question_ids]], [[choice_ids]])[0][0]
    chances = torch.as_tensor(scores, dtype=torch.float64).softmax(0).tolist()
    best = max(range(len(choices)), key=chances.__getitem__)
    probabilities = {choice: round(chance, 6) for choice, chance in zip(choices, chances, strict=True)}
    return answer | {"answer": choices[best], "probabilities": probabilities}


def _text_ids(model: Model, text: str, name: str) -> list[int]:
    ids = model.encode_text(text)
    if not ids:
        raise InputError(f"{name}: expected words, got {text!r}; write what is meant")
    return ids


def _say(model: Model, images: Sequence[np.ndarray], question: list[int], max_new_tokens: int) -> list[str]:
    """The greedy text after one question, for each image."""
    greedy = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, max_new_tokens=max_new_tokens)
    codes = model.encode_images(np.stack(images))
    seeds = torch.zeros(len(images), 1, 1, dtype=torch.int64)
    ids = model.engine.extend(codes, [[question]] * len(images), sampling=[greedy], seeds=seeds)
    return [model.decode_text(of_image[0][0]) for of_image in ids]
