"""The objective of a Pair-DPO step, and what it says about the policy.

    L = sum over the sides of weight * (mean over the side's pairs of l(h) + nll_weight * negative log-likelihood)

A step may take several passes: each gives its share of the step's means, so that the shares add up.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hermesflow.kernels.pair_dpo import PairDPOOutput, pair_dpo

from .config import TrainConfig
from .distributed import sum_over_ranks
from .packing import PairBatch, Side

SIDE_METRICS = (
    "loss", "win_reward", "lose_reward", "margin", "accuracy", "nll", "win_logprob_drift", "kl"
)  # fmt: skip


def pass_objective(
    logprob: Tensor, reference: Tensor, batch: PairBatch, totals: Mapping[str, int], config: TrainConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """A pass's share of the step's loss, with its gradient, and of its metrics.

    Args:
        logprob: the policy's log-probabilities, fp32 [T], in the order of the batch's sides.
        reference: the reference's, likewise; not read by simpo.
        batch: the pass.
        totals: pairs in the whole step, by side.
        config: loss and weights.
    Returns: (loss, 0-dim; {"side/metric": 0-dim}, shares of means over the step's pairs). kl estimates, a token, the
        divergence of the policy from the reference, KL(reference || policy), on the pairs' tokens, which the reference
        drew: the mean of r - 1 - log r with r the ratio of policy to reference (J. Schulman, "Approximating KL
        divergence"). win_logprob_drift is how far the win's summed log-probability has moved from the reference's.
    """
    loss, shares = torch.zeros((), device=logprob.device), {}
    before = batch.split(reference)
    for name, policy_logprob in batch.split(logprob).items():
        side, total = batch.sides[name], totals[name]
        result, nll = side_loss(policy_logprob, before[name], side, config)
        share = side.pair_weight.sum() / total
        loss = loss + getattr(config, f"{name}_weight") * (result.loss * share + config.nll_weight * nll.sum() / total)
        found = _side_metrics(result, nll.detach(), policy_logprob.detach(), before[name], side)
        shares |= {f"{name}/{metric}": value.double().sum() / total for metric, value in found.items()}
    return loss, shares


def side_loss(policy: Tensor, reference: Tensor, side: Side, config: TrainConfig) -> tuple[PairDPOOutput, Tensor]:
    """One side's preference loss, a mean over its pairs, and each pair's negative log-likelihood a token of the win."""
    num_pairs, beta, wins = len(side.pair_weight), config.beta, side.segment % 2 == 0
    is_simpo = config.loss_type == "simpo"
    if is_simpo:
        # A mean of (logprob - margin / beta) over the win is the mean of logprob less the margin: no op of its own.
        reference = torch.where(wins, config.simpo_margin / beta, 0.0)
    else:
        reference = reference * side.token_weight
    length_normalize = config.length_normalize or is_simpo
    weighted = policy if is_simpo else policy * side.token_weight
    result = pair_dpo(
        weighted, reference.to(policy), side.segment, num_pairs, beta=beta,
        loss_type="sigmoid" if is_simpo else config.loss_type, label_smoothing=config.label_smoothing,
        length_normalize=length_normalize, pair_weight=side.pair_weight,
    )  # fmt: skip
    if is_simpo:
        result = result._replace(win_reward=result.win_reward + config.simpo_margin)
    return result, -segment_means(policy, side, 2 * num_pairs)[::2]


def segment_means(values: Tensor, side: Side, num_segments: int) -> Tensor:
    """Mean over the tokens of each segment [S]; 0 where it has none."""
    sums = values.new_zeros(num_segments).index_add(0, side.segment, values)
    counts = values.new_zeros(num_segments).index_add(0, side.segment, torch.ones_like(values))
    return sums / counts.clamp(min=1)


def _side_metrics(
    result: PairDPOOutput, nll: Tensor, policy: Tensor, reference: Tensor, side: Side
) -> dict[str, Tensor]:
    """Of each pair [P], 0 where it lacks the side."""
    weight, num_segments = side.pair_weight, 2 * len(side.pair_weight)
    moved = policy - reference
    drift = moved.new_zeros(num_segments).index_add(0, side.segment, moved * side.token_weight)[::2]
    # Of r = exp(20) is enough told: the policy has left the reference.
    kl = segment_means(moved.clamp(max=20).expm1() - moved, side, num_segments).view(-1, 2).mean(1)
    return {
        "loss": (result.loss * weight.sum()).detach(),
        "win_reward": result.win_reward * weight,
        "lose_reward": result.lose_reward * weight,
        "margin": result.margin * weight,
        "accuracy": result.accuracy * weight.sum(),
        "nll": nll,
        "win_logprob_drift": drift,
        "kl": kl,
    }


class StepSums:
    """Adds up the passes' shares, and those of all processes."""

    def __init__(self, totals: Mapping[str, int], device: torch.device) -> None:
        self._names = [f"{side}/{metric}" for side in totals for metric in SIDE_METRICS]
        self._sums = torch.zeros(1 + len(self._names), dtype=torch.float64, device=device)

    def add(self, loss: Tensor, shares: Mapping[str, Tensor]) -> None:
        """One pass's; nothing waits for the device."""
        zero = self._sums.new_zeros(())
        values = [loss.detach().double(), *(shares.get(name, zero) for name in self._names)]
        self._sums += torch.stack(values)

    def metrics(self) -> dict[str, float]:
        """{"loss", "side/metric"} of the whole step; all processes must ask."""
        return dict(zip(["loss", *self._names], sum_over_ranks(self._sums).tolist(), strict=True))
