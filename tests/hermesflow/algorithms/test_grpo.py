"""GRPO: it learns what it is rewarded for, by the ratio it says, and resumes to the last bit."""

import copy
import json
import shutil
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hermesflow import training
from hermesflow.algorithms.algorithm import batch_logprobs
from hermesflow.algorithms.grpo import GRPO, advantages
from hermesflow.algorithms.policy import Policy
from hermesflow.config import Config, ConfigError, GRPOConfig, load_config
from hermesflow.engine.mask_schedule import num_to_mask
from hermesflow.kernels.span_tree import SpanTree
from hermesflow.report.page import write_report
from hermesflow.runs import Run, train_on_pairs
from hermesflow.runtime.checkpointing import checkpoints
from hermesflow.runtime.files import InputError
from hermesflow.runtime.metric_log import TIMINGS
from hermesflow.scoring.self_answers import Judged
from hermesflow.selfplay import curate_round, run_selfplay, train_round
from hermesflow.training import train_pairs, train_records

SMALL = {
    "train.num_steps": 6,
    "train.lr": 1e-3,
    "grpo.prompts_per_step": 4,
    "grpo.num_images": 3,
    "grpo.step_fractions": [1.0],
    "grpo.rewards": ["log"],
    "drawing.num_steps": 3,
}


def settings(**changes):
    """A small GRPO run's settings; names have __ for the dot."""
    values = SMALL | {name.replace("__", "."): value for name, value in changes.items()}
    values = {"selfplay.algorithm": "grpo", "grpo.reward_weights": [1.0] * len(values["grpo.rewards"])} | values
    return load_config(None, [f"{name}={json.dumps(value)}" for name, value in values.items()])


@pytest.fixture
def own(monkeypatch):
    """A module of rewards: the share of codes below 16, and a function that fails."""
    module = types.ModuleType("own_rewards")
    module.bright = lambda images, record: images.mean((1, 2, 3)).tolist()
    module.dark = lambda images, record: (-images.astype(float).mean((1, 2, 3))).tolist()
    module.wrong = lambda images, record: [float("nan")] * len(images)
    monkeypatch.setitem(sys.modules, "own_rewards", module)


def step_of(model, records, config):
    """An algorithm, its first batch, and the policy's and reference's log-probabilities of it."""
    policy = Policy(model, config.train, 0)
    learner = GRPO(model, records, config, 0)
    return policy, learner


def first_batch(policy, learner, tmp_path):
    reference = learner.reference(policy, range(4), tmp_path / "reference.parquet")
    (one, counts), *others = learner.passes(learner.visits(0))
    batch = one(policy.device)
    assert counts and not others
    return batch, reference.logprobs(batch)


def test_the_ratio_is_one_at_the_first_update(tiny_model, tiny_records, tmp_path):
    config = settings(train__replay_weight=0.0)
    policy, learner = step_of(tiny_model, tiny_records, config)
    batch, reference = first_batch(policy, learner, tmp_path)
    loss, shares = learner.loss(batch_logprobs(policy.transformer, batch), reference, batch)
    per_code = 1 / (batch.totals["images"] * 16)
    # To the last bit: the ratio is 1, so the loss is the advantages' sum.
    assert loss.detach().equal(-(batch.advantage * batch.weight).sum() * per_code)
    assert shares["clipped"] == 0
    assert shares["drift"] == pytest.approx(0, abs=1e-6)
    assert shares["logprob"] == pytest.approx(batch.drawn_logprob.sum().item() * per_code, rel=1e-5)


def test_the_gradient_is_the_advantage_times_that_of_the_law(tiny_model, tiny_records, tmp_path):
    policy, learner = step_of(tiny_model, tiny_records, settings(train__replay_weight=0.0))
    batch, reference = first_batch(policy, learner, tmp_path)
    logprob = batch_logprobs(policy.transformer, batch).detach().requires_grad_()
    learner.loss(logprob, reference, batch)[0].backward()
    expected = -batch.advantage[batch.segment] / (batch.totals["images"] * 16)
    torch.testing.assert_close(logprob.grad, expected)
    found = advantages(np.array([group.rewards for group in batch.groups]))
    assert np.array_equal(found, np.array([group.advantages for group in batch.groups]))


@pytest.mark.parametrize(("sign", "stopped"), [(1, True), (-1, False)])
def test_a_ratio_out_of_bounds_teaches_nothing_more(tiny_model, tiny_records, tmp_path, sign, stopped):
    """A step that is already likelier than 1 + high is pushed no further up, but may be pushed down."""
    policy, learner = step_of(tiny_model, tiny_records, settings(train__replay_weight=0.0))
    batch, reference = first_batch(policy, learner, tmp_path)
    first = batch_logprobs(policy.transformer, batch).detach()
    learner.loss(first, reference, batch)
    moved = (first + 1.0).requires_grad_()
    loss, shares = learner.loss(moved, reference, batch)
    loss.backward()
    chosen = (batch.advantage * sign > 0)[batch.segment]
    assert chosen.any() and (moved.grad[chosen] == 0).all() == stopped
    assert shares["clipped"] > 0


def test_the_divergence_from_the_reference(tiny_model, tiny_records, tmp_path):
    config = settings(grpo__kl_weight=0.5, train__reference="live", train__replay_weight=0.0)
    policy, learner = step_of(tiny_model, tiny_records, config)
    batch, reference = first_batch(policy, learner, tmp_path)
    logprob = batch_logprobs(policy.transformer, batch).detach()
    torch.testing.assert_close(reference, logprob, rtol=1e-5, atol=1e-5)
    loss, shares = learner.loss(logprob, logprob - 0.3, batch)
    expected = (np.exp(-0.3) - 1 + 0.3) * len(logprob) / (batch.totals["images"] * 16)
    assert shares["kl"] == pytest.approx(expected, rel=1e-5)
    bare, _ = learner.loss(logprob, logprob, batch)
    assert (loss - bare).item() == pytest.approx(0.5 * expected, rel=1e-4)


def test_the_unguided_half_has_a_gradient_if_it_is_asked_for(tiny_model, tiny_records, tmp_path):
    """The law is the same; its gradient then is that of the engine."""
    found = {}
    for train_unguided in (False, True):
        config = settings(train__replay_weight=0.0, grpo__train_unguided=train_unguided)
        policy, learner = step_of(copy.deepcopy(tiny_model), tiny_records, config)
        batch, reference = first_batch(policy, learner, tmp_path)
        logprob = batch_logprobs(policy.transformer, batch)
        learner.loss(logprob, reference, batch)[0].backward()
        found[train_unguided] = logprob.detach(), policy.transformer.blocks[0].mlp.up.weight.grad
    torch.testing.assert_close(found[True][0], found[False][0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[True][1], found[False][1], rtol=1e-2)


def test_advantages_by_hand():
    found = advantages(np.array([[1.0, 2.0, 3.0], [5.0, 5.0, 5.01]]))
    spread = 0.8165
    usual = 0.25 * (spread + 0.0047) / 2
    assert found == pytest.approx(np.array([[-1, 0, 1], [0, 0, 0]]) / (spread + usual), abs=1e-3)
    assert not advantages(np.full((2, 4), 0.5)).any()


@pytest.mark.parametrize("likelihood", ["kept", "drawn"])
def test_steps_that_are_drawn_stand_for_all(tiny_model, tiny_records, tmp_path, likelihood):
    config = settings(grpo__trained_steps=1, grpo__likelihood=likelihood, train__replay_weight=0.0)
    policy, learner = step_of(tiny_model, tiny_records, config)
    batch, _ = first_batch(policy, learner, tmp_path)
    num_images = sum(len(group.used) for group in batch.groups)
    assert len(batch.advantage) == num_images
    steps = [len(np.unique(group.kept_at[image])) for group in batch.groups for image in group.used]
    assert batch.weight.tolist() == steps
    drawn = [16, *num_to_mask(16, 3)]  # at each step
    whole, _ = first_batch(*step_of(tiny_model, tiny_records, settings(grpo__likelihood=likelihood)), tmp_path)
    assert len(whole.codes.targets) == (16 * num_images if likelihood == "kept" else sum(drawn) * num_images)


def test_masks_in_place_of_steps(tiny_model, tiny_records, tmp_path):
    """UniGRPO's estimate by hand: each mask's codes from a pass of its own, under the prompt alone."""
    config = settings(train__replay_weight=0.0, grpo__likelihood="masked", grpo__trained_steps=4)
    policy, learner = step_of(tiny_model, tiny_records, config)
    batch, reference = first_batch(policy, learner, tmp_path)
    layout, codes = tiny_model.layout, batch.codes
    logprob = batch_logprobs(policy.transformer, batch)
    loss, _ = learner.loss(logprob, reference, batch)
    assert loss.isfinite() and not {"drift", "logprob"} & set(learner.metric_names(batch.groups))
    assert not len(codes.unguided) and batch.unguided_tree is None
    images = [(group, image) for group in batch.groups for image in group.used]
    found, covered = logprob.detach(), {}
    for owner, step in sorted(set(zip(codes.owners.tolist(), codes.steps.tolist(), strict=True))):
        group, image = images[owner]
        mine = (codes.owners == owner) & (codes.steps == step)
        places = codes.positions[mine].numpy()
        state = layout.image(np.where(np.isin(np.arange(16), places), -1, group.codes[image]).tolist())
        prompt = layout.text_prompt(tiny_model.image_prompt(tiny_records[group.record].caption))
        tree = SpanTree.build([(prompt, -1, "causal"), (state, 0, "full")])
        rows = len(prompt) + torch.from_numpy(layout.code_positions[places])
        weight, bias = layout.code_ids.rows(policy.transformer.head)
        logits = F.linear(policy.transformer(tree)[rows], weight, bias).detach()
        expected = logits.log_softmax(1)[range(len(places)), group.codes[image][places]]
        assert (found[mine] - expected).abs().max() < 1e-4
        covered.setdefault(owner, []).append(len(places))
    assert all(len(counts) == 4 and counts == sorted(counts) for counts in covered.values())
    weights = {owner: 16 / sum(counts) for owner, counts in covered.items()}
    owners = {int(segment): int(owner) for segment, owner in zip(batch.segment, codes.owners, strict=True)}
    assert [weights[owners[number]] for number in range(len(batch.weight))] == pytest.approx(batch.weight.tolist())


def train(model, records, config, folder):
    means = train_records(model, records, config, seed=3, folder=folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return means, [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


WAYS = {
    "all steps": {},
    "one step": {"grpo__trained_steps": 1},
    "the unguided half too": {"grpo__train_unguided": True},
    "all draws": {"grpo__likelihood": "drawn"},
    "several passes": {"train__tokens_per_pass": 300},
    "two updates a rollout": {"grpo__updates_per_rollout": 2, "train__num_steps": 36, "train__lr": 2e-3},
    "bounded by the reference": {"grpo__kl_weight": 0.01, "train__reference": "live"},
    "adapters": {"train__lora_rank": 4, "train__lr": 1e-2},
    "adapters, reference": {
        "train__lora_rank": 4, "train__lr": 1e-2, "grpo__kl_weight": 0.01, "train__reference": "live",
    },
    "bfloat16": {"train__dtype": "bfloat16"},
    "no guidance": {"drawing__guidance_scale": 0.0},
    "answers replayed": {"train__replay_target": "answers", "train__replay_weight": 0.3},
}  # fmt: skip


@pytest.mark.parametrize("changes", WAYS.values(), ids=WAYS.keys())
def test_it_learns_what_it_is_rewarded_for(tiny_model, tiny_records, tmp_path, own, changes):
    changes = {"train__num_steps": 20, "grpo__num_images": 8} | changes
    config = settings(grpo__rewards=["own_rewards:bright"], **changes)
    _, lines = train(tiny_model, tiny_records, config, tmp_path)
    rewards = [line["reward"] for line in lines]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.5  # their spread in a group is 0.4
    assert all(0 <= line["left_out"] <= 1 and abs(line["drift"]) < 1 for line in lines)
    assert ("kl" in lines[0]) == ("grpo__kl_weight" in changes)
    kept = "replay/nll" if config.train.replay_target == "answers" else "replay/kl"
    assert kept in lines[0]
    assert type(tiny_model.transformer).__name__ == "Transformer"


def test_images_that_are_all_alike_teach_nothing(tiny_model, tiny_records, tmp_path, monkeypatch):
    """And a step without anything to learn is a step."""
    monkeypatch.setattr(
        sys.modules["hermesflow.scoring.self_answers"],
        "log",
        lambda model, codes, *_: [[Judged(1.0)] * codes.shape[1] for _ in codes],
    )
    before = copy.deepcopy(tiny_model.transformer.state_dict())
    config = settings(train__replay_weight=0.0, train__weight_decay=0.0, train__num_steps=2)
    _, lines = train(tiny_model, tiny_records, config, tmp_path)
    assert [(line["left_out"], line["reward"], line["loss"]) for line in lines] == [(1.0, 1.0, 0.0)] * 2
    assert all(value.equal(before[name]) for name, value in tiny_model.transformer.state_dict().items())


def test_rewards_add_up_by_their_weights(tiny_model, tiny_records, own):
    def rewards(*names, weights):
        config = settings(grpo__rewards=list(names), grpo__reward_weights=list(weights))
        return np.array([group.rewards for group in GRPO(tiny_model, tiny_records, config, 0).visits(0)])

    bright, dark = (rewards(f"own_rewards:{name}", weights=[1.0]) for name in ("bright", "dark"))
    assert bright == pytest.approx(-dark)
    both = rewards("own_rewards:bright", "own_rewards:dark", weights=[1.0, 0.25])
    assert both == pytest.approx(0.75 * bright)
    mixed = rewards("log", "prompt", weights=[1.0, 0.5])
    assert mixed == pytest.approx(rewards("log", weights=[1.0]) + 0.5 * rewards("prompt", weights=[1.0]), rel=1e-5)


def test_rollouts_take_the_numbers_of_steps_in_turn(tiny_model, tiny_records, tmp_path):
    learner = GRPO(tiny_model, tiny_records, settings(grpo__step_fractions=[0.6, 1.7]), 0)
    steps = [max(group.kept_at.max() for group in learner.visits(rollout)) + 1 for rollout in range(4)]
    assert steps == [2, 5, 2, 5]
    policy, learner = step_of(tiny_model, tiny_records, settings(grpo__step_fractions=[1.7]))
    batch, _ = first_batch(policy, learner, tmp_path)
    drawn = batch.drawn_logprob
    torch.testing.assert_close(batch_logprobs(policy.transformer, batch)[: len(drawn)], drawn, rtol=0, atol=1e-5)


def test_draws_depend_on_seed_and_step_alone(tiny_model, tiny_records):
    config = settings()
    one, again, other = (GRPO(tiny_model, tiny_records, config, seed) for seed in (0, 0, 1))
    first = one.visits(0)
    later = one.visits(1)
    assert [group.record for group in first] != [group.record for group in later]
    for mine, same in zip(later, again.visits(1), strict=True):
        assert mine.record == same.record and np.array_equal(mine.codes, same.codes)
    assert [group.codes.tolist() for group in first] != [group.codes.tolist() for group in other.visits(0)]
    # Every record has its turn before one comes again.
    seen = [record for rollout in range(7) for record in one._chosen(rollout)]
    assert all(sorted(seen[start : start + 7]) == list(range(7)) for start in range(0, 28, 7))


@pytest.mark.parametrize(
    "changes",
    [{}, {"grpo__updates_per_rollout": 2}, {"train__dtype": "bfloat16"}, {"train__lora_rank": 2}],
    ids=["plain", "two updates a rollout", "bfloat16", "adapters"],
)
def test_resume_is_bit_identical(tiny_model, tiny_records, tmp_path, monkeypatch, changes):
    config = settings(train__num_steps=8, train__checkpoint_every=2, **changes)
    whole, broken, resumed = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
    _, expected = train(whole, tiny_records, config, tmp_path / "whole")
    calls, original = iter(range(100)), training.clip_gradients

    def killed(*arguments):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "clip_gradients", killed)
        train(broken, tiny_records, config, tmp_path / "broken")
    if torch.distributed.is_initialized():  # as the end of the process would
        torch.distributed.destroy_process_group()
    assert [path.name for path in checkpoints(tmp_path / "broken")] == ["step-000002", "step-000004"]
    _, found = train(resumed, tiny_records, config, tmp_path / "broken")
    assert found == expected
    for name, tensor in whole.transformer.state_dict().items():
        assert torch.equal(tensor, resumed.transformer.state_dict()[name]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__holdout_pairs": 2}, "train.holdout_pairs: expected 0 with grpo"),
        ({"grpo__updates_per_rollout": 3}, "checkpoint_every 20: .* give a multiple of grpo.updates_per_rollout 3"),
        ({"grpo__kl_weight": 0.1}, "grpo.kl_weight: no reference .* set train.reference to live"),
        ({"grpo__rewards": ["absent_module:f"]}, "grpo.rewards absent_module:f: the module absent_module cannot be"),
        ({"curation__temperature": 0.0}, "curation.temperature: expected above 0 with grpo"),
        ({"grpo__rewards": ["own_rewards:wrong"]}, "grpo.rewards own_rewards:wrong: expected a list of 3 finite"),
        ({"train__dtype": "bfloat16", "grpo__kl_weight": 1.0, "train__reference": "live"}, "has no second copy"),
        ({"selfplay__algorithm": "pair-dpo"}, "pair-dpo: learns from pairs; call train_pairs"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused(tiny_model, tiny_records, tmp_path, own, changes, message):
    with pytest.raises(InputError, match=message):
        train_records(tiny_model, tiny_records, settings(**changes), seed=0, folder=tmp_path)


def test_records_and_decoders_that_do_not_serve_are_refused(tiny_model, tiny_records, random_pairs, tmp_path):
    bare = [replace(tiny_records[0], questions=())]
    with pytest.raises(InputError, match="has no questions to judge its images by"):
        train_records(tiny_model, bare, settings(), seed=0, folder=tmp_path)
    with pytest.raises(InputError, match="no records to train on"):
        train_records(tiny_model, [], settings(), seed=0, folder=tmp_path)
    with pytest.raises(InputError, match="draws its images as it learns and takes no pairs"):
        train_pairs(tiny_model, random_pairs(tiny_model), Config().train, seed=0, folder=tmp_path, algorithm="grpo")
    tiny_model.engine.image_decoder = object()
    with pytest.raises(InputError, match="does not say how it draws; take pair-dpo"):
        train_records(tiny_model, tiny_records, settings(), seed=0, folder=tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": 1}, "num_images"),
        ({"rewards": ()}, "reward_weights: expected a weight for each of 0"),
        ({"rewards": ("log", "soft", "hard")}, "reward_weights: expected a weight for each of 3 rewards, got 2"),
        ({"rewards": ("nice", "log")}, "rewards: expected log, soft, hard, prompt"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"step_fractions": (0.5, 0.0)}, "step_fractions"),
        ({"step_fractions": ()}, "step_fractions: expected at least one"),
        ({"likelihood": "all"}, "likelihood"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        GRPOConfig(**changes)


def test_a_run_needs_no_pairs(tiny_model, tmp_path):
    tiny_model.save(tmp_path / "model")
    changes = {
        "model__name": str(tmp_path / "model"), "run__folder": str(tmp_path), "run__name": "r", "data__num_records": 6,
        "train__num_steps": 2, "eval__num_prompts": 4, "eval__num_understanding": 4, "selfplay__num_rounds": 2,
    }  # fmt: skip
    config = settings(**changes)
    with pytest.raises(InputError, match="draws its images as it learns and takes no pairs"):
        curate_round(Run(config), 1)
    with pytest.raises(InputError, match="takes no pairs"):
        train_on_pairs(config, tmp_path / "pairs.parquet", tmp_path / "out")
    summary = run_selfplay(config)
    assert [set(found["seconds"]) for found in summary["rounds"]] == [{"training", "evaluation"}] * 2
    assert all("reward" in found["training"] and "pairs" not in found for found in summary["rounds"])
    folder = tmp_path / "r"
    assert "reward" in (folder / "report/index.html").read_text()
    assert not (folder / "round-1/candidates").exists()
    # The page of an unfinished run shows no pairs either.
    (folder / "summary.json").unlink()
    text = write_report(folder).read_text()
    assert "<h2>Pairs" not in text and "the pairs of round" not in text and "reward" in text
    # A round that was lost is trained again, to the same weights.
    before = (folder / "round-2/model/model.safetensors").read_bytes()
    shutil.rmtree(folder / "round-2/model")
    train_round(Run(config), 2)
    assert (folder / "round-2/model/model.safetensors").read_bytes() == before


@pytest.mark.parametrize("way", ["cached", "live"])
def test_the_first_model_is_the_reference_of_later_rounds(tiny_model, tiny_records, tmp_path, way):
    first = copy.deepcopy(tiny_model)
    with torch.no_grad():
        tiny_model.transformer.blocks[0].mlp.up.weight.mul_(1.5)
    config = settings(train__num_steps=1, train__reference=way, grpo__kl_weight=0.1 * (way == "live"))
    kept = {}
    for name, reference in (("first", first), ("own", None)):
        folder = tmp_path / name
        train_records(copy.deepcopy(tiny_model), tiny_records, config, seed=0, folder=folder, first=reference)
        kept[name] = json.loads((folder / "metrics.jsonl").read_text())["replay/kl"]
    assert abs(kept["own"]) < 1e-9 and kept["first"] > 1e-7  # answers of random weights are all unlikely


def test_a_record_may_come_twice_in_a_rollout(tiny_model, tiny_records, tmp_path):
    """In passes of their own: each keeps what its ratios started from."""
    changes = {"grpo__prompts_per_step": 9, "grpo__updates_per_rollout": 2, "train__tokens_per_pass": 1}
    _, lines = train(tiny_model, tiny_records, settings(train__num_steps=2, **changes), tmp_path)
    assert [line["clipped"] for line in lines][0] == 0 and lines[0]["reward"] == lines[1]["reward"]
