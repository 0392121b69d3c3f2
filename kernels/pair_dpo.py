"""The Pair-DPO loss: per-pair sums of token log-probabilities, the preference loss, its metrics.

    ratio[s] = sum over the tokens t of segment s of policy[t] - reference[t]     (their mean with length_normalize)
    h[p]     = ratio[2 p] - ratio[2 p + 1]                                        (win minus lose, one value a pair)
    loss     = sum_p weight[p] * l(h[p]) / sum_p weight[p]

Sums are of each pair, never of the batch. The difference is taken token by token, before the sum: policy and reference
are close, so that it keeps the digits which two sums of some thousand nats would lose.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hermesflow.kernels import LOSS_TYPES, registry
from hermesflow.kernels.checks import can_read_values, check_tensor, not_on, not_on_triton_device

OP = "pair_dpo"


def _sigmoid(h: Tensor, beta: float, label_smoothing: float) -> Tensor:
    right, wrong = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def _ipo(h: Tensor, beta: float, label_smoothing: float) -> Tensor:
    return (h - 1 / (2 * beta)).square()


def _hinge(h: Tensor, beta: float, label_smoothing: float) -> Tensor:
    return F.relu(1 - beta * h)


def _robust(h: Tensor, beta: float, label_smoothing: float) -> Tensor:
    right, wrong = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


_FORMULAS = dict(zip(LOSS_TYPES, (_sigmoid, _ipo, _hinge, _robust), strict=True))
"""(h [P], beta, label_smoothing) -> loss of each pair [P]."""


class PairDPOOutput(NamedTuple):
    """The loss, which carries the gradient, and what it says about each pair, which does not."""

    loss: Tensor
    """0-dim; weighted mean over the pairs, 0 when their weights sum to 0."""
    win_reward: Tensor
    """[P], beta * ratio of the win."""
    lose_reward: Tensor
    """[P], beta * ratio of the lose."""
    margin: Tensor
    """[P], win_reward - lose_reward."""
    accuracy: Tensor
    """0-dim; weighted share of the pairs with margin > 0."""


def pair_dpo(
    policy_logprob: Tensor,
    reference_logprob: Tensor,
    segment: Tensor,
    num_pairs: int,
    *,
    beta: float,
    loss_type: str,
    label_smoothing: float = 0.0,
    length_normalize: bool = False,
    pair_weight: Tensor | None = None,
    backend: str | None = None,
) -> PairDPOOutput:
    """Pair-DPO loss of num_pairs (win, lose) pairs whose tokens lie packed in one tensor.

    Args:
        policy_logprob: log-probability of each token under the policy, fp32 or fp64 [T]; carries the gradient.
        reference_logprob: the same under the frozen reference; dtype and device of policy_logprob; no gradient.
        segment: int64 [T]; 2 p for the win tokens of pair p, 2 p + 1 for its lose tokens, -1 for tokens to skip. A side
            without tokens has ratio 0; give a pair that is to be left out pair_weight 0.
        num_pairs: P.
        beta: above 0; scale of the rewards.
        loss_type: l(h) is, with s = label_smoothing,
            "sigmoid" -(1 - s) logsigmoid(beta h) - s logsigmoid(-beta h);
            "robust"  (-(1 - s) logsigmoid(beta h) + s logsigmoid(-beta h)) / (1 - 2 s);
            "hinge"   max(0, 1 - beta h);
            "ipo"     (h - 1 / (2 beta))^2.
        label_smoothing: s in [0, 0.5), for "sigmoid" and "robust".
        length_normalize: take the mean over each side's tokens instead of the sum.
        pair_weight: weight of each pair, at least 0, dtype and device of policy_logprob [P]; None is 1 each.
        backend: "triton", "cpu" or "torch"; None takes the first that can run. "triton" reads all T segments once a
            pair, from cache; it is meant for up to some hundred pairs.
    Returns: PairDPOOutput in policy_logprob's dtype; loss is differentiable in policy_logprob.
    Raises: ValueError on shapes, dtypes, devices, settings or, on the CPU, segments or weights out of range;
        BackendError if the named backend cannot run.
    Source: Pair-DPO, HermesFlow (arXiv 2502.12148), section 4; DPO (arXiv 2305.18290); conservative and robust DPO
        (arXiv 2403.00409); IPO (arXiv 2310.12036); hinge as in SLiC (arXiv 2305.10425).
    """
    check_tensor(OP, "policy_logprob", policy_logprob, "[T]", (None,), dtypes=(torch.float32, torch.float64))
    num_tokens, same = len(policy_logprob), {"dtypes": (policy_logprob.dtype,), "device": policy_logprob.device}
    check_tensor(OP, "reference_logprob", reference_logprob, "[T]", (num_tokens,), **same)
    check_tensor(OP, "segment", segment, "[T]", (num_tokens,), dtypes=(torch.int64,), device=policy_logprob.device)
    if not isinstance(num_pairs, int) or num_pairs < 0:
        raise ValueError(f"{OP}: expected num_pairs to be an integer of at least 0, got {num_pairs!r}")
    if pair_weight is not None:
        check_tensor(OP, "pair_weight", pair_weight, "[P]", (num_pairs,), **same)
    _check_settings(beta, loss_type, label_smoothing)
    results = registry.dispatch(
        OP,
        backend,
        policy_logprob,
        reference_logprob,
        segment,
        num_pairs,
        beta=float(beta),
        loss_type=loss_type,
        label_smoothing=float(label_smoothing),
        length_normalize=length_normalize,
        pair_weight=pair_weight,
    )
    return PairDPOOutput(*results)


def _check_settings(beta: float, loss_type: str, label_smoothing: float) -> None:
    if not 0 < beta < float("inf"):
        raise ValueError(f"{OP}: expected beta to be a finite number above 0, got {beta}")
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"{OP}: expected loss_type to be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"{OP}: expected label_smoothing in [0, 0.5), got {label_smoothing}")
    if label_smoothing and not LOSS_TYPES[loss_type]:
        smoothed = " or ".join(name for name, smooths in LOSS_TYPES.items() if smooths)
        raise ValueError(
            f"{OP}: label_smoothing {label_smoothing} has no meaning for loss_type {loss_type!r}; "
            f"set it to 0 or use {smoothed}"
        )


def _check_values(segment: Tensor, num_pairs: int, pair_weight: Tensor | None) -> None:
    """The checks that read values, which the C++ kernel makes as it goes."""
    if not can_read_values(segment.device):
        return
    wrong = (segment < -1) | (segment >= 2 * num_pairs)
    if wrong.any():
        raise ValueError(
            f"{OP}: expected segments in [-1, {2 * num_pairs}) for {num_pairs} pairs, got {int(segment[wrong][0])}"
        )
    if pair_weight is not None and not (pair_weight >= 0).all():
        raise ValueError(f"{OP}: expected pair_weight of at least 0, got {pair_weight.min().item():g}")


def pair_dpo_reference(
    policy_logprob: Tensor,
    reference_logprob: Tensor,
    segment: Tensor,
    num_pairs: int,
    *,
    beta: float,
    loss_type: str,
    label_smoothing: float = 0.0,
    length_normalize: bool = False,
    pair_weight: Tensor | None = None,
) -> PairDPOOutput:
    """The same in plain torch: the specification."""
    _check_values(segment, num_pairs, pair_weight)
    ratio = _sum_segments(policy_logprob - reference_logprob.detach(), segment, num_pairs)
    if length_normalize:
        ratio = ratio / _sum_segments(torch.ones_like(reference_logprob), segment, num_pairs).clamp(min=1)
    win, lose = ratio.view(num_pairs, 2).unbind(1)
    loss = _FORMULAS[loss_type](win - lose, beta, label_smoothing)
    weight = torch.ones_like(loss) if pair_weight is None else pair_weight.detach()
    win_reward, lose_reward = beta * win.detach(), beta * lose.detach()
    margin = win_reward - lose_reward
    correct = (margin > 0).to(loss.dtype)
    return PairDPOOutput(_mean(loss, weight), win_reward, lose_reward, margin, _mean(correct, weight))


def _sum_segments(values: Tensor, segment: Tensor, num_pairs: int) -> Tensor:
    """Sum of the values of each segment [2 P]."""
    # Skipped tokens go to one more segment that nobody reads, so that even a NaN there does no harm.
    index = torch.where(segment < 0, 2 * num_pairs, segment)
    return values.new_zeros(2 * num_pairs + 1).index_add(0, index, values)[:-1]


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean, 0 when the weights sum to 0."""
    total = weight.sum()
    return (weight * values).sum() / torch.where(total > 0, total, 1.0)


def _cpu_can_run(*args: object, pair_weight: Tensor | None = None, **_: object) -> str | None:
    return not_on("cpu", *args[:3], pair_weight)


def _triton_can_run(*args: object, pair_weight: Tensor | None = None, **_: object) -> str | None:
    return not_on_triton_device(*args[:3], pair_weight)


registry.register(OP, "cpu", "hermesflow.kernels.extension_ops:pair_dpo", _cpu_can_run)
registry.register(OP, "triton", "hermesflow.kernels.pair_dpo_triton:pair_dpo", _triton_can_run)
registry.register(OP, "torch", "hermesflow.kernels.pair_dpo:pair_dpo_reference", lambda *_, **__: None)
