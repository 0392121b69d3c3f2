"""Checkpoints of training: exact, whole or named, and the one before a damaged one is used."""

import copy
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import time
import warnings

import pytest
import torch

from hermesflow.algorithms.policy import Policy
from hermesflow.config import TrainConfig
from hermesflow.engine.sequence_logprob import span_logprobs
from hermesflow.kernels.span_tree import SpanTree
from hermesflow.runtime.checkpointing import checkpoints, load_checkpoint, load_state, save_checkpoint, save_state
from hermesflow.runtime.files import InputError, remove_leftovers
from hermesflow.training import make_optimizer, train_pairs

PLAIN = TrainConfig(dtype="float32", lr=1e-2)
CONFIGS = {
    "plain": PLAIN,
    "adapters": TrainConfig(dtype="float32", lr=1e-2, lora_rank=2),
    "sharded bfloat16": TrainConfig(dtype="bfloat16", lr=1e-2),
    "sharded adapters": TrainConfig(dtype="bfloat16", lr=1e-2, lora_rank=2),
}


def make_training(model, config=PLAIN):
    """A policy and its optimizer, made in the order of train_pairs."""
    policy = Policy(copy.deepcopy(model), config, 0)
    return policy, make_optimizer(policy.transformer, config)


def logprobs(transformer, tokens):
    tree = SpanTree.build([(tokens, -1, "causal")], None)
    return span_logprobs(transformer, tree, torch.arange(len(tokens) - 1), torch.tensor(tokens[1:]))


def take_step(training, number):
    """One step on tokens that a number chooses; what is drawn of torch's generator matters too."""
    policy, optimizer = training
    tokens = [3 + number % 5, *torch.randint(3, 20, (6,)).tolist()]
    (-logprobs(policy.transformer, tokens).mean()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def trained_weights(policy):
    found = {name: value for name, value in policy.transformer.named_parameters() if value.requires_grad}
    return {name: (value.full_tensor() if hasattr(value, "full_tensor") else value) for name, value in found.items()}


def assert_same_weights(one, other):
    one, other = trained_weights(one), trained_weights(other)
    assert one.keys() == other.keys() and one
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def saved(folder, model, steps, config=PLAIN, keep=2):
    training = make_training(model, config)
    for step in range(steps):
        take_step(training, step)
        save_checkpoint(folder, training[0].transformer, training[1], {"step": step + 1}, keep)
    return training


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_training_goes_on_to_the_last_bit(tiny_model, tmp_path, config):
    torch.manual_seed(0)
    whole = make_training(tiny_model, config)
    with torch.no_grad():
        logprobs(whole[0].transformer, [3, 4, 5])  # as the reference's passes do before the first step
    for step in range(2):
        take_step(whole, step)
    with torch.no_grad():
        logprobs(whole[0].transformer, [3, 4, 5])  # as the held-out loss does before a checkpoint
    progress = {"step": 2, "best_loss": float("inf"), "best_step": 0}
    save_checkpoint(tmp_path, whole[0].transformer, whole[1], progress, keep=2)
    for step in range(2, 4):
        take_step(whole, step)

    torch.manual_seed(99)
    torch.rand(5)
    resumed = make_training(tiny_model, config)
    assert load_checkpoint(tmp_path, resumed[0].transformer, resumed[1]) == progress
    for step in range(2, 4):
        take_step(resumed, step)
    assert_same_weights(whole[0], resumed[0])


def test_nothing_is_pickled_and_frozen_weights_are_left_out(tiny_model, tmp_path):
    saved(tmp_path, tiny_model, 1, CONFIGS["adapters"])
    files = sorted(path.name for path in (tmp_path / "step-000001").iterdir())
    assert files == ["manifest.json", "progress.json", "shard-00001-model-00001-of-00001.safetensors"]
    full = sum(value.nbytes for value in tiny_model.transformer.parameters())
    assert (tmp_path / "step-000001" / files[-1]).stat().st_size < full


def test_an_empty_folder_has_nothing_to_go_on_with(tiny_model, tmp_path):
    policy, optimizer = make_training(tiny_model)
    assert load_checkpoint(tmp_path, policy.transformer, optimizer) == {}
    assert not optimizer.state


def test_the_last_few_are_kept(tiny_model, tmp_path):
    saved(tmp_path, tiny_model, 4, keep=3)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000002", "step-000003", "step-000004"]


def test_saving_and_loading_is_quiet(tiny_model, tmp_path, recwarn, caplog):
    caplog.set_level(logging.INFO)
    saved(tmp_path, tiny_model, 1)
    policy, optimizer = make_training(tiny_model)
    load_checkpoint(tmp_path, policy.transformer, optimizer)
    assert not [warning for warning in recwarn if "torch.distributed is disabled" in str(warning.message)]
    assert not own_messages(caplog)
    with pytest.warns(UserWarning, match="mine"):
        warnings.warn("mine", stacklevel=1)


def own_messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("hermesflow")]


def tensors_file(path):
    return next(path.glob("*.safetensors"))


def flip_a_bit(path):
    data = bytearray(tensors_file(path).read_bytes())
    data[-100] ^= 1
    tensors_file(path).write_bytes(data)


def cut_short(path):
    tensors_file(path).write_bytes(tensors_file(path).read_bytes()[:-1])


def add_a_file(path):
    shutil.copy(tensors_file(path), path / "shard-00002-model-00001-of-00001.safetensors")


DAMAGES = {
    "a strange file": (add_a_file, "shard-00002-.* is not in manifest.json"),
    "a bit": (flip_a_bit, "has another checksum than manifest.json"),
    "cut short": (cut_short, r"has \d+ bytes instead of \d+"),
    "no tensors": (lambda path: tensors_file(path).unlink(), r"safetensors is missing"),
    "no progress": (lambda path: (path / "progress.json").unlink(), "progress.json is missing"),
    "another progress": (lambda path: (path / "progress.json").write_text("{}"), "progress.json has 2 bytes"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "no JSON": (lambda path: (path / "manifest.json").write_text("{"), "manifest.json: Expecting"),
    "another JSON": (lambda path: (path / "manifest.json").write_text("[1]"), "manifest.json: cannot unpack"),
}


@pytest.mark.parametrize("damage, reason", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tiny_model, tmp_path, caplog, damage, reason):
    saved(tmp_path, tiny_model, 2)
    damage(tmp_path / "step-000002")
    policy, optimizer = make_training(tiny_model)
    assert load_checkpoint(tmp_path, policy.transformer, optimizer) == {"step": 1}
    (warning,) = own_messages(caplog)
    assert warning.startswith(f"{tmp_path / 'step-000002'}: damaged checkpoint (") and re.search(reason, warning)

    before = make_training(tiny_model)
    assert load_state(tmp_path / "step-000001", before[0].transformer, before[1]) == {"step": 1}
    assert_same_weights(policy, before[0])


def test_no_usable_checkpoint_is_an_error(tiny_model, tmp_path):
    saved(tmp_path, tiny_model, 2)
    flip_a_bit(tmp_path / "step-000001")
    cut_short(tmp_path / "step-000002")
    policy, optimizer = make_training(tiny_model)
    with pytest.raises(InputError, match=r"no checkpoint can be used \(step-000002: .*; step-000001: .*\); .* delete"):
        load_checkpoint(tmp_path, policy.transformer, optimizer)


def test_a_single_state_that_is_damaged_is_an_error(tiny_model, tmp_path):
    policy, _ = make_training(tiny_model)
    save_state(tmp_path / "best", policy.transformer, None, {})
    flip_a_bit(tmp_path / "best")
    with pytest.raises(InputError, match="best: damaged checkpoint file .*another checksum"):
        load_state(tmp_path / "best", policy.transformer, None)


def test_weights_alone_can_be_kept(tiny_model, tmp_path):
    first, _ = make_training(tiny_model)
    save_state(tmp_path / "best", first.transformer, None, {"step": 7})
    second = make_training(tiny_model)
    take_step(second, 0)
    assert load_state(tmp_path / "best", second[0].transformer, None) == {"step": 7}
    assert_same_weights(first, second[0])


OTHERS = {
    "missing": (CONFIGS["adapters"], PLAIN, r"it has model.blocks.0.*lora_A"),
    "more": (PLAIN, CONFIGS["adapters"], r"it has model.blocks"),
    "another rank": (CONFIGS["adapters"], TrainConfig(dtype="float32", lora_rank=3), r"is \[.*\], expected \["),
}


@pytest.mark.parametrize("before, now, reason", OTHERS.values(), ids=OTHERS.keys())
def test_other_settings_are_refused(tiny_model, tmp_path, before, now, reason):
    saved(tmp_path, tiny_model, 1, before)
    policy, optimizer = make_training(tiny_model, now)
    weights = {name: value.clone() for name, value in trained_weights(policy).items()}
    fits_not = "step-000001: checkpoint of another model or of other train settings"
    message = rf"{fits_not} \(.*{reason}.* more\); set them back"
    with pytest.raises(InputError, match=message):
        load_checkpoint(tmp_path, policy.transformer, optimizer)
    assert all(torch.equal(value, weights[name]) for name, value in trained_weights(policy).items())


def test_a_failed_write_leaves_the_older_ones(tiny_model, tmp_path, monkeypatch):
    training = saved(tmp_path, tiny_model, 1)
    import torch.distributed.checkpoint.filesystem as filesystem

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(filesystem, "_write_item", full)
    with pytest.raises(InputError, match="step-000002: the disk is full"):
        save_checkpoint(tmp_path, training[0].transformer, training[1], {"step": 2}, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def save_for_ever(model, folder):
    torch.set_num_threads(1)  # the threads of the forked process are not here
    training = make_training(model)
    take_step(training, 0)
    for step in range(1, 10_000):
        save_checkpoint(folder, training[0].transformer, training[1], {"step": step}, keep=2)


def test_a_kill_leaves_whole_checkpoints(tiny_model, tmp_path):
    context = multiprocessing.get_context("fork")
    had_leftovers = False
    for moment in range(8):
        folder = tmp_path / str(moment)
        folder.mkdir()
        process = context.Process(target=save_for_ever, args=(tiny_model, folder), daemon=True)
        process.start()
        # Killed while it writes into a temporary folder, more or less full.
        while len(checkpoints(folder)) < 2:
            time.sleep(0.001)
        while not any(path.name.endswith(".tmp") for path in folder.iterdir()):
            pass
        time.sleep(moment * 5e-4)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        had_leftovers |= any(path.name.endswith(".tmp") for path in folder.iterdir())
        remove_leftovers(folder)
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        newest = checkpoints(folder)[-1]
        policy, optimizer = make_training(tiny_model)
        assert f"step-{load_checkpoint(folder, policy.transformer, optimizer)['step']:06d}" == newest.name
        assert json.loads((newest / "manifest.json").read_text())
    assert had_leftovers


@pytest.mark.parametrize("lora_rank", [0, 2], ids=["all weights", "adapters"])
def test_bfloat16_with_a_cached_reference_trains_every_weight_and_goes_on(
    tiny_model, random_pairs, tmp_path, lora_rank
):
    """The reference's passes come first and leave FSDP's root whole: that is not what is trained, nor what is saved."""
    config = TrainConfig(
        dtype="bfloat16",
        num_steps=4,
        pairs_per_step=2,
        lr=1e-2,
        checkpoint_every=2,
        holdout_pairs=2,
        holdout_every=1,
        lora_rank=lora_rank,
    )
    models = [copy.deepcopy(tiny_model) for _ in range(2)]
    train_pairs(models[0], random_pairs(tiny_model), config, seed=0, folder=tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000002"]
    trained, before = models[0].transformer.state_dict(), tiny_model.transformer.state_dict()
    assert trained.keys() == before.keys()
    assert all(torch.equal(trained[name], before[name]) for name in ("embed.weight", "head.weight")) == bool(lora_rank)
    assert not torch.equal(trained["blocks.0.attention.qkv.weight"], before["blocks.0.attention.qkv.weight"])
    train_pairs(models[1], random_pairs(tiny_model), config, seed=0, folder=tmp_path)
    for name, value in models[1].transformer.state_dict().items():
        assert torch.equal(value, trained[name]), name


def test_copies_and_notes_beside_checkpoints_are_left_alone(tiny_model, tmp_path):
    saved(tmp_path, tiny_model, 1)
    others = [tmp_path / "step-000001 (copy)", tmp_path / "step-notes"]
    for other in others:
        shutil.copytree(tmp_path / "step-000001", other)
    (tmp_path / "step-000009").write_text("")
    saved(tmp_path, tiny_model, 3, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000003"]
    assert all(other.is_dir() for other in others)


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (1_000_000, 999_999):
        (tmp_path / f"step-{step:06d}").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-999999", "step-1000000"]


def test_a_checkpoint_that_was_moved_and_linked_is_used_and_only_the_link_removed(tiny_model, tmp_path):
    saved(tmp_path, tiny_model, 1)
    shutil.move(tmp_path / "step-000001", tmp_path / "elsewhere")
    (tmp_path / "step-000001").symlink_to(tmp_path / "elsewhere")
    policy, optimizer = make_training(tiny_model)
    assert load_checkpoint(tmp_path, policy.transformer, optimizer) == {"step": 1}
    save_checkpoint(tmp_path, policy.transformer, optimizer, {"step": 2}, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000002"] and (tmp_path / "elsewhere").is_dir()
