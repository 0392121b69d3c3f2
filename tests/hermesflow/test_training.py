"""Pair-DPO training: it learns its pairs in every way it can be set, resumes to the last bit, and stops in time."""

import copy
import dataclasses
import json
import logging
import math
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from hermesflow import training
from hermesflow.config import PAPER_OBJECTIVE, TrainConfig, load_config
from hermesflow.engine.transformer import Linear, Transformer
from hermesflow.runtime.checkpointing import checkpoints
from hermesflow.runtime.files import InputError
from hermesflow.runtime.metric_log import TIMINGS, MetricLog
from hermesflow.training import learning_rate, train_pairs


@pytest.fixture
def model(tiny_model):
    return tiny_model


def test_training_is_imported_without_optional_packages():
    code = (
        "import sys; sys.modules |= dict.fromkeys(('peft', 'tensorboard', 'wandb', 'trackio'));"
        "import hermesflow.training, hermesflow.runs, hermesflow.selfplay"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def metrics_of(folder):
    """The lines of metrics.jsonl without what differs from run to run."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def weights_of(model):
    return model.transformer.state_dict()


WAYS = {
    "the paper's objective": {},
    "live reference": {"reference": "live"},
    "several passes": {"tokens_per_pass": 100},
    "several masks": {"masks_per_pair": 4, "complementary_masks": True},
    "elbo": {"masks_per_pair": 2, "elbo_weighting": True, "beta": 0.02},
    "dropped prompts": {"condition_dropout": 0.5},
    "boundary labels": {"boundary_labels": True},
    "likelihood of the win": {"nll_weight": 0.1},
    "means over tokens": {"length_normalize": True, "beta": 2.0},
    "ipo": {"loss_type": "ipo"},
    "hinge": {"loss_type": "hinge"},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "simpo": {"loss_type": "simpo", "beta": 2.0},
    "checkpointed activations": {"activation_checkpointing": True},
    "adapters": {"lora_rank": 4, "lr": 2e-2},
    "adapters, live reference": {"lora_rank": 4, "lr": 2e-2, "reference": "live"},
    "bfloat16": {"dtype": "bfloat16"},
    "adapters in bfloat16": {"dtype": "bfloat16", "lora_rank": 4, "lr": 2e-2},
}
WAYS = {name: PAPER_OBJECTIVE | settings for name, settings in WAYS.items()} | {
    "defaults": {},
    "replay alone": PAPER_OBJECTIVE | {"replay_weight": 1.0},
    "replay, simpo": PAPER_OBJECTIVE | {"replay_weight": 1.0, "loss_type": "simpo", "beta": 2.0},
    "right answers replayed": PAPER_OBJECTIVE | {"replay_weight": 1.0, "replay_target": "answers"},
}


@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS.keys())
def test_training_prefers_the_wins(model, random_pairs, asked, tmp_path, settings):
    names = list(weights_of(model))
    before = {name: value.clone() for name, value in weights_of(model).items()}
    config = TrainConfig(**{"num_steps": 30, "pairs_per_step": 6, "lr": 3e-3, "warmup_steps": 2} | settings)
    means = train_pairs(model, random_pairs(model, asked=asked), config, seed=0, folder=tmp_path)
    assert means["generation/accuracy"] > 0.9 and means["understanding/accuracy"] > 0.9
    lines = metrics_of(tmp_path)
    kept = {name for name in means if name.startswith("replay/")}
    if config.replay_target == "answers":
        assert kept == {"replay/nll"} and means["replay/nll"] < lines[0]["replay/nll"]
    else:
        assert kept == ({"replay/kl"} if config.replay_weight else set())
        assert not kept or (lines[0]["replay/kl"] == pytest.approx(0, abs=1e-5) and means["replay/kl"] < 0.5)
    assert [line["step"] for line in lines] == list(range(30))
    assert means["loss"] < lines[0]["loss"]
    # What comes out is a plain model in float32 that the engine can draw with.
    after = weights_of(model)
    assert list(after) == names and type(model.transformer.blocks[0].mlp.up) is Linear
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert any(not after[name].equal(before[name]) for name in names)
    codes = model.engine.generate(
        [model.encode_text("a red circle")],
        num_images=1,
        num_steps=2,
        guidance_scale=0.0,
        mask_temperature=1.0,
        seeds=torch.zeros(1, 1, dtype=torch.int64),
    )
    assert codes.shape == (1, 1, model.layout.num_image_tokens)


@pytest.mark.parametrize("side", ["generation", "understanding"])
def test_one_side_alone(model, random_pairs, tmp_path, side):
    other = {"generation": "understanding", "understanding": "generation"}[side]
    config = TrainConfig(num_steps=20, pairs_per_step=6, lr=3e-3, **PAPER_OBJECTIVE | {f"{other}_weight": 0.0})
    means = train_pairs(model, random_pairs(model), config, seed=0, folder=tmp_path)
    assert means[f"{side}/accuracy"] > 0.9
    assert not [name for name in means if name.startswith(other)]


def test_at_the_first_step_the_policy_is_the_reference(model, random_pairs, tmp_path):
    config = TrainConfig(num_steps=1, **PAPER_OBJECTIVE)
    train_pairs(model, random_pairs(model), config, seed=0, folder=tmp_path)
    (line,) = metrics_of(tmp_path)
    assert line["loss"] == pytest.approx(2 * math.log(2), abs=1e-5)
    for side in ("generation", "understanding"):
        for name in ("win_reward", "lose_reward", "margin", "win_logprob_drift", "kl"):
            assert line[f"{side}/{name}"] == pytest.approx(0, abs=1e-5)


def assert_same_steps(folders):
    first, *others = map(metrics_of, folders)
    assert first and others
    for other in others:
        for line, expected in zip(first, other, strict=True):
            assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("objective", [PAPER_OBJECTIVE, {}], ids=["the paper's", "the default"])
def test_passes_do_not_change_the_step(model, random_pairs, asked, tmp_path, objective):
    pairs, folders = random_pairs(model, 7, asked=asked), []
    for budget in (50, 200, 10_000):
        config = TrainConfig(num_steps=3, pairs_per_step=5, lr=1e-3, tokens_per_pass=budget, **objective)
        folders.append(tmp_path / str(budget))
        train_pairs(copy.deepcopy(model), pairs, config, seed=0, folder=folders[-1])
    assert_same_steps(folders)


def test_a_cached_and_a_live_reference_train_alike(model, random_pairs, asked, tmp_path):
    pairs, folders = random_pairs(model, 7, ("both", "generation", "understanding"), asked), []
    for reference in ("cached", "live"):
        config = TrainConfig(num_steps=4, pairs_per_step=5, lr=1e-3, replay_weight=0.5, reference=reference)
        folders.append(tmp_path / reference)
        train_pairs(copy.deepcopy(model), pairs, config, seed=0, folder=folders[-1])
    assert all(line["replay/kl"] > 0 for line in metrics_of(folders[0])[1:])
    assert_same_steps(folders)


def test_pairs_without_questions_are_told_of(model, random_pairs, asked, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="hermesflow"):
        config = TrainConfig(num_steps=1, pairs_per_step=2)
        train_pairs(model, random_pairs(model, 6, asked=asked), config, seed=0, folder=tmp_path)
    assert "2 of 6 pairs have no questions to replay" in caplog.text  # pairs 0 and 5
    assert "have no choices" not in caplog.text


@pytest.mark.parametrize("target", ["reference", "answers"])
def test_pairs_without_choices_are_told_of(model, random_pairs, asked, tmp_path, caplog, target):
    pairs = random_pairs(model, 6, asked=asked)
    bare = pairs.set_column(pairs.column_names.index("choices"), "choices", pa.nulls(6, pairs["choices"].type))
    config = TrainConfig(num_steps=1, pairs_per_step=2, replay_target=target)
    with caplog.at_level(logging.INFO, logger="hermesflow"):
        train_pairs(model, bare, config, seed=0, folder=tmp_path)
    assert ("4 of 6 pairs have no choices" in caplog.text) == (target == "reference")


RESUMED = {
    "all weights": {},
    "the paper's objective": PAPER_OBJECTIVE,
    "adapters": {"lora_rank": 4},
    "held-out pairs": {"holdout_pairs": 2, "holdout_every": 1, "patience": 50},
    "bfloat16": {"dtype": "bfloat16"},
    "held-out pairs in bfloat16": {"dtype": "bfloat16", "holdout_pairs": 2, "holdout_every": 2, "patience": 50},
}


@pytest.mark.parametrize("settings", RESUMED.values(), ids=RESUMED.keys())
def test_resume_is_bit_identical(model, random_pairs, asked, tmp_path, monkeypatch, settings):
    pairs = random_pairs(model, 8, asked=asked)
    config = TrainConfig(num_steps=9, pairs_per_step=4, lr=1e-3, checkpoint_every=2, keep_checkpoints=2, **settings)
    whole, broken, resumed = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    train_pairs(whole, pairs, config, seed=3, folder=tmp_path / "whole")

    calls, original = iter(range(100)), training.clip_gradients

    def killed(*arguments):
        if next(calls) == 7:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "clip_gradients", killed)
        train_pairs(broken, pairs, config, seed=3, folder=tmp_path / "broken")
    if torch.distributed.is_initialized():  # as the end of the process would
        torch.distributed.destroy_process_group()
    assert [path.name for path in checkpoints(tmp_path / "broken")] == ["step-000004", "step-000006"]
    train_pairs(resumed, pairs, config, seed=3, folder=tmp_path / "broken")
    for name, tensor in weights_of(whole).items():
        assert torch.equal(tensor, weights_of(resumed)[name]), name
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "broken")


def test_checkpoints_do_not_depend_on_what_was_drawn_before(model, random_pairs, tmp_path):
    config = TrainConfig(num_steps=3, checkpoint_every=2, holdout_pairs=2, holdout_every=1)
    for number in range(2):
        torch.randn(number)
        train_pairs(copy.deepcopy(model), random_pairs(model), config, seed=0, folder=tmp_path / str(number))
    files = [path.relative_to(tmp_path / "0") for path in (tmp_path / "0").rglob("*.safetensors")]
    assert len(files) == 2  # best and step-000002
    for name in files:
        one, other = (load_file(tmp_path / folder / name) for folder in "01")
        assert one.keys() == other.keys() and any(key.startswith("rng.") for key in one)
        assert all(torch.equal(one[key], other[key]) for key in one), name


def test_stops_when_the_held_out_loss_rises(model, random_pairs, tmp_path, caplog):
    # Random pairs have nothing in common, so what is learnt of some does harm to the others.
    config = TrainConfig(
        num_steps=60,
        pairs_per_step=4,
        lr=1e-2,
        holdout_pairs=3,
        holdout_every=2,
        patience=2,
        warmup_steps=8,
        checkpoint_every=100,
        **PAPER_OBJECTIVE,
    )
    with caplog.at_level(logging.INFO, logger="hermesflow"):
        train_pairs(model, random_pairs(model, 8), config, seed=0, folder=tmp_path)
    lines = metrics_of(tmp_path)
    losses = {line["step"] + 1: line["holdout/loss"] for line in lines if "holdout/loss" in line}
    best = min(losses, key=losses.get)
    assert len(lines) == best + 4 < 60
    assert f"stopped after {len(lines)} steps; the held-out loss was least after {best}" in caplog.text


def test_the_weights_after_an_early_stop_are_the_best_ones(model, random_pairs, tmp_path):
    settings = {"pairs_per_step": 4, "lr": 1e-2, "holdout_pairs": 3, "holdout_every": 2, "warmup_steps": 60}
    settings |= PAPER_OBJECTIVE
    stopped, cut = copy.deepcopy(model), copy.deepcopy(model)
    config = TrainConfig(num_steps=60, patience=2, checkpoint_every=100, **settings)
    train_pairs(stopped, random_pairs(model, 8), config, seed=0, folder=tmp_path / "stopped")
    losses = [line.get("holdout/loss", math.inf) for line in metrics_of(tmp_path / "stopped")]
    best = int(np.argmin(losses)) + 1
    assert best < len(losses) < 60
    # In the warm-up the learning rate does not depend on the number of steps.
    config = TrainConfig(num_steps=best, patience=50, **settings)
    train_pairs(cut, random_pairs(model, 8), config, seed=0, folder=tmp_path / "cut")
    for name, tensor in weights_of(cut).items():
        assert torch.equal(tensor, weights_of(stopped)[name]), name


def test_no_pairs_is_an_error(model, random_pairs, tmp_path):
    with pytest.raises(InputError, match="no pairs to train on; lower curation.threshold"):
        train_pairs(model, random_pairs(model).slice(0, 0), TrainConfig(), seed=0, folder=tmp_path)


def test_holding_out_all_pairs_is_an_error(model, random_pairs, tmp_path):
    with pytest.raises(InputError, match="train.holdout_pairs 6 leaves none; lower it"):
        train_pairs(model, random_pairs(model), TrainConfig(holdout_pairs=6), seed=0, folder=tmp_path)


@pytest.mark.parametrize("settings", [{}, {"reference": "live"}], ids=["cached", "live"])
def test_a_loss_that_is_not_finite_names_the_step(model, random_pairs, tmp_path, settings):
    with torch.no_grad():
        model.transformer.head.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="at step 0; lower train.lr"):
        train_pairs(model, random_pairs(model), TrainConfig(**settings), seed=0, folder=tmp_path)


def test_a_live_reference_of_sharded_weights_is_refused(model, random_pairs, tmp_path):
    with pytest.raises(InputError, match="train.reference live: a sharded model has no second copy; take cached"):
        config = TrainConfig(reference="live", dtype="bfloat16")
        train_pairs(model, random_pairs(model), config, seed=0, folder=tmp_path)


def test_a_cached_reference_of_other_weights_is_made_again(model, random_pairs, tmp_path):
    # A reference that is not the policy's own would show as a divergence before the first step.
    config, other = TrainConfig(num_steps=1), copy.deepcopy(model)
    with torch.no_grad():
        other.transformer.head.weight.mul_(0.5)
    for number, start in enumerate((model, other)):
        for path in checkpoints(tmp_path):
            shutil.rmtree(path)
        train_pairs(start, random_pairs(model), config, seed=0, folder=tmp_path)
        (line,) = metrics_of(tmp_path)
        assert line["generation/kl"] == pytest.approx(0, abs=1e-5), number


def test_learning_rate_warms_up_and_falls_to_zero():
    config = TrainConfig(num_steps=100, warmup_steps=10, lr=1.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0) and rates[-1] < 1e-3


def test_metrics_say_how_fast_it_was(model, random_pairs, tmp_path):
    train_pairs(model, random_pairs(model), TrainConfig(num_steps=2), seed=0, folder=tmp_path)
    for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()):
        assert line["tokens_per_second"] > 0 and 0 < line["mfu"] < 1 and line["peak_memory_gib"] > 0.05


UNUSABLE_LINES = {
    "a missing step": b'{"step": 0}\n{"step": 2}\n',
    "no step": b"{}\n",
    "no object": b"3\n",
    "a step in quotes": b'{"step": "0"}\n',
    "no text": b"\xff\n",
    "nothing": b"",
}


@pytest.mark.parametrize("lines", UNUSABLE_LINES.values(), ids=UNUSABLE_LINES.keys())
def test_metrics_that_lack_a_step_cannot_be_gone_on_with(tmp_path, lines):
    (tmp_path / "metrics.jsonl").write_bytes(lines)
    with pytest.raises(InputError, match=f"metrics.jsonl: lacks some of the first 3 steps.*or delete {tmp_path} and"):
        MetricLog(tmp_path / "metrics.jsonl", 3)
    # From the start, nothing is needed of them.
    MetricLog(tmp_path / "metrics.jsonl", 0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_held_out_loss_that_is_not_finite_names_the_step(model, random_pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "measure_loss", lambda *arguments: math.nan)
    with pytest.raises(InputError, match="holdout/loss is nan at step 1; lower train.lr"):
        config = TrainConfig(num_steps=4, holdout_pairs=2, holdout_every=2)
        train_pairs(model, random_pairs(model), config, seed=0, folder=tmp_path)
    assert len(metrics_of(tmp_path)) == 1


@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16"}], ids=["float32", "bfloat16"])
def test_tied_embeddings_stay_tied(model, random_pairs, tmp_path, settings):
    config = dataclasses.replace(model.transformer.config, tie_embeddings=True)
    model.transformer = Transformer(config).init_weights(torch.Generator().manual_seed(0), std=0.2)
    config = TrainConfig(num_steps=3, checkpoint_every=1, holdout_pairs=2, holdout_every=2, lr=1e-3, **settings)
    resumed = copy.deepcopy(model)
    for one in (model, resumed):  # the second resumes from the first one's last checkpoint
        train_pairs(one, random_pairs(model), config, seed=0, folder=tmp_path)
        assert one.transformer.head.weight is one.transformer.embed.weight
    for name, tensor in weights_of(model).items():
        assert torch.equal(tensor, weights_of(resumed)[name]), name


NOTHING_TO_LEARN = {
    "pairs": (
        ["train.preference_weight=0", "train.nll_weight=0", "train.replay_weight=0"],
        "train: nothing to learn: preference_weight, nll_weight and replay_weight are all 0; set one above 0",
    ),
    "rewards": (
        ["selfplay.algorithm=grpo", "grpo.reward_weights=[0, 0]", "train.replay_weight=0"],
        "grpo: nothing to learn: reward_weights, kl_weight and train.replay_weight are all 0; set one of them",
    ),
}


@pytest.mark.parametrize(("settings", "message"), NOTHING_TO_LEARN.values(), ids=NOTHING_TO_LEARN)
def test_nothing_to_learn_is_refused_before_work_begins(settings, message):
    with pytest.raises(InputError, match=message):
        training.check_training(load_config(None, settings))
    for number in range(len(settings)):  # any one of the weights is enough
        if "weight" in settings[number]:
            training.check_training(load_config(None, settings[:number] + settings[number + 1 :]))


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, "train.lr"),
        ({"lr": 1e6}, "train.lr"),
        ({"weight_decay": 1e5, "nll_weight": 1e4}, "weight_decay or train.nll"),
    ],
    ids=["nothing", "the rate", "two"],
)
def test_what_overflows_is_named(settings, names):
    with pytest.raises(InputError, match=f"loss is inf at step 3; lower .*{names}"):
        training._check_finite({"loss": math.inf}, 3, "x", TrainConfig(**settings))
