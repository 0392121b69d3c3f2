"""The shapes world: splits that share no scene, determinism, captions and questions that tell the truth."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from hermesflow.data.records import Question
from hermesflow.worlds import oracle, shapes

NUM_SCENES = 1500


@pytest.fixture(scope="module")
def scenes():
    return shapes.sample_scenes("train", NUM_SCENES, seed=0)


def test_splits_share_no_scene():
    keys = {
        split: {shapes.split_key(scene) for scene in shapes.sample_scenes(split, 3000, 1)} for split in shapes.SPLITS
    }
    assert not keys["train"] & keys["validation"]
    assert not keys["train"] & keys["test"]
    assert not keys["validation"] & keys["test"]
    for split, found in keys.items():
        assert {shapes.split_of(key) for key in found} == {split}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_splits_have_enough_keys_of_each_group(split):
    keys = {shapes.split_key(scene) for scene in shapes.sample_scenes(split, 3000, 2)}
    pairs = {key for key in keys if " and " in key}
    singles = {key for key in keys if key.endswith(shapes.PLACES)}
    assert len(pairs) >= 6
    assert len(singles) >= 8
    assert len(keys - pairs - singles) >= 3


def test_train_split_shows_every_attribute_and_number():
    scenes = shapes.sample_scenes("train", 3000, 3)
    assert {item.kind for scene in scenes for item in scene.objects} == set(shapes.KINDS)
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3, 4}
    counts = Counter(scene.category for scene in scenes)
    assert set(counts) == set(shapes.CATEGORIES)
    assert min(counts.values()) > 400


def test_scenes_keep_the_rules_of_the_world(scenes):
    for scene in scenes:
        cells = [item.cell for item in scene.objects]
        kinds = {item.kind for item in scene.objects}
        assert len(set(cells)) == len(cells)
        if scene.category in ("single_object", "colors"):
            assert len(cells) == 1
        elif scene.category == "counting":
            assert 2 <= len(cells) <= 4
            assert len(kinds) <= 2
            assert len({item.size for item in scene.objects}) == 1
        else:
            assert len(kinds) == len(cells) == 2
            assert tuple(sorted(cells)) in {(0, 1), (2, 3), (0, 2), (1, 3)}


def test_sampling_is_determined_by_the_seed_and_longer_samples_extend_shorter_ones(scenes):
    assert shapes.sample_scenes("train", 40, seed=0) == scenes[:40]
    assert shapes.sample_scenes("train", 40, seed=1) != scenes[:40]
    assert shapes.sample_scenes("train", 0, seed=1) == []


def test_categories_can_be_chosen():
    scenes = shapes.sample_scenes("train", 50, seed=0, categories=("counting", "position"))
    assert {scene.category for scene in scenes} == {"counting", "position"}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("dev", 1, 0), "expected split in .* got 'dev'"),
        (("train", 1, 0, ("color",)), "expected categories among .* got \\('color',\\)"),
        (("train", 1, 0, ()), "expected categories among"),
    ],
    ids=["split", "category", "no_category"],
)
def test_sample_scenes_refuses_unknown_names(arguments, match):
    with pytest.raises(ValueError, match=match):
        shapes.sample_scenes(*arguments)


def test_render_is_deterministic_and_independent_of_the_batch(scenes):
    images = shapes.render(scenes[:50])
    assert images.shape == (50, 64, 64, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images[17], shapes.render([scenes[17]])[0])
    assert shapes.render([]).shape == (0, 64, 64, 3)


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_drawn_area_matches_the_stated_area(shape):
    item = shapes.Object(shape, "red", "large", cell=0, x=16.3, y=15.8, radius=10.0, rgb=(255, 0, 0))
    image = shapes.render([shapes.Scene("single_object", (item,), "black", seed=0)])[0]
    assert image[..., 0].sum() / 255 == pytest.approx(shapes.SHAPE_AREA[shape] * 100, rel=0.02)


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_largest_object_at_the_end_of_its_jitter_is_not_cut_off(shape):
    for dx in (-2, 2):
        for dy in (-2, 2):
            item = shapes.Object(shape, "red", "large", cell=3, x=48 + dx, y=48 + dy, radius=10.5, rgb=(255, 0, 0))
            image = shapes.render([shapes.Scene("single_object", (item,), "black", seed=0)])[0]
            assert not image[32].any() and not image[63].any()
            assert not image[:, 32].any() and not image[:, 63].any()


def test_captions_state_exactly_the_facts_of_the_scene(scenes):
    rng = np.random.default_rng(0)
    for scene in scenes:
        text = shapes.caption(scene, rng)
        assert shapes.parse_caption(text) == shapes.scene_facts(scene), text
        assert text == " ".join(text.lower().split())
        assert 7 <= len(text.split()) <= 18


def test_caption_wording_varies_while_its_content_stays():
    scene = next(scene for scene in shapes.sample_scenes("train", 100, 0) if scene.category == "position")
    texts = {shapes.caption(scene, np.random.default_rng(seed)) for seed in range(200)}
    assert len(texts) > 10
    assert len({shapes.parse_caption(text) for text in texts}) == 1
    first = scene.objects[0]
    assert {text.index(f"{first.color} {first.shape}") < len(text) / 3 for text in texts} == {True, False}


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("", set()),
        ("purple nonsense", set()),
        ("a circle on a black background", {("count", "circle", "one"), ("background", "black")}),
        ("red red circle left of", set()),
        ("A  small red circle", {("count", "red circle", "one"), ("size", "red circle", "small")}),
        (
            "a red circle to the right of a blue square",
            {("count", "red circle", "one"), ("count", "blue square", "one"), ("left", "blue square", "red circle")},
        ),
        (
            "in the bottom left there is a red circle",
            {("count", "red circle", "one"), ("place", "red circle", "bottom left")},
        ),
    ],
)
def test_parse_caption_reads_what_it_can(text, facts):
    assert shapes.parse_caption(text) == frozenset(facts)


def test_vocabulary_is_sorted_and_holds_every_word_used(scenes):
    words = shapes.vocabulary()
    assert words == sorted(set(words))
    rng = np.random.default_rng(0)
    used = set(shapes.CAPTION_QUESTION.split())
    for scene in scenes:
        text = shapes.caption(scene, rng)
        used.update(text.split())
        for question in (*shapes.record_questions(scene, text), *shapes.training_questions(scene, rng, 8)):
            used.update(question.question.split())
            used.update(word for choice in question.choices for word in choice.split())
    assert used == set(words)


def test_record_questions_ask_four_or_five_things(scenes):
    rng = np.random.default_rng(0)
    for scene in scenes:
        questions = shapes.record_questions(scene, shapes.caption(scene, rng))
        assert 4 <= len({question.question for question in questions}) == len(questions) <= 5


def test_record_questions_refuses_another_caption():
    first, second = shapes.sample_scenes("train", 2, 0)
    with pytest.raises(ValueError, match="expected a caption that states"):
        shapes.record_questions(first, shapes.caption(second, np.random.default_rng(0)))


def test_training_questions_are_deterministic_and_balance_yes_and_no(scenes):
    questions = [shapes.training_questions(scene, np.random.default_rng(scene.seed), 4) for scene in scenes]
    assert questions[7] == shapes.training_questions(scenes[7], np.random.default_rng(scenes[7].seed), 4)
    assert all(len(asked) == 4 for asked in questions)
    answers = Counter(q.answer for asked in questions for q in asked if q.choices == shapes.YES_NO)
    # Standard deviation of the share of "yes" is below 0.02 at the ~750 questions drawn.
    assert 0.42 < answers["yes"] / answers.total() < 0.58


TEMPLATES = {
    "shape": "what shape ", "color": "what color ", "size": "what size ", "count": "how many ",
    "place": "where is the ", "relation": " relative to ", "presence": "is there a ",
    "background": "what color is the background ",
}  # fmt: skip


def template_of(question):
    """The last that fits, since some begin alike."""
    order = ("place", "color", "shape", "size", "count", "relation", "presence", "background")
    return [name for name in order if TEMPLATES[name] in question.question][-1]


def imbalances(asked_of):
    """What keeps questions about many scenes from being balanced: templates and kinds that are not asked for, and forms
    of the questions of yes or no whose answer is yes in less than 48 or more than 52 %."""
    asked = [question for questions in asked_of for question in questions]
    problems = [name for name in TEMPLATES if name not in set(map(template_of, asked))]
    kinds = {"yes", "no", "color", "count", "place", "relation", "size", "shape", "background"}
    problems += sorted(kinds - set(map(shapes.question_kind, asked)))
    shares = {}
    for question in asked:
        if template_of(question) == "presence":
            words = question.question.removeprefix("is there a ").removesuffix(" ?").split()
            form = tuple("color" if word in shapes.COLORS else "shape" for word in words if word != "object")
            shares.setdefault(form, []).append(question.answer == "yes")
    problems += [form for form, marks in shares.items() if not 0.48 <= sum(marks) / len(marks) <= 0.52]
    return problems


def test_balanced_questions_are_balanced_and_those_of_records_are_not(scenes):
    for category in shapes.CATEGORIES:
        of_category = [scene for scene in scenes if scene.category == category]
        asked = [q for scene in of_category for q in balanced_of(scene) if q.choices == shapes.YES_NO]
        assert len(asked) == 2 * len(of_category) and sum(q.answer == "yes" for q in asked) == len(of_category)
    assert imbalances(map(balanced_of, scenes)) == []
    rng = np.random.default_rng(0)
    problems = imbalances(shapes.record_questions(scene, shapes.caption(scene, rng)) for scene in scenes)
    assert "no" in problems and ("color", "shape") in problems


def balanced_of(scene):
    return shapes.balanced_questions(scene, np.random.default_rng(scene.seed))


def test_balanced_questions_are_right_by_the_oracle_and_repeat_themselves(scenes):
    some = scenes[:300]
    for scene, seen in zip(some, oracle.read(shapes.render(some)), strict=True):
        asked = balanced_of(scene)
        assert 6 <= len(asked) <= 9 and len({question.question for question in asked}) == len(asked)
        assert asked == balanced_of(scene)
        assert all(oracle.answer(question.question, seen) == question.answer for question in asked)


def test_a_record_s_balanced_questions_are_of_its_scene_alone(scenes):
    first, second = (shapes.make_record(scenes[3], "a", np.random.default_rng(seed)) for seed in (1, 2))
    assert first.balanced_questions == second.balanced_questions == first.image_questions


def test_questions_of_others_are_told_apart_by_their_type():
    tifa = Question("is it made of wood ?", ("yes", "no", "maybe"), "yes", "material", "wood")
    assert shapes.question_kind(tifa) == "material"
    assert shapes.question_kind(Question("who ?", ("a", "b"), "a", "", "a")) == "other"


def test_training_questions_reach_every_element_type(scenes):
    types = {q.element_type for s in scenes for q in shapes.training_questions(s, np.random.default_rng(s.seed), 8)}
    assert types == {"object", "count", "color", "location", "spatial", "size", "background"}


def test_training_questions_ask_for_nothing_ambiguous():
    circle = shapes.Object("circle", "red", "small", cell=0, x=16, y=16, radius=6, rgb=(220, 40, 40))
    other = dataclasses.replace(circle, color="blue", cell=1, x=48, rgb=(50, 80, 220))
    scene = shapes.Scene("two_objects", (circle, other), "black", seed=0)
    texts = {q.question for q in shapes.training_questions(scene, np.random.default_rng(0), 400)}
    assert "what shape are the objects ?" in texts
    assert "where is the red circle relative to the blue circle ?" in texts
    assert not texts & {"what color are the circles ?", "what color is the circle ?", "where is the circle ?"}


def test_make_record_holds_caption_questions_and_picture():
    scene = shapes.sample_scenes("test", 1, 5)[0]
    record = shapes.make_record(scene, "test-0", np.random.default_rng(3))
    assert record.id == "test-0"
    assert record.category == scene.category
    assert record.codes is None
    assert record.questions == shapes.record_questions(scene, record.caption)
    np.testing.assert_array_equal(record.image, shapes.render([scene])[0])
