"""Triton backend of token_logprob, forward and backward.

    largest[t]     = max_v logits[t, v]
    total[t]       = sum_v exp(logits[t, v] - largest[t])
    logprob[t]     = logits[t, target[t]] - largest[t] - log total[t]
    entropy[t]     = log total[t] - sum_v y exp(y) / total[t]                with y = logits[t, v] - largest[t]
    d logits[t, v] = d logprob[t] * ((v == target[t]) - exp(logits[t, v] - largest[t]) / total[t])

Forward: one program a row reads the row once, BLOCK_V ids at a time, with a running maximum and sums in fp32 (Milakov
and Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867). largest and total [T] are saved in fp32;
no probability is ever stored. Backward: one program a row and block reads the logits once and writes the gradient once.
Ignored rows are not read; their gradient is 0. A target out of range gives NaN.

Loads and stores of 16 bytes need addresses that are multiples of 16, which a row of 58,498 ids does not start with, and
a mask that does not vary within the 16 bytes. So blocks start at the last such address before the row, `shift` elements
before its first, and only the first and the last block are masked.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

MIN_BLOCK_V, MAX_BLOCK_V = 16, 4096  # at least 16 bytes: only the first block may reach before the row


@triton.jit
def _add_block(block, largest, total, weighted, WITH_ENTROPY: tl.constexpr):
    """The running maximum and sums after a block of logits."""
    new_largest = tl.maximum(largest, tl.max(block, 0))
    # While all is -inf, subtract 0: -inf - -inf is NaN.
    shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    rescale = tl.exp(largest - shift)
    y = block - shift
    mass = tl.exp(y)
    if WITH_ENTROPY:
        # Where y is far below 0, mass or rescale is 0, and 0 * -inf would be NaN.
        moved = weighted + tl.maximum(largest - shift, -1000.0) * total
        weighted = rescale * moved + tl.sum(mass * tl.where(y < -100.0, -100.0, y), 0)
    return new_largest, total * rescale + tl.sum(mass, 0), weighted


@triton.jit
def _forward_kernel(
    logits_ptr, target_ptr, logprob_ptr, largest_ptr, total_ptr, entropy_ptr,
    stride_lt, stride_lv, stride_target, vocab_size, ignore_index,
    WITH_ENTROPY: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row * stride_target)
    if target == ignore_index:
        tl.store(logprob_ptr + row, 0.0)
        if WITH_ENTROPY:
            tl.store(entropy_ptr + row, 0.0)
    else:
        shift = row * stride_lt % ALIGNED
        end = vocab_size + shift
        row_ptr = logits_ptr + tl.multiple_of(row * stride_lt - shift, ALIGNED)
        offs_v = tl.arange(0, BLOCK_V).to(tl.int64)
        inside = (offs_v >= shift) & (offs_v < end)
        block = tl.load(row_ptr + offs_v * stride_lv, mask=inside, other=float("-inf")).to(tl.float32)
        largest, total, weighted = _add_block(block, float("-inf"), 0.0, 0.0, WITH_ENTROPY)
        last = tl.maximum(end // BLOCK_V * BLOCK_V, BLOCK_V)
        for first in range(BLOCK_V, last, BLOCK_V):
            block = tl.load(row_ptr + (first + offs_v) * stride_lv).to(tl.float32)
            largest, total, weighted = _add_block(block, largest, total, weighted, WITH_ENTROPY)
        if last < end:
            offs_v += last
            block = tl.load(row_ptr + offs_v * stride_lv, mask=offs_v < end, other=float("-inf")).to(tl.float32)
            largest, total, weighted = _add_block(block, largest, total, weighted, WITH_ENTROPY)

        in_range = (target >= 0) & (target < vocab_size)
        chosen = tl.load(row_ptr + (target + shift) * stride_lv, mask=in_range, other=float("nan")).to(tl.float32)
        log_total = tl.log(total)
        tl.store(logprob_ptr + row, (chosen - largest) - log_total)
        tl.store(largest_ptr + row, largest)
        tl.store(total_ptr + row, total)
        if WITH_ENTROPY:
            tl.store(entropy_ptr + row, log_total - weighted / total)


@triton.jit
def _backward_kernel(
    logits_ptr, target_ptr, largest_ptr, total_ptr, grad_logprob_ptr, grad_logits_ptr,
    stride_lt, stride_lv, stride_target, stride_grad, stride_gt, stride_gv, vocab_size, ignore_index,
    ALIGNED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * BLOCK_V
    offs_v = first + tl.arange(0, BLOCK_V)
    shift = row * stride_lt % ALIGNED  # the launcher sees to it that row * stride_gt gives the same
    end = vocab_size + shift
    inside = (offs_v >= shift) & (offs_v < end)
    whole = (first >= shift) & (first + BLOCK_V <= end)
    logits_ptrs = logits_ptr + tl.multiple_of(row * stride_lt - shift, ALIGNED) + offs_v * stride_lv
    grad_ptrs = grad_logits_ptr + tl.multiple_of(row * stride_gt - shift, ALIGNED) + offs_v * stride_gv
    grad = tl.zeros((BLOCK_V,), tl.float32)
    target = tl.load(target_ptr + row * stride_target)
    if target != ignore_index:
        if whole:
            logits = tl.load(logits_ptrs).to(tl.float32)
        else:
            logits = tl.load(logits_ptrs, mask=inside, other=float("-inf")).to(tl.float32)
        grad_logprob = tl.load(grad_logprob_ptr + row * stride_grad)
        one_hot = tl.where(offs_v - shift == target, grad_logprob, 0.0)
        grad = one_hot - tl.exp(logits - tl.load(largest_ptr + row)) * (grad_logprob / tl.load(total_ptr + row))
    if whole:
        tl.store(grad_ptrs, grad.to(grad_logits_ptr.dtype.element_ty))
    else:
        tl.store(grad_ptrs, grad.to(grad_logits_ptr.dtype.element_ty), mask=inside)


def _launch_forward(
    logits: Tensor, target: Tensor, ignore_index: int, return_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprob, largest, total and, on request, entropy, fp32 [T]; largest and total are not written in ignored rows."""
    num_tokens, vocab_size = logits.shape
    logprob, largest, total = (logits.new_empty(num_tokens, dtype=torch.float32) for _ in range(3))
    entropy = logits.new_empty(num_tokens if return_entropy else 0, dtype=torch.float32)
    if num_tokens:
        _forward_kernel[(num_tokens,)](
            logits,
            target,
            logprob,
            largest,
            total,
            entropy,
            *logits.stride(),
            target.stride(0),
            vocab_size,
            ignore_index,
            WITH_ENTROPY=return_entropy,
            **_options(logits, logits),
        )
    return logprob, largest, total, entropy


def _launch_backward(
    logits: Tensor, target: Tensor, largest: Tensor, total: Tensor, grad_logprob: Tensor, ignore_index: int
) -> Tensor:
    """Gradient [T, V] in logits' dtype."""
    num_tokens, vocab_size = logits.shape
    grad_logits = torch.empty_like(logits)
    options = _options(logits, grad_logits)
    if num_tokens:
        num_blocks = triton.cdiv(vocab_size + options["ALIGNED"] - 1, options["BLOCK_V"])
        _backward_kernel[(num_tokens, num_blocks)](
            logits,
            target,
            largest,
            total,
            grad_logprob,
            grad_logits,
            *logits.stride(),
            target.stride(0),
            grad_logprob.stride(0),
            *grad_logits.stride(),
            vocab_size,
            ignore_index,
            **options,
        )
    return grad_logits


def _options(logits: Tensor, grad_logits: Tensor) -> dict[str, int]:
    """How a kernel is launched. ALIGNED elements are 16 bytes; 1 where no shift serves the rows of both tensors."""
    aligned = 16 // logits.element_size()
    (stride_lt, stride_lv), (stride_gt, stride_gv) = logits.stride(), grad_logits.stride()
    alike = stride_lv == stride_gv == 1 and (stride_lt - stride_gt) % aligned == 0
    block_v = max(MIN_BLOCK_V, min(MAX_BLOCK_V, triton.next_power_of_2(logits.shape[1])))
    return {"ALIGNED": aligned if alike else 1, "BLOCK_V": block_v, "num_warps": 8 if block_v > 1024 else 4}


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, ignore_index: int, return_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        logprob, largest, total, entropy = _launch_forward(logits, target, ignore_index, return_entropy)
        ctx.save_for_backward(logits, target, largest, total)
        ctx.ignore_index = ignore_index
        ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        return _launch_backward(*ctx.saved_tensors, grad_logprob, ctx.ignore_index), None, None, None


def token_logprob(
    logits: Tensor, target: Tensor, *, ignore_index: int, return_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """The "triton" backend of kernels/token_logprob.py."""
    logprob, entropy = _TokenLogprob.apply(logits, target, ignore_index, return_entropy)
    return logprob, entropy if return_entropy else None


def _production(dtype: str, vocab_size: int) -> list[tuple]:
    ALIGNED = 16 // {"fp32": 4, "bf16": 2}[dtype]
    multiple = "i32:16" if vocab_size % 16 == 0 else "i32"
    shared = {
        "logits_ptr": f"*{dtype}", "target_ptr": "*i64", "largest_ptr": "*fp32", "total_ptr": "*fp32",
        "stride_lt": multiple, "stride_lv": 1, "stride_target": 1, "vocab_size": multiple, "ignore_index": "i32",
        "ALIGNED": ALIGNED, "BLOCK_V": MAX_BLOCK_V,
    }  # fmt: skip
    forward = shared | {"logprob_ptr": "*fp32", "entropy_ptr": "*fp32", "WITH_ENTROPY": True}
    backward = shared | {
        "grad_logprob_ptr": "*fp32",
        "grad_logits_ptr": f"*{dtype}",
        "stride_grad": 1,
        "stride_gt": multiple,
        "stride_gv": 1,
    }
    options = {"num_warps": 8}
    return [(_forward_kernel, forward, options), (_backward_kernel, backward, options)]


# For .ci/check-triton: image codes, and Show-o's joint vocabulary, which is no multiple of 16.
PRODUCTION = [case for dtype in ("fp32", "bf16") for size in (8192, 58498) for case in _production(dtype, size)]
