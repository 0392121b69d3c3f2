"""Single uses of a model on a user's own prompts, images and questions.

Pictures out: generate, inpaint, extrapolate. Text out: caption, answer.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from torch import Tensor

from hermesflow import __version__
from hermesflow.engine.decoders.masked import ImageSamplingParams
from hermesflow.models.contact_sheet import draw_contact_sheet
from hermesflow.models.images import open_image
from hermesflow.models.model import Model
from hermesflow.runtime.files import InputError, StrPath, atomic_write
from hermesflow.runtime.progress import track
from hermesflow.runtime.seeds import candidate_seed

DIRECTIONS = ("left", "right", "up", "down")
_Result = TypeVar("_Result")
_BATCH_VIEWS = 16
_LABELS = ("inpainted", "extrapolated")


class GeneratedImage(NamedTuple):
    """An image, and all that is needed to draw it again."""

    prompt: str
    seed: int
    pixels: np.ndarray
    """uint8 [H, W, 3]."""
    codes: Tensor
    """Its tokens, int64 [h, w]."""
    cut: str = ""
    """How much of the prompt the model did not see, such as "cut from 7,089 to 126 tokens"; empty if it saw all."""


def generate_images(
    model: Model,
    prompts: Sequence[str],
    *,
    num_images: int = 1,
    seed: int = 0,
    sampling: ImageSamplingParams | None = None,
) -> Iterator[GeneratedImage]:
    """Draw images for prompts.

    Args:
        model: the model that draws.
        prompts: one text an image, or several images.
        num_images: images of each prompt.
        seed: seed of the first image; each further one counts up, so any image can be drawn again alone.
        sampling: how images are drawn; None takes the model's own (model.sampling).
    Yields: the images, prompt by prompt.
    Raises: InputError on an empty prompt or a word that the model does not know.
    """
    _check_numbers(num_images, seed)
    prompt_ids = [_prompt_ids(model, prompt, f"prompt {number}") for number, prompt in enumerate(prompts, 1)]
    total, size = len(prompts) * num_images, _images_per_batch(model)
    for start in track(range(0, total, size), "generate", "batches"):
        rows = range(start, min(start + size, total))
        of_prompt, seeds = [row // num_images for row in rows], [seed + row for row in rows]
        codes = _draw_codes(model, [prompt_ids[index] for index in of_prompt], torch.tensor(seeds)[:, None], sampling)
        grid = getattr(sampling, "grid", None)
        yield from _show(model, [prompts[index] for index in of_prompt], seeds, codes[:, 0], grid)


def inpaint_images(
    model: Model,
    image: StrPath,
    mask: StrPath,
    prompt: str,
    *,
    num_images: int = 1,
    seed: int = 0,
    sampling: ImageSamplingParams | None = None,
) -> Iterator[GeneratedImage]:
    """Draw the masked part of an image anew. The tokens of the rest are kept.

    Image and mask are fitted to the model's size (see fit_image). A token is drawn anew where the mean of its patch of
    the mask is at least half white (the published code samples the mask bicubically, which differs at few tokens).

    Args:
        model: the model that draws.
        image: an image file of any size.
        mask: an image file of the same shape, in any size: white is drawn anew, black is kept. In a mask of one color
            on a transparent ground, what is painted counts as white; other transparent masks are laid over black.
        prompt: what the image shows in the end.
        num_images, seed, sampling: as in generate_images.
    Yields: the images; what is kept is decoded from its tokens, so that it fits what is new.
    Raises: InputError if a file is no image, the mask is of another shape or has no white, or on the prompt as in
        generate_images.
    """
    _check_keeps_codes(model)
    _check_numbers(num_images, seed)
    prompt_ids = _prompt_ids(model, prompt, "prompt")
    opened, opened_mask = open_image(image), open_image(mask)
    _check_same_shape(image, opened, mask, opened_mask)
    redrawn = _masked_tokens(model, opened_mask)
    if not redrawn.any():
        raise InputError(f"{mask}: the mask has no white to draw anew; paint at least half of a patch white (255)")
    codes = model.encode_images(model.fit(opened)[None])
    of_token = codes.shape[1] // model.layout.num_image_tokens
    known = codes.masked_fill(redrawn.to(codes.device).repeat_interleave(of_token, -1), -1)
    size = _images_per_batch(model)
    for start in track(range(0, num_images, size), "inpaint", "batches"):
        seeds = seed + torch.arange(start, min(start + size, num_images))
        codes = _draw_codes(model, [prompt_ids], seeds[None], sampling, known)[0]
        yield from _show(model, [prompt] * len(seeds), seeds.tolist(), codes)


def extrapolate_image(
    model: Model,
    image: StrPath,
    prompts: str | Sequence[str],
    directions: Sequence[str],
    *,
    steps: int = 1,
    offset: int = 0,
    num_images: int = 1,
    seed: int = 0,
    sampling: ImageSamplingParams | None = None,
) -> Iterator[GeneratedImage]:
    """Draw more of an image beyond its borders. The tokens of the image itself are kept.

    With W the model's tokens in that direction, each extension adds about half an image on one side: the window that is
    drawn holds W // 2 - offset rows or columns of the picture's border, and new ones. Where the picture's side is
    longer than the window, windows slide along it by half of themselves, so that each sees what the last one drew.

    Args:
        model: the model that draws.
        image: an image file of any size.
        prompts: what the picture shows: one text, or one for each extension.
        directions: "left", "right", "up" or "down", in the order of the extensions.
        steps: how often the directions are gone through.
        offset: how many rows or columns more are new, and fewer seen, from 0 to W // 2 - 1.
        num_images: pictures, each extended by itself.
        seed, sampling: as in generate_images.
    Yields: the pictures.
    Raises: InputError if the file is no image, on a direction, steps, offset or number of prompts that cannot be, or on
        a prompt as in generate_images.
    Source: HermesFlow's published inference_t2i.py, mode "extrapolation".
    """
    _check_keeps_codes(model)
    _check_numbers(num_images, seed)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    grid = model.layout.image_grid
    _check_extensions(prompts, directions, steps, offset, grid)
    prompt_ids = [_prompt_ids(model, prompt, f"prompt {number}") for number, prompt in enumerate(prompts, 1)]
    codes = model.encode_images(model.fit(open_image(image))[None])
    canvas = codes.view(1, *grid, -1).repeat(num_images, 1, 1, 1)  # a token has one code, or its latent's numbers
    seeds = [seed + index for index in range(num_images)]
    for step, direction in enumerate(track(list(directions) * steps, "extrapolate", "extensions")):
        step_ids = prompt_ids[step if len(prompts) > 1 else 0]
        canvas, windows = _extended(canvas, direction, grid, offset)
        for number, (rows, columns) in enumerate(windows):
            known = canvas[:, rows, columns]
            window_seeds = [[candidate_seed(own, f"step-{step}", "extrapolate", number)] for own in seeds]
            drawn = _draw_codes(model, [step_ids] * num_images, torch.tensor(window_seeds), sampling, known.flatten(1))
            canvas[:, rows, columns] = drawn.view(known.shape)
    cut = "; ".join(filter(None, map(model.describe_cut, prompts)))
    for own, codes in zip(seeds, canvas, strict=True):
        for image in _show(model, [prompts[0]], [own], codes[None].flatten(1), tuple(codes.shape[:2])):
            yield image._replace(prompt=" | ".join(prompt.replace("|", "||") for prompt in prompts), cut=cut)


def save_image(folder: StrPath, image: GeneratedImage, settings: dict[str, Any], label: str = "") -> Path:
    """Write an image as PNG with its prompt, seed and settings in the PNG's text fields.

    A prompt that was cut is noted in prompt_cut.

    Args:
        folder: where it goes; made if need be.
        image: the image.
        settings: what else it was drawn with; kept as JSON.
        label: a word of the file's name, which keeps apart what is drawn of one prompt in several ways.
    Returns: the file's path, named by prompt, label and seed: other prompts have other names.
    Raises: InputError if it cannot be written.
    """
    path = Path(folder) / "-".join(filter(None, [_name_of(image.prompt), label, f"seed{image.seed}.png"]))
    fields = {"seed": image.seed, "settings": settings} | ({"prompt_cut": image.cut} if image.cut else {})
    _write_png(path, Image.fromarray(image.pixels), image.prompt, fields)
    return path


def save_contact_sheet(
    path: StrPath, images: Sequence[GeneratedImage], settings: dict[str, Any], num_images: int
) -> Path:
    """Write all images on one, as PNG, each with its prompt and seed below.

    Args:
        path: the file.
        images: at least one.
        settings: what they were drawn with; kept as JSON.
        num_images: images of a prompt, which make a row; single ones are laid out in a square.
    Returns: path.
    Raises: InputError if it cannot be written.
    """
    columns = num_images if num_images > 1 else math.ceil(math.sqrt(len(images)))
    captions = [f"seed {image.seed}: {image.prompt}" for image in images]
    sheet = draw_contact_sheet([image.pixels for image in images], captions, columns)
    prompts = "\n".join(dict.fromkeys(image.prompt for image in images))
    fields = {"seeds": [image.seed for image in images], "settings": settings}
    if any(image.cut for image in images):
        fields["prompt_cut"] = [image.cut for image in images]
    _write_png(path, sheet, prompts, fields)
    return Path(path)


def caption_images(
    model: Model, paths: Sequence[StrPath], *, skip: Callable[[InputError], None] | None = None
) -> Iterator[dict[str, str]]:
    """Describe images.

    Args:
        model: the model that looks.
        paths: image files of any size.
        skip: takes the error of each file that is no image, and the others are described; None raises it.
    Yields: {"image": path, "caption": text} for each, in order; the caption is the greedy one.
    Raises: InputError if a file is missing, before the first is described, or is no image.
    """
    for path, text in _each_image(paths, "caption", model.caption, skip):
        yield {"image": str(path), "caption": text}


def answer_question(
    model: Model,
    paths: Sequence[StrPath],
    question: str,
    choices: Sequence[str] = (),
    *,
    skip: Callable[[InputError], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Answer a question about each of some images.

    Args:
        model: the model that looks.
        paths: image files of any size.
        question: the question.
        choices: the answers to choose from, by their likelihood; none lets the model answer freely (greedy).
        skip: as in caption_images.
    Yields: {"image", "question", "answer"} for each, in order, and with choices "probabilities": {choice: probability}.
    Raises: InputError if a file is missing or no image, the question is empty or has a word that the model does not
        know, or the choices are fewer than two or not distinct.
    """

    def work(batch: Sequence[StrPath]) -> list[dict[str, Any]]:
        if choices:
            return [_chosen(chances) for chances in model.score(batch, question, choices)]
        return [{"answer": text} for text in model.answer(batch, question)]

    for path, answer in _each_image(paths, "answer", work, skip):
        yield {"image": str(path), "question": question} | answer


def _name_of(prompt: str) -> str:
    """A prompt as part of a file's name, in a-z and 0-9; the prompt's hash follows where those do not hold all of it.

    Only the hash has a "_" before it, and a prompt that ends as a label does has one, so no two prompts share a name.
    """
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-")
    if words and words.replace("-", " ") == prompt and not words.endswith(_LABELS):
        return words
    digest = hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
    return f"{words or 'image'}_{digest}"


def _check_numbers(num_images: int, seed: int) -> None:
    if num_images < 1 or not 0 <= seed < 2**62:
        raise InputError(
            f"expected num_images from 1 and a seed in [0, 2**62), got {num_images} and {seed}; correct it"
        )


def _prompt_ids(model: Model, prompt: str, name: str) -> list[int]:
    return model.user_prompt(prompt, name)


def _draw_codes(
    model: Model,
    prompt_ids: Sequence[list[int]],
    seeds: Tensor,
    sampling: ImageSamplingParams | None,
    known_codes: Tensor | None = None,
) -> Tensor:
    """Codes int64 [P, n, M], in sampling's grid if it has one; seeds int64 [P, n], known_codes [P, M]."""
    sampling, grid = sampling or model.sampling, getattr(sampling or model.sampling, "grid", None)
    if grid and known_codes is not None:
        raise InputError(f"sampling.grid {grid}: what is known of an image lies in the model's own grid; leave it out")
    return model.engine.generate(
        prompt_ids,
        num_images=seeds.shape[1],
        seeds=seeds,
        known_codes=known_codes,
        sampling=sampling,
        progress=lambda steps: track(steps, "draw"),
    )


def _check_keeps_codes(model: Model) -> None:
    if not getattr(model.image_decoder, "keeps_known_codes", False):
        raise InputError("the model's family draws whole images and keeps no part of one; generate instead")


def _images_per_batch(model: Model) -> int:
    """Guided images that the engine draws in one pass."""
    return max(1, model.engine.max_sequences // 2)


def _show(
    model: Model, prompts: Sequence[str], seeds: Sequence[int], codes: Tensor, grid: tuple[int, int] | None = None
) -> Iterator[GeneratedImage]:
    """The images of codes [n, M], in a grid of rows and columns if it is another than the model's own."""
    grid = grid or model.layout.image_grid
    images = model.decode_images(codes, *grid)
    codes = codes.unflatten(1, grid) if codes.shape[1] == grid[0] * grid[1] else codes
    yield from map(GeneratedImage, prompts, seeds, images, codes.cpu(), map(model.describe_cut, prompts))


def _check_same_shape(path: StrPath, image: Image.Image, mask_path: StrPath, mask: Image.Image) -> None:
    """Refuses a mask of another aspect ratio; what rounding to whole pixels does to one is let through."""
    skew = abs(image.width * mask.height - image.height * mask.width)
    if skew > max(*image.size, *mask.size):
        raise InputError(
            f"{mask_path}: a mask of {mask.width} x {mask.height} pixels does not fit {path} of "
            f"{image.width} x {image.height}; give one of the same shape"
        )


def _masked_tokens(model: Model, mask: Image.Image) -> Tensor:
    """Whether each token is to be drawn anew, bool [1, N]."""
    if mask.has_transparency_data and not mask.mode.startswith("I"):
        mask = _without_transparency(mask)
    rows, columns = model.layout.image_grid
    levels = model.fit(mask).mean(2)
    height, width = levels.shape[0] // rows, levels.shape[1] // columns
    means = levels.reshape(rows, height, columns, width).mean((1, 3))
    return torch.from_numpy(means >= 127.5).view(1, -1)


def _without_transparency(mask: Image.Image) -> Image.Image:
    """A grey mask: the opacity if nothing but one color is visible, else the colors laid over black."""
    pixels = np.asarray(mask.convert("RGBA"))
    alpha = pixels[..., 3]
    visible = pixels[alpha > 0][:, :3]
    if len(visible) and (visible == visible[0]).all() and alpha.min() < 255:
        return Image.fromarray(alpha)
    grey = np.asarray(mask.convert("RGBA").convert("L"), dtype=np.float32) * alpha / 255
    return Image.fromarray(grey.round().astype(np.uint8))


def _check_extensions(
    prompts: list[str], directions: Sequence[str], steps: int, offset: int, grid: tuple[int, int]
) -> None:
    if not directions:
        raise InputError(f"direction: expected at least one of {', '.join(DIRECTIONS)}, got none; name one")
    for direction in directions:
        if direction not in DIRECTIONS:
            raise InputError(f"direction: expected one of {', '.join(DIRECTIONS)}, got {direction!r}; name one of them")
    if steps < 1:
        raise InputError(f"steps: expected at least 1, got {steps}; say how often the directions are gone through")
    rows, columns = grid
    most = min(columns if direction in ("left", "right") else rows for direction in directions) // 2 - 1
    if most < 0:
        raise InputError(
            f"extrapolate: the model's images have {rows} x {columns} tokens, too few to be extended; raise "
            "model.image_size"
        )
    if not 0 <= offset <= most:
        raise InputError(f"offset: expected 0 to {most} for this model's {rows} x {columns} tokens, got {offset}")
    if len(prompts) not in (1, len(directions) * steps):
        raise InputError(
            f"prompts: expected one, or one for each of {len(directions) * steps} extensions, got {len(prompts)}; "
            "leave some out or add the missing ones"
        )


def _extended(
    canvas: Tensor, direction: str, grid: tuple[int, int], offset: int
) -> tuple[Tensor, list[tuple[slice, slice]]]:
    """The canvas [n, h, w, M] with new rows or columns of -1, and the windows of the grid's shape that cover them."""
    sideways = direction in ("left", "right")
    window_along, window_across = grid if sideways else grid[::-1]
    num_new = window_across - (window_across // 2 - offset)
    canvas = F.pad(canvas, [0, 0, *(num_new if direction == edge else 0 for edge in DIRECTIONS)], value=-1)
    height, width = canvas.shape[1:3]
    across, along = (width, height) if sideways else (height, width)
    edge = slice(0, window_across) if direction in ("left", "up") else slice(across - window_across, across)
    starts = [*range(0, along - window_along, window_along // 2), along - window_along]
    strips = [slice(start, start + window_along) for start in starts]
    return canvas, [(strip, edge) if sideways else (edge, strip) for strip in strips]


def _write_png(path: StrPath, image: Image.Image, prompt: str, fields: dict[str, Any]) -> None:
    """Write a PNG with the prompt, our name and fields, as JSON, in its text."""
    text = PngImagePlugin.PngInfo()
    text.add_itxt("prompt", prompt)
    for name, value in fields.items():
        text.add_text(name, json.dumps(value))
    text.add_text("Software", f"hermesflow {__version__}")
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=text)


def _each_image(
    paths: Sequence[StrPath],
    description: str,
    work: Callable[[Sequence[StrPath]], list[_Result]],
    skip: Callable[[InputError], None] | None,
) -> Iterator[tuple[StrPath, _Result]]:
    """Images, which are looked at a batch together, with what the work makes of each; see caption_images."""
    for path in paths:
        if skip is None and not os.path.exists(path):  # shows before the work on the others, not after it
            raise InputError(f"{path}: no such file; check the path")
    for start in track(range(0, len(paths), _BATCH_VIEWS), description, "batches"):
        batch = list(paths[start : start + _BATCH_VIEWS])
        try:
            found = work(batch)
        except InputError:
            whole = batch if skip is None else _readable(batch, skip)
            if len(whole) == len(batch):  # the error is not about an image
                raise
            batch, found = whole, work(whole) if whole else []
        yield from zip(batch, found, strict=True)


def _readable(paths: Sequence[StrPath], skip: Callable[[InputError], None]) -> list[StrPath]:
    """Those that are images; skip takes the errors of the others."""
    whole = []
    for path in paths:
        try:
            open_image(path)
            whole.append(path)
        except InputError as error:
            skip(error)
    return whole


def _chosen(chances: dict[str, float]) -> dict[str, Any]:
    """The most likely choice, and the probabilities of all of them."""
    probabilities = {choice: round(chance, 6) for choice, chance in chances.items()}
    return {"answer": max(chances, key=chances.__getitem__), "probabilities": probabilities}
