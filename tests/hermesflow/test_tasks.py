"""Pictures of pictures: what inpainting and extrapolation keep, draw and refuse, and the contact sheet."""

import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from hermesflow import tasks
from hermesflow.engine.decoders.masked import ImageSamplingParams
from hermesflow.engine.engine import Engine
from hermesflow.models.contact_sheet import draw_contact_sheet
from hermesflow.models.images import read_image
from hermesflow.runtime.files import InputError
from hermesflow.runtime.seeds import candidate_seed

SIZE = 64  # of the tiny model, 4 x 4 tokens of 16 pixels
PROMPT = "a small red circle"
SAMPLING = ImageSamplingParams(num_steps=3, guidance_scale=0.5, mask_temperature=1.0)


@pytest.fixture
def image(tmp_path):
    """A wide photo-like image; the model sees its center."""
    pixels = np.random.default_rng(0).integers(0, 256, (80, 120, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.fixture
def square(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "square.png")
    return tmp_path / "square.png"


def save_mask(path, white, mode="L", size=(SIZE, SIZE)):
    """A mask whose tokens [4, 4] are white where asked."""
    levels = np.kron(np.asarray(white), np.ones((16, 16))).astype(np.uint8) * 255
    mask = Image.fromarray(levels).resize(size, Image.Resampling.NEAREST)
    if mode == "white-on-nothing":
        drawn = Image.new("RGBA", size, (255, 255, 255, 0))
        drawn.putalpha(mask)
    elif mode == "black-on-nothing":
        drawn = Image.new("RGBA", size, (0, 0, 0, 0))
        drawn.putalpha(mask)
    elif mode == "red-on-nothing":
        drawn = Image.new("RGBA", size, (0, 0, 0, 0))
        drawn.paste((255, 0, 0, 255), mask=mask)
    elif mode == "grey-and-white-on-nothing":  # dark grey is visible, but no white; what is transparent is no white
        drawn = Image.new("RGBA", size, (255, 255, 255, 0))
        drawn.paste((60, 60, 60, 255), (0, 0, size[0], size[1] // 8))
        drawn.paste((255, 255, 255, 255), mask=mask)
    elif mode == "16-bit":
        drawn = Image.fromarray(np.asarray(mask).astype(np.uint16) * 257)
    else:
        drawn = mask.convert(mode)
    drawn.save(path)
    return path


LEFT = np.tile([1, 1, 0, 0], (4, 1))
SPOTS = np.array([[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 1, 0]])


def inpaint(model, image, mask, **options):
    return list(tasks.inpaint_images(model, image, mask, PROMPT, **{"sampling": SAMPLING} | options))


def original_codes(model, path):
    return model.encode_images(read_image(path, SIZE)[None]).view(4, 4)


@pytest.mark.parametrize("white", [LEFT, SPOTS], ids=["left", "spots"])
def test_inpainting_keeps_what_is_not_masked(shared_tiny_model, square, tmp_path, white):
    drawn = inpaint(shared_tiny_model, square, save_mask(tmp_path / "mask.png", white), num_images=3, seed=5)
    original, kept = original_codes(shared_tiny_model, square), torch.from_numpy(white == 0)
    assert [image.seed for image in drawn] == [5, 6, 7]
    for image in drawn:
        assert image.prompt == PROMPT and image.pixels.shape == (SIZE, SIZE, 3) and image.pixels.dtype == np.uint8
        assert torch.equal(image.codes[kept], original[kept])
        assert not torch.equal(image.codes, original)
    assert not torch.equal(drawn[0].codes, drawn[1].codes)


def test_an_inpainted_image_does_not_depend_on_its_batch(shared_tiny_model, square, tmp_path, monkeypatch):
    mask = save_mask(tmp_path / "mask.png", LEFT)
    together = inpaint(shared_tiny_model, square, mask, num_images=5, seed=1)
    alone = inpaint(shared_tiny_model, square, mask, seed=4)[0]
    assert torch.equal(together[3].codes, alone.codes)
    monkeypatch.setattr(Engine, "max_sequences", 4)
    for one, other in zip(inpaint(shared_tiny_model, square, mask, num_images=5, seed=1), together, strict=True):
        assert one.seed == other.seed and torch.equal(one.codes, other.codes)


def test_a_mask_that_is_all_white_draws_all(shared_tiny_model, square, tmp_path):
    mask = save_mask(tmp_path / "mask.png", np.ones((4, 4)))
    drawn = inpaint(shared_tiny_model, square, mask, num_images=2, seed=3)
    whole = tasks.generate_images(shared_tiny_model, [PROMPT], num_images=2, seed=3, sampling=SAMPLING)
    for one, other in zip(drawn, whole, strict=True):
        assert torch.equal(one.codes, other.codes)


@pytest.mark.parametrize(
    ("mode", "size"),
    [
        ("L", (SIZE, SIZE)),
        ("L", (640, 640)),
        ("L", (16, 16)),
        ("1", (SIZE, SIZE)),
        ("P", (SIZE, SIZE)),
        ("RGB", (128, 128)),
        ("RGBA", (SIZE, SIZE)),
        ("LA", (SIZE, SIZE)),
        ("16-bit", (SIZE, SIZE)),
        ("white-on-nothing", (SIZE, SIZE)),
        ("black-on-nothing", (320, 320)),
        ("red-on-nothing", (SIZE, SIZE)),
        ("grey-and-white-on-nothing", (SIZE, SIZE)),
    ],
)
def test_masks_of_any_mode_and_size(shared_tiny_model, square, tmp_path, mode, size):
    mask = save_mask(tmp_path / "mask.png", SPOTS, mode, size)
    drawn = inpaint(shared_tiny_model, square, mask)[0]
    kept = torch.from_numpy(SPOTS == 0)
    assert torch.equal(drawn.codes[kept], original_codes(shared_tiny_model, square)[kept])
    reference = inpaint(shared_tiny_model, square, save_mask(tmp_path / "plain.png", SPOTS))[0]
    assert torch.equal(drawn.codes, reference.codes)


@pytest.mark.parametrize(("rows", "redrawn"), [(7, False), (8, True), (9, True)])
def test_a_token_is_drawn_anew_where_half_its_patch_is_white(shared_tiny_model, square, tmp_path, rows, redrawn):
    levels = np.zeros((SIZE, SIZE), np.uint8)
    levels[:rows, :16] = 255
    levels[48:, 48:] = 255  # so that something is masked in each case
    Image.fromarray(levels).save(tmp_path / "mask.png")
    tokens = tasks._masked_tokens(shared_tiny_model, Image.open(tmp_path / "mask.png"))
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[0, 0], expected[3, 3] = redrawn, True
    assert torch.equal(tokens.view(4, 4), expected)


def test_mask_and_image_are_cropped_alike(shared_tiny_model, image, tmp_path):
    """The center of 120 x 80 is 80 x 80: the left sixth of the mask is cut off, and with it all that is white."""
    levels = np.zeros((160, 240), np.uint8)
    levels[:, :38] = 255
    Image.fromarray(levels).save(tmp_path / "mask.png")
    with pytest.raises(InputError, match="the mask has no white"):
        inpaint(shared_tiny_model, image, tmp_path / "mask.png")


def test_a_mask_may_be_rounded_to_whole_pixels(shared_tiny_model, tmp_path):
    Image.new("RGB", (1001, 667)).save(tmp_path / "image.png")
    Image.new("L", (100, 67), 255).save(tmp_path / "mask.png")
    assert len(inpaint(shared_tiny_model, tmp_path / "image.png", tmp_path / "mask.png")) == 1


def bad_mask(folder, kind):
    path = folder / f"{kind}.png"
    if kind == "black":
        Image.new("L", (SIZE, SIZE)).save(path)
    elif kind == "other-shape":
        Image.new("L", (80, SIZE), 255).save(path)
    elif kind == "text":
        path.write_text("no image")
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("black", "black.png: the mask has no white to draw anew; paint"),
        ("other-shape", "other-shape.png: a mask of 80 x 64 pixels does not fit .*square.png of 64 x 64; give one of"),
        ("text", "text.png: not an image that can be read"),
        ("missing", "missing.png: no such file"),
    ],
)
def test_masks_that_are_refused(shared_tiny_model, square, tmp_path, kind, message):
    with pytest.raises(InputError, match=message):
        inpaint(shared_tiny_model, square, bad_mask(tmp_path, kind))


def test_an_image_to_inpaint_that_is_none(shared_tiny_model, tmp_path):
    bad, mask = bad_mask(tmp_path, "text"), save_mask(tmp_path / "mask.png", LEFT)
    with pytest.raises(InputError, match="text.png: not an image that can be read"):
        inpaint(shared_tiny_model, bad, mask)


def extrapolate(model, image, directions, prompts=PROMPT, **options):
    return list(tasks.extrapolate_image(model, image, prompts, directions, **{"sampling": SAMPLING} | options))


# Where the 4 x 4 tokens of the image lie in the canvas [h, w].
@pytest.mark.parametrize(
    ("directions", "options", "shape", "corner"),
    [
        (["left"], {}, (4, 6), (0, 2)),
        (["right"], {}, (4, 6), (0, 0)),
        (["up"], {}, (6, 4), (2, 0)),
        (["down"], {}, (6, 4), (0, 0)),
        (["right"], {"offset": 1}, (4, 7), (0, 0)),
        (["left"], {"steps": 3}, (4, 10), (0, 6)),
        (["left", "up", "right", "down"], {}, (8, 8), (2, 2)),
        (["up", "left"], {"steps": 2, "offset": 1}, (10, 10), (6, 6)),
    ],
    ids=["left", "right", "up", "down", "offset", "steps", "around", "twice-with-offset"],
)
def test_extrapolation_keeps_the_image_and_adds_to_it(shared_tiny_model, square, directions, options, shape, corner):
    drawn = extrapolate(shared_tiny_model, square, directions, num_images=2, seed=2, **options)
    original, (top, left) = original_codes(shared_tiny_model, square), corner
    assert [image.seed for image in drawn] == [2, 3]
    for image in drawn:
        assert tuple(image.codes.shape) == shape and (image.codes >= 0).all()
        assert image.pixels.shape == (16 * shape[0], 16 * shape[1], 3)
        assert torch.equal(image.codes[top : top + 4, left : left + 4], original)
    assert not torch.equal(drawn[0].codes, drawn[1].codes)


@pytest.mark.parametrize(
    ("direction", "border", "rest"),
    [
        ("left", np.s_[:, :2], np.s_[:, 2:]),
        ("right", np.s_[:, 2:], np.s_[:, :2]),
        ("up", np.s_[:2], np.s_[2:]),
        ("down", np.s_[2:], np.s_[:2]),
    ],
)
def test_one_extension_is_the_published_one(shared_tiny_model, square, direction, border, rest):
    """Half the window is the picture's border, the other half is drawn; the rest of the picture is put behind."""
    original = original_codes(shared_tiny_model, square)
    axis, order = (1 if direction in ("left", "right") else 0), (1 if direction in ("left", "up") else -1)
    known = torch.cat([torch.full_like(original[border], -1), original[border]][::order], axis)
    window = shared_tiny_model.engine.generate(
        [shared_tiny_model.image_prompt(PROMPT)],
        num_images=1,
        num_steps=3,
        guidance_scale=0.5,
        mask_temperature=1.0,
        seeds=torch.tensor([[candidate_seed(7, "step-0", "extrapolate", 0)]]),
        known_codes=known.view(1, 16),
    ).view(4, 4)
    drawn = extrapolate(shared_tiny_model, square, [direction], seed=7)[0]
    assert torch.equal(drawn.codes, torch.cat([window, original[rest]][::order], axis))


def windows_of(monkeypatch, model, image, directions, **options):
    """The seeds [n] and known codes [n, 16] of each window that is drawn."""
    calls = []
    generate = type(model.engine).generate

    def noted(engine, prompt_ids, *, seeds, known_codes, **settings):
        calls.append((tuple(map(tuple, prompt_ids)), seeds.flatten().tolist(), known_codes.clone()))
        return generate(engine, prompt_ids, seeds=seeds, known_codes=known_codes, **settings)

    monkeypatch.setattr(type(model.engine), "generate", noted)
    extrapolate(model, image, directions, **options)
    return calls


def test_windows_slide_along_a_longer_side_and_draw_with_seeds_of_their_own(shared_tiny_model, square, monkeypatch):
    calls = windows_of(monkeypatch, shared_tiny_model, square, ["down", "right"], steps=2, num_images=2)
    # Canvases of 4 x 4, 6 x 4 (windows at 0, 2), 6 x 6 (0, 2), 8 x 6 (0, 2, 4).
    assert [(known[0] < 0).sum().item() for _, _, known in calls] == [8, 8, 4, 8, 4, 8, 4, 4]
    seeds = [seed for _, window_seeds, _ in calls for seed in window_seeds]
    assert len(set(seeds)) == len(seeds) == 16


def test_two_prompts_are_not_taken_for_one_that_looks_like_them(shared_tiny_model, square, monkeypatch):
    monkeypatch.setattr(shared_tiny_model, "encode_text", lambda text: [5])
    labels = [
        next(tasks.extrapolate_image(shared_tiny_model, square, prompts, directions, sampling=SAMPLING)).prompt
        for prompts, directions in ((["a circle", "a square"], ["left", "up"]), (["a circle | a square"], ["left"]))
    ]
    assert labels == ["a circle | a square", "a circle || a square"]


def test_an_extrapolated_picture_does_not_depend_on_the_others(shared_tiny_model, square):
    together = extrapolate(shared_tiny_model, square, ["up", "left"], steps=2, num_images=3, seed=1)
    alone = extrapolate(shared_tiny_model, square, ["up", "left"], steps=2, seed=3)[0]
    assert torch.equal(together[2].codes, alone.codes)
    np.testing.assert_array_equal(together[2].pixels, alone.pixels)


def test_a_prompt_for_each_extension(shared_tiny_model, square, monkeypatch):
    prompts = ["a red circle", "two blue squares", "one green triangle", "a circle"]
    calls = windows_of(monkeypatch, shared_tiny_model, square, ["left", "right"], steps=2, prompts=prompts)
    assert [prompt for (prompt,), _, _ in calls] == [tuple(shared_tiny_model.image_prompt(text)) for text in prompts]
    drawn = extrapolate(shared_tiny_model, square, ["left"], prompts=["a circle"])[0]
    assert drawn.prompt == "a circle"


@pytest.mark.parametrize(
    ("directions", "options", "message"),
    [
        ([], {}, "direction: expected at least one of left, right, up, down, got none"),
        (["left", "north"], {}, "direction: expected one of left, right, up, down, got 'north'"),
        (["left"], {"steps": 0}, "steps: expected at least 1, got 0"),
        (["left"], {"offset": -1}, "offset: expected 0 to 1 for this model's 4 x 4 tokens, got -1"),
        (["left"], {"offset": 2}, "offset: expected 0 to 1 for this model's 4 x 4 tokens, got 2"),
        (["left"], {"steps": 3, "prompts": ["a"] * 2}, "prompts: expected one, or one for each of 3 extensions, got 2"),
        (["left"], {"prompts": []}, "prompts: expected one, or one for each of 1 extensions, got 0"),
        (["left"], {"prompts": " "}, "prompt 1: expected words, got ' '"),
    ],
    ids=["no-direction", "direction", "steps", "negative-offset", "offset", "prompts", "no-prompts", "empty-prompt"],
)
def test_extensions_that_are_refused(shared_tiny_model, square, directions, options, message):
    with pytest.raises(InputError, match=message):
        extrapolate(shared_tiny_model, square, directions, **options)


def name_of(folder, prompt, label=""):
    image = tasks.GeneratedImage(prompt, 0, np.zeros((1, 1, 3), np.uint8), torch.zeros(1, 1, dtype=torch.int64))
    return tasks.save_image(folder, image, {}, label).name


LONG = "a large green triangle in the top left and a small red circle in the bottom"
ALIKE = {
    "cut": (f"{LONG} left", f"{LONG} right", LONG),
    "of one word": ("o" * 60, "o" * 61, "o" * 500),
    "chinese": ("一个红色的圆", "一个蓝色的正方形", "image", "?"),
    "mixed": ("a 红 cat", "a 蓝 cat", "a cat", "a-cat"),
    "capitals": ("a Red circle", "a red circle", "A RED CIRCLE"),
    "marks": ("a cat.", "a cat!", "a cat", "a, cat", "a_cat"),
    "blanks": ("a cat", "a  cat", " a cat", "a cat ", "a\tcat", "a\u00a0cat"),
    "normalized": ("caf\u00e9", "cafe\u0301", "cafe", "caf"),
    "as names": ("a cat", "a cat inpainted", "a cat seed0", "a-cat-seed0.png", "a cat extrapolated"),
    "numbers": ("1.5 cats", "15 cats", "1 5 cats"),
    "case folding": ("stra\u00dfe", "strasse", "STRASSE", "\u212a", "k"),
    "endless": ("语" * 10_000, "语" * 10_001, "a " * 10_000),
}


@pytest.mark.parametrize("prompts", ALIKE.values(), ids=ALIKE)
def test_names_of_pictures_do_not_collide(tmp_path, prompts):
    names = [name_of(tmp_path, prompt, label) for prompt in prompts for label in ("", "inpainted", "extrapolated")]
    assert len({name.lower() for name in names}) == len(names)
    assert names[::3] == [name_of(tmp_path, prompt) for prompt in prompts]
    assert all(len(os.fsencode(name)) <= 200 and name.isascii() for name in names)


def test_a_prompt_that_its_name_holds_whole_has_no_hash(tmp_path):
    assert name_of(tmp_path, PROMPT) == "a-small-red-circle-seed0.png"
    assert name_of(tmp_path, PROMPT, "inpainted") == "a-small-red-circle-inpainted-seed0.png"
    hashed = name_of(tmp_path, "A small red circle.")
    assert re.fullmatch(r"a-small-red-circle_[0-9a-f]{12}-seed0\.png", hashed)
    assert hashed == "a-small-red-circle_14b96232d63c-seed0.png"  # the same in every process


def test_a_bad_image_is_left_out_where_it_may_be(shared_tiny_model, square, tmp_path):
    (tmp_path / "bad.png").touch()
    with pytest.raises(InputError, match="bad.png: not an image"):
        list(tasks.caption_images(shared_tiny_model, [square, tmp_path / "bad.png"]))
    with pytest.raises(InputError, match="none.png: no such file"):
        next(tasks.caption_images(shared_tiny_model, [square, "none.png"]))
    errors = []
    lines = list(tasks.caption_images(shared_tiny_model, [tmp_path / "bad.png", square], skip=errors.append))
    assert [line["image"] for line in lines] == [str(square)] and "bad.png: not an image" in str(*errors)
    assert lines == list(tasks.caption_images(shared_tiny_model, [square]))


def test_drawn_images_are_their_codes(shared_tiny_model):
    drawn = list(tasks.generate_images(shared_tiny_model, [PROMPT, "a blue square"], sampling=SAMPLING))
    for image in drawn:
        assert image.codes.shape == (4, 4)
        pixels = shared_tiny_model.decode_images(image.codes.view(1, -1))[0]
        assert abs(image.pixels.astype(int) - pixels).max() <= 1


def test_a_long_prompt_is_cut_as_the_model_was_trained(shared_tiny_model, monkeypatch):
    monkeypatch.setattr(shared_tiny_model, "prompts", replace(shared_tiny_model.prompts, max_prompt_tokens=3))
    long, short = tasks.generate_images(shared_tiny_model, ["a small red circle", "a small red"], sampling=SAMPLING)
    again = next(iter(tasks.generate_images(shared_tiny_model, ["a small red"], sampling=SAMPLING)))
    assert torch.equal(long.codes, again.codes) and short.seed == 1


LONG = "a small red circle on a white background"
CUT = "cut from 8 to 3 tokens"


def test_a_prompt_that_is_cut_is_told_once(shared_tiny_model, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(shared_tiny_model, "prompts", replace(shared_tiny_model.prompts, max_prompt_tokens=3))
    drawn = list(tasks.generate_images(shared_tiny_model, [LONG, "a small red"], num_images=2, sampling=SAMPLING))
    assert [image.cut for image in drawn] == [CUT, CUT, "", ""]
    assert [record.levelname for record in caplog.records] == ["WARNING"] and f"prompt 1, '{LONG}" in caplog.text
    assert CUT in caplog.text
    with Image.open(tasks.save_image(tmp_path, drawn[0], {})) as saved:
        assert json.loads(saved.text["prompt_cut"]) == CUT
    with Image.open(tasks.save_image(tmp_path, drawn[2], {})) as saved:
        assert "prompt_cut" not in saved.text
    with Image.open(tasks.save_contact_sheet(tmp_path / "all.png", drawn, {}, 2)) as saved:
        assert json.loads(saved.text["prompt_cut"]) == [CUT, CUT, "", ""]


@pytest.mark.parametrize("task", ["inpaint", "extrapolate", "model"])
def test_the_other_ways_to_draw_tell_it_too(shared_tiny_model, square, tmp_path, monkeypatch, caplog, task):
    monkeypatch.setattr(shared_tiny_model, "prompts", replace(shared_tiny_model.prompts, max_prompt_tokens=2))
    if task == "inpaint":
        assert inpaint(shared_tiny_model, square, save_mask(tmp_path / "mask.png", LEFT))[0].cut
    elif task == "extrapolate":
        options = {"sampling": SAMPLING}
        assert next(tasks.extrapolate_image(shared_tiny_model, square, [PROMPT], ["left"], **options)).cut
    else:
        shared_tiny_model.generate(PROMPT, sampling=SAMPLING)
    assert caplog.text.count("cut from 4 to 2 tokens") == 1


@pytest.mark.parametrize("seed", [-1, 2**62, 2**63 - 1, 2**64])
@pytest.mark.parametrize("task", ["generate", "inpaint", "extrapolate"])
def test_seeds_beyond_the_range(shared_tiny_model, square, tmp_path, task, seed):
    with pytest.raises(InputError, match=rf"a seed in \[0, 2\*\*62\), got 1 and {seed}"):
        if task == "generate":
            next(tasks.generate_images(shared_tiny_model, [PROMPT], seed=seed))
        elif task == "inpaint":
            inpaint(shared_tiny_model, square, save_mask(tmp_path / "mask.png", LEFT), seed=seed)
        else:
            next(tasks.extrapolate_image(shared_tiny_model, square, [PROMPT], ["left"], seed=seed))


def test_the_last_seeds_draw(shared_tiny_model):
    drawn = tasks.generate_images(shared_tiny_model, [PROMPT], num_images=2, seed=2**62 - 1, sampling=SAMPLING)
    assert [image.seed for image in drawn] == [2**62 - 1, 2**62]


@pytest.mark.parametrize("question", ["a circle {question} ?", "{question}"])
def test_questions_are_put_as_the_model_expects(shared_tiny_model, square, monkeypatch, question):
    asked = []
    generate_text = type(shared_tiny_model.engine).generate_text
    monkeypatch.setattr(
        type(shared_tiny_model.engine),
        "generate_text",
        lambda engine, codes, ids, **options: asked.append(ids[0][0]) or generate_text(engine, codes, ids, **options),
    )
    monkeypatch.setattr(shared_tiny_model, "prompts", replace(shared_tiny_model.prompts, question=question))
    (answer,) = tasks.answer_question(shared_tiny_model, [square], "what color")
    assert set(answer) == {"image", "question", "answer"}
    assert asked == [shared_tiny_model.encode_text(question.format(question="what color"))]


def test_answers_to_choices_are_the_engines_likelihoods(shared_tiny_model, square):
    question, choices = "what color is the circle ?", ["red", "green"]
    (answer,) = tasks.answer_question(shared_tiny_model, [square], question, choices)
    seen = shared_tiny_model.view_images([Image.open(square)])
    ids = [shared_tiny_model.encode_text(text) for text in (question, *choices)]
    scores = torch.tensor(shared_tiny_model.engine.score_choices(seen, [[ids[0]]], [[ids[1:]]])[0][0])
    assert list(answer["probabilities"].values()) == pytest.approx(scores.softmax(0).tolist(), abs=1e-5)
    assert answer["answer"] == choices[scores.argmax()]


@pytest.mark.parametrize(
    ("shape", "count", "columns", "width", "heights"),
    [
        ((16, 16), 1, 4, 136 + 8, 128),  # 8 times as large, and as many columns as there are pictures
        ((64, 64), 5, 3, 3 * 136 + 8, 2 * 128),
        ((100, 300), 2, 2, 2 * 608 + 8, 200),
        ((512, 512), 20, 20, 7 * 520 + 8, 3 * 512),  # no wider than 4096
        ((128, 5000), 2, 2, 5016, 2 * 128),  # but for a single picture
    ],
    ids=["enlarged", "rows", "wide", "many", "panorama"],
)
def test_size_of_a_contact_sheet(shape, count, columns, width, heights):
    """Heights are those of the pictures; a row's caption and margins add less than 50 pixels."""
    sheet = draw_contact_sheet([np.zeros((*shape, 3), np.uint8)] * count, ["a circle"] * count, columns)
    assert sheet.width == width
    assert heights + 16 < sheet.height < heights + 50 * max(1, heights // 128)


def test_a_contact_sheet_shows_pictures_in_order_with_captions():
    levels = [10, 90, 200]
    sheet = np.asarray(draw_contact_sheet([np.full((64, 64, 3), level, np.uint8) for level in levels], ["a"] * 3, 2))
    assert [sheet[8, 8, 0], sheet[8, 144, 0]] == levels[:2]
    below = sheet.shape[0] // 2 + 20
    assert sheet[below, 8, 0] == levels[2] and (sheet[below, 144:] == 236).all()
    assert (sheet[136:160, 8:136] < 128).any(), "no ink below the first picture"


@pytest.mark.parametrize(
    ("caption", "lines"),
    [("", 1), ("a circle", 1), ("a circle " * 4, 2), ("o" * 40, 3), ("a circle " * 500, 4), ("o" * 5000, 4)],
    ids=["empty", "short", "wrapped", "one-word", "cut", "one-word-cut"],
)
def test_captions_are_wrapped_and_cut(caption, lines):
    blank = np.zeros((128, 128, 3), np.uint8)
    one_line = draw_contact_sheet([blank], ["a"], 1).height
    line_height = (draw_contact_sheet([blank], ["o " * 500], 1).height - one_line) // 3
    assert draw_contact_sheet([blank], [caption], 1).height - one_line == (lines - 1) * line_height


def test_a_contact_sheet_is_written_with_its_settings(shared_tiny_model, tmp_path):
    images = list(tasks.generate_images(shared_tiny_model, [PROMPT, "a blue square"], seed=4, sampling=SAMPLING))
    path = tasks.save_contact_sheet(tmp_path / "new" / "sheet.png", images, {"num_steps": 3}, num_images=1)
    with Image.open(path) as sheet:
        assert sheet.text["prompt"] == f"{PROMPT}\na blue square" and json.loads(sheet.text["seeds"]) == [4, 5]
        assert json.loads(sheet.text["settings"]) == {"num_steps": 3}
        assert sheet.width == 2 * 136 + 8
