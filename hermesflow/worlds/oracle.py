"""The oracle: reads what a picture of the shapes world shows from its pixels alone, and answers the world's questions.

Each pixel is explained as background mixed with one palette color; where the color's share passes one half, the pixel
belongs to an object of that color. Connected pixels of one color are one object. Its shape is the one whose ideal
picture, of the same area at the same place, overlaps it best; a poor overlap leaves the shape unknown. No learnt part
and no knowledge of the prompt enters, so a model cannot talk the oracle into a picture that it did not draw.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hermesflow.data.records import Question
from hermesflow.worlds.shapes import (
    BACKGROUND_RGB,
    CELL_SIZE,
    COLOR_RGB,
    COLORS,
    IMAGE_SIZE,
    NUMBERS,
    PLACES,
    SHAPE_AREA,
    SHAPES,
    TRIANGLE_CIRCUMRADIUS,
    relation,
    signed_distance,
)

UNKNOWN = "unknown"

MIN_AREA = 24
"""Pixels; the smallest object drawn has 61."""
MIN_OVERLAP = 0.75
"""Intersection over union below which a shape is unknown."""
SIZE_THRESHOLD = 9.0
"""Radius in pixels that divides small from large."""
MAX_COLOR_DISTANCE = 100.0
"""Distance in RGB from the nearest color beyond which an object's or the background's is unknown; half the distance
between red and green."""
_BATCH = 256


@dataclass(frozen=True, slots=True)
class SeenObject:
    """One object found in a picture."""

    shape: str
    """One of SHAPES or "unknown"."""
    color: str
    """One of COLORS or "unknown"."""
    size: str
    """One of SIZES."""
    x: float
    """Center of mass in pixels; the center of pixel i is at i + 0.5."""
    y: float
    cell: int
    """Quadrant of the center: an index into PLACES."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a picture shows."""

    objects: tuple[SeenObject, ...]
    """From the top row of pixels down."""
    background: str
    """"black", "white" or "unknown"."""


def read(images: np.ndarray) -> list[Seen]:
    """Reads pictures.

    Args:
        images: uint8 [n, 64, 64, 3].
    Returns: what each shows.
    Raises: ValueError on another shape or dtype.
    """
    if images.ndim != 4 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3) or images.dtype != np.uint8:
        raise ValueError(
            f"read: expected images uint8 [n, {IMAGE_SIZE}, {IMAGE_SIZE}, 3], got {images.dtype} {list(images.shape)}; "
            "resize them and stack them in a batch"
        )
    return [seen for start in range(0, len(images), _BATCH) for seen in _read_batch(images[start : start + _BATCH])]


def answer(question: str, seen: Seen) -> str | None:
    """Answers a question of the shapes world from what is seen.

    Args:
        question: in the words of one of the world's templates.
        seen: from read.
    Returns: the answer; "unknown" where what is asked for could not be recognized; None where the question has no
        single answer (nothing of the name is there, or several that differ) or is none of the templates.
    """
    for pattern, reply in _ANSWERS:
        match = pattern.fullmatch(question)
        if match:
            return reply(seen, *match.groups())
    return None


def score(questions: Sequence[Question], seen: Seen) -> tuple[float, bool]:
    """How many of a record's questions a picture answers rightly.

    Args:
        questions: at least one.
        seen: from read.
    Returns: (fraction right, whether all are right).
    Raises: ValueError without questions.
    """
    if not questions:
        raise ValueError("score: expected at least one question, got none; give the record questions")
    right = sum(answer(question.question, seen) == question.answer for question in questions)
    return right / len(questions), right == len(questions)


def _read_batch(images: np.ndarray) -> list[Seen]:
    pixels = images.astype(np.float32)
    backgrounds, background_rgb = _find_backgrounds(pixels)
    colors = _classify_pixels(pixels, background_rgb)
    # Against a background that is neither black nor white, no pixel has a known color.
    colors[[name == UNKNOWN for name in backgrounds]] = 0
    objects: list[list[SeenObject]] = [[] for _ in images]
    for index, item in _describe_components(pixels, colors):
        objects[index].append(item)
    return [Seen(tuple(items), background) for items, background in zip(objects, backgrounds, strict=True)]


def _find_backgrounds(pixels: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The background's name and the RGB of the nearest one; the median is safe, as objects cover less than half."""
    names, palette = list(BACKGROUND_RGB), np.array(list(BACKGROUND_RGB.values()), dtype=np.float32)
    median = np.median(pixels.reshape(len(pixels), -1, 3), axis=1)
    distance = np.linalg.norm(median[:, None] - palette, axis=2)
    nearest = distance.argmin(axis=1)
    known = distance.min(axis=1) <= MAX_COLOR_DISTANCE
    return [names[i] if ok else UNKNOWN for i, ok in zip(nearest, known, strict=True)], palette[nearest]


def _classify_pixels(pixels: np.ndarray, background_rgb: np.ndarray) -> np.ndarray:
    """Each pixel's color int8 [n, 64, 64]: 1 + its index in COLORS, 0 for background.

    The nearest palette color alone would call the blend of yellow and black green: so a pixel is compared with the
    whole line from the background to each color.
    """
    offset = pixels - background_rgb[:, None, None]
    best = np.full(pixels.shape[:3], np.inf, dtype=np.float32)
    colors = np.zeros(pixels.shape[:3], dtype=np.int8)
    length = (offset * offset).sum(axis=3)
    for index, name in enumerate(COLORS):
        line = np.array(COLOR_RGB[name], dtype=np.float32) - background_rgb
        square = (line * line).sum(axis=1)[:, None, None]
        along = np.matmul(offset.reshape(len(pixels), -1, 3), line[:, :, None]).reshape(best.shape)
        share = np.clip(along / square, 0, 1)
        distance = length - share * (2 * along - share * square)
        nearer = distance < best
        best = np.where(nearer, distance, best)
        colors = np.where(nearer, np.where(share > 0.5, index + 1, 0), colors).astype(np.int8)
    return colors


def _connected_components(colors: np.ndarray) -> np.ndarray:
    """Component of each pixel int64 [n, 64, 64], -1 for background; it is connected by edges and of one color.

    Runs of one color in a row are joined to the runs they touch in the next row; the lowest run number spreads until
    it is everywhere in the component, which halves the longest chain at each turn.
    """
    starts = np.ones(colors.shape, dtype=bool)
    starts[:, :, 1:] = colors[:, :, 1:] != colors[:, :, :-1]
    runs = np.cumsum(starts.reshape(-1)).reshape(colors.shape) - 1
    touching = (colors[:, 1:] == colors[:, :-1]) & (colors[:, 1:] > 0)
    upper, lower = runs[:, :-1][touching], runs[:, 1:][touching]
    root = np.arange(runs.max(initial=-1) + 1)
    while True:
        lowest = np.minimum(root[upper], root[lower])
        if np.array_equal(lowest, root[upper]) and np.array_equal(lowest, root[lower]):
            break
        np.minimum.at(root, root[upper], lowest)
        np.minimum.at(root, root[lower], lowest)
        root = root[root]
    return np.where(colors > 0, root[runs], -1)


def _describe_components(pixels: np.ndarray, colors: np.ndarray) -> Iterator[tuple[int, SeenObject]]:
    """(image index, object) of each component of at least MIN_AREA pixels."""
    components = _connected_components(colors)
    ids, first, area = np.unique(components, return_index=True, return_counts=True)
    keep = (ids >= 0) & (area >= MIN_AREA)
    ids, first, area = ids[keep], first[keep], area[keep].astype(np.float32)
    image = first // IMAGE_SIZE**2
    masks = components[image] == ids[:, None, None]
    centers = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
    x = masks.sum(axis=1) @ centers / area
    y = masks.sum(axis=2) @ centers / area
    overlaps = np.stack([_overlap(masks, shape, x, y, area) for shape in SHAPES])
    best = overlaps.argmax(axis=0)
    for i in range(len(ids)):
        shape = SHAPES[best[i]]
        radius = (area[i] / SHAPE_AREA[shape]) ** 0.5
        color = COLORS[colors.reshape(-1)[first[i]] - 1]
        off = np.linalg.norm(pixels[image[i]][masks[i]].mean(axis=0) - COLOR_RGB[color])
        item = SeenObject(
            shape=shape if overlaps[best[i], i] >= MIN_OVERLAP else UNKNOWN,
            color=color if off <= MAX_COLOR_DISTANCE else UNKNOWN,
            size="large" if radius > SIZE_THRESHOLD else "small",
            x=float(x[i]),
            y=float(y[i]),
            cell=int(y[i] >= CELL_SIZE) * 2 + int(x[i] >= CELL_SIZE),
        )
        yield int(image[i]), item


def _overlap(masks: np.ndarray, shape: str, x: np.ndarray, y: np.ndarray, area: np.ndarray) -> np.ndarray:
    """Intersection over union [M] of each mask with the shape of its area and center of mass."""
    radius = np.sqrt(area / SHAPE_AREA[shape])
    if shape == "triangle":
        # A triangle's center of mass lies a quarter of its circumradius below the middle of its bounding box.
        y = y - 0.25 * TRIANGLE_CIRCUMRADIUS * radius
    centers = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
    dx, dy = centers - x[:, None], centers - y[:, None]
    ideal = signed_distance(shape, dx[:, None, :], dy[:, :, None], radius[:, None, None]) <= 0
    both = (ideal & masks).sum(axis=(1, 2))
    return both / (ideal.sum(axis=(1, 2)) + area - both)


def _matching(seen: Seen, color: str | None, noun: str) -> list[SeenObject]:
    shape = None if noun == "object" else noun
    return [item for item in seen.objects if color in (None, item.color) and shape in (None, item.shape)]


def _common(values: Iterable[str]) -> str | None:
    found = set(values)
    return found.pop() if len(found) == 1 else None


def _only(seen: Seen, color: str | None, noun: str) -> SeenObject | None:
    items = _matching(seen, color, noun)
    return items[0] if len(items) == 1 else None


def _answer_shape(seen: Seen, color: str | None, noun: str) -> str | None:
    return _common(item.shape for item in _matching(seen, color, noun))


def _answer_color(seen: Seen, color: str | None, noun: str) -> str | None:
    return _common(item.color for item in _matching(seen, color, noun))


def _answer_size(seen: Seen, color: str | None, noun: str) -> str | None:
    return _common(item.size for item in _matching(seen, color, noun))


def _answer_count(seen: Seen, color: str | None, noun: str) -> str | None:
    count = len(_matching(seen, color, noun))
    return NUMBERS[count - 1] if 1 <= count <= len(NUMBERS) else None


def _answer_place(seen: Seen, color: str | None, noun: str) -> str | None:
    item = _only(seen, color, noun)
    return PLACES[item.cell] if item else None


def _answer_relation(seen: Seen, color: str | None, noun: str, other_color: str | None, other_noun: str) -> str | None:
    item, other = _only(seen, color, noun), _only(seen, other_color, other_noun)
    if item is None or other is None or item is other:
        return None
    return relation(other.x - item.x, other.y - item.y)


def _answer_presence(seen: Seen, color: str | None, noun: str) -> str:
    return "yes" if _matching(seen, color, noun) else "no"


def _answer_background(seen: Seen) -> str:
    return seen.background


_NAME = rf"(?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)}|object)"
_ANSWERS = (
    (re.compile(r"what color is the background \?"), _answer_background),
    (re.compile(rf"what shape (?:is|are) the {_NAME}s? \?"), _answer_shape),
    (re.compile(rf"what color (?:is|are) the {_NAME}s? \?"), _answer_color),
    (re.compile(rf"what size (?:is|are) the {_NAME}s? \?"), _answer_size),
    (re.compile(rf"how many {_NAME}s are there \?"), _answer_count),
    (re.compile(rf"where is the {_NAME} \?"), _answer_place),
    (re.compile(rf"where is the {_NAME} relative to the {_NAME} \?"), _answer_relation),
    (re.compile(rf"is there a {_NAME} \?"), _answer_presence),
)
