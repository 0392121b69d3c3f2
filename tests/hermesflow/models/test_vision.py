"""Images by CLIP features: the encoder against CLIP's own hidden states, and answers against whole dense sequences."""

import json
import logging
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from hermesflow import tasks
from hermesflow.benchmarks.random_checkpoint import TINY, write_checkpoint
from hermesflow.config import load_config
from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.engine.engine import Engine
from hermesflow.models import load_model
from hermesflow.models.vision import load_clip_encoder
from hermesflow.runtime.files import InputError
from hermesflow.selfplay import run_selfplay

WIDTH, INNER, HIDDEN = 24, 20, 32
VISION = CLIPVisionConfig(
    hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
)
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=6)
QUESTIONS = [[[5, 6, 7], [8]], [[9, 10, 11, 12], [5], []], [], [[6, 6]]]
CHOICES = [[[[5], [6, 7]], [[8]]], [[[9]], [], [[1], [2, 3, 4]]], [], [[[7], [8]]]]


def write_clip(folder, model=None, **processor):
    """A CLIP of random weights, far from zero, in a folder as transformers keeps it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model or CLIPVisionModel(VISION)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**(size | processor)).save_pretrained(folder)
    return folder


def random_projector(width=WIDTH, dtype=torch.float32):
    layers = nn.Sequential(nn.Linear(width, INNER), nn.GELU(), nn.Linear(INNER, HIDDEN)).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in layers.parameters():
        parameter.normal_(std=0.3, generator=generator)
    return layers.to(dtype)


def pictures():
    """Images of several sizes and kinds, one of them far from square."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((3, 9), (50, 37), (1, 1))]
    return [*arrays, Image.fromarray(rng.integers(0, 256, (20, 31, 4), dtype=np.uint8), "RGBA")]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def encoder(clip_folder):
    return load_clip_encoder(clip_folder, random_projector())


def features_by_clip(folder, projector, image):
    """[F, hidden] by transformers alone: hidden layer -2 of the whole model, without CLS, and the projector."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image.convert("RGB")  # as published
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images=image, return_tensors="pt")["pixel_values"]
    hidden = CLIPVisionModel.from_pretrained(folder).eval()(pixels, output_hidden_states=True).hidden_states[-2]
    first, _, last = projector
    return nn.functional.gelu(hidden[0, 1:] @ first.weight.T + first.bias) @ last.weight.T + last.bias


@torch.no_grad()
def test_features_are_those_of_clip(clip_folder, encoder):
    got = encoder.encode(pictures())
    assert encoder.num_features == 16 and got.shape == (4, 16, HIDDEN)
    for features, image in zip(got, pictures(), strict=True):
        truth = features_by_clip(clip_folder, encoder.projector, image)
        torch.testing.assert_close(features, truth, rtol=1e-5, atol=1e-5)
    assert (got[0] - got[1]).abs().max() > 0.1


def test_features_can_be_trained_on(clip_folder):
    """They are no tensors of inference mode; the tower is frozen, the projector left as the model has it."""
    projector = random_projector().requires_grad_(True)
    encoder = load_clip_encoder(clip_folder, projector)
    assert not encoder.encode(pictures()).is_inference()
    assert not any(weight.requires_grad for weight in encoder.tower.parameters()) and not encoder.tower.training
    assert encoder.projector is projector and projector[0].weight.requires_grad


def test_batches(encoder, monkeypatch):
    """Sixty-four images are read in parts; an image's features do not depend on the others."""
    images = pictures() * 16
    sizes = []
    encoder.tower.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    got = encoder.encode(images)
    assert sizes == [32, 32]
    torch.testing.assert_close(got[60:], encoder.encode(images[:4]), rtol=1e-5, atol=1e-5)
    assert encoder.encode([]).shape == (0, 16, HIDDEN)


def test_a_strip_does_not_blow_up(encoder, monkeypatch):
    """One pixel high and a hundred thousand wide: scaled whole, it would be three million pixels wide. The middle is
    what CLIP's image processor crops out."""
    processor, sizes = encoder.processor, []

    def recorded(images, **options):
        sizes.extend(image.size for image in images)
        return processor(images=images, **options)

    monkeypatch.setattr(encoder, "processor", recorded)
    strip = np.zeros((1, 10**5, 3), dtype=np.uint8)
    strip[:, 49_990:50_010] = 255
    wide, standing, white = encoder.encode([strip, strip.transpose(1, 0, 2), np.full((4, 4, 3), 255, dtype=np.uint8)])
    assert sizes == [(8, 1), (1, 8), (4, 4)]
    torch.testing.assert_close(wide, white)
    torch.testing.assert_close(standing, white)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((4, 4, 3), np.float32), ((4, 4), np.uint8), ((4, 4, 4), np.uint8), ((0, 4, 3), np.uint8)],
    ids=["float", "grey", "rgba", "empty"],
)
def test_bad_arrays(encoder, shape, dtype):
    image = np.zeros(shape, dtype)
    with pytest.raises(ValueError, match=r"ClipEncoder.encode: expected RGB images uint8 \[H, W, 3\], got .*convert"):
        encoder.encode([image])


def with_text_model(folder):
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    return write_clip(folder, CLIPModel(CLIPConfig(vision_config=VISION.to_dict(), text_config=text)))


def as_pickle(folder):
    """With the image processor's settings as the published CLIP models hold them."""
    write_clip(folder)
    torch.save(CLIPVisionModel.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    settings = {"crop_size": 32, "size": 32, "resample": 3, "do_center_crop": True, "do_normalize": True}
    settings |= {"do_resize": True, "feature_extractor_type": "CLIPFeatureExtractor"}
    settings |= {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("write", [with_text_model, as_pickle])
def test_forms_of_published_models(write, tmp_path, caplog, capfd):
    folder = write(tmp_path)
    capfd.readouterr()
    with caplog.at_level(logging.WARNING):
        encoder = load_clip_encoder(folder, random_projector())
    assert not caplog.records and capfd.readouterr() == ("", ""), "what is left out on purpose is not reported"
    image = pictures()[1]
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode([image])[0], features_by_clip(folder, encoder.projector, image))


def test_dtype(clip_folder, encoder):
    """The projector's; a model that is converted later takes its projector along."""
    half = load_clip_encoder(clip_folder, random_projector(dtype=torch.bfloat16))
    assert half.tower.dtype == half.encode(pictures()).dtype == half.encode([]).dtype == torch.bfloat16
    mixed = load_clip_encoder(clip_folder, random_projector())
    mixed.projector.to(torch.bfloat16)
    torch.testing.assert_close(mixed.encode(pictures()).float(), encoder.encode(pictures()), rtol=0.05, atol=0.1)


def without(name):
    def damage(folder):
        (folder / name).unlink()

    return damage


def with_weights(**changes):
    """As a .bin with other tensors in it; None removes one."""

    def damage(folder):
        state = CLIPVisionModel.from_pretrained(folder).state_dict()
        state |= {f"pre_layrnorm.{name}": value for name, value in changes.items()}
        state = {name: value for name, value in state.items() if value is not None}
        torch.save(state, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    return damage


def with_processor(**settings):
    return lambda folder: CLIPImageProcessorPil(**settings).save_pretrained(folder)


class Payload:
    def __reduce__(self):
        return print, ("a pickle ran",)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("config.json"), "not a CLIP vision model"),
        (without("preprocessor_config.json"), "not a CLIP vision model"),
        (without("model.safetensors"), "holds no weights"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a CLIP vision model"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x08" * 30), "not a readable safetensors file"),
        (with_weights(bias=None), r"lacks pre_layrnorm\.bias"),
        (with_weights(bias=torch.full((WIDTH,), float("inf"))), r"pre_layrnorm\.bias holds NaN or infinity"),
        (with_weights(bias=torch.ones(7)), "not a CLIP vision model"),
        (with_weights(extra=Payload()), "holds more than tensors, and code in it is not run"),
        (
            with_processor(size={"shortest_edge": 24}, crop_size=24),
            r"preprocessor_config\.json: makes images of \[3, 24, 24\], CLIP's config\.json says \[3, 32, 32\]",
        ),
        (with_processor(size={"shortest_edge": 32}, do_center_crop=False), r"makes images of \[3, 48, 32\]"),
    ],
    ids=[
        "no-config",
        "no-processor",
        "no-weights",
        "json",
        "header",
        "missing",
        "infinite",
        "misshapen",
        "code",
        "size",
        "uncropped",
    ],
)
def test_damaged_folders(damage, message, tmp_path, capfd):
    damage(write_clip(tmp_path))
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path))}.*{message}.*; (restore|give) [^\n]*$"):
        load_clip_encoder(tmp_path, random_projector())
    assert "a pickle ran" not in capfd.readouterr().out


def test_no_such_folder(tmp_path):
    with pytest.raises(InputError, match="absent: not a CLIP vision model .*; restore it from its source$"):
        load_clip_encoder(tmp_path / "absent", random_projector())


def test_projector_of_another_clip(clip_folder):
    with pytest.raises(InputError, match="CLIP's width is 24, the checkpoint's projector expects 9; give the CLIP"):
        load_clip_encoder(clip_folder, random_projector(width=9))


@pytest.fixture(scope="module")
def engine(naive):
    return Engine(naive.tiny_model("parallel-gqa-partial-qknorm"), naive.FEATURE_LAYOUT)


def test_answers_about_features_end_to_end(naive, engine, encoder):
    """Several questions about several images, greedy: each as if it were computed alone, whole and without a cache."""
    features = encoder.encode(pictures())
    seeds = torch.zeros(4, 3, 1, dtype=torch.int64)
    got = engine.generate_text(features, QUESTIONS, sampling=[GREEDY], seeds=seeds)
    truth = [
        [[naive.answer(engine.transformer, engine.layout, image, question, GREEDY, 0)] for question in questions]
        for image, questions in zip(features, QUESTIONS, strict=True)
    ]
    assert got == truth
    assert len({tuple(samples[0]) for of_image in got for samples in of_image}) > 2, "the answers say something"
    # Bounds of one question a pass, of one image a pass, and alone.
    for max_tokens in (1, 60):
        assert engine.generate_text(features, QUESTIONS, sampling=[GREEDY], seeds=seeds, max_tokens=max_tokens) == got
    alone = engine.generate_text(encoder.encode(pictures()[1:2]), [[[5]]], sampling=[GREEDY], seeds=seeds[:1, :1])
    assert alone == [[got[1][1]]]


def test_choices_about_features_end_to_end(naive, engine, encoder):
    features = encoder.encode(pictures())
    got = engine.score_choices(features, QUESTIONS, CHOICES)
    for image, questions, choices, scores in zip(features, QUESTIONS, CHOICES, got, strict=True):
        for question, of_question, row in zip(questions, choices, scores, strict=True):
            truth = [
                naive.choice_logprob(engine.transformer, engine.layout, image, question, ids) for ids in of_question
            ]
            assert row == pytest.approx(truth, rel=1e-5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A published checkpoint of the variant, with its CLIP beside it."""
    folder = tmp_path_factory.mktemp("w-clip-vit")
    write_checkpoint(folder, replace(TINY, vision_size=WIDTH))
    write_clip(folder / "clip")
    return folder


def test_a_checkpoint_captions_and_answers_through_clip(naive, checkpoint, tmp_path):
    """Pictures to text, as the original builds the sequence: [mmu, system prompt, soi, features, eoi, question]."""
    model = load_model(str(checkpoint))
    model.prompts = replace(model.prompts, max_caption_tokens=6)
    Image.fromarray(pictures()[1]).save(tmp_path / "a.png")
    question = model.encode_text("USER: Give a caption for this image. ASSISTANT:")
    system_prompt = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    assert list(model.layout.system_ids) == model.encode_text(system_prompt)
    (said,) = tasks.caption_images(model, [tmp_path / "a.png"])
    features = model.view_images([Image.open(tmp_path / "a.png")])
    torch.testing.assert_close(features, model.vision_encoder.encode([pictures()[1]]))
    assert features.shape == (1, 16, TINY.hidden_size)
    truth = features_by_clip(checkpoint / "clip", model.projector, pictures()[1])
    torch.testing.assert_close(features[0], truth, rtol=1e-5, atol=1e-5)
    ids = naive.answer(model.transformer, model.layout, features[0], question, GREEDY, 0)
    assert said["caption"] == model.decode_text(ids)
    (answer,) = tasks.answer_question(model, [tmp_path / "a.png"], "is it?", ["yes", "no"])
    asked = model.encode_text("USER: is it? ASSISTANT:")
    truth = torch.tensor(
        [
            naive.choice_logprob(model.transformer, model.layout, features[0], asked, model.encode_text(choice))
            for choice in (" yes", " no")
        ]
    ).softmax(0)
    assert list(answer["probabilities"].values()) == pytest.approx(truth.tolist(), abs=2e-6)
    (drawn,) = tasks.generate_images(model, ["a circle"], sampling=replace(model.sampling, num_steps=2))
    assert drawn.pixels.shape == (64, 64, 3)


def test_a_checkpoint_saves_its_projector(checkpoint, tmp_path):
    load_model(str(checkpoint)).save(tmp_path)
    again, model = load_model(str(tmp_path)), load_model(str(checkpoint))
    assert all(map(torch.equal, again.projector.parameters(), model.projector.parameters()))


def test_a_checkpoint_without_clip_says_so(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    load_model(str(checkpoint)).save(tmp_path)
    with pytest.raises(InputError, match="no vision encoder 'openai/clip-vit-large-patch14-336'"):
        load_model(str(tmp_path)).vision_encoder  # noqa: B018


def test_self_play_refuses_what_it_would_not_train(checkpoint, tmp_path):
    settings = [f"model.name={checkpoint}", f"run.folder={tmp_path}"]
    with pytest.raises(
        InputError, match="sees images through a vision encoder that is saved .*; choose a checkpoint without it"
    ):
        run_selfplay(load_config(None, settings))
