"""Families that draw latents, from checkpoint to exported policy: self-play, killed and not, every task."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from hermesflow import load_model, tasks
from hermesflow.algorithms.algorithm import batch_logprobs
from hermesflow.algorithms.latent_packing import FlowDraw, draw_flow, flow_weight
from hermesflow.algorithms.packers import make_packer
from hermesflow.algorithms.packing import check_pairs
from hermesflow.algorithms.pair_dpo import PairDPO, pass_objective
from hermesflow.algorithms.policy import Policy
from hermesflow.algorithms.references import LiveReference, make_reference
from hermesflow.config import PAPER_OBJECTIVE, DrawingConfig, TrainConfig, load_config
from hermesflow.data.pairs import PAIRS_SCHEMA, read_pairs
from hermesflow.engine.image_tokenizers.kl_autoencoder import KLAutoencoder, KLAutoencoderConfig
from hermesflow.engine.latents import pack_latents, patchify, unpack_latents
from hermesflow.engine.weights import save_tensors
from hermesflow.kernels.span_tree import SpanTree
from hermesflow.runs import export_model
from hermesflow.runtime.files import InputError
from hermesflow.selfplay import run_selfplay
from hermesflow.training import train_pairs

BAGEL = Path(__file__).parents[2] / "data/bagel-tiny"
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
    """BAGEL's folder of random weights, with an autoencoder of FLUX.1's kind."""
    folder = shutil.copytree(BAGEL, tmp_path_factory.mktemp("bagel") / "model")
    torch.manual_seed(0)
    small = KLAutoencoderConfig(channels=8, channel_multipliers=(1, 1, 2, 2), num_res_blocks=1, num_groups=8)
    save_tensors(KLAutoencoder(small).state_dict(), folder / "ae.safetensors")
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
        for name in ("blocks.0.latent.mlp.up.weight", "blocks.1.attention.qkv.weight", "latent_in.weight"):
            assert not torch.equal(after.transformer.get_parameter(name), before.transformer.get_parameter(name)), name
        assert torch.equal(after.transformer.latent_places.weight, before.transformer.latent_places.weight)
        before = after


def test_a_killed_run_ends_alike(checkpoint, settings, whole, tmp_path, run_killed_once):
    run_killed_once(settings(checkpoint, tmp_path), tmp_path / "t/round-1/train")
    for number in (1, 2):
        ours, theirs = (load_model(folder / f"round-{number}/model").transformer for folder in (tmp_path / "t", whole))
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_every_task(checkpoint, whole, tmp_path):
    """Of the trained model, exported; its files hold the tensors that the checkpoint's do."""
    export_model(whole / "round-2/model", tmp_path / "exported")
    for name in ("ema.safetensors", "ae.safetensors"):
        assert set(load_file(tmp_path / "exported" / name)) == set(load_file(checkpoint / name))
    model, trained = load_model(tmp_path / "exported"), load_model(whole / "round-2/model")
    tree = SpanTree.build([(model.layout.text_prompt([5, 6, 7]), -1, "causal")])
    with torch.no_grad():
        ours, theirs = (each.transformer.head(each.transformer(tree)) for each in (model, trained))
    assert torch.equal(ours, theirs)
    model.set_image_size(64)
    sampling = replace(model.sampling, num_steps=4)
    drawn = list(tasks.generate_images(model, ["a red circle", "two squares"], num_images=2, sampling=sampling))
    assert len(drawn) == 4 and all(image.pixels.shape == (64, 64, 3) for image in drawn)
    assert not np.array_equal(drawn[0].pixels, drawn[1].pixels)
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
    wide = replace(sampling, grid=(2, 5))
    (rectangle,) = tasks.generate_images(model, ["a red circle"], sampling=wide)
    assert rectangle.pixels.shape == (32, 80, 3)
    assert len(model.caption([image])) == 1
    assert model.answer([image], "is there a circle?", choices=["yes", "no"])[0] in ("yes", "no")
    with pytest.raises(ValueError, match="BAGEL: expected a grid of at most 8 x 8"):
        model.set_image_size(144)


def test_tiny_flow_from_a_killed_run_to_every_task(tmp_path, run_killed_once):
    """The built-in model of this kind in its own world."""
    more = [*(item for item in SETTINGS if not item.startswith("model.")), "model.name=tiny-flow"]
    run_selfplay(load_config(None, [*more, f"run.folder={tmp_path / 'whole'}"]))
    run_killed_once([*more, f"run.folder={tmp_path / 'killed'}"], tmp_path / "killed/t/round-1/train")
    folders = [tmp_path / name / "t/round-2/model" for name in ("whole", "killed")]
    ours, theirs, shipped = (load_model(folder).transformer for folder in (*folders, "tiny-flow"))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not torch.equal(ours.blocks[0].mlp.up.weight, shipped.blocks[0].mlp.up.weight)
    # What it sees of an image stays, so that features that are kept stay true.
    assert torch.equal(ours.latent_in.weight, shipped.latent_in.weight)
    assert not torch.equal(ours.latent_out.weight, shipped.latent_out.weight)

    model = load_model(folders[0])
    drawn = list(tasks.generate_images(model, ["a small red circle"], num_images=2))
    assert [image.pixels.shape for image in drawn] == 2 * [(64, 64, 3)]
    Image.fromarray(drawn[0].pixels).save(tmp_path / "image.png")
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[32:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    image, kept = tmp_path / "image.png", model.encode_images(drawn[0].pixels[None])
    (painted,) = tasks.inpaint_images(model, image, tmp_path / "mask.png", "a small red circle")
    assert torch.equal(*(unpack_latents(codes.view(1, -1), 10)[0, :8].cpu() for codes in (painted.codes, kept)))
    (longer,) = tasks.extrapolate_image(model, image, "a small red circle", ["right"])
    assert longer.pixels.shape[0] == 64 and longer.pixels.shape[1] > 64
    assert model.caption([image])[0]
    assert model.answer([image], "is there a red circle ?", choices=["yes", "no"])[0] in ("yes", "no")


@pytest.mark.parametrize("more", ["train.dtype=bfloat16", "train.lora_rank=2"])
def test_tiny_flow_keeps_what_it_sees_by(tmp_path, more):
    """Whether its weights are sharded or have adapters, in the second round as in the first."""
    kept = [item for item in SETTINGS if not item.startswith("model.")]
    run_selfplay(load_config(None, [*kept, "model.name=tiny-flow", more, f"run.folder={tmp_path}"]))
    ours, shipped = (load_model(name).transformer for name in (tmp_path / "t/round-2/model", "tiny-flow"))
    for name, parameter in ours.latent_in.named_parameters():
        assert torch.equal(parameter, shipped.latent_in.get_parameter(name))
    assert not torch.equal(ours.blocks[0].mlp.up.weight, shipped.blocks[0].mlp.up.weight)


def test_grpo_is_refused(checkpoint, settings, tmp_path):
    more = [*settings(checkpoint, tmp_path), "selfplay.algorithm=grpo"]
    with pytest.raises(InputError, match="image decoder does not say how it draws; take pair-dpo"):
        run_selfplay(load_config(None, more))


# pairs


def make_table(model, num_pairs=3, seed=0):
    rng, layout, rows = np.random.default_rng(seed), model.layout, []
    for number in range(num_pairs):
        codes = {
            f"{role}_codes": pack_latents(torch.from_numpy(rng.standard_normal((layout.num_image_tokens, 64)))).tolist()
            for role in ("record", "win", "lose")
        }
        captions = {f"{role}_caption_ids": rng.integers(0, 250, 3 + number).tolist() for role in ("win", "lose")}
        rows.append({**dict.fromkeys(PAIRS_SCHEMA.names), "record_id": str(number), "sides": "both",
                     "caption": "a red circle", **codes, **captions})  # fmt: skip
    return pa.Table.from_pylist(rows, PAIRS_SCHEMA)


@pytest.fixture
def model(checkpoint):
    model = load_model(checkpoint, dtype=torch.float32)
    model.set_image_size(32)
    return model


def scored(model, packer, visits, reference=None):
    batch = packer.pack(visits, totals=packer.num_pairs(visits))
    now = batch_logprobs(model.transformer, batch)
    before = now.detach() if reference is None else reference.logprobs(batch)
    return now, before, batch, *pass_objective(now, before, batch, batch.totals, packer.config)


def test_an_images_score_is_the_mean_error(model, monkeypatch):
    """Diffusion-DPO's loss from the velocities themselves, under given draws."""
    config, table = TrainConfig(**PAPER_OBJECTIVE | {"masks_per_pair": 1, "generation_beta": 7.0}), make_table(model)
    packer = make_packer(model, table, config, 0).only("generation")
    noise = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr("hermesflow.algorithms.latent_packing.draw_flow", lambda *_: [FlowDraw(0.7, noise, 1 / 4)])
    visits = [packer.visits(0)[0]]
    now, _, batch, _, _ = scored(model, packer, visits)
    moved = now + 0.01 * torch.arange(len(now))
    loss, shares = pass_objective(moved, now.detach(), batch, batch.totals, packer.config)
    (pair, _) = visits[0]
    errors = []
    for role in ("win", "lose"):
        image = unpack_latents(torch.tensor(table[f"{role}_codes"][pair].as_py()), 64)
        layout = model.layout
        leaf = layout.image([0] * 4), 0, "full", layout.image_place
        tree = SpanTree.build([(layout.text_prompt(model.image_prompt("a red circle")), -1, "causal"), leaf])
        rows = torch.arange(4) + len(tree.token_ids) - 5
        embeds = model.transformer.latent_embeds(
            0.3 * image + 0.7 * noise, torch.full((4,), 0.7), model.transformer.places_of(layout.image_grid)
        )
        velocity = model.transformer.velocities(model.transformer(tree, embeds=(rows, embeds), rows=rows))
        errors.append(((velocity - (noise - image)) ** 2).mean())
    assert batch.sides["generation"].pair_sums(now * batch.sides["generation"].token_weight)[0].tolist() == (
        pytest.approx([-float(error) / 2 for error in errors], abs=1e-4)
    )
    expected = [moved[:4].mean() - now[:4].mean(), moved[4:].mean() - now[4:].mean()]
    assert float(loss) == pytest.approx(float(-F.logsigmoid(7.0 * (expected[0] - expected[1]))), abs=1e-5)
    assert float(shares["generation/margin"]) == pytest.approx(float(7.0 * (expected[0] - expected[1])), abs=1e-4)


def test_equal_images_teach_nothing(model):
    rows = make_table(model).to_pylist()
    for row in rows:
        row["lose_codes"], row["lose_caption_ids"] = row["win_codes"], row["win_caption_ids"]
    config = TrainConfig(**PAPER_OBJECTIVE | {"masks_per_pair": 2})
    packer = make_packer(model, pa.Table.from_pylist(rows, PAIRS_SCHEMA), config, 0)
    *_, loss, shares = scored(model, packer, packer.visits(0))
    assert float(shares["generation/loss"]) == pytest.approx(np.log(2), abs=1e-6)
    loss.backward()
    gradients = [weight.grad for weight in model.transformer.parameters() if weight.grad is not None]
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-4
    assert packer.config.generation_beta == 500.0
    model.transformer.zero_grad(set_to_none=True)


def test_cached_and_live_references_agree_over_visits(model, tmp_path):
    config = TrainConfig(masks_per_pair=2, pairs_per_step=3, replay_weight=0.0)
    packer = make_packer(model, make_table(model), config, 5)
    visits = [visit for step in range(3) for visit in packer.visits(step)]
    policy = Policy(model, config, 0)
    live = LiveReference(policy.transformer)
    cached = make_reference(policy, packer, visits, tmp_path / "reference.parquet")
    for step in range(3):
        chosen = packer.visits(step)
        batch, again = (packer.pack(chosen) for _ in range(2))
        assert torch.equal(batch.noised, again.noised) and torch.equal(batch.times, again.times)
        assert torch.allclose(cached.logprobs(batch), live.logprobs(batch), atol=1e-4)
    one, other = (packer.pack([visit._replace(visit=number)]) for visit in visits[:1] for number in (0, 1))
    assert not torch.equal(one.times, other.times)


def test_errors_are_logged_by_time(model):
    """What the quarters add to adds up to the mean error, over passes too."""
    config = TrainConfig(masks_per_pair=4, pairs_per_step=3, replay_weight=0.0, tokens_per_pass=120)
    learner = PairDPO(model, make_table(model), config, 0)
    visits = learner.visits(0)
    assert learner.metric_names(visits)[-4:] == [f"generation/error_t{quarter}" for quarter in (1, 2, 3, 4)]
    sums, errors = torch.zeros(4), []
    passes = learner.passes(visits)
    for one, _ in passes:
        batch = one(torch.device("cpu"))
        with torch.no_grad():
            logprob = batch_logprobs(model.transformer, batch)
        _, shares = learner.loss(logprob.requires_grad_(), logprob.detach(), batch)
        sums += torch.stack([shares[f"generation/error_t{quarter}"] for quarter in (1, 2, 3, 4)])
        errors.append(-2 * batch.split(logprob)["generation"])
    assert len(passes) > 1 and float(sums.sum()) == pytest.approx(float(torch.cat(errors).mean()), rel=1e-4)


def test_draws(model):
    """Times of a shifted normal number, noise of both signs, weights that add up."""
    config = TrainConfig(masks_per_pair=4)
    draws = draw_flow((6, 4), config, np.random.default_rng(0), 3.0)
    assert [draw.time for draw in draws[::2]] == [draw.time for draw in draws[1::2]]
    assert torch.equal(draws[0].noise, -draws[1].noise) and not torch.equal(draws[0].noise, draws[2].noise)
    assert sum(draw.weight for draw in draws) * 6 == pytest.approx(1)
    plain = replace(config, complementary_masks=False)
    rng = np.random.default_rng(1)
    times = np.array([draw.time for _ in range(500) for draw in draw_flow((1, 2), plain, rng, 3.0)])
    logits = np.log(times / (1 - times)) - np.log(3.0)
    assert abs(logits.mean()) < 0.1 and abs(logits.std() - 1) < 0.05
    assert all(draw.weight == 1.0 for draw in draw_flow((6, 4), replace(plain, length_normalize=True), rng, 1.0))


def test_weights_of_the_bound():
    """Of a Gaussian whose velocity is known, the weighted draws give differences of its log-density."""
    spread, rng = 0.5, np.random.default_rng(0)
    # For x ~ N(0, spread^2): E[eps - x | x_t] = x_t (t - (1 - t) spread^2) / (t^2 + (1 - t)^2 spread^2).
    points, totals, count = np.array([0.2, 1.4]), np.zeros(2), 200_000
    normals = rng.standard_normal(count)
    times, noise = 1 / (1 + np.exp(-normals)), rng.standard_normal(count)
    weights = np.array([flow_weight(time, normal) for time, normal in zip(times, normals, strict=True)])
    for place, point in enumerate(points):
        at = (1 - times) * point + times * noise
        velocity = at * (times - (1 - times) * spread**2) / (times**2 + (1 - times) ** 2 * spread**2)
        totals[place] = (weights * -0.5 * (velocity - (noise - point)) ** 2).mean()
    expected = -(points[0] ** 2 - points[1] ** 2) / (2 * spread**2)
    assert totals[0] - totals[1] == pytest.approx(expected, rel=0.1)


def test_latents_in_sixteen_bits():
    latents = torch.randn(3, 5, 8) * 3
    packed = pack_latents(latents)
    assert packed.shape == (3, 20) and packed.dtype == torch.int64
    assert torch.equal(unpack_latents(packed, 8), latents.half().float())
    column = pa.array(packed.tolist(), pa.list_(pa.int32()))
    assert torch.equal(torch.tensor(column.to_pylist()), packed)
    odd = torch.tensor([[float("nan"), float("inf")], [-float("inf"), 1e6]])
    assert unpack_latents(pack_latents(odd), 2).tolist() == [[65504.0, 65504.0], [-65504.0, 65504.0]]
    assert unpack_latents(torch.tensor([-1]), 2).isnan().all()
    assert patchify(torch.zeros(1, 16, 4, 4), 2).shape == (1, 4, 64)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_rank": 2},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "lora_rank": 2, "reference": "live"},
        {"activation_checkpointing": True, "condition_dropout": 0.5},
        {"elbo_weighting": True, "generation_beta": 1e-4},
        {"length_normalize": True},
        {"loss_type": "simpo"},
    ],
    ids=str,
)
def test_ways_to_train(model, tmp_path, settings):
    """Adapters on both experts, sharded layers, recomputed activations, other weights of draws."""
    before = {name: weight.clone() for name, weight in model.transformer.named_parameters()}
    config = TrainConfig(
        num_steps=3, pairs_per_step=2, masks_per_pair=2, warmup_steps=0, lr=1e-3, replay_weight=0.0, **settings
    )
    train_pairs(model, make_table(model), config, seed=0, folder=tmp_path / "train")
    after = dict(model.transformer.named_parameters())
    assert after.keys() == before.keys()
    for name in ("blocks.0.attention.qkv.weight", "blocks.1.latent.mlp.up.weight"):
        assert not torch.equal(after[name], before[name]) and after[name].isfinite().all()
    assert torch.equal(after["latent_places.weight"], before["latent_places.weight"])


# what is damaged


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("config.json", {"latent_patch_size": 4}, "latent_patch_size 4 is not supported, 2 is"),
        ("config.json", {"interpolate_pos": True}, "interpolate_pos True is not supported"),
        ("config.json", {"timestep_shift": True}, "timestep_shift is True, no number above 0"),
        ("llm_config.json", {"rope_scaling": {"factor": 2}}, "rope_scaling .* is not supported"),
        ("llm_config.json", {"layer_module": [1]}, r"layer_module \[1\] is not supported"),
        ("llm_config.json", {"head_dim": 32}, "head_dim 32 is not supported, 16 is"),
        ("vit_config.json", {"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ("config.json", {"max_latent_size": "8"}, "expected max_latent_size and vit_max_num_patch_per_side from 1"),
        ("config.json", {"timestep_shift": -1}, "timestep_shift is -1, no number above 0"),
        ("llm_config.json", {"layer_module": "Other"}, "layer_module 'Other' is not supported"),
        ("llm_config.json", {"tie_word_embeddings": True}, "tie_word_embeddings True is not supported, False is"),
        ("llm_config.json", {"hidden_size": 32}, "does not fit"),
        ("vit_config.json", {"patch_size": 0}, "patch_size 0 and 3 layers do not fit"),
    ],
)
def test_damaged_configurations_are_named(checkpoint, tmp_path, name, changes, message):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(values | changes))
    with pytest.raises(InputError, match=message):
        load_model(folder)


def test_an_autoencoder_that_gives_nan_is_named(model):
    for part in (model.vq_tokenizer.decoder, model.vq_tokenizer.encoder):
        with torch.no_grad():
            part.conv_out.bias[0] = float("nan")
    for call in (lambda: model.generate("a star"), lambda: model.encode_images(np.zeros((1, 32, 32, 3), np.uint8))):
        with pytest.raises(RuntimeError, match=r"ae.safetensors: the autoencoder gives no finite numbers; .*NaN"):
            call()


@pytest.mark.parametrize("code", [-1, 0x7E00, 0x7C00])
def test_latents_that_are_no_numbers_are_named(model, code):
    rows = make_table(model).to_pylist()
    rows[1]["win_codes"][3] = code
    with pytest.raises(InputError, match="record 1: expected finite latents of 16 bits"):
        check_pairs(pa.Table.from_pylist(rows, PAIRS_SCHEMA), model)


def test_a_single_step_is_refused(checkpoint, model):
    with pytest.raises(InputError, match="expected num_steps from 2 .* got 1"):
        model.sampling_of(DrawingConfig(num_steps=1))


def test_weights_that_do_not_fit_are_listed(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    tensors = load_file(folder / "ema.safetensors")
    tensors["extra"] = tensors.pop("llm2vae.bias")
    tensors["vae2llm.bias"] = tensors["vae2llm.bias"][:5].clone()
    save_tensors(tensors, folder / "ema.safetensors")
    with pytest.raises(InputError) as error:
        load_model(folder)
    for part in ("llm2vae.bias", "extra", "vae2llm.bias"):
        assert part in str(error.value)


def test_an_autoencoder_that_is_missing_or_another_is_named(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / "ae.safetensors").unlink()
    with pytest.raises(InputError, match=r"ae.safetensors: is not there; put FLUX.1's autoencoder"):
        load_model(folder).generate("a star")
    save_tensors({"a": torch.zeros(2)}, folder / "ae.safetensors")
    with pytest.raises(InputError, match="holds no autoencoder of FLUX.1's kind"):
        load_model(folder).generate("a star")
    save_tensors(
        KLAutoencoder(KLAutoencoderConfig(channels=8, latent_channels=4, num_groups=8)).state_dict(),
        folder / "ae.safetensors",
    )
    with pytest.raises(InputError, match="gives latents of 16 numbers, the model draws 64"):
        load_model(folder).generate("a star")
