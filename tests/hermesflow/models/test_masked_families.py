"""Bidirectional families, from checkpoint to exported policy: self-play, killed and not, every task."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hermesflow import load_model, tasks
from hermesflow.algorithms.packers import make_packer
from hermesflow.algorithms.policy import Policy
from hermesflow.algorithms.references import LiveReference, make_reference
from hermesflow.config import ModelConfig, TrainConfig, load_config
from hermesflow.data.pairs import read_pairs
from hermesflow.engine.image_tokenizers.magvit import VQTokenizer, VQTokenizerConfig
from hermesflow.engine.weights import save_tensors
from hermesflow.kernels.span_tree import SpanTree
from hermesflow.models import vqgan
from hermesflow.models.family import open_model
from hermesflow.models.magvit import save_vq_tokenizer
from hermesflow.runs import export_model
from hermesflow.runtime.files import InputError, write_json
from hermesflow.selfplay import run_selfplay

DATA = Path(__file__).parents[2] / "data"
FAMILIES = ("mmada-tiny", "dimoo-tiny")
SETTINGS = (
    "data.num_records=4", "selfplay.num_rounds=2", "curation.num_images=2", "curation.batch_records=2",
    "curation.threshold=0", "curation.margin=0", "curation.keep=any", "curation.caption_top_k=[2]",
    "curation.caption_scorer=hermesflow.benchmarks.study.scorers:random_captions",
    "train.num_steps=6", "train.pairs_per_step=2", "train.warmup_steps=0",
    "train.lr=1e-3", "train.checkpoint_every=1", "eval.num_prompts=3", "eval.num_understanding=3",
    "eval.images_per_prompt=1", "drawing.guidance_scale=0.5", "drawing.num_steps=3", "curation.num_steps=3",
    "model.image_size=64", "run.name=t",
)  # fmt: skip
VQ_MODEL = {
    "_class_name": "VQModel", "block_out_channels": [32, 32, 64, 64, 96], "layers_per_block": 1, "latent_channels": 8,
    "num_vq_embeddings": 64, "norm_num_groups": 16, "mid_block_add_attention": False, "lookup_from_codebook": True,
    "down_block_types": ["DownEncoderBlock2D"] * 5, "up_block_types": ["UpDecoderBlock2D"] * 5,
}  # fmt: skip


def write_checkpoint(name, folder):
    """The tiny checkpoint with an image tokenizer of random weights."""
    shutil.copytree(DATA / name, folder)
    torch.manual_seed(0)
    if name == "mmada-tiny":
        sizes = {"code_bits": 6, "channels": 8, "num_groups": 4}
        shape = {"channel_multipliers": (1, 1, 2, 2, 2), "num_res_blocks": (1, 1, 1, 1, 1)}
        save_vq_tokenizer(VQTokenizer(VQTokenizerConfig(**sizes, **shape)), (folder / "magvitv2").resolve())
        return folder
    (folder / "vqvae").mkdir()
    write_json(folder / "vqvae/config.json", VQ_MODEL)
    tokenizer = vqgan.VQGAN(vqgan.diffusers_config(VQ_MODEL))
    tensors = vqgan.tokenizer_tensors(tokenizer, vqgan.DIFFUSERS)
    save_tensors(tensors, folder / "vqvae/diffusion_pytorch_model.safetensors")
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    return write_checkpoint(request.param, tmp_path_factory.mktemp(request.param) / "model")


def test_two_rounds_train_both_sides(checkpoint, whole):
    before = load_model(checkpoint, dtype=torch.float32)
    for number in (1, 2):
        assert len(read_pairs(whole / f"round-{number}" / "pairs.parquet"))
        lines = [json.loads(line) for line in (whole / f"round-{number}/train/metrics.jsonl").read_text().splitlines()]
        for side in ("generation", "understanding"):
            losses = [line[f"{side}/loss"] for line in lines if f"{side}/loss" in line]
            assert losses and np.isfinite(losses).all()
        first = lines[0]
        assert first["replay/kl"] == pytest.approx(0, abs=1e-5)
        after = load_model(whole / f"round-{number}" / "model")
        assert not torch.equal(after.transformer.blocks[0].mlp.up.weight, before.transformer.blocks[0].mlp.up.weight)
        before = after


def test_a_killed_run_ends_alike(checkpoint, settings, whole, tmp_path, run_killed_once):
    run_killed_once(settings(checkpoint, tmp_path), tmp_path / "t/round-1/train")
    for number in (1, 2):
        ours, theirs = (load_model(folder / f"round-{number}/model").transformer for folder in (tmp_path / "t", whole))
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_every_task(checkpoint, whole, tmp_path):
    """Of the trained model, exported; its files hold the tensors that the checkpoint's do."""
    export_model(whole / "round-2/model", tmp_path / "exported")
    names = {path.name: set(load_file(path)) for path in checkpoint.rglob("*.safetensors") if path.parent == checkpoint}
    assert set(load_file(tmp_path / "exported/model.safetensors")) == names["model.safetensors"]
    model, trained = load_model(tmp_path / "exported"), load_model(whole / "round-2/model")
    tree = SpanTree.build([(model.layout.text_prompt([5, 6, 7]), -1, "full")])
    with torch.no_grad():
        ours, theirs = (each.transformer.head(each.transformer(tree)) for each in (model, trained))
    assert torch.equal(ours, theirs)
    model.set_image_size(64)
    sampling = replace(model.sampling, num_steps=3)
    drawn = list(tasks.generate_images(model, ["a red circle", "two squares"], num_images=2, sampling=sampling))
    assert len(drawn) == 4 and all(image.pixels.shape == (64, 64, 3) for image in drawn)
    Image.fromarray(drawn[0].pixels).save(tmp_path / "image.png")
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[32:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (painted,) = tasks.inpaint_images(
        model, tmp_path / "image.png", tmp_path / "mask.png", "a red circle", sampling=sampling
    )
    kept = model.encode_images(drawn[0].pixels[None])[0].view(4, 4)
    assert torch.equal(painted.codes.view(4, 4)[:2], kept[:2].cpu())
    assert len(model.caption([tmp_path / "image.png"])) == 1
    assert model.answer([tmp_path / "image.png"], "is there a circle?", choices=["yes", "no"])[0] in ("yes", "no")


def test_grpo_meets_the_law_of_the_drawing(checkpoint, settings, tmp_path):
    """At the first step the log-probabilities of the decoder and of training are the same."""
    more = ["selfplay.algorithm=grpo", "selfplay.num_rounds=1", "train.num_steps=2", "grpo.prompts_per_step=2"]
    more += ["grpo.num_images=3", "train.lr=1e-4"]
    run_selfplay(load_config(None, [*settings(checkpoint, tmp_path), *more]))
    lines = [json.loads(line) for line in (tmp_path / "t/round-1/train/metrics.jsonl").read_text().splitlines()]
    assert [line["drift"] for line in lines if "drift" in line] == pytest.approx([0, 0], abs=1e-4)
    masked = [*settings(checkpoint, tmp_path / "masked"), *more, "grpo.likelihood=masked"]
    run_selfplay(load_config(None, masked))


def test_images_and_answers_do_not_depend_on_their_batch(checkpoint):
    model = load_model(checkpoint, dtype=torch.float32)
    model.set_image_size(64)
    sampling = replace(model.sampling, num_steps=4)
    prompts = [model.image_prompt(text) for text in ("a red circle", "two green triangles above a star", "")]
    seeds = torch.arange(6).view(3, 2)
    together = model.engine.generate(prompts, num_images=2, seeds=seeds, sampling=sampling)
    for row, prompt in enumerate(prompts):
        for image in range(2):
            alone = model.engine.generate([prompt], num_images=1, seeds=seeds[row : row + 1, image : image + 1],
                                          sampling=sampling)  # fmt: skip
            assert torch.equal(alone[0, 0], together[row, image])
    pixels = [Image.fromarray(np.full((64, 64, 3), level, dtype=np.uint8)) for level in (10, 200)]
    questions = ["what is there?", "how many circles are there in the image?"]
    assert model.answer(pixels, questions) == [
        model.answer([image], question)[0] for image, question in zip(pixels, questions, strict=True)
    ]


def test_answers_by_several_masks(checkpoint):
    model = open_model(ModelConfig(name=str(checkpoint), answer_masks=3))
    codes = torch.randint(model.layout.codebook_size, (1, model.layout.num_image_tokens))
    question, choices = model.question_prompt("what is there?"), [model.encode_text(text) for text in ("a red", "two")]
    scores = model.engine.score_choices(codes, [[question]], [[choices]])
    model.answer_masks = 0
    assert scores != model.engine.score_choices(codes, [[question]], [[choices]])
    with pytest.raises(
        InputError, match="model.answer_masks: expected 0 in a model that answers token by token, got 2"
    ):
        open_model(ModelConfig(name="tiny", answer_masks=2))


def test_another_size_needs_a_family_of_any_size(checkpoint):
    model = load_model(checkpoint)
    with pytest.raises(ValueError, match="expected a multiple of 16 pixels; give one"):
        model.set_image_size(100)
    if checkpoint.parent.name.startswith("mmada"):
        with pytest.raises(ValueError, match="the model draws images of 4 x 4 codes alone"):
            model.set_image_size(128)
        return
    with pytest.raises(ValueError, match=r"expected grid as \(rows, columns\) from 1, of at most 65536 codes, got"):
        model.set_image_size(16 * 10**21)
    for grid in ((2.5, 4), ("2", "4"), 5, (True, 2), [2, 4], (2,), (0, 4), (2**10, 2**10)):
        with pytest.raises(ValueError, match="ImageSamplingParams: expected grid as"):
            replace(model.sampling, grid=grid)
    model.set_image_size(16)
    with pytest.raises(InputError, match="have 1 x 1 tokens, too few to be extended; raise model.image_size"):
        list(tasks.extrapolate_image(model, checkpoint / "none.png", "a star", ["left"]))


def test_unsupported_options_are_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"alibi": True, "block_type": "sequential"})
    with pytest.raises(InputError, match=r"config.json: .*block_type 'sequential', alibi True is not supported; give"):
        load_model(folder)
    if config["model_type"] == "mmada":
        write_json(folder / "config.json", config | {"num_vq_tokens": 2**40})
        with pytest.raises(InputError, match="num_vq_tokens as a square of such, got 64 and 1099511627776; restore it"):
            load_model(folder)
    else:
        write_json(folder / "config.json", config)
        for wrong in ({"act_fn": "relu"}, {"in_channels": 1}, {"norm_num_groups": None}, {"norm_type": "spatial"}):
            write_json(folder / "vqvae/config.json", VQ_MODEL | wrong)
            with pytest.raises(InputError, match=f"vqvae/config.json: .*{next(iter(wrong))}.*(give|restore)"):
                load_model(folder).vq_tokenizer  # noqa: B018
        write_json(folder / "vqvae/config.json", [])
        with pytest.raises(InputError, match=r"vqvae/config.json: the image tokenizer's configuration is .*restore it"):
            load_model(folder).vq_tokenizer  # noqa: B018
    write_json(folder / "config.json", config | {"embedding_size": 100})
    with pytest.raises(InputError, match="give the tokenizer that belongs to the checkpoint"):
        load_model(folder)


def test_a_grid_of_its_own_counts_in_the_law_of_a_drawing(checkpoint):
    if checkpoint.parent.name.startswith("mmada"):
        pytest.skip("MMaDA draws one grid alone")
    model = load_model(checkpoint, dtype=torch.float32)
    sampling = replace(model.sampling, num_steps=2, grid=(2, 3))
    prompt, seeds = [model.image_prompt("a red circle")], torch.arange(2)[None]
    drawn = model.engine.rollout(prompt, num_images=2, seeds=seeds, sampling=sampling)
    with torch.no_grad():
        again = model.engine.rollout_logprobs(prompt, drawn, sampling=sampling)
    assert drawn.codes.shape == (1, 2, 6) and (again - drawn.logprob).abs().max() < 1e-4


@pytest.mark.parametrize("complementary", [True, False])
def test_a_cached_reference_is_the_live_one_at_every_visit(checkpoint, whole, complementary, tmp_path):
    """Also where a pair comes back: captions have other masks then."""
    model, pairs = load_model(checkpoint, dtype=torch.float32), read_pairs(whole / "round-1" / "pairs.parquet")
    model.set_image_size(64)
    config = TrainConfig(pairs_per_step=len(pairs), masks_per_pair=2, complementary_masks=complementary)
    policy, packer = Policy(model, config, 0), make_packer(model, pairs, config, 0)
    visits = [visit for step in range(3) for visit in packer.visits(step)]
    cached = make_reference(policy, packer, visits, tmp_path / "reference.parquet")
    live = LiveReference(policy.transformer)
    for step in range(3):
        batch = packer.pack(packer.visits(step))
        assert (cached.logprobs(batch) - live.logprobs(batch)).abs().max() < 1e-4


def test_passes_hold_what_they_say(checkpoint, records, whole):
    """num_tokens of a visit is the size of its tree."""
    model, pairs = load_model(checkpoint, dtype=torch.float32), read_pairs(whole / "round-1" / "pairs.parquet")
    model.set_image_size(64)
    for config in (TrainConfig(), TrainConfig(boundary_labels=True, replay_weight=0.0, masks_per_pair=2)):
        packer = make_packer(model, pairs, config, 0)
        for visit in packer.visits(0)[: len(pairs)]:
            assert packer.num_tokens(visit) == len(packer.pack([visit]).tree.token_ids)
