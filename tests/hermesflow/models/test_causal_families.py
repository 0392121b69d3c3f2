"""Families that draw code by code, from checkpoint to exported policy: self-play, killed and not, and every task."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hermesflow import load_model, tasks
from hermesflow.config import load_config
from hermesflow.data.pairs import read_pairs
from hermesflow.runs import Run, export_model
from hermesflow.runtime.files import InputError
from hermesflow.selfplay import curate_round, run_selfplay

DATA = Path(__file__).parents[2] / "data"
FAMILIES = ("chameleon-tiny", "emu3-tiny", "janus-tiny")
SETTINGS = (
    "data.num_records=4", "selfplay.num_rounds=2", "curation.num_images=2", "curation.batch_records=2",
    "curation.threshold=0", "curation.margin=0", "curation.keep=any", "curation.caption_top_k=[2]",
    "curation.caption_scorer=token-f1", "train.num_steps=6", "train.pairs_per_step=2", "train.warmup_steps=0",
    "train.lr=1e-3", "train.checkpoint_every=1", "eval.num_prompts=3", "eval.num_understanding=3",
    "eval.images_per_prompt=1", "drawing.guidance_scale=0.5", "run.name=t",
)  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoint(family):
    return DATA / family


def test_two_rounds_train_both_sides(family, whole):
    before = load_model(DATA / family, dtype=torch.float32)
    for number in (1, 2):
        pairs = read_pairs(whole / f"round-{number}" / "pairs.parquet").to_pylist()
        assert pairs and all((pair["record_image"] is None) == before.views_codes for pair in pairs)
        lines = [json.loads(line) for line in (whole / f"round-{number}/train/metrics.jsonl").read_text().splitlines()]
        for side in ("generation", "understanding"):
            losses = [line.get(f"{side}/loss") for line in lines]
            assert losses[0] is None or losses[0] == pytest.approx(np.log(2), abs=1e-3)
            assert all(loss is None or np.isfinite(loss) for loss in losses)
        assert any("generation/loss" in line for line in lines) and any("understanding/loss" in line for line in lines)
        after = load_model(whole / f"round-{number}" / "model")
        assert not torch.equal(after.transformer.blocks[0].mlp.up.weight, before.transformer.blocks[0].mlp.up.weight)
        before = after


def test_a_killed_run_ends_alike(checkpoint, settings, whole, tmp_path, run_killed_once):
    run_killed_once(settings(checkpoint, tmp_path), tmp_path / "t/round-1/train")
    for number in (1, 2):
        ours, theirs = (load_model(folder / f"round-{number}/model").transformer for folder in (tmp_path / "t", whole))
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_every_task(family, whole, tmp_path):
    """Of the trained model, exported."""
    export_model(whole / "round-2/model", tmp_path / "exported")
    model = load_model(tmp_path / "exported")
    drawn = list(tasks.generate_images(model, ["a red circle", "two squares"], num_images=2))
    size = model.image_size
    assert len(drawn) == 4 and all(image.pixels.shape == (size, size, 3) for image in drawn)
    Image.fromarray(drawn[0].pixels).save(tmp_path / "image.png")
    mask = np.zeros((size, size), dtype=np.uint8)
    mask[size // 2 :] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (painted,) = tasks.inpaint_images(model, tmp_path / "image.png", tmp_path / "mask.png", "a red circle")
    kept = model.encode_images(drawn[0].pixels[None])[0].view(model.layout.image_grid)
    assert torch.equal(painted.codes.view(model.layout.image_grid)[: len(kept) // 2], kept[: len(kept) // 2].cpu())
    assert len(model.caption([tmp_path / "image.png"])) == 1
    assert model.answer([tmp_path / "image.png"], "is there a circle?", choices=["yes", "no"])[0] in ("yes", "no")


def test_grpo_meets_the_law_of_the_drawing(checkpoint, settings, tmp_path):
    more = ["selfplay.algorithm=grpo", "selfplay.num_rounds=1", "train.num_steps=2", "grpo.prompts_per_step=2"]
    more += ["grpo.num_images=3", "drawing.top_k=0", "drawing.top_p=1", "train.lr=1e-4"]
    run_selfplay(load_config(None, [*settings(checkpoint, tmp_path), *more]))
    lines = (tmp_path / "t/round-1/train/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["drift"] for line in lines if "drift" in json.loads(line)] == pytest.approx(
        [0, 0], abs=1e-4
    )


def test_another_model_judges(settings, tmp_path):
    """It changes the images' scores and nothing that is drawn; one that has changed, or has other codes, is refused."""
    judge, scores, tokens = load_model(DATA / "emu3-tiny", dtype=torch.float32), [], []
    judge.transformer.head.weight.data.mul_(-1)
    judge.save(tmp_path / "judge")
    for name, more in (("self", []), ("other", [f"model.judge={tmp_path / 'judge'}"])):
        config = load_config(None, [*settings(DATA / "emu3-tiny", tmp_path / name), *more])
        curate_round(Run(config), 1)
        parts = [pq.read_table(part) for part in sorted((tmp_path / name / "t/round-1/candidates").glob("*.parquet"))]
        rows = [row for part in parts for row in part.to_pylist() if row["kind"] == "image"]
        tokens.append([row["token_ids"] for row in rows])
        scores.append([row["score"] for row in rows])
    assert tokens[0] == tokens[1] and scores[0] != scores[1]
    path = tmp_path / "other/t/judge.json"
    kept = path.read_text()
    path.write_text("[]")
    with pytest.raises(InputError, match="judge.json: .*it is no object"):
        Run(config).check_judge()
    path.write_text(kept)
    judge.transformer.head.weight.data.mul_(-1)
    judge.save(tmp_path / "judge")
    with pytest.raises(InputError, match="judge.json: the run began with other weights than the judge"):
        Run(config).check_judge()
    next(judge.vq_tokenizer.parameters()).data.mul_(-1)
    judge.save(tmp_path / "judge")
    with pytest.raises(InputError, match="weights of its image tokenizer are not those of .*; give a judge with"):
        Run(config).check_judge()
    config = load_config(None, [*settings(DATA / "emu3-tiny", tmp_path), f"model.judge={DATA / 'chameleon-swin-tiny'}"])
    with pytest.raises(InputError, match="model.judge .*: its images are .* codes in .*; give a judge with the same"):
        curate_round(Run(config), 1)
