"""Triton backend of token_logprob, forward and backward.

    lse[t]         = log sum_v exp(logits[t, v])
    logprob[t]     = logits[t, target[t]] - lse[t]
    d logits[t, v] = d logprob[t] * ((v == target[t]) - exp(logits[t, v] - lse[t]))

Forward: one program a row reads the row once, BLOCK_V ids at a time, with a running maximum and sum in fp32 (Milakov
and Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867). lse [T] is saved in fp32; no probability
is ever stored. Backward: one program a row and block reads the logits once and writes the gradient once. Ignored rows
are not read; their gradient is 0. A target out of range gives NaN.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_BLOCK_V = 4096


@triton.jit
def _forward_kernel(
    logits_ptr, target_ptr, logprob_ptr, lse_ptr, stride_lt, stride_lv, vocab_size, ignore_index, BLOCK_V: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    if target == ignore_index:
        tl.store(logprob_ptr + row, 0.0)
    else:
        row_ptr = logits_ptr + row * stride_lt
        largest = float("-inf")
        total = 0.0
        for start in range(0, vocab_size, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V).to(tl.int64)
            block = tl.load(row_ptr + offs_v * stride_lv, mask=offs_v < vocab_size, other=float("-inf")).to(tl.float32)
            new_largest = tl.maximum(largest, tl.max(block, 0))
            # While all is -inf, subtract 0: -inf - -inf is NaN.
            shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            total = total * tl.exp(largest - shift) + tl.sum(tl.exp(block - shift), 0)
            largest = new_largest
        lse = largest + tl.log(total)
        in_range = (target >= 0) & (target < vocab_size)
        chosen = tl.load(row_ptr + target * stride_lv, mask=in_range, other=float("nan")).to(tl.float32)
        tl.store(logprob_ptr + row, chosen - lse)
        tl.store(lse_ptr + row, lse)


@triton.jit
def _backward_kernel(
    logits_ptr, target_ptr, lse_ptr, grad_logprob_ptr, grad_logits_ptr,
    stride_lt, stride_lv, stride_gt, stride_gv, vocab_size, ignore_index, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs_v = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = offs_v < vocab_size
    target = tl.load(target_ptr + row)
    grad_ptrs = grad_logits_ptr + row * stride_gt + offs_v * stride_gv
    if target == ignore_index:
        tl.store(grad_ptrs, tl.zeros((BLOCK_V,), tl.float32).to(grad_logits_ptr.dtype.element_ty), mask=inside)
    else:
        logits = tl.load(logits_ptr + row * stride_lt + offs_v * stride_lv, mask=inside, other=0.0).to(tl.float32)
        probability = tl.exp(logits - tl.load(lse_ptr + row))
        one_hot = tl.where(offs_v == target, 1.0, 0.0)
        grad = tl.load(grad_logprob_ptr + row) * (one_hot - probability)
        tl.store(grad_ptrs, grad.to(grad_logits_ptr.dtype.element_ty), mask=inside)


def _launch_forward(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """logprob and lse, fp32 [T]; lse is not written in ignored rows."""
    num_tokens, vocab_size = logits.shape
    logprob, lse = torch.empty(2, num_tokens, dtype=torch.float32, device=logits.device)
    if num_tokens:
        _forward_kernel[(num_tokens,)](
            logits, target, logprob, lse, *logits.stride(), vocab_size, ignore_index, **_block(vocab_size)
        )
    return logprob, lse


def _launch_backward(logits: Tensor, target: Tensor, lse: Tensor, grad_logprob: Tensor, ignore_index: int) -> Tensor:
    """Gradient [T, V] in logits' dtype."""
    num_tokens, vocab_size = logits.shape
    grad_logits = torch.empty_like(logits)
    options = _block(vocab_size)
    if num_tokens:
        _backward_kernel[(num_tokens, triton.cdiv(vocab_size, options["BLOCK_V"]))](
            logits, target, lse, grad_logprob, grad_logits,
            *logits.stride(), *grad_logits.stride(), vocab_size, ignore_index, **options,
        )  # fmt: skip
    return grad_logits


def _block(vocab_size: int) -> dict[str, int]:
    block_v = min(MAX_BLOCK_V, triton.next_power_of_2(vocab_size))
    return {"BLOCK_V": block_v, "num_warps": 8 if block_v > 1024 else 4}


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        logprob, lse = _launch_forward(logits, target, ignore_index)
        ctx.save_for_backward(logits, target, lse)
        ctx.ignore_index = ignore_index
        return logprob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor) -> tuple[Tensor, None, None]:
        logits, target, lse = ctx.saved_tensors
        return _launch_backward(logits, target, lse, grad_logprob.contiguous(), ctx.ignore_index), None, None


def token_logprob(logits: Tensor, target: Tensor, *, ignore_index: int = -100) -> Tensor:
    """hermesflow.kernels.token_logprob.token_logprob on the GPU."""
    return _TokenLogprob.apply(logits, target.contiguous(), ignore_index)


PRODUCTION = []
