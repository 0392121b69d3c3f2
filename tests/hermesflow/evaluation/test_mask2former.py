"""GenEval's judge by transformers: its rules on objects that are given, and the whole path with random weights."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    PreTrainedTokenizerFast,
    SwinConfig,
)

from hermesflow.cli import main
from hermesflow.evaluation.suites.mask2former import Found, Mask2FormerJudge, relations_of
from hermesflow.runtime.files import InputError

NAMES = ("circle", "square", "mouse")
ENTRIES = [
    {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}], "prompt": "a large red circle"},
    {"tag": "counting", "include": [{"class": "square", "count": 2}], "exclude": [{"class": "square", "count": 3}],
     "prompt": "two small blue squares"},
    {"tag": "position", "include": [{"class": "circle", "count": 1},
                                    {"class": "square", "count": 1, "position": ["left of", 0]}],
     "prompt": "a small blue square"},
]  # fmt: skip


def save_clip(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = "<|startoftext|> <|endoftext|> a photo of red circle object colored -".split()
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>").save_pretrained(folder)
    text = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "eos_token_id": 1}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**size).save_pretrained(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Random weights, a few megabytes."""
    folder = tmp_path_factory.mktemp("mask2former")
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=6,
        id2label=dict(enumerate(NAMES)), label2id={name: number for number, name in enumerate(NAMES)},
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    save_clip(folder / "clip")
    return folder


def object_at(left, top, score=0.9, size=10):
    mask = np.zeros((64, 64), dtype=bool)
    mask[top : top + size, left : left + size] = True
    return Found((left, top, left + size, top + size), mask, score)


@pytest.mark.parametrize(
    "box, relations",
    [
        ((0, 20, 10, 30), {"left of"}),
        ((50, 20, 60, 30), {"right of"}),
        ((20, 0, 30, 10), {"above"}),
        ((20, 50, 30, 60), {"below"}),
        ((50, 50, 60, 60), {"right of", "below"}),
        ((21, 20, 31, 30), set()),  # nearer than a tenth of both sides
        ((20, 20, 30, 30), set()),
    ],
)
def test_places(box, relations):
    assert relations_of(box, (20, 20, 30, 30)) == relations


@pytest.mark.parametrize(
    "row, found, colors, reason",
    [
        (0, {"circle": [object_at(0, 0)]}, ["red"], ""),
        (0, {"circle": [object_at(0, 0)]}, ["blue"], "circle is blue, not red"),
        (0, {}, [], "0 circle, 1 wanted"),
        (1, {"square": [object_at(0, 0), object_at(30, 0)]}, [], ""),
        (1, {"square": [object_at(0, 0)]}, [], "1 square, 2 wanted"),
        (1, {"square": [object_at(0, 0)] * 3}, [], "3 square, fewer than 3 wanted"),
        (2, {"circle": [object_at(40, 0)], "square": [object_at(0, 0)]}, [], ""),
        (2, {"circle": [object_at(0, 0)], "square": [object_at(40, 0)]}, [], "square is not left of the other"),
        (2, {"square": [object_at(0, 0)]}, [], "0 circle, 1 wanted; nothing that square could be left of"),
        # the surest counts: the second square, which lies left, does not
        (2, {"circle": [object_at(20, 0)], "square": [object_at(40, 0), object_at(0, 0, 0.5)]}, [], "square is not"),
    ],
)  # fmt: skip
def test_the_rules_of_its_evaluator(checkpoint, monkeypatch, row, found, colors, reason):
    judge = Mask2FormerJudge(checkpoint)
    thresholds = []
    monkeypatch.setattr(judge, "detect", lambda picture, threshold: thresholds.append(threshold) or found)
    monkeypatch.setattr(judge, "colors_of", lambda picture, found, name: colors)
    is_right, why = judge(Image.new("RGB", (64, 64)), ENTRIES[row])
    assert is_right == (not reason) and why.startswith(reason)
    assert thresholds == [0.9 if ENTRIES[row]["tag"] == "counting" else 0.3]


def test_objects_and_colors_with_random_weights(checkpoint):
    """Boxes hold their masks, scores fall, and a color is one of ten whatever else is asked."""
    judge = Mask2FormerJudge(checkpoint)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    detected = judge.detect(picture, 0.01)
    assert detected and set(detected) <= set(NAMES)
    for found in detected.values():
        assert [item.score for item in found] == sorted((item.score for item in found), reverse=True)
        for item in found:
            left, top, right, bottom = map(int, item.box)
            assert item.mask.shape == (48, 64) and item.mask[top:bottom, left:right].sum() == item.mask.sum() > 0
    some = next(iter(detected.values()))
    assert judge.colors_of(picture, some, "circle") == [judge.colors_of(picture, [one], "circle")[0] for one in some]
    assert judge.detect(picture, 0.999) == {}


def test_the_command_judges_resumes_and_labels(checkpoint, tmp_path, capsys):
    prompts, out = tmp_path / "evaluation_metadata.jsonl", tmp_path / "out"
    prompts.write_text("".join(json.dumps(entry) + "\n" for entry in ENTRIES))
    suite = ["eval", "--suite", "geneval", "--prompts", str(prompts), "--model", "tiny", "-o", str(out)]
    assert main(suite) == 0
    assert main([*suite, "--judge", f"mask2former:{checkpoint}"]) == 0
    result = json.loads((out / "evaluation.json").read_text())
    assert result["judge"] == f"mask2former:{checkpoint}" and set(result["metrics"]["category"]) >= {"counting"}
    (path,) = out.glob("results-mask2former-*.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])  # a stop in the middle of a line
    assert main([*suite, "--judge", f"mask2former:{checkpoint}"]) == 0
    assert path.read_bytes() == whole and whole.count(b"\n") == 12
    assert main([*suite, "--judge", f"import:{path}"]) == 0
    assert json.loads((out / "evaluation.json").read_text())["metrics"] == result["metrics"]
    capsys.readouterr()


def test_what_it_cannot_judge_is_named(checkpoint, tmp_path):
    judge = Mask2FormerJudge(checkpoint)
    judge.check({"include": [{"class": "computer mouse"}]})
    with pytest.raises(InputError, match="knows no 'dragon'; give a Mask2Former of COCO's instances"):
        judge.check({"include": [{"class": "circle"}], "exclude": [{"class": "dragon"}]})
    with pytest.raises(InputError, match="'teal' is none of its colors"):
        judge.check({"include": [{"class": "circle", "color": "teal"}]})
    with pytest.raises(InputError, match="cannot be loaded .*; give a folder with Mask2Former"):
        Mask2FormerJudge(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        Mask2FormerJudge(tmp_path / "none")


def test_weights_that_are_missing_are_no_judge(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    for path in checkpoint.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(checkpoint / "model.safetensors")
    tensors.pop("class_predictor.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="class_predictor.weight is missing"):
        Mask2FormerJudge(tmp_path)
