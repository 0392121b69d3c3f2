"""The objective of a Pair-DPO step, and what it says about the policy.

    L = sum over the sides of weight * mean over the side's pairs of (preference_weight * l(h) + nll_weight * nll)
        + replay_weight * mean over the replay's pairs of kl or nll

A step may take several passes: each gives its share of the step's means, so that the shares add up.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from hermesflow.algorithms.algorithm import Pass
from hermesflow.algorithms.batch import REPLAY, PairBatch, PairVisit, Side
from hermesflow.algorithms.losses import find_loss
from hermesflow.algorithms.packers import make_packer
from hermesflow.algorithms.policy import Policy
from hermesflow.algorithms.references import Reference, make_reference
from hermesflow.config import TrainConfig
from hermesflow.models.model import Model

_METRICS = ("loss", "win_reward", "lose_reward", "margin", "accuracy", "nll")
_REFERENCE_METRICS = ("win_logprob_drift", "kl")


def pass_objective(
    logprob: Tensor, reference: Tensor, batch: PairBatch, totals: Mapping[str, int], config: TrainConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """A pass's share of the step's loss, with its gradient, and of its metrics.

    Args:
        logprob: the policy's log-probabilities, fp32 [T], in the order of the batch's sides.
        reference: the reference's, likewise; simpo's sides do not read it.
        batch: the pass.
        totals: pairs in the whole step, by side.
        config: loss and weights.
    Returns: (loss, 0-dim; {"side/metric": 0-dim}, shares of means over the step's pairs):
        loss: the side's l(h).
        win_reward, lose_reward, margin: beta times the sum (or mean) of policy less reference, and their difference;
            of simpo, beta times the mean of the policy alone.
        accuracy: the share of pairs with a margin above 0.
        nll: the negative log-likelihood a token of the win; of replay, of the right answers, and its only metric where
            those are its target. Where the reference is, it is kl: the mean over questions of the divergence
            sum over choices of p log(p / q) - p + q, with p and q the probabilities of the whole choice by reference
            and by policy: 0 and without gradient where the two agree, and sound though choices need not add up to 1
            (the generalized Kullback-Leibler divergence; Lee and Seung, Nature 401, 1999).
        win_logprob_drift: how far the win's log-probability has moved from the reference's. Not with simpo.
        kl: an estimate, a token, of the divergence KL(reference || policy) on the pairs' tokens, which the reference
            drew: the mean of r - 1 - log r with r the ratio of policy to reference (J. Schulman, "Approximating KL
            divergence"). Not with simpo.
    """
    loss, shares, before = torch.zeros((), device=logprob.device), {}, batch.split(reference)
    for name, policy in batch.split(logprob).items():
        if name == REPLAY:
            metric, kept = replay_metric(config), replay_loss(policy, before[name], batch.sides[name], config)
            kept = kept / totals[name]
            loss, shares = loss + config.replay_weight * kept, shares | {f"{name}/{metric}": kept.detach()}
            continue
        values = _pair_values(policy, before[name], batch.sides[name], side_config(config, name))
        means = {metric: value.sum() / totals[name] for metric, value in values.items()}
        preferred = config.preference_weight * means["loss"]
        loss = loss + getattr(config, f"{name}_weight") * (preferred + config.nll_weight * means["nll"])
        shares |= {f"{name}/{metric}": mean.detach() for metric, mean in means.items()}
    return loss, shares


def side_config(config: TrainConfig, side: str) -> TrainConfig:
    """The settings with the side's own beta, where it has one."""
    beta = getattr(config, f"{side}_beta")
    return replace(config, beta=beta) if beta else config


def replay_metric(config: TrainConfig) -> str:
    """Name of the replay's metric."""
    return "kl" if config.replay_target == "reference" else "nll"


def replay_loss(policy: Tensor, reference: Tensor, side: Side, config: TrainConfig) -> Tensor:
    """Of the replay's visits, added up."""
    ours, theirs = (
        values.new_zeros(len(side.pair_weight)).index_add(0, side.segment, values) for values in (policy, reference)
    )
    if config.replay_target == "answers":
        return -(ours * side.pair_weight).sum()
    chance = theirs.exp()
    return ((chance * (theirs - ours) - chance + ours.exp()) * side.pair_weight).sum()


def _pair_values(policy: Tensor, reference: Tensor, side: Side, config: TrainConfig) -> dict[str, Tensor]:
    """By metric: one value a pair [P], 0 where it lacks the side, or their sum; loss and nll carry the gradient."""
    loss = find_loss(config.loss_type)
    result = loss(policy * side.token_weight, reference * side.token_weight, side, config)
    margin = result.win_reward - result.lose_reward
    # The loss is a mean over this pass's pairs.
    values = {"loss": result.loss * side.pair_weight.sum(), "win_reward": result.win_reward}
    values |= {"lose_reward": result.lose_reward, "margin": margin, "accuracy": (margin > 0).to(margin)}
    values |= {"nll": -side.pair_means(policy)[:, 0]}
    if loss.needs_reference:
        moved = policy.detach() - reference
        # A ratio beyond exp(20) says nothing more: the policy has left the reference.
        divergence = moved.clamp(max=20).expm1() - moved
        values |= {
            "win_logprob_drift": result.win_reward / config.beta,
            "kl": side.pair_means(divergence).mean(1),
        }
    return values


def metric_names(totals: Mapping[str, int], config: TrainConfig) -> list[str]:
    """Of pass_objective's metrics, in a step with these sides."""
    metrics = _METRICS + _REFERENCE_METRICS if find_loss(config.loss_type).needs_reference else _METRICS
    of_side = {side: (replay_metric(config),) if side == REPLAY else metrics for side in totals}
    return [f"{side}/{metric}" for side, names in of_side.items() for metric in names]


class PairDPO:
    """The algorithm: see Algorithm."""

    name = "Pair-DPO"

    def __init__(self, model: Model, pairs: pa.Table, config: TrainConfig, seed: int) -> None:
        """
        Args:
            model: its layout, text tokenizer and prompts are used.
            pairs: see PairPacker.
            config: loss, weights and masks.
            seed: of masks, dropped prompts and the order of pairs.
        """
        self.packer = make_packer(model, pairs, config, seed)
        self.config = self.packer.config

    def visits(self, step: int | None) -> list[PairVisit]:
        """The pairs of a step; None: every pair under the masks of its first visit."""
        if step is None:
            return [PairVisit(pair, 0) for pair in range(len(self.packer.pairs))]
        return self.packer.visits(step)

    def passes(self, visits: Sequence[PairVisit]) -> list[Pass]:
        """See Algorithm."""
        totals = self.packer.num_pairs(visits)
        return [
            Pass(functools.partial(self.packer.pack, chosen, totals=totals), counts)
            for chosen, counts in self.packer.passes(visits)
        ]

    def metric_names(self, visits: Sequence[PairVisit]) -> list[str]:
        """See Algorithm."""
        return metric_names(self.packer.num_pairs(visits), self.config) + self.packer.further_metric_names(visits)

    def reference(self, policy: Policy, steps: Iterable[int | None], path: Path) -> Reference:
        """See Algorithm."""
        visits = [visit for step in steps for visit in self.visits(step)]
        return make_reference(policy, self.packer, visits, path)

    def loss(self, logprob: Tensor, reference: Tensor, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """See Algorithm."""
        loss, shares = pass_objective(logprob, reference, batch, batch.totals, self.config)
        return loss, shares | batch.further_metrics(logprob.detach())
