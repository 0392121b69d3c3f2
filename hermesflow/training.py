"""Pair-DPO over packed homologous pairs, against a frozen reference (HermesFlow, arXiv 2502.12148, section 4).

Every pair of a step brings both its sides, as two span trees: prompt -> win image, lose image, which share one random
mask, and image -> question -> win caption, lose caption. Prefixes are computed once, and the head runs on labelled
tokens only. All draws are pure functions of (seed, step), so that a run resumes to the same weights, bit by bit.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from hermesflow.engine.mask_schedule import mask_ratio
from hermesflow.engine.sequence_logprob import span_logprobs
from hermesflow.engine.span_tree import Span, SpanTree
from hermesflow.engine.token_layout import TokenLayout
from hermesflow.engine.transformer import Transformer
from hermesflow.kernels.pair_dpo import PairDPOOutput, pair_dpo

from .checkpointing import load_checkpoint, save_checkpoint
from .config import TrainConfig
from .files import InputError, damaged, write_problem, write_text
from .models import Model
from .progress import track
from .prompting import caption_prompt, image_prompt

SIDES = ("generation", "understanding")


@dataclass(frozen=True)
class Side:
    """What one side of a step's pairs must predict: packed rows, targets and segments, and the pairs' weights."""

    rows: Tensor
    targets: Tensor
    segment: Tensor
    pair_weight: Tensor


@dataclass(frozen=True)
class PairBatch:
    """One step: the forest of its pairs and what each side predicts in it."""

    tree: SpanTree
    sides: dict[str, Side]
    num_pairs: int


def train_pairs(model: Model, pairs: pa.Table, config: TrainConfig, *, seed: int, folder: Path) -> dict[str, float]:
    """Trains model.transformer in place on one round's pairs; the weights at the start are the reference.

    Args:
        model: the policy; it must hold the round's starting weights, a checkpoint in the folder is loaded over them.
        pairs: a table of hermesflow.pairs.
        config: steps, rates and loss.
        seed: seeds the order of pairs and the masks.
        folder: receives step-*/ checkpoints and metrics.jsonl, one line a step.
    Returns: means over the last tenth of the steps of every metric.
    Raises: InputError on an empty table, an unwritable folder, a damaged checkpoint, or a loss or gradient that is not
        finite; the last names the step.
    """
    if not len(pairs):
        raise InputError("no pairs to train on; lower curation.threshold or curation.margin, or raise data.num_records")
    policy = model.transformer
    rows = [pair | {"prompt_ids": image_prompt(model, pair["caption"])} for pair in pairs.to_pylist()]
    reference = copy.deepcopy(policy).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    start = load_checkpoint(folder, policy, optimizer)
    log = MetricLog(folder / "metrics.jsonl", start)
    question = caption_prompt(model)
    policy.train()
    progress = track(range(start, config.num_steps), "Pair-DPO", "steps", completed=start)
    for step in progress:
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        chosen = [rows[index] for index in step_indices(len(rows), config.pairs_per_step, step, seed)]
        batch = pair_batch(
            chosen, model.layout, question, model.prompts.max_caption_tokens, np.random.default_rng([seed, 1, step]),
            policy.embed.weight.device,
        )  # fmt: skip
        loss, metrics = pair_losses(policy, reference, batch, config)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            raise InputError(
                f"Pair-DPO: loss {loss.item()} and gradient norm {norm.item()} at step {step}; lower train.lr"
            )
        optimizer.step()
        seconds = time.perf_counter() - began
        metrics |= {"loss": loss.item(), "grad_norm": norm.item(), "lr": learning_rate(config, step)}
        log.add({"step": step, **metrics, "tokens_per_second": len(batch.tree.token_ids) / seconds})
        progress.note(f"loss {loss.item():.3f} margin {metrics.get('generation/margin', float('nan')):.2f}")
        if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.num_steps:
            save_checkpoint(folder, step + 1, policy, optimizer, config.keep_checkpoints)
    policy.eval()
    return log.tail_means(max(config.num_steps // 10, 1))


def step_indices(num_pairs: int, pairs_per_step: int, step: int, seed: int) -> list[int]:
    """Which pairs a step trains on: consecutive entries of an endless row of shuffled epochs."""
    first = step * pairs_per_step
    positions = range(first, first + pairs_per_step)
    epochs = {position // num_pairs for position in positions}
    order = {epoch: np.random.default_rng([seed, 0, epoch]).permutation(num_pairs) for epoch in epochs}
    return [int(order[position // num_pairs][position % num_pairs]) for position in positions]


def pair_batch(
    pairs: Sequence[dict], layout: TokenLayout, question_ids: Sequence[int], max_caption_tokens: int,
    rng: np.random.Generator, device: torch.device | str | None = None,
) -> PairBatch:
    """Packs the pairs' two sides into one forest.

    Args:
        pairs: rows of a pairs table with prompt_ids, the caption's text ids; a side that a row lacks gets weight 0
            there and no tokens.
        layout: the joint vocabulary.
        question_ids: text ids of the caption question.
        max_caption_tokens: where captions were cut; one of that length has not ended by itself.
        rng: draws the masks; win and lose of a pair share theirs.
        device: where the batch goes; None is the CPU.
    Returns: the batch.
    """
    builder = _ForestBuilder()
    for index, pair in enumerate(pairs):
        if pair["sides"] != "understanding":
            _add_images(builder, index, pair, layout, rng)
        if pair["sides"] != "generation":
            _add_captions(builder, index, pair, layout, question_ids, max_caption_tokens)
    return builder.build(len(pairs), device)


def _add_images(builder: _ForestBuilder, index: int, pair: dict, layout: TokenLayout, rng: np.random.Generator) -> None:
    """prompt -> win image, lose image: the masked codes are predicted, under one mask of cosine ratio."""
    root = builder.add(layout.text_prompt(pair["prompt_ids"]), -1, "causal")
    num_codes = len(pair["win_codes"])
    ratio = mask_ratio(torch.tensor(rng.random(), dtype=torch.float64), "cosine").item()
    num_masked = max(round(ratio * num_codes), 1)
    masked = np.sort(rng.permutation(num_codes)[:num_masked])
    for lose, name in enumerate(("win_codes", "lose_codes")):
        ids = np.array(layout.image(pair[name]))
        targets = ids[1 + masked]
        ids[1 + masked] = layout.mask_id
        builder.predict("generation", 2 * index + lose, 1 + masked, targets)
        builder.add(ids.tolist(), root, "full")


def _add_captions(
    builder: _ForestBuilder, index: int, pair: dict, layout: TokenLayout, question_ids: Sequence[int],
    max_caption_tokens: int,
) -> None:
    """image -> question -> win caption, lose caption: next tokens, and eot where a caption ended by itself."""
    image = builder.add(layout.image_prefix(pair["record_codes"]), -1, "full")
    question = builder.add(layout.question(question_ids), image, "causal")
    last_of_question = builder.packed - 1
    for lose, name in enumerate(("win_caption_ids", "lose_caption_ids")):
        caption = list(pair[name])
        targets = [*caption, layout.eot][:max_caption_tokens]
        rows = np.concatenate([[last_of_question - builder.packed], np.arange(len(caption))]).astype(np.int64)
        builder.predict("understanding", 2 * index + lose, rows[: len(targets)], targets)
        if caption:
            builder.add(caption, question, "causal")


class _ForestBuilder:
    """Collects spans and, side by side, what they must predict."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.packed = 0
        self._found: dict[str, list[tuple[np.ndarray, np.ndarray, int]]] = {side: [] for side in SIDES}

    def add(self, ids: Sequence[int], parent: int, mode: str) -> int:
        """Appends a span; returns its index."""
        self.spans.append((ids, parent, mode))
        self.packed += len(ids)
        return len(self.spans) - 1

    def predict(self, side: str, segment: int, offsets: np.ndarray, targets: Sequence[int]) -> None:
        """The rows at these offsets from the next span's first token predict targets, as part of a segment."""
        self._found[side].append((self.packed + offsets, np.asarray(targets, dtype=np.int64), segment))

    def build(self, num_pairs: int, device: torch.device | str | None) -> PairBatch:
        """The finished batch."""
        sides = {side: self._side(side, num_pairs, device) for side in SIDES}
        return PairBatch(SpanTree.build(self.spans, device), sides, num_pairs)

    def _side(self, side: str, num_pairs: int, device: torch.device | str | None) -> Side:
        found = self._found[side]
        none = [np.zeros(0, dtype=np.int64)]
        weight = torch.zeros(num_pairs)
        weight[[segment // 2 for _, _, segment in found]] = 1.0
        segments = np.repeat([s for _, _, s in found], [len(rows) for rows, _, _ in found]).astype(np.int64)
        return Side(
            torch.from_numpy(np.concatenate([rows for rows, _, _ in found] or none)).to(device),
            torch.from_numpy(np.concatenate([targets for _, targets, _ in found] or none)).to(device),
            torch.from_numpy(segments).to(device),
            weight.to(device),
        )


def pair_losses(
    policy: Transformer, reference: Transformer, batch: PairBatch, config: TrainConfig
) -> tuple[Tensor, dict[str, float]]:
    """The step's loss with its gradient, and each side's metrics: loss, rewards, margin, accuracy, drift of the win.

    L = generation_weight * L_generation + understanding_weight * L_understanding, each a mean over pairs, plus
    nll_weight times the win's mean negative log-probability a token on both sides.
    """
    sides = {side: found for side, found in batch.sides.items() if len(found.rows)}
    counts = [len(found.rows) for found in sides.values()]
    rows = torch.cat([found.rows for found in sides.values()])
    targets = torch.cat([found.targets for found in sides.values()])
    now = span_logprobs(policy, batch.tree, rows, targets).split(counts)
    with torch.no_grad():
        before = span_logprobs(reference, batch.tree, rows, targets).split(counts)
    loss, metrics = torch.zeros((), device=batch.tree.token_ids.device), {}
    for (name, side), policy_logprob, reference_logprob in zip(sides.items(), now, before, strict=True):
        result = pair_dpo(
            policy_logprob, reference_logprob, side.segment, batch.num_pairs,
            beta=config.beta, loss_type=config.loss_type, pair_weight=side.pair_weight,
        )  # fmt: skip
        wins = side.segment % 2 == 0
        nll = -policy_logprob[wins].mean()
        loss = loss + getattr(config, f"{name}_weight") * (result.loss + config.nll_weight * nll)
        drift = (policy_logprob - reference_logprob)[wins].sum() / side.pair_weight.sum()
        metrics |= _side_metrics(name, result, side.pair_weight, drift)
    return loss, metrics


def _side_metrics(name: str, result: PairDPOOutput, weight: Tensor, drift: Tensor) -> dict[str, float]:
    def mean(values: Tensor) -> float:
        return ((values * weight).sum() / weight.sum()).item()

    return {
        f"{name}/loss": result.loss.item(),
        f"{name}/win_reward": mean(result.win_reward),
        f"{name}/lose_reward": mean(result.lose_reward),
        f"{name}/margin": mean(result.margin),
        f"{name}/accuracy": result.accuracy.item(),
        f"{name}/win_logprob_drift": drift.item(),
    }


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine to zero at num_steps."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.num_steps - config.warmup_steps, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


class MetricLog:
    """metrics.jsonl of one training run: lines after the step that a run resumes from are dropped first."""

    def __init__(self, path: Path, start: int) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        kept = list(itertools.takewhile(lambda record: record["step"] < start, _parsed(lines)))
        if [record["step"] for record in kept] != list(range(start)):
            raise damaged(path, "metrics", ValueError(f"it lacks some of the first {start} steps"))
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._records = kept

    def add(self, record: dict[str, float]) -> None:
        """Appends one line."""
        self._records.append(record)
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise write_problem(self._path, error) or error from error

    def tail_means(self, count: int) -> dict[str, float]:
        """Mean of every metric over the last `count` steps that have it; speeds and step numbers are left out."""
        tail = self._records[-count:]
        names = [name for name in tail[-1] if name not in ("step", "tokens_per_second")] if tail else []
        return {name: float(np.mean([record[name] for record in tail if name in record])) for name in names}


def _parsed(lines: list[str]) -> Iterator[dict]:
    """The lines that are whole; a kill may have cut the last one."""
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
