"""Model folders: one that is damaged, or whose files do not fit one another, is refused in one line."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hermesflow.models import load_model
from hermesflow.models.text_tokenizers import WordTokenizer
from hermesflow.runtime.files import InputError


@pytest.fixture
def folder(shared_tiny_model, tmp_path):
    shared_tiny_model.save(tmp_path)
    return tmp_path


def test_a_saved_model_loads(folder, shared_tiny_model):
    assert load_model(str(folder)).layout == shared_tiny_model.layout


def test_a_folder_below_the_home_folder(folder, shared_tiny_model, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_model(f"~/{folder.name}").layout == shared_tiny_model.layout
    with pytest.raises(InputError, match="no model .*none"):
        load_model("~/none")


@pytest.mark.parametrize("text", ["\ud800", "a red \udce9 circle"], ids=["alone", "inside"])
def test_text_of_half_characters_is_refused(shared_tiny_model, text):
    message = r"is not valid Unicode text; write it in UTF-8"
    with pytest.raises(InputError, match=message):
        shared_tiny_model.encode_text(text)
    for use in (shared_tiny_model.generate, lambda text: shared_tiny_model.answer([np.zeros((64, 64), "u1")], text)):
        with pytest.raises(InputError, match=message):
            use(text)
    with pytest.raises(InputError, match=message):
        shared_tiny_model.answer([np.zeros((64, 64), "u1")], "a circle", ["red", text])


def test_prompts_and_sampling_are_kept(tiny_model, tmp_path):
    tiny_model.prompts = replace(tiny_model.prompts, caption_question="what is there ?", max_caption_tokens=7)
    tiny_model.sampling = replace(tiny_model.sampling, num_steps=3, schedule="linear")
    tiny_model.save(tmp_path)
    loaded = load_model(str(tmp_path))
    assert (loaded.prompts, loaded.sampling) == (tiny_model.prompts, tiny_model.sampling)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        (None, "vq_tokenizer", [], "no attribute 'items'"),
        (None, "layout", None, "no attribute 'items'"),
        (None, "image_size", "wide", "invalid literal"),
        (None, "image_size", 65, "image_size is 65, the other sizes make it 64"),
        (None, "image_size", 80, "num_image_tokens is 16, the other sizes make it 25"),
        (None, "image_size", -64, "image_size is -64"),
        ("transformer", "num_heads", 0, "num_heads must lie in"),
        ("transformer", "hidden_size", -32, "hidden_size is -32"),
        ("transformer", "rope_theta", "high", "rope_theta is 'high'"),
        ("transformer", "num_layer", 2, "unexpected keyword argument"),
        ("transformer", "vocab_size", 7, "vocab_size is 7, the other sizes make it"),
        ("vq_tokenizer", "num_groups", 0, "num_groups must lie in"),
        ("vq_tokenizer", "num_groups", -4, "num_groups is -4"),
        ("vq_tokenizer", "num_res_blocks", [1, 1, 1.5], "num_res_blocks is"),
        ("vq_tokenizer", "num_groups", 3, "divisible"),
        ("prompts", "max_caption_tokens", "many", "max_caption_tokens is 'many'"),
        ("prompts", "max_caption_tokens", 0, r"max_caption_tokens must lie in \[1, 65536\], got 0"),
        ("prompts", "question", "{question:>99999999}", "question may hold {question}, got"),
        ("prompts", "answer", "{", "Single '{' encountered"),
        ("prompts", "choices", "{choices[9]}", "choices may hold {question} and {choices}, got"),
        ("layout", "image_rows", 2, "image_rows is 2, the other sizes make it 4"),
        ("sampling", "num_steps", 10**9, "num_steps of 1 to 65536, got 1000000000"),
        ("sampling", "temperature", 1e31, "expected temperature of 0 or 1e-06 to"),
        ("sampling", "num_steps", -1, "num_steps is -1"),
        ("sampling", "schedule", 3, "schedule is 3"),
        ("layout", "codebook_size", 64, "codebook_size is 64, the other sizes make it 32"),
        ("layout", "num_image_tokens", 15, "num_image_tokens is 15, the other sizes make it 16"),
    ],
)
def test_a_wrong_configuration_is_refused(folder, section, key, value, message):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (config[section] if section else config)[key] = value
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"config.json: not a model configuration .*{message}.*; restore it"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "not a model configuration"), ("null", "not a model configuration"), ("[" * 100_000, "damaged JSON")],
    ids=["list", "null", "deep"],
)
def test_json_that_is_no_configuration_is_refused(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=f"config.json: {message}"):
        load_model(str(folder))


def test_a_tokenizer_of_another_model_is_refused(folder):
    WordTokenizer.of_words([f"word{index}" for index in range(500)]).save(folder)
    with pytest.raises(InputError, match="tokenizer.json: has 502 text ids, the model .*; restore it"):
        load_model(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", ["model", "vq_tokenizer"])
def test_weights_that_are_no_numbers_are_refused(folder, name, value):
    path = folder / f"{name}.safetensors"
    state = load_file(path)
    key = sorted(state)[-1]
    state[key] = torch.full_like(state[key], value)
    save_file(state, path)
    with pytest.raises(InputError, match=f"{name}.safetensors: {key} holds NaN or infinity; restore it"):
        load_model(str(folder))
