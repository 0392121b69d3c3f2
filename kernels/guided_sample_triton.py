"""Triton backend of guided_sample: one program a row, one pass over its logits.

Formula: logits = ((1 + g) cond - g uncond) / temperature, drawn from by the rule of kernels/sampling.py.
Layout: a block of BLOCK_TILES x TILE logits at a time; the winning tile is read once more at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hermesflow.kernels.philox import TOKEN_STREAM, RandomKey
from hermesflow.kernels.sampling import SAMPLE_TILE
from hermesflow.kernels.tile_sampling_triton import add_tiles, draw_in_tile

MAX_BLOCK_TILES = 16


@triton.jit
def _load_logits(
    cond_ptr,
    uncond_ptr,
    bias_ptr,
    offs,
    vocab_size,
    stride_cv,
    stride_uv,
    guidance_scale,
    inverse_temperature,
    HAS_UNCOND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Guided, tempered fp32 logits at ids offs; -inf past the vocabulary."""
    inside = offs < vocab_size
    logits = tl.load(cond_ptr + offs * stride_cv, mask=inside, other=-float("inf")).to(tl.float32)
    if HAS_BIAS:
        logits += tl.load(bias_ptr + offs, mask=inside, other=0.0)
    if HAS_UNCOND:
        uncond = tl.load(uncond_ptr + offs * stride_uv, mask=inside, other=0.0).to(tl.float32)
        guided = (1 + guidance_scale) * logits - guidance_scale * uncond
        # -inf - -inf is NaN; what the condition forbids stays forbidden.
        logits = tl.where(logits == -float("inf"), logits, guided)
    return logits * inverse_temperature


@triton.jit
def _guided_sample_kernel(
    cond_ptr,
    uncond_ptr,
    bias_ptr,
    seed_ptr,
    step_ptr,
    position_ptr,
    token_ptr,
    logprob_ptr,
    vocab_size,
    stride_cr,
    stride_cv,
    stride_ur,
    stride_uv,
    stride_seed,
    stride_step,
    stride_position,
    guidance_scale,
    inverse_temperature,
    STREAM: tl.constexpr,
    HAS_UNCOND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GREEDY: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cond_ptr += row * stride_cr
    uncond_ptr += row * stride_ur
    seed = tl.load(seed_ptr + row * stride_seed)
    step = tl.load(step_ptr + row * stride_step).to(tl.uint32)
    position = tl.load(position_ptr + row * stride_position).to(tl.uint32)
    offs_in_tile = tl.arange(0, TILE).to(tl.int64)

    state = (-float("inf"), tl.full((), 0, tl.int64), -float("inf"), 0.0)
    for first in range(0, tl.cdiv(vocab_size, TILE), BLOCK_TILES):
        tile = first + tl.arange(0, BLOCK_TILES).to(tl.int64)
        offs = tile[:, None] * TILE + offs_in_tile[None, :]
        logits = _load_logits(
            cond_ptr,
            uncond_ptr,
            bias_ptr,
            offs,
            vocab_size,
            stride_cv,
            stride_uv,
            guidance_scale,
            inverse_temperature,
            HAS_UNCOND,
            HAS_BIAS,
        )
        state = add_tiles(logits, tile, state, seed, step, position, GREEDY, STREAM)

    offs = state[1] * TILE + offs_in_tile
    logits = _load_logits(
        cond_ptr,
        uncond_ptr,
        bias_ptr,
        offs,
        vocab_size,
        stride_cv,
        stride_uv,
        guidance_scale,
        inverse_temperature,
        HAS_UNCOND,
        HAS_BIAS,
    )
    token, logprob = draw_in_tile(logits, state, seed, step, position, GREEDY, STREAM, TILE)
    tl.store(token_ptr + row, token)
    tl.store(logprob_ptr + row, logprob)


def guided_sample(
    cond: Tensor,
    uncond: Tensor | None,
    *,
    guidance_scale: float,
    temperature: float,
    key: RandomKey,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The "triton" backend of kernels/guided_sample.py; bias, contiguous fp32 [V], is added to cond."""
    num_rows, vocab_size = cond.shape
    token = torch.empty(num_rows, dtype=torch.int64, device=cond.device)
    logprob = torch.empty(num_rows, dtype=torch.float32, device=cond.device)
    if num_rows == 0:
        return token, logprob
    other = cond if uncond is None else uncond
    _guided_sample_kernel[(num_rows,)](
        cond,
        other,
        cond if bias is None else bias,
        key.seed,
        key.step,
        key.position,
        token,
        logprob,
        vocab_size,
        *cond.stride(),
        *other.stride(),
        key.seed.stride(0),
        key.step.stride(0) if key.step.dim() else 0,
        key.position.stride(0),
        guidance_scale,
        1.0 / temperature if temperature else 1.0,
        STREAM=TOKEN_STREAM,
        HAS_UNCOND=uncond is not None,
        HAS_BIAS=bias is not None,
        GREEDY=temperature == 0,
        TILE=SAMPLE_TILE,
        BLOCK_TILES=min(MAX_BLOCK_TILES, triton.next_power_of_2(triton.cdiv(vocab_size, SAMPLE_TILE))),
    )
    return token, logprob


def _production(dtype: str, vocab_size: str) -> tuple:
    arguments = {
        "cond_ptr": f"*{dtype}", "uncond_ptr": f"*{dtype}", "bias_ptr": "*fp32", "seed_ptr": "*i64", "step_ptr": "*i64",
        "position_ptr": "*i64", "token_ptr": "*i64", "logprob_ptr": "*fp32", "vocab_size": vocab_size,
        "stride_cr": "i32:16", "stride_cv": 1, "stride_ur": "i32:16", "stride_uv": 1, "stride_seed": 1,
        "stride_step": "i32", "stride_position": 1, "guidance_scale": "fp32", "inverse_temperature": "fp32",
        "STREAM": TOKEN_STREAM, "HAS_UNCOND": True, "HAS_BIAS": dtype == "fp32", "GREEDY": False, "TILE": SAMPLE_TILE,
        "BLOCK_TILES": MAX_BLOCK_TILES,
    }  # fmt: skip
    return _guided_sample_kernel, arguments, {"num_warps": 4}


# For .ci/check-triton: image codes, and Show-o's joint vocabulary, which is no multiple of 16.
PRODUCTION = [_production("fp32", "i32:16"), _production("bf16", "i32:16"), _production("bf16", "i32")]
