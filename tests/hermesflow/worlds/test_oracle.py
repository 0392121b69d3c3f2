"""The oracle: right on clean, blurred and noisy pictures, and not to be talked into anything by pictures of nothing."""

import numpy as np
import pytest

from hermesflow.worlds import oracle, shapes

NUM_IMAGES = 1000


@pytest.fixture(scope="module")
def asked():
    """Pictures [n, 64, 64, 3] and, for each, its record's questions and six training questions."""
    scenes = shapes.sample_scenes("train", NUM_IMAGES, seed=11)
    questions = []
    for scene in scenes:
        rng = np.random.default_rng(scene.seed)
        record = shapes.record_questions(scene, shapes.caption(scene, rng))
        questions.append((*record, *shapes.training_questions(scene, rng, 6)))
    return shapes.render(scenes), questions, scenes


def _accuracy(images, questions):
    right = [
        oracle.answer(question.question, seen) == question.answer
        for seen, group in zip(oracle.read(images), questions, strict=True)
        for question in group
    ]
    return np.mean(right)


def _blurred(images):
    padded = np.pad(images.astype(np.float32), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    return sum(padded[:, i : i + 64, j : j + 64] for i in range(3) for j in range(3)) / 9


def _noisy(images, sigma=8.0):
    noise = np.random.default_rng(0).normal(0, sigma, images.shape)
    return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


def test_reads_rendered_pictures(asked):
    images, questions, _ = asked
    assert _accuracy(images, questions) >= 0.99


@pytest.mark.parametrize(
    "spoil",
    [_noisy, lambda images: np.rint(_blurred(images)).astype(np.uint8), lambda images: _noisy(_blurred(images))],
    ids=["noise", "box_blur", "box_blur_and_noise"],
)
def test_reads_pictures_as_a_tokenizer_gives_them_back(asked, spoil):
    images, questions, _ = asked
    assert _accuracy(spoil(images), questions) >= 0.97


def test_sees_every_object_as_it_was_drawn(asked):
    images, _, scenes = asked
    for seen, scene in zip(oracle.read(images), scenes, strict=True):
        drawn = sorted((o.cell, o.shape, o.color, o.size) for o in scene.objects)
        assert sorted((o.cell, o.shape, o.color, o.size) for o in seen.objects) == drawn
        assert seen.background == scene.background
        for item in seen.objects:
            truth = next(o for o in scene.objects if o.cell == item.cell)
            # A triangle's center of mass lies a quarter of its circumradius below the middle of its bounding box.
            sag = 0.25 * shapes.TRIANGLE_CIRCUMRADIUS * truth.radius
            assert abs(item.x - truth.x) < 0.5 and abs(item.y - truth.y) < sag + 0.5


def test_a_picture_is_read_alike_in_any_batch(asked):
    images, _, _ = asked
    together = oracle.read(images[:300])
    assert together[299] == oracle.read(images[299:300])[0]
    assert oracle.read(images[:0]) == []


@pytest.mark.parametrize("background", shapes.BACKGROUNDS)
def test_blank_picture_has_background_and_nothing_else(background):
    image = np.full((1, 64, 64, 3), shapes.BACKGROUND_RGB[background], dtype=np.uint8)
    seen = oracle.read(image)[0]
    assert seen == oracle.Seen((), background)
    assert oracle.answer("is there a circle ?", seen) == "no"
    assert oracle.answer("how many objects are there ?", seen) is None
    assert oracle.answer("what color is the circle ?", seen) is None


def test_noise_and_grey_pictures_answer_nothing_rightly(asked):
    _, questions, _ = asked
    noise = np.random.default_rng(0).integers(0, 256, (50, 64, 64, 3), dtype=np.uint8)
    for images in (noise, np.full_like(noise, 128)):
        for seen, group in zip(oracle.read(images), questions, strict=False):
            assert seen == oracle.Seen((), "unknown")
            assert oracle.score([q for q in group if q.answer != "no"], seen) == (0.0, False)


def test_shape_that_is_none_of_the_three_is_unknown():
    image = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    image[0, 10:50, 20:26] = shapes.COLOR_RGB["red"]
    seen = oracle.read(image)[0]
    assert [(item.shape, item.color) for item in seen.objects] == [("unknown", "red")]
    assert oracle.answer("what shape is the red object ?", seen) == "unknown"
    assert oracle.answer("is there a red square ?", seen) == "no"
    assert oracle.answer("how many objects are there ?", seen) == "one"


def test_colour_that_is_none_of_the_four_is_unknown():
    image = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    image[0, 10:28, 20:38] = (200, 200, 200)
    seen = oracle.read(image)[0]
    assert [(item.shape, item.color) for item in seen.objects] == [("square", "unknown")]
    assert oracle.answer("what color is the square ?", seen) == "unknown"


def test_specks_are_no_objects_and_winding_shapes_are_one():
    image = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    image[0, 5:9, 5:9] = shapes.COLOR_RGB["blue"]
    # A comb: one component only if labels spread through the whole chain of runs.
    image[0, 20:60, 10:60:4] = shapes.COLOR_RGB["green"]
    image[0, 59, 10:60] = shapes.COLOR_RGB["green"]
    seen = oracle.read(image)[0]
    assert [(item.shape, item.color) for item in seen.objects] == [("unknown", "green")]


def test_touching_objects_of_two_colours_stay_two():
    image = np.full((1, 64, 64, 3), 255, dtype=np.uint8)
    image[0, 20:36, 16:32] = shapes.COLOR_RGB["yellow"]
    image[0, 20:36, 32:48] = shapes.COLOR_RGB["blue"]
    seen = oracle.read(image)[0]
    assert oracle.answer("where is the yellow square relative to the blue square ?", seen) == "left"
    assert oracle.answer("how many squares are there ?", seen) == "two"


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("is there a red square ?", "no"),
        ("is there a triangle ?", "yes"),
        ("how many circles are there ?", "two"),
        ("how many red circles are there ?", "one"),
        ("how many yellow objects are there ?", None),
        ("what color is the triangle ?", "green"),
        ("what color are the circles ?", None),
        ("what size are the circles ?", "small"),
        ("where is the circle ?", None),
        ("where is the green triangle ?", "bottom left"),
        ("where is the green triangle relative to the red circle ?", "below"),
        ("where is the green triangle relative to the circle ?", None),
        ("where is the triangle relative to the green object ?", None),
        ("what color is the background ?", "black"),
        ("who painted this ?", None),
    ],
)
def test_answers_and_refuses_what_has_no_single_answer(question, expected):
    placed = [("circle", "red", "small", 0), ("circle", "blue", "small", 1), ("triangle", "green", "large", 2)]
    objects = tuple(
        shapes.Object(
            shape,
            color,
            size,
            cell,
            x=16 + cell % 2 * 32,
            y=16 + cell // 2 * 32,
            radius=shapes.SIZE_RADIUS[size],
            rgb=shapes.COLOR_RGB[color],
        )
        for shape, color, size, cell in placed
    )
    seen = oracle.read(shapes.render([shapes.Scene("counting", objects, "black", seed=0)]))[0]
    assert oracle.answer(question, seen) == expected


def test_score_counts_right_answers(asked):
    images, questions, _ = asked
    right = oracle.read(images[:1])[0]
    assert oracle.score(questions[0], right) == (1.0, True)
    fraction, all_right = oracle.score(questions[0], oracle.Seen((), right.background))
    assert 0 <= fraction < 1 and not all_right
    with pytest.raises(ValueError, match="expected at least one question"):
        oracle.score((), right)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 32, 32, 3), dtype=np.uint8),
        np.zeros((64, 64, 3), dtype=np.uint8),
        np.zeros((1, 64, 64, 3), dtype=np.float32),
    ],
    ids=["size", "rank", "dtype"],
)
def test_read_refuses_other_shapes_and_dtypes(images):
    with pytest.raises(ValueError, match=r"read: expected images uint8 \[n, 64, 64, 3\], got"):
        oracle.read(images)
