"""What `import hermesflow` gives: names, and a model that frames prompts as its family does."""

import ast
import inspect
import os
import pkgutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hermesflow
from hermesflow import ImageSamplingParams
from hermesflow.runtime.files import InputError

PROMPT = "a large red circle on a white background"


@pytest.fixture(scope="module")
def model():
    return hermesflow.load_model()


def test_every_name_loads_and_editors_see_it():
    source = ast.parse(Path(hermesflow.__file__).read_text(encoding="utf-8"))
    checked = next(node for node in source.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in checked.body for alias in node.names}
    assert seen == hermesflow._EXPORTS and set(hermesflow.__all__) == {*seen, "__version__"}
    for name in hermesflow.__all__:
        assert name in dir(hermesflow) and (name == "__version__" or inspect.getdoc(getattr(hermesflow, name)))
    assert Path(hermesflow.__file__).with_name("py.typed").exists()
    with pytest.raises(AttributeError, match="has no attribute 'nothing'; it exports __version__, .*train_pairs"):
        _ = hermesflow.nothing


def test_images_of_prompts(model):
    images = model.generate([PROMPT, "a small blue square on a black background"], num_images=2, seed=5)
    assert [(image.mode, image.size) for image in images] == [("RGB", (64, 64))] * 4
    alone = model.generate("a small blue square on a black background", seed=8)
    assert np.abs(np.asarray(alone[0], int) - np.asarray(images[3], int)).max() <= 1  # rounding by batch
    few = model.generate(PROMPT, sampling=replace(model.sampling, num_steps=1))
    assert not np.array_equal(np.asarray(few[0]), np.asarray(model.generate(PROMPT)[0]))
    assert model.generate([]) == []
    for wrong in ({"num_images": 0}, {"seed": -1}, {"seed": 2**63}):
        with pytest.raises(ValueError, match="generate: expected num_images from 1 and seed"):
            model.generate(PROMPT, **wrong)


def test_captions_answers_and_scores_of_anything_that_holds_an_image(model, tmp_path):
    (drawn,) = model.generate(PROMPT, seed=1)
    drawn.save(tmp_path / "drawn.png")
    images = [drawn, np.asarray(drawn), tmp_path / "drawn.png", str(tmp_path / "drawn.png")]
    captions = model.caption(images)
    assert len(set(captions)) == 1 and "circle" in captions[0]
    assert model.answer(images, "what color is the circle ?") == ["red"] * 4
    questions = ["what color is the circle ?", "what color is the background ?"]
    assert model.answer(images[:2], questions) == ["red", "white"]
    colors = ("blue", "red", "green")
    scores = model.score(images, questions[0], colors)
    assert all(list(chances) == list(colors) and max(chances, key=chances.get) == "red" for chances in scores)
    assert all(sum(chances.values()) == pytest.approx(1) for chances in scores)
    assert model.answer(images, questions[0], choices=colors) == ["red"] * 4
    assert model.caption([]) == model.answer([], "why ?") == model.score([], "why ?", colors) == []


def test_questions_are_framed_as_the_family_does(model, monkeypatch):
    monkeypatch.setattr(
        model, "prompts", replace(model.prompts, question="a circle {question} ?", answer="red {answer}")
    )
    asked = []
    monkeypatch.setattr(
        model.engine, "score_choices", lambda seen, questions, choices: asked.append((questions, choices)) or [[[0, 1]]]
    )
    model.score([Image.new("RGB", (8, 8))], "what color", ["one", "two"])
    encode = model.encode_text
    assert asked == [([[encode("a circle what color ?")]], [[[encode("red one"), encode("red two")]]])]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.generate(["a circle", " "]), "prompt 2: expected words, got ' '"),
        (lambda model: model.caption([7]), "image: expected a path, an image of Pillow or uint8 .*, got int"),
        (lambda model: model.caption([np.zeros((8, 8, 3))]), r"got float64 \[8, 8, 3\]"),
        (lambda model: model.caption(["none.png"]), "none.png"),
        (lambda model: model.answer([Image.new("L", (8, 8))], ""), "question: expected words"),
        (lambda model: model.answer([Image.new("L", (8, 8))], ["why ?"] * 2), "one for each of 1 images, got 2"),
        (lambda model: model.caption("a.png"), r"images: expected a list, got one str; put it in brackets"),
        (lambda model: model.caption(np.zeros((8, 8, 3), np.uint8)), "images: expected a list, got one ndarray"),
        (lambda model: model.answer(Image.new("L", (8, 8)), "why ?"), "images: expected a list, got one Image"),
        (lambda model: model.score([Image.new("L", (8, 8))], "why ?", "yes"), "choices: expected a list, got one str"),
        (lambda model: model.caption([np.zeros(3, np.uint8)]), r"got uint8 \[3\]"),
        (lambda model: model.score([Image.new("L", (8, 8))], "why ?", ["yes"]), "two or more distinct answers"),
        (lambda model: model.score([Image.new("L", (8, 8))], "why ?", ["yes", "yes"]), "two or more distinct answers"),
        (
            lambda model: model.answer([Image.new("L", (8, 8))], "why ?", ["no", "yes", "YES"]),
            "choices no,yes,YES: yes and YES are one to the model; leave one out",
        ),
    ],
    ids=[
        "blank",
        "number",
        "floats",
        "missing",
        "no question",
        "questions",
        "one path",
        "one array",
        "one image",
        "text of choices",
        "row",
        "one choice",
        "equal choices",
        "choices of equal tokens",
    ],
)
def test_what_cannot_be_used_is_named(call, message, model):
    with pytest.raises(InputError, match=message):
        call(model)


def test_the_engine_takes_sampling_whole_and_by_its_fields(model):
    engine, ids, seeds = model.engine, [model.image_prompt(PROMPT)], torch.arange(2).view(1, 2)
    params = ImageSamplingParams(num_steps=3, guidance_scale=1.0, mask_temperature=1.0, temperature=0.8)
    whole = engine.generate(ids, num_images=2, seeds=seeds, sampling=params)
    fields = {"num_steps": 3, "guidance_scale": 1.0, "mask_temperature": 1.0, "temperature": 0.8}
    assert torch.equal(whole, engine.generate(ids, num_images=2, seeds=seeds, **fields))
    other = replace(params, num_steps=9)
    assert torch.equal(whole, engine.generate(ids, num_images=2, seeds=seeds, sampling=other, num_steps=3))
    drawn = engine.rollout(ids, num_images=2, seeds=seeds, sampling=params)
    assert torch.equal(drawn.codes, whole)
    logprobs = (engine.rollout_logprobs(ids, drawn, **way) for way in (fields, {"sampling": params}))
    assert torch.equal(*logprobs)
    with pytest.raises(
        ValueError, match="Engine.generate: expected sampling of ImageSamplingParams, got SamplingParams"
    ):
        engine.generate(ids, num_images=2, seeds=seeds, sampling=hermesflow.SamplingParams())
    with pytest.raises(ValueError, match="Engine.generate: unknown num_step; images are drawn by num_steps, "):
        engine.generate(ids, num_images=2, seeds=seeds, num_step=8)
    assert hermesflow.Engine.extend is hermesflow.Engine.generate_text


def test_paths_may_be_strings(tmp_path):
    model = hermesflow.load_model("tiny")
    model.save(str(tmp_path / "copy"))
    assert hermesflow.load_model(tmp_path / "copy").generate(PROMPT)[0].size == (64, 64)


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=["nothing", "a count", "a policy"],
)
def test_threads_that_wait_go_to_sleep_unless_the_user_decides(given, spins):
    program = "import hermesflow, os, sys; print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"
    kept = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", program]
    environment = kept | {"PYTHONSAFEPATH": "1"} | given
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", spins]


def test_all_packages_are_listed_however_it_is_installed():
    listed = {item.name: item.ispkg for item in pkgutil.iter_modules(hermesflow.__path__, "hermesflow.")}
    assert {"hermesflow.benchmarks", "hermesflow.engine", "hermesflow.kernels", "hermesflow.models"} <= listed.keys()
    assert all(listed[f"hermesflow.{name}"] for name in ("benchmarks", "engine", "kernels"))
    walked = [item.name for item in pkgutil.walk_packages(hermesflow.__path__, "hermesflow.")]
    assert "hermesflow.benchmarks.random_checkpoint" in walked and len(walked) == len(set(walked))
    assert not [name for name in walked if name.startswith(("hermesflow.hermesflow", "hermesflow.setup"))]
