"""GRPO on captions: the law of the masked text decoder, its estimate under masks, and what is learned by them."""

import json
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hermesflow import load_model
from hermesflow.algorithms.algorithm import batch_logprobs
from hermesflow.algorithms.caption_grpo import CaptionGRPO
from hermesflow.algorithms.policy import Policy
from hermesflow.config import load_config
from hermesflow.data.records import Record
from hermesflow.engine.image_tokenizers.magvit import VQTokenizer, VQTokenizerConfig
from hermesflow.kernels.span_tree import SpanTree
from hermesflow.models.magvit import save_vq_tokenizer
from hermesflow.runtime.files import InputError, make_folder
from hermesflow.training import train_records

FOLDER = Path(__file__).parents[2] / "data/mmada-tiny"
SMALL = {
    "selfplay.algorithm": "caption-grpo", "train.num_steps": 6, "train.lr": 1e-3, "train.replay_weight": 0.0,
    "grpo.prompts_per_step": 2, "grpo.num_images": 3, "curation.caption_scorer": "own_scores:short",
}  # fmt: skip


def settings(**changes):
    values = SMALL | {name.replace("__", "."): value for name, value in changes.items()}
    return load_config(None, [f"{name}={json.dumps(value)}" for name, value in values.items()])


@pytest.fixture(autouse=True)
def own(monkeypatch):
    """Scorers: the shorter the better, and one for which all are alike."""
    module = types.ModuleType("own_scores")
    module.short = lambda captions, truth: [-float(len(caption)) for caption in captions]
    module.alike = lambda captions, truth: [1.0 for _ in captions]
    monkeypatch.setitem(sys.modules, "own_scores", module)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The checkpoint with an image tokenizer of its sizes."""
    folder = shutil.copytree(FOLDER, tmp_path_factory.mktemp("model") / "mmada")
    shape = {"channel_multipliers": (1, 1, 2, 2, 2), "num_res_blocks": (1, 1, 1, 1, 1)}
    config = VQTokenizerConfig(code_bits=6, channels=8, num_groups=4, **shape)
    save_vq_tokenizer(VQTokenizer(config), make_folder(folder / "magvitv2"))
    return folder


@pytest.fixture
def model(folder):
    model = load_model(folder, dtype=torch.float32)
    model.prompts = replace(model.prompts, max_caption_tokens=12)
    return model


@pytest.fixture
def records(model):
    codes = np.random.default_rng(0).integers(0, 64, (4, 16)).astype(np.int32)
    return [Record(f"r{number}", "two green triangles", "shapes", (), codes=row) for number, row in enumerate(codes)]


def first_batch(model, records, config):
    """With an end that comes often."""
    model.layout = replace(model.layout, eot=105)
    learner = CaptionGRPO(model, records, config, 0)
    (one, counts), *others = learner.passes(learner.visits(0))
    assert counts and not others
    return learner, one(torch.device("cpu"))


def test_the_law_is_that_of_the_decoder(model, records):
    """Of each token that a step kept, in the state in which it was kept; what follows the end is left out."""
    learner, batch = first_batch(model, records, settings(grpo__num_images=24, train__tokens_per_pass=10**6))
    found = batch_logprobs(model.transformer, batch)
    assert len(found) and (found - batch.drawn_logprob).abs().max() < 1e-4
    drawn = [(group, number) for group in batch.groups for number in group.used]
    assert drawn and any(model.layout.eot in group.codes[number] for group, number in drawn)
    for owner, (group, number) in enumerate(drawn):
        region, kept_at = group.codes[number], group.kept_at[number]
        mine = batch.codes.owners == owner
        end = region.tolist().index(model.layout.eot) + 1 if model.layout.eot in region else len(region)
        positions = batch.codes.positions[mine]
        assert sorted(positions.tolist()) == list(range(end))
        assert torch.equal(batch.codes.steps[mine], torch.from_numpy(kept_at)[positions])
        assert torch.equal(batch.codes.targets[mine], torch.from_numpy(region)[positions])
    _, shares = learner.loss(found, torch.zeros_like(found), batch)
    assert float(shares["drift"]) == pytest.approx(0, abs=1e-5) and float(shares["clipped"]) == 0


def test_the_estimate_under_masks(model, records):
    """A mask hides part of a caption, behind which the region is filled as in training."""
    learner, batch = first_batch(model, records, settings(grpo__likelihood="masked", grpo__trained_steps=3))
    found, layout = batch_logprobs(model.transformer, batch), model.layout
    group, number = next((group, number) for group in batch.groups for number in group.used)
    region = group.codes[number].tolist()
    end = region.index(layout.eot) + 1 if layout.eot in region else len(region)
    asked = layout.asked(records[group.record].codes.tolist(), model.caption_prompt())
    for mask in range(3):
        mine = (batch.codes.owners == 0) & (batch.codes.steps == mask)
        hidden = batch.codes.positions[mine].tolist()
        assert hidden and max(hidden) < end
        state = [*region[:end], *[layout.filler] * (12 - end)]
        for place in hidden:
            state[place] = layout.mask_id
        logits = model.transformer.head(model.transformer(SpanTree.build([([*asked, *state], -1, "full")])))
        logits = logits[len(asked) :, torch.tensor(list(layout.text_ids))].log_softmax(1)
        places = layout.text_ids.numbers(torch.tensor([region[place] for place in hidden]))
        assert (found[mine] - logits[hidden, places]).abs().max() < 1e-4
    assert batch.weight[0] * sum(batch.codes.owners == 0) == pytest.approx(end)
    loss, _ = learner.loss(found, torch.zeros_like(found), batch)
    assert loss.isfinite()


@pytest.mark.parametrize("likelihood", ["kept", "masked"])
def test_it_learns_what_it_is_rewarded_for(model, records, tmp_path, likelihood):
    config = settings(
        grpo__likelihood=likelihood, grpo__num_images=8, grpo__prompts_per_step=4, grpo__trained_steps=4,
        train__num_steps=12, train__lr=2e-3,
    )  # fmt: skip
    train_records(model, records, config, seed=0, folder=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rewards = [line["reward"] for line in lines if "reward" in line]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 4


def test_a_resumed_run_draws_the_same(model, records):
    first, again = (CaptionGRPO(model, records, settings(), 0).visits(3) for _ in range(2))
    assert all(np.array_equal(a.codes, b.codes) for a, b in zip(first, again, strict=True))
    other = CaptionGRPO(model, records, settings(), 1).visits(3)
    assert not all(np.array_equal(a.codes, b.codes) for a, b in zip(first, other, strict=True))


def test_captions_that_are_all_alike_teach_nothing(model, records):
    learner, batch = first_batch(model, records, settings(curation__caption_scorer="own_scores:alike"))
    found = batch_logprobs(model.transformer, batch)
    loss, shares = learner.loss(found, torch.zeros_like(found), batch)
    assert len(found) == 0 and loss.item() == 0 and float(shares["left_out"]) == 1


def test_what_does_not_go_together_is_named(model, records):
    with pytest.raises(InputError, match="caption-grpo: the model does not fill text from masks"):
        CaptionGRPO(load_model("tiny"), records, settings(), 0)
    with pytest.raises(InputError, match="grpo.likelihood drawn: is for images; take kept or masked"):
        CaptionGRPO.check(settings(grpo__likelihood="drawn"))
    with pytest.raises(InputError, match="record x: has no image codes"):
        CaptionGRPO(model, [Record("x", "a star", "shapes", ())], settings(), 0)
    with pytest.raises(InputError, match="train.checkpoint_every 10: a run resumes before a rollout"):
        CaptionGRPO.check(settings(train__checkpoint_every=10, grpo__updates_per_rollout=3))


def test_rollouts_by_another_law_are_refused(model, records):
    codes, asked = torch.from_numpy(records[0].codes)[None].long(), [[model.caption_prompt()]]
    seeds = torch.zeros(1, 1, 1, dtype=torch.int64)
    plain = CaptionGRPO(model, records, settings(), 0)._params_of_text
    region = model.engine.rollout_text(codes, asked, sampling=[plain], seeds=seeds)[0][0][0]
    ids = model.engine.generate_text(codes, asked, sampling=[plain], seeds=seeds)[0][0][0]
    assert region.ids[: len(ids)].tolist() == ids and region.kept_at.max() == region.step - 1
    for name, value in (("temperature", 0.5), ("top_k", 3), ("guidance_scale", 1.0), ("cache", "dual")):
        with pytest.raises(ValueError, match=f"rollout: expected {name} "):
            model.engine.rollout_text(codes, asked, sampling=[replace(plain, **{name: value})], seeds=seeds)
    with pytest.raises(ValueError, match="Engine.rollout_text: TextDecoder does not say how it draws"):
        tiny = load_model("tiny")
        codes = torch.zeros(1, tiny.layout.num_image_tokens, dtype=torch.int64)
        tiny.engine.rollout_text(codes, [[[1]]], sampling=[plain], seeds=seeds)


def test_policy_passes_of_several_processes_have_one_each(model, records):
    """All take as many passes, also where one has nothing to do."""
    config = settings(train__tokens_per_pass=400)
    learner = CaptionGRPO(model, records, config, 0)
    passes = learner.passes(learner.visits(0))
    policy = Policy(model, config.train, 0)
    assert len(passes) > 1 and all(len(one(policy.device).tree.token_ids) for one, _ in passes)
