"""The C++ and CUDA backends: calls into the extension, which torch dispatches by device, their autograd functions, and
the fake kernels that give torch.compile shapes and dtypes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hermesflow.kernels import linear_logprob_blocked
from hermesflow.kernels.extension import load_extension
from hermesflow.kernels.linear_logprob_blocked import Kernels
from hermesflow.kernels.philox import RandomKey

load_extension()  # registers torch.ops.hermesflow


@torch.no_grad()
def guided_sample(
    cond: Tensor,
    uncond: Tensor | None,
    *,
    guidance_scale: float,
    temperature: float,
    key: RandomKey,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Backends "cuda" and "cpu" of kernels/guided_sample.py; bias, fp32 [V], is added to cond."""
    return torch.ops.hermesflow.guided_sample(cond, uncond, bias, guidance_scale, temperature, *key)


def mask_topk(
    logprob: Tensor, known: Tensor, num_masked: Tensor, *, temperature: float | Tensor, key: RandomKey
) -> Tensor:
    """Backends "cuda" and "cpu" of kernels/mask_topk.py."""
    one, each = (0.0, temperature) if isinstance(temperature, Tensor) else (temperature, None)
    return torch.ops.hermesflow.mask_topk(logprob, known, num_masked, one, each, key.seed, key.step)


@torch.no_grad()
def token_sample(
    logits: Tensor, *, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, key: RandomKey
) -> tuple[Tensor, Tensor]:
    """Backends "cuda" and "cpu" of kernels/token_sample.py."""
    return torch.ops.hermesflow.token_sample(logits, temperature, top_k, top_p, min_p, *key)


def token_logprob(
    logits: Tensor, target: Tensor, *, ignore_index: int, return_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Backends "cuda" and "cpu" of kernels/token_logprob.py."""
    logprob, entropy = _TokenLogprob.apply(logits, target, ignore_index, return_entropy)
    return logprob, entropy if return_entropy else None


def _update_state(logits: Tensor, bias: Tensor | None, target: Tensor, first_id: int, state: Tensor, _: None) -> None:
    torch.ops.hermesflow.linear_logprob_block(logits, bias, target, first_id, state)


linear_logprob_blocked.KERNELS["extension"] = Kernels(_update_state, torch.ops.hermesflow.linear_logprob_block_backward)


def linear_logprob(
    x: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None, ignore_index: int, return_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Backend "cpu" of kernels/linear_logprob.py: log-probability and, if asked for, entropy."""
    return linear_logprob_blocked.linear_logprob("extension", x, weight, target, bias, ignore_index, return_entropy)


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, ignore_index: int, return_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        logprob, *softmax, entropy = torch.ops.hermesflow.token_logprob(logits, target, ignore_index, return_entropy)
        ctx.save_for_backward(logits, target, *softmax)
        ctx.ignore_index = ignore_index
        ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        grad = torch.ops.hermesflow.token_logprob_backward(*ctx.saved_tensors, grad_logprob, ctx.ignore_index)
        return grad, None, None, None


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
    """Backend "cpu" of kernels/pair_dpo.py."""
    settings = (num_pairs, beta, loss_type, label_smoothing, length_normalize)
    return _PairDPO.apply(policy_logprob, reference_logprob, segment, pair_weight, *settings)


class _PairDPO(torch.autograd.Function):
    """The forward pass also gives the gradient of the loss, which is all that the backward pass needs."""

    @staticmethod
    def forward(
        ctx: Any, policy: Tensor, reference: Tensor, segment: Tensor, pair_weight: Tensor | None, *settings: Any
    ) -> tuple[Tensor, ...]:
        *outputs, grad_policy = torch.ops.hermesflow.pair_dpo(policy, reference, segment, *settings, pair_weight)
        ctx.save_for_backward(grad_policy)
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return grad_loss * ctx.saved_tensors[0], *(None,) * 8


@torch.library.register_fake("hermesflow::guided_sample")
def _guided_sample_fake(cond, uncond, bias, guidance_scale, temperature, seed, step, position):
    return cond.new_empty(cond.shape[0], dtype=torch.int64), cond.new_empty(cond.shape[0], dtype=torch.float32)


@torch.library.register_fake("hermesflow::mask_topk")
def _mask_topk_fake(logprob, known, num_masked, temperature, temperatures, seed, step):
    return known.new_empty(known.shape)


@torch.library.register_fake("hermesflow::token_sample")
def _token_sample_fake(logits, temperature, top_k, top_p, min_p, seed, step, position):
    return logits.new_empty(logits.shape[0], dtype=torch.int64), logits.new_empty(logits.shape[0], dtype=torch.float32)


@torch.library.register_fake("hermesflow::token_logprob")
def _token_logprob_fake(logits, target, ignore_index, return_entropy):
    num_rows = logits.shape[0]
    lengths = (num_rows, num_rows, num_rows, num_rows if return_entropy else 0)
    return tuple(logits.new_empty(length, dtype=torch.float32) for length in lengths)


@torch.library.register_fake("hermesflow::token_logprob_backward")
def _token_logprob_backward_fake(logits, target, largest, total, grad_logprob, ignore_index):
    return logits.new_empty(logits.shape)


@torch.library.register_fake("hermesflow::linear_logprob_block")
def _linear_logprob_block_fake(logits, bias, target, first_id, state):
    return None


@torch.library.register_fake("hermesflow::linear_logprob_block_backward")
def _linear_logprob_block_backward_fake(logits, bias, target, lse, grad_logprob, first_id, grad_logits):
    return None


@torch.library.register_fake("hermesflow::pair_dpo")
def _pair_dpo_fake(
    policy_logprob,
    reference_logprob,
    segment,
    num_pairs,
    beta,
    loss_type,
    label_smoothing,
    length_normalize,
    pair_weight,
):
    scalar, pairs = policy_logprob.new_empty(()), policy_logprob.new_empty(num_pairs)
    return (
        scalar,
        pairs,
        torch.empty_like(pairs),
        torch.empty_like(pairs),
        torch.empty_like(scalar),
        policy_logprob.new_empty(policy_logprob.shape),
    )
