"""Pair-DPO over packed homologous pairs, against a frozen reference (HermesFlow, arXiv 2502.12148, section 4).

Every pair of a step brings both its sides, as two span trees (packing.py). All draws are pure functions of the seed, so
that a run resumes to the same weights, bit by bit. With torchrun the passes of a step are shared out among the
processes, and the weights are sharded.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from hermesflow.algorithms.packing import REPLAY, PairPacker, PairVisit, check_pairs, referenced_sides, trained_pairs
from hermesflow.algorithms.pair_dpo import StepSums, pass_objective
from hermesflow.algorithms.references import LiveReference, NoReference, Reference, batch_logprobs, cached_reference
from hermesflow.config import TrainConfig
from hermesflow.engine.model_work import ModelWork
from hermesflow.engine.transformer import Transformer
from hermesflow.models.lora import Adapters
from hermesflow.models.model import Model, model_digest
from hermesflow.runtime.checkpointing import load_checkpoint, load_state, save_checkpoint, save_state
from hermesflow.runtime.distributed import reshard, shard, unshard, world_size
from hermesflow.runtime.files import InputError
from hermesflow.runtime.metric_log import Meter, MetricLog
from hermesflow.runtime.progress import track
from hermesflow.runtime.trackers import open_tracker

_LOGGER = logging.getLogger(__name__)


def train_pairs(model: Model, pairs: pa.Table, config: TrainConfig, *, seed: int, folder: Path) -> dict[str, float]:
    """Trains model.transformer in place on one round's pairs; the weights at the start are the reference.

    Args:
        model: the policy, in float32; it must hold the round's starting weights, a checkpoint in the folder is loaded
            over them.
        pairs: a table of hermesflow.data.pairs.
        config: steps, rates and loss.
        seed: seeds the order of pairs, the masks, which pairs are held out, and torch's generators.
        folder: receives metrics.jsonl, one line a step, step-*/ checkpoints, reference*.parquet and, with LoRA,
            adapter/.
    Returns: means over the last tenth of the steps of every metric.
    Raises: InputError on an empty table, pairs of another model, an unwritable folder, checkpoints that cannot be used,
        or a metric that is not finite; the last names it and the step.

    Where the weights are sharded (several processes, or bfloat16), the model of the first process alone holds the
    result; the others open what it saves. After an error the model is of no more use: open it anew to go on.
    """
    check_pairs(pairs, model)
    pairs, held_out = _hold_out(trained_pairs(pairs, config), config.holdout_pairs, seed)
    without = sum(not questions for questions in pairs["questions"].to_pylist())
    if config.replay_weight and without:
        _LOGGER.info("Pair-DPO: %d of %d pairs have no questions to replay", without, len(pairs))
    asked = zip(pairs["questions"].to_pylist(), pairs["choices"].to_pylist(), strict=True)
    bare = sum(bool(questions) and not choices for questions, choices in asked)
    if REPLAY in referenced_sides(config) and bare:
        _LOGGER.warning(
            "Pair-DPO: %d of %d pairs have no choices, so that the replay keeps the probability of their right answers "
            "alone; curate again for pairs that have them", bare, len(pairs),
        )  # fmt: skip
    policy = Policy(model, config, seed)
    packer, held_packer = (PairPacker(model, table, config, seed) for table in (pairs, held_out))
    held_visits = [PairVisit(pair, 0) for pair in range(len(held_out))]
    all_visits = [visit for step in range(config.num_steps) for visit in packer.visits(step)]
    reference = _make_reference(policy, packer, all_visits, folder / "reference.parquet")
    held_reference = _make_reference(policy, held_packer, held_visits, folder / "reference-holdout.parquet")
    optimizer = make_optimizer(policy.transformer, config)
    torch.manual_seed(seed)  # whatever was drawn before: what a model draws in training is the same after a restart
    # Least held-out loss so far, and the number of steps after which it was measured.
    progress = {"step": 0, "best_loss": None, "best_step": 0}
    progress |= load_checkpoint(folder, policy.transformer, optimizer)
    start, log = progress["step"], MetricLog(folder / "metrics.jsonl", progress["step"])
    bar = track(range(start, config.num_steps), "Pair-DPO", "steps", completed=start)
    with open_tracker(config.tracker, asdict(config), folder, start) as send:
        for step in bar:
            began, meter = time.perf_counter(), Meter(policy.work, policy.device, isinstance(reference, LiveReference))
            lr = optimizer.param_groups[0]["lr"] = learning_rate(config, step)
            visits = packer.visits(step)
            totals = packer.num_pairs(visits)
            sums = StepSums(totals, config, policy.device)
            for chosen, counts in packer.passes(visits):
                batch = packer.pack(chosen, policy.device)
                logprob = batch_logprobs(policy.transformer, batch)
                loss, shares = pass_objective(logprob, reference.logprobs(batch), batch, totals, config)
                # Shards hold the mean of the processes' gradients, which are shares of a sum.
                (loss * (world_size() if counts else 0)).backward()
                if counts:
                    sums.add(loss, shares)
                    meter.add(batch.tree, len(batch.rows))
            norm = clip_gradients(policy.transformer, config.max_grad_norm)
            metrics = sums.metrics() | {"grad_norm": norm, "lr": lr}
            _check_finite(metrics, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress["step"] = step + 1
            metrics |= meter.rates(time.perf_counter() - began)
            if held_visits and (step + 1) % config.holdout_every == 0:
                metrics["holdout/loss"] = measure_loss(policy.transformer, held_packer, held_reference)
                _check_finite(metrics, step)
                if progress["best_loss"] is None or metrics["holdout/loss"] < progress["best_loss"]:
                    progress |= {"best_loss": metrics["holdout/loss"], "best_step": step + 1}
                    save_state(folder / "best", policy.transformer, None, progress)
            log.add({"step": step, **metrics})
            send(metrics, step)
            bar.note(_told(metrics))
            if held_visits and step + 1 - progress["best_step"] >= config.patience * config.holdout_every:
                _LOGGER.info("Pair-DPO: stopped after %d steps; the held-out loss was least after %d", step + 1,
                             progress["best_step"])  # fmt: skip
                break
            if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.num_steps:
                save_checkpoint(folder, policy.transformer, optimizer, progress, config.keep_checkpoints)
    if progress["best_step"]:
        load_state(folder / "best", policy.transformer, None)
    policy.finish(folder)
    return log.tail_means(max(config.num_steps // 10, 1))


class Policy:
    """The transformer that is trained, made ready as the settings say."""

    def __init__(self, model: Model, config: TrainConfig, seed: int) -> None:
        """Changes model.transformer in place; finish makes it a plain one again.

        Args:
            model: its transformer is on its device, in float32 and whole.
            config: dtype, compile, activation_checkpointing, reference and the adapters' settings are used.
            seed: of new adapters.
        Raises: InputError if a live reference would need a copy of sharded weights, or as Adapters does.
        """
        self._model, self.transformer, self.config = model, model.transformer, config
        self.device = self.transformer.embed.weight.device
        on_cuda = self.device.type == "cuda"
        dtype = torch.bfloat16 if config.dtype == "bfloat16" or (config.dtype == "auto" and on_cuda) else torch.float32
        self.is_sharded = world_size() > 1 or dtype != torch.float32
        if self.is_sharded and config.reference == "live" and referenced_sides(config) and not config.lora_rank:
            raise InputError(
                "train.reference live: a sharded model has no second copy; take cached, or adapters (train.lora_rank)"
            )
        self.digest = model_digest(model)  # of the weights at the start, while they are whole
        self.work = ModelWork(config=self.transformer.config, layout=model.layout, dtype=dtype)
        self.adapters = Adapters(self.transformer, config, seed) if config.lora_rank else None
        self.transformer.prepare_training(compiled=config.compile, checkpointed=config.activation_checkpointing)
        if self.is_sharded:
            shard(self.transformer, dtype)
        self.transformer.train()

    def finish(self, folder: Path) -> None:
        """Merges adapters, which go to folder/adapter too, and leaves model.transformer whole, in evaluation mode."""
        self.transformer.prepare_training(compiled=False, checkpointed=False)
        if self.adapters is not None:
            self.adapters.save(folder / "adapter")
            self.adapters.merge()
        if self.is_sharded:
            self._model.transformer = unshard(self.transformer)
        self._model.transformer.eval()


def make_optimizer(transformer: Transformer, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW on what is trained, fused."""
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def clip_gradients(transformer: Transformer, max_norm: float) -> float:
    """Clips the gradients to a norm; returns the norm that they had."""
    norm = nn.utils.clip_grad_norm_(transformer.parameters(), max_norm)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


@torch.no_grad()
def measure_loss(transformer: Transformer, packer: PairPacker, reference: Reference) -> float:
    """The objective on all of a packer's pairs, each under the masks of its first visit."""
    device = transformer.embed.weight.device
    visits = [PairVisit(pair, 0) for pair in range(len(packer.pairs))]
    totals = packer.num_pairs(visits)
    sums = StepSums(totals, packer.config, device)
    transformer.eval()
    for chosen, counts in packer.passes(visits):
        batch = packer.pack(chosen, device)
        logprob = batch_logprobs(transformer, batch)
        loss, shares = pass_objective(logprob, reference.logprobs(batch), batch, totals, packer.config)
        if counts:
            sums.add(loss, shares)
    reshard(transformer)
    transformer.train()
    return sums.metrics()["loss"]


def _hold_out(pairs: pa.Table, count: int, seed: int) -> tuple[pa.Table, pa.Table]:
    """The pairs to train on and those that are held out, `count` of them, both in the table's order."""
    if count >= len(pairs):
        told = f"train.holdout_pairs {count} leaves none; lower it, " if len(pairs) else ""
        raise InputError(
            f"no pairs to train on; {told}lower curation.threshold or curation.margin, or raise data.num_records"
        )
    chosen = np.random.default_rng([seed, 2]).permutation(len(pairs))[:count]
    is_held = np.isin(np.arange(len(pairs)), chosen)
    return pairs.filter(pa.array(~is_held)), pairs.filter(pa.array(is_held))


def _make_reference(policy: Policy, packer: PairPacker, visits: list[PairVisit], path: Path) -> Reference:
    """The reference of these visits, as the settings say; the policy still has its first weights."""
    config, transformer = packer.config, policy.transformer
    if not referenced_sides(config) or not visits:
        return NoReference()
    if config.reference == "live":
        return LiveReference(transformer, policy.adapters and policy.adapters.off)

    def logprobs(batch):
        # Tensors of inference mode may not come near a gradient, and sharded weights are kept between passes.
        with torch.no_grad() if policy.is_sharded else torch.inference_mode():
            return batch_logprobs(transformer, batch)

    reference = cached_reference(path, [policy.digest, str(policy.work.dtype)], packer, visits, logprobs)
    reshard(transformer)
    return reference


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine to zero at num_steps."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.num_steps - config.warmup_steps, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def _check_finite(metrics: dict[str, float], step: int) -> None:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise InputError(f"Pair-DPO: {name} is {value} at step {step}; lower train.lr")


def _told(metrics: dict[str, float]) -> str:
    """A step in a few words."""
    margins = [f"{name} {metrics[name]:.2f}" for name in metrics if name.endswith("/margin")]
    return " ".join([f"loss {metrics['loss']:.3f}", *margins])
