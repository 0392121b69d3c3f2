"""SEED-X, from checkpoint to exported policy: self-play, killed and not, every task, and noise that is calibrated."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hermesflow import load_model, tasks
from hermesflow.algorithms.algorithm import batch_logprobs
from hermesflow.algorithms.packers import make_packer
from hermesflow.algorithms.pair_dpo import pass_objective
from hermesflow.algorithms.policy import Policy
from hermesflow.algorithms.references import LiveReference, make_reference
from hermesflow.config import PAPER_OBJECTIVE, TrainConfig
from hermesflow.data.pairs import PAIRS_SCHEMA, read_pairs
from hermesflow.engine.latents import pack_latents, unpack_latents
from hermesflow.engine.weights import read_tensors, save_tensors
from hermesflow.kernels.span_tree import SpanTree
from hermesflow.runs import export_model
from hermesflow.runtime.files import InputError

FOLDER = Path(__file__).parents[2] / "data/seedx-tiny"
SETTINGS = (
    "data.num_records=4", "selfplay.num_rounds=2", "curation.num_images=2", "curation.batch_records=2",
    "curation.threshold=0", "curation.margin=0", "curation.keep=any", "curation.caption_top_k=[2]",
    "curation.caption_scorer=hermesflow.benchmarks.study.scorers:random_captions",
    "train.num_steps=6", "train.pairs_per_step=2", "train.warmup_steps=0", "train.nll_weight=0.1",
    "train.lr=1e-3", "train.checkpoint_every=1", "eval.num_prompts=3", "eval.num_understanding=3",
    "eval.images_per_prompt=1", "model.image_size=64", "run.name=t",
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of random weights, with an SDXL of their sizes."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel

    folder = shutil.copytree(FOLDER, tmp_path_factory.mktemp("seed-x") / "model")
    sdxl = folder / "stable-diffusion-xl-base-1.0"
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=(2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20, cross_attention_dim=32,
    )  # fmt: skip
    coder = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    for name, part in (("unet", unet), ("vae", coder), ("scheduler", scheduler)):
        part.save_pretrained(sdxl / name)
    return folder


@pytest.fixture
def model(checkpoint):
    model = load_model(checkpoint, dtype=torch.float32)
    model.set_image_size(64)
    model.vq_tokenizer.num_steps = 4
    return model


def test_two_rounds_train_both_sides(checkpoint, whole):
    before = load_model(checkpoint, dtype=torch.float32)
    for number in (1, 2):
        pairs = read_pairs(whole / f"round-{number}" / "pairs.parquet")
        assert len(pairs) and len(pairs["win_codes"][0]) == before.layout.code_length
        lines = [json.loads(line) for line in (whole / f"round-{number}/train/metrics.jsonl").read_text().splitlines()]
        for side in ("generation", "understanding"):
            losses = [line[f"{side}/loss"] for line in lines if f"{side}/loss" in line]
            assert losses and np.isfinite(losses).all()
        assert lines[0].get("generation/margin", 0) == pytest.approx(0, abs=1e-3)
        after = load_model(whole / f"round-{number}" / "model", dtype=torch.float32)
        for name in ("feature_out.query", "feature_out.attn.in_proj_weight", "blocks.1.attention.qkv.weight"):
            assert not torch.equal(after.transformer.get_parameter(name), before.transformer.get_parameter(name)), name
        assert torch.equal(after.transformer.feature_out.pos_embed, before.transformer.feature_out.pos_embed)
        for part in ("view", "tower"):
            pairs_of = zip(after.parts[part].parameters(), before.parts[part].parameters(), strict=True)
            assert all(torch.equal(*pair) for pair in pairs_of)
        before = after


def test_a_killed_run_ends_alike(checkpoint, settings, whole, tmp_path, run_killed_once):
    run_killed_once(settings(checkpoint, tmp_path), tmp_path / "t/round-1/train")
    for number in (1, 2):
        ours, theirs = (load_model(folder / f"round-{number}/model").transformer for folder in (tmp_path / "t", whole))
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_every_task(checkpoint, whole, tmp_path):
    export_model(whole / "round-2/model", tmp_path / "exported")
    for name in ("seed_x_i/llm", "seed_x_i/agent/pytorch_model.bin"):
        ours, theirs = (read_tensors(folder / name) for folder in (tmp_path / "exported", checkpoint))
        assert set(ours) == {name for name in theirs if not name.endswith("inv_freq")}
    model, trained = load_model(tmp_path / "exported"), load_model(whole / "round-2/model")
    tree = SpanTree.build([(model.layout.text_prompt([5, 6, 7]), -1, "causal")])
    with torch.no_grad():
        ours, theirs = (each.transformer.head(each.transformer(tree)) for each in (model, trained))
    assert torch.equal(ours, theirs)
    model.set_image_size(64)
    model.vq_tokenizer.num_steps = 4
    drawn = list(tasks.generate_images(model, ["a red circle", "two squares"], num_images=2))
    assert len(drawn) == 4 and all(image.pixels.shape == (64, 64, 3) for image in drawn)
    assert not np.array_equal(drawn[0].pixels, drawn[1].pixels)
    (alone,) = tasks.generate_images(model, ["two squares"], num_images=1, seed=2)
    assert np.abs(alone.pixels.astype(int) - drawn[2].pixels).max() <= 2
    still = list(
        tasks.generate_images(model, ["a red circle"], num_images=2, sampling=replace(model.sampling, temperature=0))
    )
    assert np.array_equal(still[0].pixels, still[1].pixels)
    Image.fromarray(drawn[0].pixels).save(tmp_path / "image.png")
    Image.fromarray(drawn[1].pixels).resize((150, 40)).save(tmp_path / "wide.png")
    images = [tmp_path / "image.png", tmp_path / "wide.png"]
    captions = model.caption(images)
    assert captions == [model.caption([image])[0] for image in images]
    assert model.answer(images, "is there a circle?", choices=["yes", "no"])[1] in ("yes", "no")
    with pytest.raises(InputError, match="draws whole images and keeps no part of one"):
        list(tasks.inpaint_images(model, images[0], images[0], "a red circle"))
    with pytest.raises(ValueError, match="expected a multiple of 64 pixels"):
        model.set_image_size(100)


def make_table(model, num_pairs=3, seed=0):
    rng, layout, rows = np.random.default_rng(seed), model.layout, []
    shape = layout.num_image_tokens, layout.latent_size
    for number in range(num_pairs):
        codes = {
            f"{role}_codes": pack_latents(torch.from_numpy(rng.standard_normal(shape))).tolist()
            for role in ("record", "win", "lose")
        }
        captions = {f"{role}_caption_ids": rng.integers(3, 250, 3 + number).tolist() for role in ("win", "lose")}
        rows.append({**dict.fromkeys(PAIRS_SCHEMA.names), "record_id": str(number), "sides": "both",
                     "caption": "a red circle", **codes, **captions})  # fmt: skip
    return pa.Table.from_pylist(rows, PAIRS_SCHEMA)


def scored(model, packer, visits):
    batch = packer.pack(visits, totals=packer.num_pairs(visits))
    now = batch_logprobs(model.transformer, batch)
    return now, batch, *pass_objective(now, now.detach(), batch, batch.totals, packer.config)


@pytest.mark.parametrize("is_calibrated", [False, True])
def test_an_images_score_is_its_gaussian_density(model, is_calibrated):
    """Its ratio is linear in the features, and in the noise's coordinates a sample's own noise comes back."""
    if is_calibrated:
        calibrate(model)
    noise, layout = model.transformer.noise, model.layout
    packer = make_packer(model, make_table(model), TrainConfig(nll_weight=0.1), 0).only("generation")
    visits = [packer.visits(0)[0]]
    now, batch, _, _ = scored(model, packer, visits)
    assert len(now) == 2
    prompt = model.image_prompt("a red circle")
    drawn = model.engine.image_decoder.features([prompt])[0]
    codes = [packer._tokens[name][visits[0].pair].astype(np.int64) for name in ("win_codes", "lose_codes")]
    images = [unpack_latents(torch.from_numpy(each), layout.latent_size) for each in codes]
    for found, image in zip(now.tolist(), images, strict=True):
        flat = (drawn - image).flatten()
        if is_calibrated:
            flat = noise.directions @ flat
        assert found == pytest.approx(-float((flat / noise.scales).square().sum()) / 2, rel=1e-4)
    seeds = torch.tensor([3, 4])
    eps = noise.coordinates(noise.draw(seeds, drawn.shape))
    assert torch.allclose(eps, noise.coordinates(noise.draw(seeds[:1], drawn.shape)).expand_as(eps), atol=1e-4) is False
    assert eps.std() == pytest.approx(1, abs=0.4 if is_calibrated else 0.05)


def test_equal_images_teach_their_distance_alone(model):
    rows = make_table(model).to_pylist()
    for row in rows:
        row["lose_codes"], row["lose_caption_ids"] = row["win_codes"], row["win_caption_ids"]
    packer = make_packer(model, pa.Table.from_pylist(rows, PAIRS_SCHEMA), TrainConfig(nll_weight=1e-9), 0)
    *_, loss, shares = scored(model, packer, packer.visits(0))
    assert float(shares["generation/loss"]) == pytest.approx(np.log(2), abs=1e-6)
    loss.backward()
    gradients = [weight.grad for weight in model.transformer.parameters() if weight.grad is not None]
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-3
    model.transformer.zero_grad(set_to_none=True)


def test_the_loss_has_one_minimum(model):
    """From two starts the features of a prompt end at the same place, between reference and win."""
    noise = model.transformer.noise
    win, lose, before = torch.randn(3, 16, 128, generator=torch.Generator().manual_seed(0)) * noise.scales
    ends = []
    for start in (before, lose - 5 * noise.scales):
        features = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([features], max_iter=200, line_search_fn="strong_wolfe")

        def loss(features=features, optimizer=optimizer):
            optimizer.zero_grad()
            now, then = ([noise.logprob(f, z) for z in (win, lose)] for f in (features, before))
            ratio = (now[0] - then[0]) - (now[1] - then[1])
            value = -torch.nn.functional.logsigmoid(0.1 * ratio) - 0.1 * now[0]
            value.backward()
            return value

        for _ in range(5):
            optimizer.step(loss)
        ends.append(features.detach())
    assert torch.allclose(*ends, atol=1e-2 * float(noise.scales))


def test_cached_and_live_references_agree(model, tmp_path):
    config = TrainConfig(nll_weight=0.1, pairs_per_step=3, replay_weight=0.0)
    packer = make_packer(model, make_table(model), config, 5)
    visits = [visit for step in range(2) for visit in packer.visits(step)]
    policy = Policy(model, config, 0)
    live = LiveReference(policy.transformer)
    cached = make_reference(policy, packer, visits, tmp_path / "reference.parquet")
    for step in range(2):
        batch = packer.pack(packer.visits(step))
        assert sum(map(packer.num_tokens, packer.visits(step))) >= len(batch.tree.token_ids)
        assert torch.allclose(cached.logprobs(batch), live.logprobs(batch), rtol=1e-5, atol=1e-3)


def test_preference_without_a_minimum_is_refused(model):
    with pytest.raises(InputError, match="train.nll_weight: expected more than 0"):
        make_packer(model, make_table(model), TrainConfig(**PAPER_OBJECTIVE), 0)


def calibrate(model, rank=5):
    rng = np.random.default_rng(1)
    captions = ["a red circle", "two squares", "a blue star", "a green box"] * 2
    model.calibrate_noise(rng.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8), captions, rank)


def test_calibrated_noise_is_kept(model, tmp_path):
    """Its directions are those of the records' deviations, by a singular value decomposition."""
    calibrate(model)
    noise = model.transformer.noise
    assert torch.allclose(noise.directions @ noise.directions.T, torch.eye(5), atol=1e-4)
    model.save(tmp_path / "saved")
    again = load_model(tmp_path / "saved").transformer.noise
    assert torch.equal(again.directions, noise.directions) and torch.equal(again.scales, noise.scales)
    with pytest.raises(ValueError, match="expected more images than rank 9"):
        calibrate(model, 9)
    save_file({"scales": torch.ones(2), "directions": torch.ones(3, 7)}, tmp_path / "saved/feature_noise.safetensors")
    with pytest.raises(InputError, match="no noise of this model's features; calibrate it anew"):
        load_model(tmp_path / "saved")


def test_what_is_missing_or_does_not_fit_is_named(checkpoint, tmp_path):
    def broken(name, change):
        folder = shutil.copytree(checkpoint, tmp_path / name.replace("/", "-"))
        tensors = {name: tensor.clone() for name, tensor in read_tensors(folder / name).items()}
        change(tensors)
        save_tensors(tensors, folder / name)
        return folder

    folder = broken("seed_x_i/agent/pytorch_model.bin", lambda tensors: tensors.pop("patch_pos_embed"))
    with pytest.raises(InputError, match="missing patch_pos_embed"):
        load_model(folder)
    folder = broken("QwenViT/qwen_vit_G.pt", lambda tensors: tensors.update(extra=torch.zeros(2)))
    with pytest.raises(InputError, match="unexpected extra"):
        load_model(folder)
    name = "seed_detokenizer/first_stage/pytorch_model.bin"
    folder = broken(name, lambda tensors: tensors.update({"unet.other.weight": torch.zeros(2)}))
    with pytest.raises(InputError, match="does not fit SDXL .*other.weight"):
        load_model(folder).generate("a star")
    folder = shutil.copytree(checkpoint, tmp_path / "shards")
    (folder / "seed_x_i/llm/pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(InputError, match="shards are missing"):
        load_model(folder)
    folder = shutil.copytree(checkpoint, tmp_path / "sdxl")
    shutil.rmtree(folder / "stable-diffusion-xl-base-1.0/unet")
    with pytest.raises(InputError, match="not SDXL as diffusers keeps it"):
        load_model(folder).generate("a star")
    (folder / "configs/visual_encoder/qwen_vitg_448.yaml").write_text("heads: many")
    with pytest.raises(InputError, match="tower_heads is 'many'"):
        load_model(folder)


def test_tensors_of_the_unet_stand_in_place_of_sdxls(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    path = folder / "seed_detokenizer/first_stage/pytorch_model.bin"
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    tensors = {name: tensor.clone() for name, tensor in read_tensors(path).items()}
    tensors[f"unet.{name}"] = torch.full((16, 32), 0.5)
    save_tensors(tensors, path)
    assert bool((load_model(folder).vq_tokenizer.unet.get_parameter(name) == 0.5).all())
