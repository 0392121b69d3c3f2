"""Triton backend of token_sample: one program a row, without a sort.

Formula: each filter is a lowest kept logit; the row without what lies below it is drawn from by the rule of
kernels/sampling.py.
Layout: the row is never stored, but read again for each pass, from L2 after the first. A filter is a search in the
order of the floats: a pass weighs what lies at or above each of NUM_THRESHOLDS that split the interval evenly, and the
part that holds the lowest kept logit is the next interval; a filter takes at most 11 passes, one that is off none.
Counts are exact and masses are summed in fp64 in a fixed order, so the result is deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hermesflow.kernels.philox import TOKEN_STREAM, RandomKey
from hermesflow.kernels.sampling import SAMPLE_TILE
from hermesflow.kernels.tile_sampling_triton import add_tiles, draw_in_tile

BLOCK = 1024
NUM_THRESHOLDS = 8
NUM_WARPS = 8


@triton.jit
def _load_tempered(logits_ptr, offs, vocab_size, stride_v, temperature):
    """fp32 logits / temperature at ids offs; -inf past the vocabulary."""
    logits = tl.load(logits_ptr + offs * stride_v, mask=offs < vocab_size, other=-float("inf")).to(tl.float32)
    # Rounded as torch divides: ids may tie by this very rounding.
    return tl.div_rn(logits, tl.full(logits.shape, 1.0, tl.float32) * temperature)


@triton.jit
def _to_key(value):
    """uint32 in the order of the floats; -0 and 0 are one."""
    bits = tl.where(value == 0, 0.0, value).to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, ~bits, bits | 0x80000000)


@triton.jit
def _from_key(key):
    bits = tl.where(key >= 0x80000000, key ^ 0x80000000, ~key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _largest(logits_ptr, vocab_size, stride_v, temperature, BLOCK: tl.constexpr):
    largest = tl.full((BLOCK,), -float("inf"), tl.float32)
    for first in range(0, vocab_size, BLOCK):
        offs = first + tl.arange(0, BLOCK).to(tl.int64)
        largest = tl.maximum(largest, _load_tempered(logits_ptr, offs, vocab_size, stride_v, temperature))
    return tl.max(largest, axis=0)


@triton.jit
def _mass_from(logits_ptr, vocab_size, stride_v, temperature, lowest, largest, BLOCK: tl.constexpr):
    """Sum of exp(logit - largest) in fp64 over the logits of at least lowest."""
    mass = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, vocab_size, BLOCK):
        offs = first + tl.arange(0, BLOCK).to(tl.int64)
        logits = _load_tempered(logits_ptr, offs, vocab_size, stride_v, temperature)
        mass += tl.where(logits < lowest, 0.0, tl.exp(logits - largest)).to(tl.float64)
    return tl.sum(mass, axis=0)


@triton.jit
def _lowest_reaching(
    logits_ptr,
    vocab_size,
    stride_v,
    temperature,
    bound,
    largest,
    target,
    BY_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_THRESHOLDS: tl.constexpr,
):
    """The largest float from bound to largest such that the logits of at least that reach target in number or mass."""
    low, high = _to_key(bound), _to_key(largest)
    parts = tl.arange(0, NUM_THRESHOLDS).to(tl.uint32)
    while low < high:
        step = (high - low) // NUM_THRESHOLDS + 1
        threshold = low + parts * step
        weight = tl.zeros((NUM_THRESHOLDS, BLOCK), tl.float64 if BY_MASS else tl.int32)
        for first in range(0, vocab_size, BLOCK):
            offs = first + tl.arange(0, BLOCK).to(tl.int64)
            logits = _load_tempered(logits_ptr, offs, vocab_size, stride_v, temperature)
            reached = _to_key(logits)[None, :] >= threshold[:, None]
            if BY_MASS:
                weight += tl.where(reached, tl.exp(logits - largest)[None, :], 0.0).to(tl.float64)
            else:
                weight += reached.to(tl.int32)
        # The weight falls from threshold to threshold and is enough at the first.
        enough = (tl.sum(weight, axis=1) >= target) | (parts == 0)
        low = tl.max(tl.where(enough, threshold, 0), axis=0)
        high = tl.minimum(high, low + (step - 1))
    return _from_key(low)


@triton.jit
def _token_sample_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    step_ptr,
    position_ptr,
    token_ptr,
    logprob_ptr,
    vocab_size,
    stride_r,
    stride_v,
    stride_temperature,
    stride_top_k,
    stride_top_p,
    stride_min_p,
    stride_seed,
    stride_step,
    stride_position,
    STREAM: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_THRESHOLDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_r
    temperature_setting = tl.load(temperature_ptr + row * stride_temperature)
    temperature = tl.where(temperature_setting == 0, 1.0, temperature_setting)  # 0: argmax, no filter
    top_k = tl.load(top_k_ptr + row * stride_top_k)
    top_p = tl.load(top_p_ptr + row * stride_top_p)
    min_p = tl.load(min_p_ptr + row * stride_min_p)
    seed = tl.load(seed_ptr + row * stride_seed)
    step = tl.load(step_ptr + row * stride_step).to(tl.uint32)
    position = tl.load(position_ptr + row * stride_position).to(tl.uint32)
    lowest = -float("inf")
    if temperature_setting != 0:
        largest = _largest(logits_ptr, vocab_size, stride_v, temperature, BLOCK)
        # Else the row has no distribution, which the draw finds.
        if (largest > -float("inf")) & (largest < float("inf")):
            if (top_k > 0) & (top_k < vocab_size):
                lowest = _lowest_reaching(
                    logits_ptr, vocab_size, stride_v, temperature, lowest, largest, top_k, False, BLOCK, NUM_THRESHOLDS
                )
            if top_p < 1:
                total = _mass_from(logits_ptr, vocab_size, stride_v, temperature, lowest, largest, BLOCK)
                # The ids below this bound have less than half of 1 - top_p together.
                bound = largest + tl.log(((1 - top_p) * 0.5 * (total / vocab_size)).to(tl.float32))
                bound = tl.maximum(bound, lowest)
                # The largest logit's mass is 1: it stays even where top_p is 0.
                target = tl.maximum(total * top_p, 0.5)
                lowest = _lowest_reaching(
                    logits_ptr, vocab_size, stride_v, temperature, bound, largest, target, True, BLOCK, NUM_THRESHOLDS
                )
            lowest = tl.maximum(lowest, largest + tl.log(min_p))

    greedy = temperature_setting == 0
    state = (-float("inf"), tl.full((), 0, tl.int64), -float("inf"), 0.0)
    offs_in_tile = tl.arange(0, TILE).to(tl.int64)
    BLOCK_TILES: tl.constexpr = BLOCK // TILE
    for first in range(0, tl.cdiv(vocab_size, TILE), BLOCK_TILES):
        tile = first + tl.arange(0, BLOCK_TILES).to(tl.int64)
        offs = tile[:, None] * TILE + offs_in_tile[None, :]
        logits = _load_tempered(logits_ptr, offs, vocab_size, stride_v, temperature)
        logits = tl.where(logits < lowest, -float("inf"), logits)
        state = add_tiles(logits, tile, state, seed, step, position, greedy, STREAM)

    logits = _load_tempered(logits_ptr, state[1] * TILE + offs_in_tile, vocab_size, stride_v, temperature)
    logits = tl.where(logits < lowest, -float("inf"), logits)
    token, logprob = draw_in_tile(logits, state, seed, step, position, greedy, STREAM, TILE)
    tl.store(token_ptr + row, token)
    tl.store(logprob_ptr + row, logprob)


def token_sample(
    logits: Tensor, *, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, key: RandomKey
) -> tuple[Tensor, Tensor]:
    """The "triton" backend of kernels/token_sample.py."""
    num_rows, vocab_size = logits.shape
    token = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    logprob = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows == 0:
        return token, logprob
    settings = (temperature, top_k, top_p, min_p)
    _token_sample_kernel[(num_rows,)](
        logits,
        *settings,
        *key,
        token,
        logprob,
        vocab_size,
        *logits.stride(),
        *(setting.stride(0) for setting in settings),
        key.seed.stride(0),
        key.step.stride(0) if key.step.dim() else 0,
        key.position.stride(0),
        STREAM=TOKEN_STREAM,
        TILE=SAMPLE_TILE,
        BLOCK=BLOCK,
        NUM_THRESHOLDS=NUM_THRESHOLDS,
        num_warps=NUM_WARPS,
    )
    return token, logprob


def _production(dtype: str) -> tuple:
    arguments = {
        "logits_ptr": f"*{dtype}", "temperature_ptr": "*fp32", "top_k_ptr": "*i64", "top_p_ptr": "*fp32",
        "min_p_ptr": "*fp32", "seed_ptr": "*i64", "step_ptr": "*i64", "position_ptr": "*i64", "token_ptr": "*i64",
        "logprob_ptr": "*fp32", "vocab_size": "i32", "stride_r": "i32", "stride_v": 1, "stride_temperature": 1,
        "stride_top_k": 1, "stride_top_p": 1, "stride_min_p": 1, "stride_seed": 1, "stride_step": "i32",
        "stride_position": 1, "STREAM": TOKEN_STREAM, "TILE": SAMPLE_TILE, "BLOCK": BLOCK,
        "NUM_THRESHOLDS": NUM_THRESHOLDS,
    }  # fmt: skip
    return _token_sample_kernel, arguments, {"num_warps": NUM_WARPS}


# For .ci/check-triton: Show-o's joint vocabulary of 58,498 ids, no multiple of 16.
PRODUCTION = [_production("fp32"), _production("bf16")]
