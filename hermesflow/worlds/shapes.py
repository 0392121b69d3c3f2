"""A world of colored shapes: scenes, their pictures, captions from a small grammar, and questions of known answer.

A scene has one to four objects, each in its own quadrant ("cell") of a 64 x 64 picture. Categories follow GenEval
(arXiv 2310.11513). Everything is a pure function of the seed or generator passed in.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice

import numpy as np

from hermesflow.data.records import Question, Record
from hermesflow.data.wording import overlap_f1
from hermesflow.runtime.files import InputError
from hermesflow.scoring.captions import scorer_of

IMAGE_SIZE = 64
CELL_SIZE = 32

SHAPES = ("circle", "square", "triangle")
COLORS = ("red", "green", "blue", "yellow")
SIZES = ("small", "large")
BACKGROUNDS = ("black", "white")
PLACES = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("one", "two", "three", "four")
RELATIONS = ("left", "right", "above", "below")
YES_NO = ("yes", "no")
CATEGORIES = ("single_object", "two_objects", "counting", "colors", "position", "color_attribution")
SPLITS = ("train", "validation", "test")

CAPTION_QUESTION = "give a caption for this image ."

COLOR_RGB = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (235, 205, 50)}
BACKGROUND_RGB = {"black": (0, 0, 0), "white": (255, 255, 255)}
SIZE_RADIUS = {"small": 7.0, "large": 11.0}
POSITION_JITTER = 1.0
RADIUS_JITTER = 0.25
COLOR_JITTER = 6

# Half side of a square and circumradius of a triangle, in radii: the three shapes look equally large, and a large
# triangle at the end of its jitter still lies inside its cell.
SQUARE_HALF_SIDE = 0.89
TRIANGLE_CIRCUMRADIUS = 1.25
SHAPE_AREA = {
    "circle": np.pi,
    "square": (2 * SQUARE_HALF_SIDE) ** 2,
    "triangle": 0.75 * 3**0.5 * TRIANGLE_CIRCUMRADIUS**2,
}
"""Area of each shape at radius 1."""

KINDS = tuple((color, shape) for color in COLORS for shape in SHAPES)

# Chosen so that validation and test each hold enough keys of each group (a test checks the numbers).
_SPLIT_SALT = "hermesflow-shapes-29"
_HELD_OUT = 0.1
_SCENE_SEEDS = 2**32


@dataclass(frozen=True, slots=True)
class Object:
    """One shape in a picture."""

    shape: str
    color: str
    size: str
    cell: int
    """Quadrant: an index into PLACES."""
    x: float
    """Center of the bounding box in pixels; the center of pixel i is at i + 0.5."""
    y: float
    radius: float
    rgb: tuple[int, int, int]
    """The jittered color that is drawn."""

    @property
    def kind(self) -> tuple[str, str]:
        """(color, shape)."""
        return self.color, self.shape


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows."""

    category: str
    objects: tuple[Object, ...]
    background: str
    seed: int
    """A number of the scene's own, for random choices that belong to it."""


def split_key(scene: Scene) -> str:
    """What a scene is held out by: its pair of kinds, its one object's kind, size and cell, or kind and count."""
    kinds = sorted({item.kind for item in scene.objects})
    if len(kinds) == 2:
        return _pair_key(*kinds)
    if len(scene.objects) == 1:
        return _single_key(kinds[0], scene.objects[0].size, scene.objects[0].cell)
    return _counting_key(kinds[0], len(scene.objects))


def split_of(key: str) -> str:
    """The split that a key of split_key belongs to: about a tenth each in validation and test."""
    digest = hashlib.blake2b(f"{_SPLIT_SALT}|{key}".encode(), digest_size=8).digest()
    fraction = int.from_bytes(digest, "little") / 2**64
    return "validation" if fraction < _HELD_OUT else "test" if fraction < 2 * _HELD_OUT else "train"


def _pair_key(first: tuple[str, str], second: tuple[str, str]) -> str:
    first, second = sorted((first, second))
    return f"{' '.join(first)} and {' '.join(second)}"


def _single_key(kind: tuple[str, str], size: str, cell: int) -> str:
    return f"{size} {' '.join(kind)} {PLACES[cell]}"


def _counting_key(kind: tuple[str, str], count: int) -> str:
    return f"{NUMBERS[count - 1]} {' '.join(kind)}"


def _by_split(items: Iterable[tuple], key) -> dict[str, list[tuple]]:
    groups: dict[str, list[tuple]] = {split: [] for split in SPLITS}
    for item in items:
        groups[split_of(key(*item))].append(item)
    return groups


_PAIRS = _by_split(combinations(sorted(KINDS), 2), _pair_key)
_SINGLES = _by_split(((kind, size, cell) for kind in KINDS for size in SIZES for cell in range(4)), _single_key)
_COUNTINGS = _by_split(((kind, count) for kind in KINDS for count in (2, 3, 4)), _counting_key)
_ADJACENT_CELLS = ((0, 1), (2, 3), (0, 2), (1, 3))


def sample_scenes(split: str, n: int, seed: int, categories: Sequence[str] = CATEGORIES) -> list[Scene]:
    """Random scenes of one split, categories equally likely; splits share no split_key.

    Args:
        split: "train", "validation" or "test".
        n: number of scenes; the first scenes are the same for every larger n.
        seed: non-negative.
        categories: those to draw from, some of CATEGORIES.
    Returns: n scenes.
    Raises: ValueError on an unknown split or category.
    """
    return list(islice(endless_scenes(split, seed, categories), n))


def endless_scenes(split: str, seed: int, categories: Sequence[str] = CATEGORIES) -> Iterator[Scene]:
    """The scenes of sample_scenes, one after the other and without end."""
    if split not in SPLITS:
        raise ValueError(f"sample_scenes: expected split in {SPLITS}, got {split!r}; name one of them")
    unknown = [category for category in categories if category not in CATEGORIES]
    if unknown or not categories:
        raise ValueError(
            f"sample_scenes: expected categories among {CATEGORIES}, got {tuple(categories)}; name some of them"
        )
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    while True:
        yield _sample_scene(split, categories[rng.integers(len(categories))], rng)


def _sample_scene(split: str, category: str, rng: np.random.Generator) -> Scene:
    if category in ("single_object", "colors"):
        kind, size, cell = _pick(_SINGLES[split], rng)
        placed = [(kind, size, cell)]
    elif category == "counting":
        placed = _sample_counting(split, rng)
    else:
        first, second = _shuffled(_pick(_PAIRS[split], rng), rng)
        cells = _pick(_ADJACENT_CELLS, rng)
        placed = [(first, _pick(SIZES, rng), cells[0]), (second, _pick(SIZES, rng), cells[1])]
    objects = tuple(_jittered(*item, rng) for item in sorted(placed, key=lambda item: item[2]))
    return Scene(category, objects, _pick(BACKGROUNDS, rng), int(rng.integers(2**63)))


def _sample_counting(split: str, rng: np.random.Generator) -> list[tuple]:
    if rng.random() < 0.2:
        many, one = _shuffled(_pick(_PAIRS[split], rng), rng)
        kinds = [many] * int(rng.integers(2, 4)) + [one]
    else:
        kind, count = _pick(_COUNTINGS[split], rng)
        kinds = [kind] * count
    size = _pick(SIZES, rng)
    cells = rng.permutation(4)
    return [(kind, size, int(cell)) for kind, cell in zip(kinds, cells, strict=False)]


def _jittered(kind: tuple[str, str], size: str, cell: int, rng: np.random.Generator) -> Object:
    color, shape = kind
    dx, dy = rng.uniform(-POSITION_JITTER, POSITION_JITTER, 2)
    rgb = np.clip(COLOR_RGB[color] + rng.integers(-COLOR_JITTER, COLOR_JITTER + 1, 3), 0, 255)
    return Object(
        shape=shape,
        color=color,
        size=size,
        cell=cell,
        x=CELL_SIZE * (cell % 2 + 0.5) + float(dx),
        y=CELL_SIZE * (cell // 2 + 0.5) + float(dy),
        radius=SIZE_RADIUS[size] + float(rng.uniform(-RADIUS_JITTER, RADIUS_JITTER)),
        rgb=tuple(int(level) for level in rgb),
    )


def _pick(items: Sequence, rng: np.random.Generator):
    return items[rng.integers(len(items))]


def _shuffled(pair: tuple, rng: np.random.Generator) -> tuple:
    return pair if rng.integers(2) else (pair[1], pair[0])


def signed_distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Signed distance in pixels from a shape's edge, negative inside (outside a corner: of the nearest side's line).

    Args:
        shape: one of SHAPES.
        dx: offset to the right of the center of the bounding box; broadcasts with dy and radius.
        dy: offset downwards.
        radius: the object's radius.
    Returns: the distances in the broadcast shape.
    """
    if shape == "circle":
        return np.sqrt(dx * dx + dy * dy) - radius
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - SQUARE_HALF_SIDE * radius
    half_height = 0.75 * TRIANGLE_CIRCUMRADIUS * radius
    side = 0.5 * (3**0.5 * np.abs(dx) - (dy + half_height))
    return np.maximum(side, dy - half_height)


def render(scenes: Sequence[Scene]) -> np.ndarray:
    """Draws the scenes with antialiased edges.

    Args:
        scenes: n scenes.
    Returns: uint8 [n, 64, 64, 3].
    """
    backgrounds = np.array([BACKGROUND_RGB[scene.background] for scene in scenes], dtype=np.uint8).reshape(-1, 3)
    images = np.empty((len(scenes), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    images[:] = backgrounds[:, None, None]
    # [scene, cell row, cell column, y, x, channel]: an object lies inside its cell, so only that is drawn.
    cells = images.reshape(-1, 2, CELL_SIZE, 2, CELL_SIZE, 3).transpose(0, 1, 3, 2, 4, 5)
    centers = np.arange(CELL_SIZE, dtype=np.float32) + 0.5
    for shape in SHAPES:
        drawn = [(index, item) for index, scene in enumerate(scenes) for item in scene.objects if item.shape == shape]
        if not drawn:
            continue
        index = np.array([index for index, _ in drawn])
        cell = np.array([item.cell for _, item in drawn])
        x, y, radius = np.array([(item.x, item.y, item.radius) for _, item in drawn], dtype=np.float32).T
        rgb = np.array([item.rgb for _, item in drawn], dtype=np.float32)[:, None, None]
        dx = centers[None, None, :] - (x - cell % 2 * CELL_SIZE)[:, None, None]
        dy = centers[None, :, None] - (y - cell // 2 * CELL_SIZE)[:, None, None]
        coverage = np.clip(0.5 - signed_distance(shape, dx, dy, radius[:, None, None]), 0, 1)[..., None]
        behind = backgrounds[index].astype(np.float32)[:, None, None]
        cells[index, cell // 2, cell % 2] = np.rint(behind + coverage * (rgb - behind)).astype(np.uint8)
    return images


_OPENINGS_ONE = ("", "there is ", "a picture of ", "an image with ")
_OPENINGS_MANY = ("", "there are ", "a picture of ", "an image with ")
_RELATION_PHRASES = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption whose content follows from the picture; only the wording and the order of mention are random.

    Args:
        scene: what to describe.
        rng: draws the wording.
    Returns: lower-case words split by single spaces.
    """
    background = f"on a {scene.background} background"
    if len(scene.objects) == 1:
        return _caption_one(scene.objects[0], background, rng)
    if scene.category == "counting":
        return _caption_counting(scene, background, rng)
    first, second = _shuffled(scene.objects, rng)
    phrase = _pick(_RELATION_PHRASES[_relation(first, second)], rng)
    content = f"a {first.color} {first.shape} {phrase} a {second.color} {second.shape}"
    return _framed(content, background, _OPENINGS_ONE, rng)


def _caption_one(item: Object, background: str, rng: np.random.Generator) -> str:
    thing, place = f"a {item.size} {item.color} {item.shape}", f"in the {PLACES[item.cell]}"
    if rng.random() < 0.2:
        return f"{place} there is {thing} {background}"
    return _framed(f"{thing} {place}", background, _OPENINGS_ONE, rng)


def _caption_counting(scene: Scene, background: str, rng: np.random.Generator) -> str:
    counts: dict[tuple[str, str], int] = {}
    for item in scene.objects:
        counts[item.kind] = counts.get(item.kind, 0) + 1
    size = scene.objects[0].size
    groups = [f"{NUMBERS[count - 1]} {size} {_noun(*kind, plural=count > 1)}" for kind, count in sorted(counts.items())]
    if len(groups) == 2:
        groups = _shuffled(groups, rng)
    return _framed(" and ".join(groups), background, _OPENINGS_MANY, rng)


def _framed(content: str, background: str, openings: Sequence[str], rng: np.random.Generator) -> str:
    if rng.random() < 0.2:
        return f"{background} {openings[1]}{content}"
    return f"{_pick(openings, rng)}{content} {background}"


def _noun(color: str | None, shape: str | None, plural: bool = False) -> str:
    return (f"{color} " if color else "") + (shape or "object") + ("s" if plural else "")


def _relation(first: Object, second: Object) -> str:
    return relation(second.x - first.x, second.y - first.y)


def relation(dx: float, dy: float) -> str:
    """Where a first thing is relative to a second that lies (dx, dy) right of and below it, on the dominant axis."""
    if abs(dx) >= abs(dy):
        return "left" if dx > 0 else "right"
    return "above" if dy > 0 else "below"


_PHRASE = re.compile(
    rf"(?:\b(a|{'|'.join(NUMBERS)}) )?(?:\b({'|'.join(SIZES)}) )?(?:\b({'|'.join(COLORS)}) )?\b({'|'.join(SHAPES)})s?\b"
)
_PLACE = re.compile(r"\b(top|bottom) (left|right)\b")
_BACKGROUND = re.compile(rf"\b({'|'.join(BACKGROUNDS)}) background\b")
_RELATION_WORD = re.compile(r"\b(left|right|above|over|below|under)\b")
_RELATION_OF_WORD = {"over": "above", "under": "below"} | {name: name for name in RELATIONS}


def parse_caption(text: str) -> frozenset[tuple[str, ...]]:
    """The facts that a caption states: what can be read is returned, the rest is passed over.

    Args:
        text: a caption, for instance one that a model wrote.
    Returns: facts ("count", kind, number), ("size", kind, size), ("place", kind, place), ("left" or "above", kind,
        other kind) and ("background", color), where a kind is such as "red circle". Right and below are stored as left
        and above.
    """
    text = " ".join(text.lower().split())
    facts: set[tuple[str, ...]] = {("background", match[1]) for match in _BACKGROUND.finditer(text)}
    phrases = list(_PHRASE.finditer(text))
    kinds = [_noun(match[3], match[4]) for match in phrases]
    for match, kind in zip(phrases, kinds, strict=True):
        if match[1]:
            facts.add(("count", kind, "one" if match[1] == "a" else match[1]))
        if match[2]:
            facts.add(("size", kind, match[2]))
    if len(phrases) == 1:
        facts.update(("place", kinds[0], match[0]) for match in _PLACE.finditer(text))
    for i in range(len(phrases) - 1):
        word = _RELATION_WORD.search(text, phrases[i].end(), phrases[i + 1].start())
        if word:
            facts.add(_relation_fact(kinds[i], _RELATION_OF_WORD[word[1]], kinds[i + 1]))
    return frozenset(facts)


def scene_facts(scene: Scene) -> frozenset[tuple[str, ...]]:
    """The facts that every caption of a scene states, as parse_caption gives them."""
    kinds = [_noun(*item.kind) for item in scene.objects]
    facts: set[tuple[str, ...]] = {("background", scene.background)}
    facts.update(("count", kind, NUMBERS[kinds.count(kind) - 1]) for kind in kinds)
    if len(kinds) == 1 or scene.category == "counting":
        facts.update(("size", kind, scene.objects[0].size) for kind in kinds)
    else:
        facts.add(_relation_fact(kinds[0], _relation(*scene.objects), kinds[1]))
    if len(kinds) == 1:
        facts.add(("place", kinds[0], PLACES[scene.objects[0].cell]))
    return frozenset(facts)


def _relation_fact(first: str, name: str, second: str) -> tuple[str, str, str]:
    return (name, first, second) if name in ("left", "above") else (_OPPOSITE[name], second, first)


_ASK_SHAPE = "what shape {be} the {noun} ?"
_ASK_COLOR = "what color {be} the {noun} ?"
_ASK_SIZE = "what size {be} the {noun} ?"
_ASK_COUNT = "how many {noun} are there ?"
_ASK_PLACE = "where is the {noun} ?"
_ASK_RELATION = "where is the {noun} relative to the {other} ?"
_ASK_OBJECT = "is there a {noun} ?"
_ASK_BACKGROUND = "what color is the background ?"


def vocabulary() -> list[str]:
    """Every word of captions, questions and answers, sorted; the words of CAPTION_QUESTION too."""
    asked = (_ASK_SHAPE, _ASK_COLOR, _ASK_SIZE, _ASK_COUNT, _ASK_PLACE, _ASK_RELATION, _ASK_OBJECT, _ASK_BACKGROUND)
    text = [template.format(be="is are", noun="", other="") for template in asked]
    text += [*_OPENINGS_ONE, *_OPENINGS_MANY, *(phrase for phrases in _RELATION_PHRASES.values() for phrase in phrases)]
    text += [f"{shape} {shape}s" for shape in (*SHAPES, "object")]
    text += [*COLORS, *SIZES, *BACKGROUNDS, *PLACES, *NUMBERS, *RELATIONS, *YES_NO]
    text += ["on a background", "in the", "and", CAPTION_QUESTION]
    return sorted({word for words in text for word in words.split()})


def record_questions(scene: Scene, text: str) -> tuple[Question, ...]:
    """The questions that a picture of the caption must answer: four or five, chosen by category, in a fixed order.

    Args:
        scene: the truth.
        text: the scene's caption; it states all that is asked.
    Returns: the questions.
    Raises: ValueError if the caption does not state the scene's facts.
    """
    if not scene_facts(scene) <= parse_caption(text):
        raise ValueError(
            f"record_questions: expected a caption that states {sorted(scene_facts(scene))}, "
            f"got {text!r}; make it with caption()"
        )
    return _RECORD_QUESTIONS[scene.category](scene)


def _ask_single_object(scene: Scene) -> tuple[Question, ...]:
    color, shape = scene.objects[0].kind
    return (
        _about_shape(scene, color),
        _about_size(scene, None, shape),
        _about_place(scene, None, shape),
        _about_count(scene, None, None),
    )


def _ask_colors(scene: Scene) -> tuple[Question, ...]:
    shape = scene.objects[0].shape
    return (
        _about_color(scene, shape),
        _about_shape(scene, None),
        _about_background(scene),
        _about_count(scene, None, None),
    )


def _ask_two_objects(scene: Scene) -> tuple[Question, ...]:
    first, second = scene.objects
    by_color = first.color != second.color
    detail = _about_shape(scene, first.color) if by_color else _about_color(scene, first.shape)
    return (
        _about_presence(scene, *first.kind),
        _about_presence(scene, *second.kind),
        detail,
        _about_count(scene, None, None),
        _about_background(scene),
    )


def _ask_position(scene: Scene) -> tuple[Question, ...]:
    first, second = scene.objects
    return (
        _about_relation(first, second),
        _about_relation(second, first),
        _about_presence(scene, *first.kind),
        _about_presence(scene, *second.kind),
        _about_count(scene, None, None),
    )


def _ask_color_attribution(scene: Scene) -> tuple[Question, ...]:
    first, second = scene.objects
    if first.shape != second.shape:
        bound = _about_color(scene, first.shape), _about_color(scene, second.shape)
    else:
        bound = _about_presence(scene, *first.kind), _about_presence(scene, *second.kind)
    return *bound, _about_count(scene, None, None), _about_background(scene)


def _ask_counting(scene: Scene) -> tuple[Question, ...]:
    kinds = sorted({item.kind for item in scene.objects})
    counts = [_about_count(scene, *kind) for kind in kinds]
    size = _about_size(scene, None, None)
    if len(kinds) == 1:
        return (
            _about_count(scene, None, None),
            *counts,
            _about_color(scene, kinds[0][1]),
            size,
            _about_shape(scene, kinds[0][0]),
        )
    return _about_count(scene, None, None), *counts, size, _about_background(scene)


_RECORD_QUESTIONS = {
    "single_object": _ask_single_object,
    "colors": _ask_colors,
    "two_objects": _ask_two_objects,
    "position": _ask_position,
    "color_attribution": _ask_color_attribution,
    "counting": _ask_counting,
}


def _matching(scene: Scene, color: str | None, shape: str | None) -> list[Object]:
    return [item for item in scene.objects if color in (None, item.color) and shape in (None, item.shape)]


def _about_shape(scene: Scene, color: str | None) -> Question:
    items = _matching(scene, color, None)
    return _question_on(_ASK_SHAPE, items, color, None, SHAPES, items[0].shape, "object")


def _about_color(scene: Scene, shape: str | None) -> Question:
    items = _matching(scene, None, shape)
    return _question_on(_ASK_COLOR, items, None, shape, COLORS, items[0].color, "color")


def _about_size(scene: Scene, color: str | None, shape: str | None) -> Question:
    items = _matching(scene, color, shape)
    return _question_on(_ASK_SIZE, items, color, shape, SIZES, items[0].size, "size")


def _about_place(scene: Scene, color: str | None, shape: str | None) -> Question:
    items = _matching(scene, color, shape)
    return _question_on(_ASK_PLACE, items, color, shape, PLACES, PLACES[items[0].cell], "location")


def _question_on(template: str, items, color, shape, choices, answer: str, element_type: str) -> Question:
    plural = len(items) > 1
    text = template.format(be="are" if plural else "is", noun=_noun(color, shape, plural))
    return Question(text, choices, answer, element_type, answer)


def _about_count(scene: Scene, color: str | None, shape: str | None) -> Question:
    answer = NUMBERS[len(_matching(scene, color, shape)) - 1]
    return Question(_ASK_COUNT.format(noun=_noun(color, shape, plural=True)), NUMBERS, answer, "count", answer)


def _about_relation(first: Object, second: Object) -> Question:
    answer = _relation(first, second)
    text = _ASK_RELATION.format(noun=_noun(*first.kind), other=_noun(*second.kind))
    return Question(text, RELATIONS, answer, "spatial", answer)


def _about_presence(scene: Scene, color: str | None, shape: str | None) -> Question:
    noun = _noun(color, shape)
    answer = "yes" if _matching(scene, color, shape) else "no"
    return Question(_ASK_OBJECT.format(noun=noun), YES_NO, answer, "object", noun)


def _about_background(scene: Scene) -> Question:
    return Question(_ASK_BACKGROUND, tuple(BACKGROUNDS), scene.background, "background", scene.background)


def balanced_questions(scene: Scene, rng: np.random.Generator) -> tuple[Question, ...]:
    """Questions about a scene's picture by which understanding is measured: no answer to yes or no is the safer one.

    One question of each template that fits the scene, and of "is there a ... ?" two of the same form: the one asks for
    what is there, the other for what is not, as POPE does (arXiv 2305.10355).

    Args:
        scene: the truth.
        rng: draws what is asked about.
    Returns: 6 to 9 questions, in the templates' order, those of yes and no last.
    """
    makers = [maker for maker in _fitting_makers(scene) if maker is not _random_presence]
    asked = [question for maker in makers if (question := maker(scene, rng)) is not None]
    name = _name_there(scene, rng)
    return *asked, _about_presence(scene, *name), _about_presence(scene, *_absent_like(scene, name, rng))


def question_kind(question: Question) -> str:
    """The kind under which results report a question: "yes" or "no" by its answer, otherwise its template.

    A question of another origin has its element_type as its kind, or "other".
    """
    if question.answer in YES_NO and set(question.choices) <= set(YES_NO):
        return question.answer
    return _KIND_OF_TYPE.get(question.element_type, question.element_type) or "other"


def training_questions(scene: Scene, rng: np.random.Generator, n: int) -> tuple[Question, ...]:
    """Random questions over all templates; templates do not repeat before each that fits the scene has been drawn.

    Args:
        scene: the truth.
        rng: draws the questions.
        n: how many.
    Returns: n questions; those of yes or no are yes half of the time.
    """
    makers = _fitting_makers(scene)
    questions: list[Question] = []
    while len(questions) < n:
        for index in rng.permutation(len(makers))[: n - len(questions)]:
            question = makers[index](scene, rng)
            if question is not None:
                questions.append(question)
    return tuple(questions)


def _fitting_makers(scene: Scene) -> list[Callable[[Scene, np.random.Generator], Question | None]]:
    """Of the templates; those but relation may still find nothing to ask about."""
    return [maker for maker in _TRAINING_QUESTIONS if maker is not _random_relation or _has_relation(scene)]


def _has_relation(scene: Scene) -> bool:
    return len(scene.objects) == 2 and scene.category != "counting"


def _subjects(scene: Scene, fits) -> list[tuple[str | None, str | None]]:
    """The (color, shape) with None for "any" that name objects of the scene and whose objects pass `fits`."""
    names = {name for color, shape in {item.kind for item in scene.objects} for name in _names(color, shape)}
    return [name for name in sorted(names, key=str) if fits(_matching(scene, *name))]


def _names(color: str, shape: str) -> tuple[tuple[str | None, str | None], ...]:
    return (color, shape), (color, None), (None, shape), (None, None)


def _same(items: list[Object], field: str) -> bool:
    return len({getattr(item, field) for item in items}) == 1


def _random_shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    subjects = [color for color, shape in _subjects(scene, lambda items: _same(items, "shape")) if shape is None]
    return _about_shape(scene, _pick(subjects, rng)) if subjects else None


def _random_color(scene: Scene, rng: np.random.Generator) -> Question | None:
    subjects = [shape for color, shape in _subjects(scene, lambda items: _same(items, "color")) if color is None]
    return _about_color(scene, _pick(subjects, rng)) if subjects else None


def _random_size(scene: Scene, rng: np.random.Generator) -> Question | None:
    subjects = _subjects(scene, lambda items: _same(items, "size"))
    return _about_size(scene, *_pick(subjects, rng)) if subjects else None


def _random_place(scene: Scene, rng: np.random.Generator) -> Question | None:
    subjects = _subjects(scene, lambda items: len(items) == 1)
    return _about_place(scene, *_pick(subjects, rng)) if subjects else None


def _random_count(scene: Scene, rng: np.random.Generator) -> Question:
    return _about_count(scene, *_pick(_subjects(scene, len), rng))


def _random_relation(scene: Scene, rng: np.random.Generator) -> Question:
    return _about_relation(*_shuffled(scene.objects, rng))


def _name_there(scene: Scene, rng: np.random.Generator) -> tuple[str | None, str | None]:
    """A (color, shape) of an object, or one of the two with None for "any"."""
    names = _names(*_pick(scene.objects, rng).kind)[:3]
    return names[rng.choice(3, p=(0.6, 0.2, 0.2))]


def _random_presence(scene: Scene, rng: np.random.Generator) -> Question:
    name = _name_there(scene, rng)
    return _about_presence(scene, *(name if rng.integers(2) else _absent_like(scene, name, rng)))


def _absent_like(
    scene: Scene, name: tuple[str | None, str | None], rng: np.random.Generator
) -> tuple[str | None, str | None]:
    """A name of the same form that fits nothing in the scene; of a full kind, half of the time one word is right."""
    colors, shapes = ((None,) if name[0] is None else COLORS), ((None,) if name[1] is None else SHAPES)
    absent = [(color, shape) for color in colors for shape in shapes if not _matching(scene, color, shape)]
    near = [other for other in absent if other[0] == name[0] or other[1] == name[1]]
    return _pick(near if None not in name and near and rng.integers(2) else absent, rng)


def _random_background(scene: Scene, rng: np.random.Generator) -> Question:
    return _about_background(scene)


_TRAINING_QUESTIONS = (
    _random_shape,
    _random_color,
    _random_size,
    _random_place,
    _random_count,
    _random_relation,
    _random_presence,
    _random_background,
)
_KIND_OF_TYPE = {"object": "shape", "location": "place", "spatial": "relation"}


def make_record(scene: Scene, id: str, rng: np.random.Generator) -> Record:
    """A scene as a record: its caption, the questions of its category, and its picture.

    Args:
        scene: what the record is about.
        id: the record's name.
        rng: draws the caption's wording.
    Returns: a record with image uint8 [64, 64, 3] and without codes.
    """
    text = caption(scene, rng)
    return Record(
        id=id,
        caption=text,
        category=scene.category,
        questions=record_questions(scene, text),
        # A stream of its own, so that what else a scene draws stays the same.
        balanced_questions=balanced_questions(scene, np.random.default_rng([scene.seed, 1])),
        image=render([scene])[0],
    )


def training_records(seed: int, count: int) -> Iterator[Record]:
    """Records of training scenes, one by one.

    Args:
        seed: of the scenes, in a stream of its own: pretraining draws the scenes of small seeds.
        count: how many.
    """
    seed = _SCENE_SEEDS + seed
    scenes, rng = islice(endless_scenes("train", seed), count), np.random.default_rng([seed, len(SPLITS)])
    return (make_record(scene, f"train-{index:06d}", rng) for index, scene in enumerate(scenes))


def attribute_f1(caption: str, truth: str) -> float:
    """F1 over what two captions of the built-in world state: its facts (see parse_caption), and each color and
    shape that they name, so that a wrong color does not cost the shape.

    Raises: InputError if the true caption states nothing of that world.
    """
    wanted = _attributes(truth)
    if not wanted:
        raise InputError(
            f"caption {truth!r}: states no fact of the built-in world; choose another curation.caption_scorer than "
            "attribute-f1"
        )
    return overlap_f1(_attributes(caption), wanted)


ATTRIBUTE_F1 = scorer_of(attribute_f1)


def _attributes(caption: str) -> Counter:
    facts = parse_caption(caption)
    kinds = [kind for name, kind, *_ in facts if name != "background"]
    kinds += [fact[2] for fact in facts if fact[0] in ("left", "above")]
    return Counter(facts | {("named", word) for kind in kinds for word in kind.split()})
