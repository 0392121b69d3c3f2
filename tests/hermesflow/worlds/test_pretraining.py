"""Making the tiny model: its batches, a killed run that resumes alike, damaged files, and the shipped result."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import hermesflow.worlds.pretraining as pretraining
from hermesflow.config import PretrainConfig
from hermesflow.engine.decoders.autoregressive import AutoregressiveDecoder
from hermesflow.engine.decoders.flow import FlowDecoder
from hermesflow.models.family import ASSETS, load_model
from hermesflow.runtime.files import InputError
from hermesflow.scoring.self_answers import self_vqa
from hermesflow.worlds import oracle, shapes
from hermesflow.worlds.pretraining import SceneBatches, run_pretraining

SMALL = {
    "num_scenes": 64,
    "tokenizer_steps": 3,
    "tokenizer_batch": 4,
    "steps": 6,
    "batch_images": 4,
    "batch_understanding": 3,
    "warmup_steps": 2,
    "eval_every": 100,
    "checkpoint_every": 2,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    return folder, run_pretraining(PretrainConfig(folder=str(folder), **SMALL))


def test_it_leaves_a_model_that_loads(made):
    folder, model_folder = made
    model = load_model(str(model_folder))
    assert model.decode_text(model.encode_text("a small red circle")) == "a small red circle"
    tokenizer, lines = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("tokenizer.jsonl", "metrics.jsonl")
    )
    assert [line["step"] for line in tokenizer] == [0, 1, 2] and all(math.isfinite(line["fit"]) for line in tokenizer)
    assert [line["step"] for line in lines] == list(range(6)) and all(math.isfinite(line["image"]) for line in lines)
    assert [line["step"] for line in lines if "validation/image" in line] == [5]


def test_a_killed_run_goes_on_to_the_same_weights(made, tmp_path, monkeypatch):
    calls, original = iter(range(100)), pretraining.batch_losses

    def killed(*args):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return original(*args)

    config = PretrainConfig(folder=str(tmp_path), **SMALL)
    monkeypatch.setattr(pretraining, "batch_losses", killed)
    with pytest.raises(KeyboardInterrupt):
        run_pretraining(config)
    monkeypatch.setattr(pretraining, "batch_losses", original)
    run_pretraining(config)
    assert (made[0] / "metrics.jsonl").read_text() == (tmp_path / "metrics.jsonl").read_text()
    whole, resumed = (load_file(folder / "model" / "model.safetensors") for folder in (made[0], tmp_path))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("step-000002/manifest.json", "no checkpoint can be used .*manifest.json"),
        ("checkpoint.pt", "checkpoint.pt: was written by an older version; delete .* to start over"),
    ],
    ids=["damaged", "older version"],
)
def test_a_checkpoint_that_cannot_be_used_is_named(made, tmp_path, path, message):
    (tmp_path / "vq_tokenizer.safetensors").write_bytes((made[0] / "vq_tokenizer.safetensors").read_bytes())
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_bytes(b"no checkpoint")
    with pytest.raises(InputError, match=message):
        run_pretraining(PretrainConfig(folder=str(tmp_path), **SMALL))


def test_batches_predict_codes_and_the_texts_that_belong_to_them(made):
    model = load_model(str(made[1]))
    layout = model.layout
    batches = SceneBatches(model, "train", 20, seed=0)
    batch = batches.draw(np.random.default_rng(0), 5, 4, dropout=0.0)
    ids, codes = batch.tree.token_ids, torch.from_numpy(batches.codes) + layout.code_offset
    assert (ids[batch.rows["image"]] == layout.mask_id).all()
    known = {tuple(row.tolist()) for row in codes}
    for span in np.flatnonzero(batch.tree.full & (batch.tree.parents >= 0)):
        rows = batch.tree.span_rows(span)
        image = ids[rows][1:-1].clone()
        inside = (batch.rows["image"] >= rows.start) & (batch.rows["image"] < rows.stop)
        image[batch.rows["image"][inside] - rows.start - 1] = batch.targets["image"][inside]
        assert tuple(image.tolist()) in known
    # A text row predicts its span's next token, and eot after the last.
    ends = set(np.cumsum(batch.tree.num_new).tolist())
    for task in ("caption", "answer"):
        for row, target in zip(batch.rows[task].tolist(), batch.targets[task].tolist(), strict=True):
            assert target == (layout.eot if row + 1 in ends else ids[row + 1])


def test_a_model_that_draws_code_by_code_is_made_too(tmp_path):
    """A row of an image predicts the next code."""
    model = load_model(str(run_pretraining(PretrainConfig(folder=str(tmp_path), images="causal", **SMALL))))
    assert isinstance(model.engine.image_decoder, AutoregressiveDecoder)
    batch = SceneBatches(model, "train", 20, seed=0).draw(np.random.default_rng(0), 5, 4, dropout=0.0)
    rows, targets = batch.rows["image"], batch.targets["image"]
    assert len(rows) == 5 * 16 and torch.equal(batch.tree.token_ids[rows + 1], targets)
    assert batch.tree.causal.all() and not (batch.tree.token_ids == model.layout.mask_id).any()


def test_a_model_that_draws_by_a_flow_is_made_too(tmp_path, monkeypatch):
    """Noised latents give velocities, seen ones have no noise; and a killed run ends alike."""
    config = PretrainConfig(folder=str(tmp_path / "whole"), images="flow", **SMALL)
    model = load_model(str(run_pretraining(config)))
    assert isinstance(model.engine.image_decoder, FlowDecoder)
    batches = SceneBatches(model, "train", 20, seed=0)
    assert set(np.unique(batches.latents)) == {-1.0, 1.0}
    batch = batches.draw(np.random.default_rng(0), 5, 4, dropout=0.0)
    rows, noised, times, places = batch.latents
    count = 5 * 4 * 16
    assert torch.equal(batch.rows["image"], rows[:count]) and len(rows) == count + 4 * 16
    assert batch.targets["image"].shape == (count, 10) and places.tolist() == list(range(16)) * (len(rows) // 16)
    assert (times[count:] == 0).all() and (noised[count:].abs() == 1).all()
    # x_t = x + t (eps - x), of latents that are 1 or -1.
    clean = noised[:count] - times[:count, None] * batch.targets["image"]
    assert torch.allclose(clean.abs(), torch.ones_like(clean), atol=1e-4)
    assert 0 < times[:count].min() and times[:count].max() < 1 and len(times[:count].unique()) == 20
    for span in np.flatnonzero(batch.tree.full & (batch.tree.parents >= 0)):
        assert batch.tree.lengths[span] == 18

    calls, original = iter(range(100)), pretraining.batch_losses

    def killed(*args):
        if next(calls) == 9:
            raise KeyboardInterrupt
        return original(*args)

    again = PretrainConfig(folder=str(tmp_path / "killed"), images="flow", **SMALL)
    monkeypatch.setattr(pretraining, "batch_losses", killed)
    with pytest.raises(KeyboardInterrupt):
        run_pretraining(again)
    monkeypatch.undo()
    ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (run_pretraining(again), tmp_path / "whole/model")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", ["tiny-ar", "tiny-flow"])
def test_the_shipped_models_of_other_kinds_understand_and_draw(name):
    """They take the tokenizer of tiny; what they save holds its own."""
    model, scenes = load_model(name), shapes.sample_scenes("validation", 60, seed=7)
    assert not (ASSETS / name / "vq_tokenizer.safetensors").exists()
    records = [shapes.make_record(scene, "", np.random.default_rng(0)) for scene in scenes]
    codes = model.encode_images(np.stack([record.image for record in records]))
    marks = [score.hard for [score] in self_vqa(model, codes[:, None], records)]
    assert np.mean(marks) > 0.85
    prompts = [model.image_prompt(record.caption) for record in records]
    drawn = model.engine.generate(prompts, num_images=1, seeds=torch.arange(60)[:, None], sampling=model.sampling)
    seen = oracle.read(model.decode_images(drawn[:, 0]))
    marks = [oracle.score(record.questions, item)[0] for record, item in zip(records, seen, strict=True)]
    assert np.mean(marks) > 0.7


def test_the_shipped_model_fits_ten_megabytes_and_reads_and_draws_its_world():
    folder = ASSETS / "tiny"
    for model_folder in ASSETS.iterdir():
        assert sum(path.stat().st_size for path in model_folder.rglob("*") if path.is_file()) < 7e6
    assert "Measured" in (folder / "README.md").read_text()
    model = load_model("tiny")
    scenes = shapes.sample_scenes("validation", 300, seed=7)
    rng = np.random.default_rng(7)
    records = [shapes.make_record(scene, str(index), rng) for index, scene in enumerate(scenes)]
    codes = model.encode_images(np.stack([record.image for record in records]))
    seen = oracle.read(model.decode_images(codes))
    marks = [oracle.score(record.questions, item)[0] for record, item in zip(records, seen, strict=True)]
    assert np.mean(marks) >= 0.95  # the tokenizer keeps what the oracle asks for


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "vq_tokenizer.safetensors", "tokenizer.json"])
def test_a_damaged_model_file_is_named(made, tmp_path, damage):
    for path in made[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / damage).write_bytes(b"{]")
    with pytest.raises(InputError, match=damage):
        load_model(str(tmp_path))


def test_weights_of_another_size_are_listed(made, tmp_path):
    for path in made[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["transformer"]["num_layers"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="does not fit the configuration: missing blocks.6"):
        load_model(str(tmp_path))


def test_an_unknown_model_says_what_to_give():
    with pytest.raises(InputError, match="no model 'giant': give 'tiny', 'tiny-ar' or 'tiny-flow', a folder"):
        load_model("giant")


def test_an_unknown_word_is_named():
    with pytest.raises(InputError, match="does not know the word 'hexagon'"):
        load_model("tiny").encode_text("a red hexagon")


def test_other_settings_in_the_same_folder_are_refused(made):
    with pytest.raises(InputError, match=r"other settings \(pretrain.seed\); choose another pretrain.folder"):
        run_pretraining(PretrainConfig(folder=str(made[0]), **(SMALL | {"seed": 1})))


GRADIENT_OF_A_STEP = """
import os, sys, torch
import torch.distributed as dist
from hermesflow.config import PretrainConfig
from hermesflow.engine.decoders.autoregressive import AutoregressiveDecoder
from hermesflow.models import load_model
from hermesflow.worlds.pretraining import SceneBatches, add_gradients
if "RANK" in os.environ:
    dist.init_process_group("gloo", init_method=os.environ["STORE"], rank=int(os.environ["RANK"]), world_size=2)
model = load_model(sys.argv[1])
config = PretrainConfig(batch_images=4, batch_understanding=3)
add_gradients(model.transformer, SceneBatches(model, "train", 20, seed=0), config, step=0)
torch.save({name: item.grad for name, item in model.transformer.named_parameters()}, sys.argv[2])
"""


def test_two_processes_have_the_gradient_of_one(made, tmp_path):
    plain = os.environ | {"PYTHONSAFEPATH": "1"}
    group = plain | {"STORE": f"file://{tmp_path / 'store'}", "WORLD_SIZE": "2"}  # no port that another could take
    environments = {"one": plain, "rank0": group | {"RANK": "0"}, "rank1": group | {"RANK": "1"}}
    started = [
        subprocess.Popen([sys.executable, "-c", GRADIENT_OF_A_STEP, made[1], tmp_path / name], env=environment)
        for name, environment in environments.items()
    ]
    assert [process.wait(timeout=200) for process in started] == [0, 0, 0]
    one, *ranks = (torch.load(tmp_path / name, weights_only=True) for name in environments)
    for name, gradient in one.items():
        for of_rank in ranks:
            assert (of_rank[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
