"""Show-o2, from checkpoint to exported policy: self-play, killed and not, every task."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hermesflow import load_model, tasks
from hermesflow.config import load_config
from hermesflow.data.pairs import read_pairs
from hermesflow.engine.image_tokenizers.wan import WanAutoencoder, WanAutoencoderConfig
from hermesflow.engine.latents import unpack_latents
from hermesflow.engine.weights import save_tensors
from hermesflow.kernels.span_tree import SpanTree
from hermesflow.runs import export_model
from hermesflow.runtime.files import InputError
from hermesflow.selfplay import run_selfplay

FOLDER = Path(__file__).parents[2] / "data/showo2-tiny"
SETTINGS = (
    "data.num_records=4", "selfplay.num_rounds=2", "curation.num_images=2", "curation.batch_records=2",
    "curation.threshold=0", "curation.margin=0", "curation.keep=any", "curation.caption_top_k=[2]",
    "curation.caption_scorer=hermesflow.benchmarks.study.scorers:random_captions",
    "train.num_steps=6", "train.pairs_per_step=2", "train.warmup_steps=0", "train.masks_per_pair=2",
    "train.lr=1e-3", "train.checkpoint_every=1", "eval.num_prompts=3", "eval.num_understanding=3",
    "eval.images_per_prompt=1", "drawing.guidance_scale=0.5", "drawing.num_steps=3", "curation.num_steps=3",
    "model.image_size=32", "run.name=t",
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of random weights, with SigLIP's shape and an autoencoder of Wan2.1's kind."""
    folder = shutil.copytree(FOLDER, tmp_path_factory.mktemp("show-o2") / "model")
    (folder / "siglip").mkdir()
    (folder / "siglip/config.json").write_text(json.dumps({"vision_config": {"num_attention_heads": 2}}))
    torch.manual_seed(0)
    coder = WanAutoencoder(WanAutoencoderConfig(channels=8, num_res_blocks=1))
    for weight in coder.parameters():
        weight.data = torch.randn(weight.shape) * (weight.numel() / len(weight)) ** -0.5
    save_tensors(coder.state_dict(), folder / "Wan2.1_VAE.pth")
    return folder


def test_two_rounds_train_both_sides(checkpoint, whole):
    before = load_model(checkpoint, dtype=torch.float32)
    for number in (1, 2):
        pairs = read_pairs(whole / f"round-{number}" / "pairs.parquet")
        assert len(pairs) and len(pairs["win_codes"][0]) == 4 * 64 // 2
        lines = [json.loads(line) for line in (whole / f"round-{number}/train/metrics.jsonl").read_text().splitlines()]
        for side in ("generation", "understanding"):
            losses = [line[f"{side}/loss"] for line in lines if f"{side}/loss" in line]
            assert losses and np.isfinite(losses).all()
        assert lines[0]["replay/kl"] == pytest.approx(0, abs=1e-5)
        assert lines[0].get("generation/margin", 0) == pytest.approx(0, abs=1e-3)
        after = load_model(whole / f"round-{number}" / "model", dtype=torch.float32)
        for name in ("flow_head.blocks.0.modulation.1.weight", "blocks.1.attention.qkv.weight", "embed.weight"):
            assert not torch.equal(after.transformer.get_parameter(name), before.transformer.get_parameter(name)), name
        assert after.transformer.head.weight is after.transformer.embed.weight
        assert all(
            torch.equal(*pair) for pair in zip(after.vision.parameters(), before.vision.parameters(), strict=True)
        )
        before = after


def test_a_killed_run_ends_alike(checkpoint, settings, whole, tmp_path, run_killed_once):
    run_killed_once(settings(checkpoint, tmp_path), tmp_path / "t/round-1/train")
    for number in (1, 2):
        ours, theirs = (load_model(folder / f"round-{number}/model").transformer for folder in (tmp_path / "t", whole))
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("more", ["train.dtype=bfloat16", "train.lora_rank=2"])
def test_sharded_weights_and_adapters(checkpoint, settings, tmp_path, more):
    run_selfplay(load_config(None, [*settings(checkpoint, tmp_path), "selfplay.num_rounds=1", more]))
    ours, theirs = (load_model(folder).transformer for folder in (tmp_path / "t/round-1/model", checkpoint))
    for name in ("flow_head.blocks.1.attention.qkv.weight", "blocks.0.mlp.up.weight"):
        assert not torch.equal(ours.get_parameter(name), theirs.get_parameter(name).to(ours.embed.weight)), name


def test_every_task(checkpoint, whole, tmp_path):
    """Of the trained model, exported; its files hold the tensors that the checkpoint's do."""
    export_model(whole / "round-2/model", tmp_path / "exported")
    for name in ("pytorch_model.bin", "Wan2.1_VAE.pth"):
        ours, theirs = (torch.load(folder / name, weights_only=True) for folder in (tmp_path / "exported", checkpoint))
        assert ours.keys() == theirs.keys()
    model, trained = load_model(tmp_path / "exported"), load_model(whole / "round-2/model")
    tree = SpanTree.build([(model.layout.text_prompt([5, 6, 7]), -1, "causal")])
    with torch.no_grad():
        ours, theirs = (each.transformer.head(each.transformer(tree)) for each in (model, trained))
    assert torch.equal(ours, theirs)
    sampling = replace(model.sampling, num_steps=4)
    drawn = list(tasks.generate_images(model, ["a red circle", "two squares"], num_images=2, sampling=sampling))
    assert len(drawn) == 4 and all(image.pixels.shape == (64, 64, 3) for image in drawn)
    assert not np.array_equal(drawn[0].pixels, drawn[1].pixels)
    (alone,) = tasks.generate_images(model, ["two squares"], num_images=1, seed=2, sampling=sampling)
    latents = [unpack_latents(image.codes.view(1, -1), 64) for image in (alone, drawn[2])]
    assert torch.allclose(*latents, atol=2e-2)
    Image.fromarray(drawn[0].pixels).save(tmp_path / "image.png")
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[32:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    (painted,) = tasks.inpaint_images(model, image, mask, "a red circle", sampling=sampling)
    kept, found = (
        unpack_latents(codes, 64).view(4, 4, 64)
        for codes in (model.encode_images(drawn[0].pixels[None])[0], painted.codes)
    )
    assert torch.equal(found[:2], kept[:2].cpu()) and not torch.allclose(found[2:], kept[2:].cpu())
    (longer,) = tasks.extrapolate_image(model, image, "a red circle", ["right"], sampling=sampling)
    assert longer.pixels.shape == (64, 96, 3)
    (rectangle,) = tasks.generate_images(model, ["a red circle"], sampling=replace(sampling, grid=(2, 5)))
    assert rectangle.pixels.shape == (32, 80, 3)
    assert len(model.caption([image])) == 1
    assert model.answer([image], "is there a circle?", choices=["yes", "no"])[0] in ("yes", "no")
    many = model.caption([image] * 3 + [drawn[1].pixels])
    assert many[0] == many[2] == model.caption([image])[0] and many[3] == model.caption([drawn[1].pixels])[0]


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("config.json", {"patch_size": 4}, "patch_size 4 is not supported, 2 is"),
        ("config.json", {"add_time_embeds": False}, "add_time_embeds False is not supported, True is"),
        ("config.json", {"llm_vocab_size": None}, "llm_vocab_size: expected a number from 1, got None"),
        ("config.json", {"llm_vocab_size": 200}, "has 277 ids, the checkpoint's llm_vocab_size is 200"),
        ("config.json", {"llm_model_path": 3}, "llm_model_path: expected a text, got 3"),
        ("llm/config.json", {"model_type": "llama"}, "the language model is of type 'llama'"),
        ("llm/config.json", {"hidden_size": 32}, "does not fit"),
        ("siglip/config.json", {"vision_config": {"num_attention_heads": 3}}, "num_attention_heads is 3 at a width"),
    ],
)  # fmt: skip
def test_damaged_configurations_are_named(checkpoint, tmp_path, name, changes, message):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(values | changes))
    with pytest.raises(InputError, match=message):
        load_model(folder)


def test_what_is_missing_is_named(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / "siglip/config.json").unlink()
    with pytest.raises(InputError, match="the heads of a SigLIP of width 32 are not known; put google/siglip-so400m"):
        load_model(folder)
    folder = shutil.copytree(checkpoint, tmp_path / "other")
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    del tensors["diffusion_head_a.1.mlp.up_proj.weight"]
    tensors["extra"] = tensors.pop("diffusion_head_b.linear.bias")
    save_tensors(tensors, folder / "pytorch_model.bin")
    with pytest.raises(InputError) as error:
        load_model(folder)
    for part in ("missing diffusion_head_a.1.mlp.up_proj.weight", "missing diffusion_head_b.linear.bias", "extra"):
        assert part in str(error.value)
    del tensors["position_embedding.weight"]
    save_tensors(tensors, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"config.json: not the shape of a model .*position_embedding"):
        load_model(folder)
