"""Triton backend of pair_dpo: one program a pair, one launch for losses, rewards and the gradient.

Formula: as in kernels/pair_dpo.py. A program reads all segment ids, twice: it sums the differences of its two sides'
tokens, then writes their gradient; program 0 also writes the zeros of skipped tokens.
Layout: sums and the loss are fp64, so that neither many tokens nor nearly equal policies lose digits. The last program
to arrive adds the pairs' losses in their order, so that the result does not depend on the order of arrival.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from hermesflow.kernels import LOSS_TYPES

BLOCK_T = 1024
BLOCK_P = 128
NUM_WARPS = 8
LOSS_NUMBERS = {name: number for number, name in enumerate(LOSS_TYPES)}
SIGMOID, IPO, HINGE, ROBUST = map(tl.constexpr, LOSS_NUMBERS.values())


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1], to fp64's precision: the rounding of 1 + x is divided out."""
    one_more = 1 + x
    rounded = one_more - 1
    return tl.where(rounded == 0, x, tl.log(one_more) * (x / tl.where(rounded == 0, 1.0, rounded)))


@triton.jit
def _pair_loss(h, beta, label_smoothing, LOSS_TYPE: tl.constexpr):
    """l(h) and dl/dh in fp64."""
    z = beta * h
    if LOSS_TYPE == HINGE:
        below = 1 - z
        loss = tl.where(below <= 0, 0.0, below)  # NaN goes through
        slope = -beta * (~(below <= 0)).to(tl.float64)
    elif LOSS_TYPE == IPO:
        apart = h - 1 / (2 * beta)
        loss = apart * apart
        slope = 2 * apart
    else:
        # -logsigmoid(z) = max(-z, 0) + log(1 + exp(-|z|)), with no exponential that overflows.
        small = tl.exp(-tl.abs(z))
        rest = _log1p(small)
        right = rest + tl.where(z < 0, -z, 0.0)
        wrong = rest + tl.where(z > 0, z, 0.0)
        lower = small / (1 + small)
        upper = 1 / (1 + small)
        right_slope = -beta * tl.where(z > 0, lower, upper)
        wrong_slope = beta * tl.where(z > 0, upper, lower)
        # No name for the shares: a named number is fp32 to Triton, beside an fp64 tensor it takes that tensor's dtype.
        if LOSS_TYPE == ROBUST:
            loss = ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
            slope = ((1 - label_smoothing) * right_slope - label_smoothing * wrong_slope) / (1 - 2 * label_smoothing)
        else:
            loss = (1 - label_smoothing) * right + label_smoothing * wrong
            slope = (1 - label_smoothing) * right_slope + label_smoothing * wrong_slope
    return loss, slope


@triton.jit
def _load_weight(weight_ptr, pair, inside, stride_w, HAS_WEIGHT: tl.constexpr):
    """fp64 weight of pairs; 0 where not inside."""
    if HAS_WEIGHT:
        return tl.load(weight_ptr + pair * stride_w, mask=inside, other=0.0).to(tl.float64)
    return inside.to(tl.float64)


@triton.jit
def _pair_dpo_kernel(
    policy_ptr,
    reference_ptr,
    segment_ptr,
    weight_ptr,
    arrived_ptr,
    pair_loss_ptr,
    loss_ptr,
    win_reward_ptr,
    lose_reward_ptr,
    margin_ptr,
    accuracy_ptr,
    grad_ptr,
    num_tokens,
    num_pairs,
    stride_p,
    stride_r,
    stride_s,
    stride_w,
    BETA: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr,
    LOSS_TYPE: tl.constexpr,
    LENGTH_NORMALIZE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    offs_t = tl.arange(0, BLOCK_T).to(tl.int64)
    offs_p = tl.arange(0, BLOCK_P).to(tl.int64)

    win_sum = tl.zeros((BLOCK_T,), tl.float64)
    lose_sum = tl.zeros((BLOCK_T,), tl.float64)
    win_length = tl.zeros((BLOCK_T,), tl.float64)
    lose_length = tl.zeros((BLOCK_T,), tl.float64)
    for start in range(0, num_tokens, BLOCK_T):
        t = start + offs_t
        segment = tl.load(segment_ptr + t * stride_s, mask=t < num_tokens, other=-1)
        of_win = segment == 2 * pair
        of_lose = segment == 2 * pair + 1
        own = of_win | of_lose
        policy = tl.load(policy_ptr + t * stride_p, mask=own, other=0.0).to(tl.float64)
        reference = tl.load(reference_ptr + t * stride_r, mask=own, other=0.0).to(tl.float64)
        win_sum += tl.where(of_win, policy - reference, 0.0)
        lose_sum += tl.where(of_lose, policy - reference, 0.0)
        win_length += of_win.to(tl.float64)
        lose_length += of_lose.to(tl.float64)
    total = tl.zeros((BLOCK_P,), tl.float64)
    for start in range(0, num_pairs, BLOCK_P):
        other = start + offs_p
        total += _load_weight(weight_ptr, other, other < num_pairs, stride_w, HAS_WEIGHT)
    total_weight = tl.sum(total, axis=0)
    total_weight = tl.where(total_weight > 0, total_weight, 1.0)

    win_divisor = tl.full((), 1, tl.float64)
    lose_divisor = tl.full((), 1, tl.float64)
    if LENGTH_NORMALIZE:
        win_divisor = tl.maximum(tl.sum(win_length, axis=0), 1.0)
        lose_divisor = tl.maximum(tl.sum(lose_length, axis=0), 1.0)
    win_ratio = tl.sum(win_sum, axis=0) / win_divisor
    lose_ratio = tl.sum(lose_sum, axis=0) / lose_divisor
    loss, slope = _pair_loss(win_ratio - lose_ratio, BETA, LABEL_SMOOTHING, LOSS_TYPE)
    weight = _load_weight(weight_ptr, pair, pair < num_pairs, stride_w, HAS_WEIGHT)
    tl.store(win_reward_ptr + pair, BETA * win_ratio)
    tl.store(lose_reward_ptr + pair, BETA * lose_ratio)
    tl.store(margin_ptr + pair, BETA * win_ratio - BETA * lose_ratio)
    tl.store(pair_loss_ptr + pair, weight * loss)

    token_grad = weight * slope / total_weight
    for start in range(0, num_tokens, BLOCK_T):
        t = start + offs_t
        inside = t < num_tokens
        segment = tl.load(segment_ptr + t * stride_s, mask=inside, other=-1)
        skipped = (segment < 0) | (segment >= 2 * num_pairs)
        owner = tl.where(skipped, 0, segment // 2)
        side_grad = tl.where(segment % 2 == 0, token_grad / win_divisor, -token_grad / lose_divisor)
        tl.store(grad_ptr + t, tl.where(skipped, 0.0, side_grad), mask=inside & (owner == pair))

    tl.debug_barrier()  # the whole program has stored its pair before it says so
    if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        loss_sum = tl.zeros((BLOCK_P,), tl.float64)
        correct_sum = tl.zeros((BLOCK_P,), tl.float64)
        for start in range(0, num_pairs, BLOCK_P):
            other = start + offs_p
            inside = other < num_pairs
            loss_sum += tl.load(pair_loss_ptr + other, mask=inside, other=0.0, volatile=True)
            margin = tl.load(margin_ptr + other, mask=inside, other=0.0, volatile=True)
            weights = _load_weight(weight_ptr, other, inside, stride_w, HAS_WEIGHT)
            correct_sum += tl.where(margin > 0, weights, 0.0)
        tl.store(loss_ptr, tl.sum(loss_sum, axis=0) / total_weight)
        tl.store(accuracy_ptr, tl.sum(correct_sum, axis=0) / total_weight)


class _PairDPO(torch.autograd.Function):
    """The forward pass also gives the gradient of the loss, which is all that the backward pass needs."""

    @staticmethod
    def forward(
        ctx: Any,
        policy: Tensor,
        reference: Tensor,
        segment: Tensor,
        pair_weight: Tensor | None,
        num_pairs: int,
        beta: float,
        loss_type: str,
        label_smoothing: float,
        length_normalize: bool,
    ) -> tuple[Tensor, ...]:
        num_tokens = policy.shape[0]
        loss, accuracy = policy.new_zeros(()), policy.new_zeros(())
        win_reward, lose_reward, margin = (policy.new_empty(num_pairs) for _ in range(3))
        grad_policy = policy.new_empty(num_tokens) if num_pairs else policy.new_zeros(num_tokens)
        if num_pairs:
            _pair_dpo_kernel[(num_pairs,)](
                policy,
                reference,
                segment,
                policy if pair_weight is None else pair_weight,
                segment.new_zeros((), dtype=torch.int32),
                policy.new_empty(num_pairs, dtype=torch.float64),
                loss,
                win_reward,
                lose_reward,
                margin,
                accuracy,
                grad_policy,
                num_tokens,
                num_pairs,
                policy.stride(0),
                reference.stride(0),
                segment.stride(0),
                0 if pair_weight is None else pair_weight.stride(0),
                BETA=beta,
                LABEL_SMOOTHING=label_smoothing,
                LOSS_TYPE=LOSS_NUMBERS[loss_type],
                LENGTH_NORMALIZE=length_normalize,
                HAS_WEIGHT=pair_weight is not None,
                BLOCK_T=BLOCK_T,
                BLOCK_P=BLOCK_P,
                num_warps=NUM_WARPS,
            )
        ctx.save_for_backward(grad_policy)
        ctx.mark_non_differentiable(win_reward, lose_reward, margin, accuracy)
        return loss, win_reward, lose_reward, margin, accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return grad_loss * ctx.saved_tensors[0], *(None,) * 8


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
) -> tuple[Tensor, ...]:
    """The "triton" backend of kernels/pair_dpo.py."""
    settings = (num_pairs, beta, loss_type, label_smoothing, length_normalize)
    return _PairDPO.apply(policy_logprob, reference_logprob, segment, pair_weight, *settings)


def _production(dtype: str, loss_type: str) -> tuple:
    arguments = {
        "policy_ptr": f"*{dtype}", "reference_ptr": f"*{dtype}", "segment_ptr": "*i64", "weight_ptr": f"*{dtype}",
        "arrived_ptr": "*i32", "pair_loss_ptr": "*fp64", "loss_ptr": f"*{dtype}", "win_reward_ptr": f"*{dtype}",
        "lose_reward_ptr": f"*{dtype}", "margin_ptr": f"*{dtype}", "accuracy_ptr": f"*{dtype}",
        "grad_ptr": f"*{dtype}", "num_tokens": "i32", "num_pairs": "i32", "stride_p": 1, "stride_r": 1,
        "stride_s": 1, "stride_w": 1, "BETA": 0.2, "LABEL_SMOOTHING": 0.1, "LOSS_TYPE": LOSS_NUMBERS[loss_type],
        "LENGTH_NORMALIZE": True, "HAS_WEIGHT": True, "BLOCK_T": BLOCK_T, "BLOCK_P": BLOCK_P,
    }  # fmt: skip
    return _pair_dpo_kernel, arguments, {"num_warps": NUM_WARPS}


# For .ci/check-triton.
PRODUCTION = [_production("fp32", "sigmoid"), _production("fp32", "ipo"), _production("fp64", "robust")]
