"""Triton backend of mask_topk: one program a row, whose keys stay in registers.

Formula: score = logprob + temperature * Gumbel noise; the num_masked unknown tokens of the lowest score are masked.
Layout: a row's scores as uint32 keys of the same order, BLOCK_N of them. The threshold is found bit by bit, each by
counting the keys below it, so nothing is sorted and nothing but the result is stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hermesflow.kernels.philox import MASK_STREAM, RandomKey
from hermesflow.kernels.tile_sampling_triton import uniform

KEYS_A_WARP = 1024  # 32 registers of keys a thread
KNOWN_KEY = tl.constexpr(0xFFFFFFFF)  # above every score's key, +inf's included
SIGN_BIT = tl.constexpr(0x80000000)


@triton.jit
def _mask_topk_kernel(
    logprob_ptr,
    known_ptr,
    num_masked_ptr,
    temperature_ptr,
    seed_ptr,
    step_ptr,
    masked_ptr,
    num_tokens,
    stride_lb,
    stride_ln,
    stride_kb,
    stride_kn,
    stride_num_masked,
    stride_temperature,
    stride_seed,
    stride_step,
    temperature,
    STREAM: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    inside = offs_n < num_tokens
    offs = offs_n.to(tl.int64)
    logprob = tl.load(logprob_ptr + row * stride_lb + offs * stride_ln, mask=inside, other=0.0)
    known = tl.load(known_ptr + row * stride_kb + offs * stride_kn, mask=inside, other=1) != 0
    if HAS_TEMPERATURES:
        temperature = tl.load(temperature_ptr + row * stride_temperature)

    seed = tl.load(seed_ptr + row * stride_seed)
    step = tl.load(step_ptr + row * stride_step).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, offs_n.to(tl.uint32), step, 0, STREAM)
    score = logprob - temperature * tl.log(-tl.log(uniform(word)))
    # NaN is the lowest; adding 0 makes -0 equal 0.
    score = tl.where(score == score, score + 0.0, -float("inf"))
    bits = score.to(tl.uint32, bitcast=True)
    key = tl.where(bits >= SIGN_BIT, ~bits, bits | SIGN_BIT)
    key = tl.where(known, KNOWN_KEY, key)

    num_unknown = BLOCK_N - tl.sum(known.to(tl.int32), axis=0)
    wanted = tl.load(num_masked_ptr + row * stride_num_masked)
    count = tl.minimum(tl.maximum(wanted, 0), num_unknown.to(tl.int64)).to(tl.int32)
    # The largest threshold that fewer than count keys are below is the count-th lowest key.
    threshold = tl.full((), 0, tl.uint32)
    bit = tl.full((), SIGN_BIT, tl.uint32)
    for _ in range(32):
        higher = threshold | bit
        below = tl.sum((key < higher).to(tl.int32), axis=0)
        threshold = tl.where(below < count, higher, threshold)
        bit = bit >> 1
    lower = key < threshold
    tied = (key == threshold).to(tl.int32)
    left = count - tl.sum(lower.to(tl.int32), axis=0)
    masked = lower | ((tied != 0) & (tl.cumsum(tied, axis=0) <= left))
    tl.store(masked_ptr + row * num_tokens + offs, (masked & (count > 0)).to(tl.uint8), mask=inside)


def mask_topk(
    logprob: Tensor, known: Tensor, num_masked: Tensor, *, temperature: float | Tensor, key: RandomKey
) -> Tensor:
    """The "triton" backend of kernels/mask_topk.py."""
    num_rows, num_tokens = logprob.shape
    masked = torch.empty((num_rows, num_tokens), dtype=torch.bool, device=logprob.device)
    if masked.numel() == 0:
        return masked
    one_each = isinstance(temperature, Tensor)
    block_n = triton.next_power_of_2(num_tokens)
    _mask_topk_kernel[(num_rows,)](
        logprob,
        known.view(torch.uint8),
        num_masked,
        temperature if one_each else logprob,
        key.seed,
        key.step,
        masked.view(torch.uint8),
        num_tokens,
        *logprob.stride(),
        *known.stride(),
        num_masked.stride(0),
        temperature.stride(0) if one_each else 0,
        key.seed.stride(0),
        key.step.stride(0) if key.step.dim() else 0,
        0.0 if one_each else temperature,
        STREAM=MASK_STREAM,
        HAS_TEMPERATURES=one_each,
        BLOCK_N=block_n,
        num_warps=_num_warps(block_n),
    )
    return masked


def _num_warps(block_n: int) -> int:
    return min(16, max(4, block_n // KEYS_A_WARP))


def _production(block_n: int) -> tuple:
    arguments = {
        "logprob_ptr": "*fp32", "known_ptr": "*u8", "num_masked_ptr": "*i64", "temperature_ptr": "*fp32",
        "seed_ptr": "*i64", "step_ptr": "*i64", "masked_ptr": "*u8", "num_tokens": "i32:16",
        "stride_lb": "i32:16", "stride_ln": 1, "stride_kb": "i32:16", "stride_kn": 1, "stride_num_masked": 1,
        "stride_temperature": "i32:16", "stride_seed": 1, "stride_step": "i32:16", "temperature": "fp32",
        "STREAM": MASK_STREAM, "HAS_TEMPERATURES": False, "BLOCK_N": block_n,
    }  # fmt: skip
    return _mask_topk_kernel, arguments, {"num_warps": _num_warps(block_n)}


# For .ci/check-triton: an image's tokens, and the longest row that kernels/mask_topk.py allows.
PRODUCTION = [_production(1024), _production(16384)]
