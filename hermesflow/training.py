"""Preference training over packed span trees (HermesFlow, arXiv 2502.12148, section 4): forward, backward, step.

All draws are pure functions of the seed, so that a run resumes to the same weights, bit by bit. With torchrun the
passes of a step are shared out among the processes, and the weights are sharded.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from hermesflow.algorithms.algorithm import Algorithm, Reference, StepSums, batch_logprobs
from hermesflow.algorithms.batch import REPLAY
from hermesflow.algorithms.losses import check_loss
from hermesflow.algorithms.packing import check_pairs, referenced_sides, trained_pairs
from hermesflow.algorithms.policy import Policy
from hermesflow.config import Config, TrainConfig
from hermesflow.data.records import Record
from hermesflow.engine.phases import phase
from hermesflow.engine.transformer import Transformer
from hermesflow.models.model import Model
from hermesflow.runtime.checkpointing import load_checkpoint, load_state, save_checkpoint, save_state
from hermesflow.runtime.distributed import reshard, world_size
from hermesflow.runtime.files import InputError, StrPath
from hermesflow.runtime.metric_log import Meter, MetricLog
from hermesflow.runtime.progress import track
from hermesflow.runtime.registry import ALGORITHMS, resolve
from hermesflow.runtime.trackers import check_tracker, open_tracker

_LOGGER = logging.getLogger(__name__)


def train_pairs(
    model: Model, pairs: pa.Table, config: TrainConfig, *, seed: int, folder: StrPath, algorithm: str = "pair-dpo"
) -> dict[str, float]:
    """Trains model.transformer in place on one round's pairs; the weights at the start are the reference.

    Args:
        model: the policy, in float32; it must hold the round's starting weights, a checkpoint in the folder is loaded
            over them.
        pairs: a table of hermesflow.data.pairs.
        config: steps, rates and loss.
        seed: seeds the order of pairs, the masks, which pairs are held out, and torch's generators.
        folder: receives metrics.jsonl, one line a step, step-*/ checkpoints, reference*.parquet and, with LoRA,
            adapter/.
        algorithm: a name of ALGORITHMS or "module:class" of your own.
    Returns: means over the last tenth of the steps of every metric.
    Raises: InputError on an empty table, pairs of another model, an unwritable folder, checkpoints that cannot be used,
        or a metric that is not finite; the last names it and the step.

    Where the weights are sharded (several processes, or bfloat16), the model of the first process alone holds the
    result; the others open what it saves. After an error the model is of no more use: open it again.
    """
    _check_training(config, algorithm)
    check_pairs(pairs, model)
    return train_checked_pairs(model, pairs, config, seed=seed, folder=folder, algorithm=algorithm)


def train_checked_pairs(
    model: Model, pairs: pa.Table, config: TrainConfig, *, seed: int, folder: StrPath, algorithm: str = "pair-dpo"
) -> dict[str, float]:
    """train_pairs for settings and pairs that check_training and check_pairs have seen."""
    make = find_algorithm(algorithm)
    check_takes_pairs(algorithm)
    pairs, held = _hold_out(trained_pairs(pairs, config), config.holdout_pairs, seed)
    _tell_what_is_replayed(pairs, config, make.name)
    policy, folder = Policy(model, config, seed), Path(folder)
    learner, held_learner = (make(model, table, config, seed) for table in (pairs, held))
    return _train(policy, learner, HoldOut(policy, held_learner, len(held), folder), seed, folder)


def train_records(
    model: Model, records: Sequence[Record], config: Config, *, seed: int, folder: StrPath, first: Model | None = None
) -> dict[str, float]:
    """Trains model.transformer in place by an online algorithm, such as GRPO: it learns from images that the model
    draws of the records' captions as it learns.

    Args:
        model: the policy, as in train_pairs.
        records: with codes and questions, and ids of their own.
        config: selfplay.algorithm names the algorithm; train, curation and the algorithm's own section are used.
        seed: of all draws.
        folder: see train_pairs.
        first: the model before all rounds, another object, which is then the reference; None: the weights at the start.
    Returns: means over the last tenth of the steps of every metric.
    Raises: as train_pairs; InputError on an algorithm that learns from pairs, or records that cannot be judged.
    """
    check_training(config)
    if not is_online(config.selfplay.algorithm):
        raise InputError(f"selfplay.algorithm {config.selfplay.algorithm}: learns from pairs; call train_pairs")
    if not records:
        raise InputError("no records to train on; raise data.num_records")
    learner = find_algorithm(config.selfplay.algorithm)(model, records, config, seed)  # it may draw: weights are whole
    policy, folder = Policy(model, config.train, seed, first), Path(folder)
    return _train(policy, learner, HoldOut(policy, None, 0, folder), seed, folder)


def train_on(
    model: Model,
    learned: pa.Table | Sequence[Record],
    config: Config,
    *,
    seed: int,
    folder: StrPath,
    first: Model | None = None,
) -> dict[str, float]:
    """train_records, or train_pairs where config.selfplay.algorithm learns from pairs; its reference is the policy."""
    if is_online(config.selfplay.algorithm):
        return train_records(model, learned, config, seed=seed, folder=folder, first=first)
    return train_pairs(model, learned, config.train, seed=seed, folder=folder, algorithm=config.selfplay.algorithm)


def _train(policy: Policy, learner: Algorithm, hold_out: HoldOut, seed: int, folder: Path) -> dict[str, float]:
    """The steps of a training, from the last checkpoint on."""
    config = policy.config
    reference = learner.reference(policy, range(config.num_steps), folder / "reference.parquet")
    optimizer = make_optimizer(policy.transformer, config)
    torch.manual_seed(seed)  # a resumed run draws the same numbers
    progress = {"step": 0} | hold_out.progress() | load_checkpoint(folder, policy.transformer, optimizer)
    hold_out.resume(progress)
    start, log = progress["step"], MetricLog(folder / "metrics.jsonl", progress["step"])
    bar = track(range(start, config.num_steps), learner.name, "steps", completed=start)
    with open_tracker(config.tracker, asdict(config), folder, start) as send:
        for step in bar:
            began, meter = time.perf_counter(), Meter(policy.work, policy.device, reference.is_live)
            lr = optimizer.param_groups[0]["lr"] = learning_rate(config, step)
            metrics = forward_backward(policy, learner, reference, learner.visits(step), meter)
            metrics |= {"grad_norm": clip_gradients(policy.transformer, config.max_grad_norm), "lr": lr}
            _check_finite(metrics, step, learner.name, config)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            metrics |= meter.rates(time.perf_counter() - began)
            metrics |= hold_out.measure(step)
            log.add({"step": step, **metrics})
            send(metrics, step)
            bar.note(_as_note(metrics))
            if hold_out.is_over(step):
                break
            progress = {"step": step + 1} | hold_out.progress()
            if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.num_steps:
                save_checkpoint(folder, policy.transformer, optimizer, progress, config.keep_checkpoints)
    hold_out.take_best()
    policy.finish(folder)
    return log.tail_means(max(config.num_steps // 10, 1))


def check_training(config: Config) -> None:
    """Raises InputError with the fix where training could not begin: before the work on its data, not after it."""
    name = config.selfplay.algorithm
    _check_training(config.train, name)
    if is_online(name):
        if config.train.holdout_pairs:
            raise InputError(f"train.holdout_pairs: expected 0 with {name}, which learns from no pairs; leave it out")
        find_algorithm(name).check(config)


def _check_training(config: TrainConfig, algorithm: str) -> None:
    check_tracker(config.tracker)
    check_loss(config)
    find_algorithm(algorithm)
    if algorithm == "pair-dpo" and not (config.preference_weight or config.nll_weight or config.replay_weight):
        raise InputError(
            "train: nothing to learn: preference_weight, nll_weight and replay_weight are all 0; set one above 0"
        )


def find_algorithm(name: str) -> type:
    """The class of an algorithm. Raises: InputError if there is none."""
    has = ("name", "visits", "passes", "metric_names", "reference", "loss")
    return resolve(ALGORITHMS, name, "selfplay.algorithm", has, is_class=True)


def check_takes_pairs(algorithm: str) -> None:
    """Raises InputError for an algorithm that draws its images as it learns."""
    if is_online(algorithm):
        raise InputError(
            f"selfplay.algorithm {algorithm}: draws its images as it learns and takes no pairs; run hermesflow "
            "selfplay, or hermesflow train without --pairs"
        )


def check_model(model: Model, config: Config) -> None:
    """Raises InputError where the algorithm of the settings cannot train the model, before any work."""
    check = getattr(find_algorithm(config.selfplay.algorithm), "check_model", None)
    if check is not None:
        check(model, config)


def is_online(name: str) -> bool:
    """Whether an algorithm learns from records, whose images it draws itself, and not from pairs."""
    return getattr(find_algorithm(name), "is_online", False)


def forward_backward(
    policy: Policy, algorithm: Algorithm, reference: Reference, visits: Sequence[Any], meter: Meter
) -> dict[str, float]:
    """Adds the gradient of a step's loss to that of the weights.

    Args:
        policy: what is trained.
        algorithm, reference: what it learns from.
        visits: of the step.
        meter: counts the work.
    Returns: {"loss", the algorithm's metrics}, of all processes together.
    """
    sums = StepSums(algorithm.metric_names(visits), policy.device)
    for make_batch, counts in algorithm.passes(visits):
        batch = make_batch(policy.device)
        with phase("pass"):
            logprob = batch_logprobs(policy.transformer, batch)
            loss, shares = algorithm.loss(logprob, reference.logprobs(batch), batch)
            # Shards hold the mean of the processes' gradients, which are shares of a sum.
            (loss * (world_size() if counts else 0)).backward()
        if counts:
            sums.add(loss, shares)
            meter.add(batch.tree, len(batch.rows))
    return sums.metrics()


class HoldOut:
    """Pairs kept out of training: their loss now and then, the weights where it was least, and when to stop."""

    def __init__(self, policy: Policy, algorithm: Algorithm | None, num_pairs: int, folder: Path) -> None:
        """
        Args:
            policy: what is measured; it still has its first weights.
            algorithm: over the held-out pairs, None without any; each is measured under the masks of its first visit.
            num_pairs: of them; without any nothing is measured.
            folder: receives best/ and the reference's log-probabilities.
        """
        self._policy, self._algorithm, self._config, self._folder = policy, algorithm, policy.config, folder
        self._visits = algorithm.visits(None) if num_pairs else []
        if num_pairs:
            self._reference = algorithm.reference(policy, [None], folder / "reference-holdout.parquet")
        self._best_loss, self._best_step = None, 0

    def progress(self) -> dict[str, Any]:
        """Least loss so far, and the number of steps after which it was measured; a checkpoint keeps them."""
        return {"best_loss": self._best_loss, "best_step": self._best_step}

    def resume(self, progress: dict[str, Any]) -> None:
        """Resumes from what a checkpoint kept."""
        self._best_loss, self._best_step = progress["best_loss"], progress["best_step"]

    def measure(self, step: int) -> dict[str, float]:
        """The loss after a step where it is due, as a metric; the best weights so far are kept."""
        if not self._visits or (step + 1) % self._config.holdout_every:
            return {}
        loss = measure_loss(self._policy.transformer, self._algorithm, self._visits, self._reference)
        metrics = {"holdout/loss": loss}
        _check_finite(metrics, step, self._algorithm.name, self._config)
        if self._best_loss is None or loss < self._best_loss:
            self._best_loss, self._best_step = loss, step + 1
            save_state(self._folder / "best", self._policy.transformer, None, {"step": step + 1} | self.progress())
        return metrics

    def is_over(self, step: int) -> bool:
        """Whether the loss has not fallen for so many measurements that training ends after this step."""
        over = self._visits and step + 1 - self._best_step >= self._config.patience * self._config.holdout_every
        if over:
            _LOGGER.info(
                "%s: stopped after %d steps; the held-out loss was least after %d",
                self._algorithm.name,
                step + 1,
                self._best_step,
            )
        return bool(over)

    def take_best(self) -> None:
        """Loads the weights of the least loss."""
        if self._best_step:
            load_state(self._folder / "best", self._policy.transformer, None)


@torch.no_grad()
def measure_loss(transformer: Transformer, algorithm: Algorithm, visits: Sequence[Any], reference: Reference) -> float:
    """The loss on these visits, by all processes together; the transformer is in training mode again after it."""
    device = transformer.embed.weight.device
    sums = StepSums(algorithm.metric_names(visits), device)
    transformer.eval()
    for make_batch, counts in algorithm.passes(visits):
        batch = make_batch(device)
        loss, shares = algorithm.loss(batch_logprobs(transformer, batch), reference.logprobs(batch), batch)
        if counts:
            sums.add(loss, shares)
    reshard(transformer)
    transformer.train()
    return sums.metrics()["loss"]


def make_optimizer(transformer: Transformer, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW on what is trained, fused."""
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def clip_gradients(transformer: Transformer, max_norm: float) -> float:
    """Clips the gradients to a norm; returns the norm that they had."""
    norm = nn.utils.clip_grad_norm_(transformer.parameters(), max_norm)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


def _hold_out(pairs: pa.Table, count: int, seed: int) -> tuple[pa.Table, pa.Table]:
    """The pairs to train on and those that are held out, `count` of them, both in the table's order."""
    if count >= len(pairs):
        message = f"train.holdout_pairs {count} leaves none; lower it, " if len(pairs) else ""
        raise InputError(
            f"no pairs to train on; {message}lower curation.threshold or curation.margin, or raise data.num_records"
        )
    chosen = np.random.default_rng([seed, 2]).permutation(len(pairs))[:count]
    is_held = np.isin(np.arange(len(pairs)), chosen)
    return pairs.filter(pa.array(~is_held)), pairs.filter(pa.array(is_held))


def _tell_what_is_replayed(pairs: pa.Table, config: TrainConfig, algorithm: str) -> None:
    asked = list(zip(pairs["questions"].to_pylist(), pairs["choices"].to_pylist(), strict=True))
    without = sum(not questions for questions, _ in asked)
    if config.replay_weight and without:
        _LOGGER.info("%s: %d of %d pairs have no questions to replay", algorithm, without, len(pairs))
    bare = sum(bool(questions) and not choices for questions, choices in asked)
    if REPLAY in referenced_sides(config) and bare:
        _LOGGER.warning(
            "%s: %d of %d pairs have no choices, so that the replay keeps the probability of their right answers "
            "alone; curate again for pairs that have them",
            algorithm,
            bare,
            len(pairs),
        )


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine to zero at num_steps."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.num_steps - config.warmup_steps, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def _suspect(config: TrainConfig) -> str:
    """What may have made the arithmetic overflow: settings that are far out, else the rate."""
    far = [item.name for item in fields(config) if item.type is float and getattr(config, item.name) >= 1e3]
    return " or ".join(f"train.{name}" for name in far or ["lr"])


def _check_finite(metrics: dict[str, float], step: int, algorithm: str, config: TrainConfig) -> None:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise InputError(f"{algorithm}: {name} is {value} at step {step}; lower {_suspect(config)}")


def _as_note(metrics: dict[str, float]) -> str:
    """A step in a few words."""
    message = [f"{name} {metrics[name]:.2f}" for name in metrics if name.endswith("/margin") or name == "reward"]
    return " ".join([f"loss {metrics['loss']:.3f}", *message])
