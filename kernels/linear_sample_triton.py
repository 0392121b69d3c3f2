"""Triton backend of linear_sample: a matmul whose epilogue draws, so that logits are never stored.

Formula: logits = (hidden weight^T + bias) / temperature, then the rule of kernels/sampling.py: the tile of SAMPLE_TILE
ids with the largest log-sum-exp + Gumbel noise wins, an inverse CDF draws inside it.
Layout: a program takes BLOCK_R rows and one of SPLITS runs of tiles. Its [BLOCK_R, TILE] accumulator is one tile of
every row; the epilogue draws inside the tile while it lies in registers and keeps the best tile so far. A second kernel
picks each row's best split. What is stored: five numbers a row and split.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hermesflow.kernels.philox import TOKEN_STREAM, RandomKey
from hermesflow.kernels.sampling import SAMPLE_TILE
from hermesflow.kernels.tile_sampling_triton import uniform

BLOCK_D, CHUNKS = 64, 8
OPTIONS = {"num_warps": 8, "num_stages": 3}
# Enough programs for two waves of the largest GPU that the project names (148 multiprocessors).
WANTED_PROGRAMS = 296


def _block_rows(capability: int) -> int:
    """Rows of a program. Before Hopper, 128 rows spill registers: the operands of tl.dot take them too."""
    return 128 if capability >= 90 else 64


@triton.jit
def _first_passed(cumulative, mass, target, SIZE: tl.constexpr):
    """First index with mass whose cumulative mass exceeds the row's target; if rounding leaves none, the last one."""
    index = tl.arange(0, SIZE)[None, :]
    first = tl.min(tl.where((cumulative > target[:, None]) & (mass > 0), index, SIZE), axis=1)
    last = tl.max(tl.where(mass > 0, index, 0), axis=1)
    return tl.minimum(first, last)


@triton.jit
def _linear_sample_kernel(
    hidden_ptr, weight_ptr, bias_ptr, seed_ptr, step_ptr, position_ptr, partial_ptr, partial_token_ptr,
    num_rows, vocab_size, width,
    stride_hr, stride_hd, stride_wv, stride_wd, stride_b, stride_seed, stride_step, stride_position,
    inverse_temperature, tiles_per_split,
    STREAM: tl.constexpr, HAS_BIAS: tl.constexpr, GREEDY: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share a run of tiles, so that its weights are read from L2.
    row_block, split = tl.program_id(0), tl.program_id(1)
    offs_r = row_block.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_r = offs_r < num_rows
    offs_t = tl.arange(0, TILE)
    offs_c = tl.arange(0, CHUNKS)[None, :]
    offs_i = tl.arange(0, TILE // CHUNKS)[None, :]
    offs_d = tl.arange(0, BLOCK_D)
    seed = tl.load(seed_ptr + offs_r * stride_seed, mask=inside_r, other=0)
    step = tl.load(step_ptr + offs_r * stride_step, mask=inside_r, other=0).to(tl.uint32)
    position = tl.load(position_ptr + offs_r * stride_position, mask=inside_r, other=0).to(tl.uint32)

    best = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    best_token = tl.full((BLOCK_R,), -1, tl.int32)
    best_logit = tl.full((BLOCK_R,), 0.0, tl.float32)
    running_max = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_R,), tl.float32)
    # The last split may have tiles past the vocabulary's end: they hold nothing but -inf and never win.
    for index in range(0, tiles_per_split):
        tile = split * tiles_per_split + index
        offs_v = tile.to(tl.int64) * TILE + offs_t
        inside_v = offs_v < vocab_size
        hidden_ptrs = hidden_ptr + offs_r[:, None] * stride_hr + offs_d[None, :] * stride_hd
        weight_ptrs = weight_ptr + offs_v[None, :] * stride_wv + offs_d[:, None] * stride_wd
        logits = tl.zeros((BLOCK_R, TILE), tl.float32)
        for start in range(0, width, BLOCK_D):
            inside_d = start + offs_d < width
            hidden = tl.load(hidden_ptrs, mask=inside_r[:, None] & inside_d[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=inside_v[None, :] & inside_d[:, None], other=0.0)
            logits = tl.dot(hidden, weight, logits, input_precision="ieee")
            hidden_ptrs += BLOCK_D * stride_hd
            weight_ptrs += BLOCK_D * stride_wd
        if HAS_BIAS:
            logits += tl.load(bias_ptr + offs_v * stride_b, mask=inside_v, other=0.0).to(tl.float32)[None, :]
        logits = tl.where(inside_v[None, :], logits * inverse_temperature, -float("inf"))

        tile_max = tl.max(logits, axis=1)
        shift = tl.where(tile_max == -float("inf"), 0.0, tile_max)
        if GREEDY:
            score, chosen = tile_max, tile_max
            inside = tl.min(tl.where(logits == tile_max[:, None], offs_t[None, :], TILE - 1), axis=1)
            tile_sum = tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        else:
            # From here on only masses, so that the logits' registers are free.
            mass = tl.exp(logits - shift[:, None]).reshape(BLOCK_R, CHUNKS, TILE // CHUNKS)
            chunk_sum = tl.sum(mass, axis=2)
            tile_sum = tl.sum(chunk_sum, axis=1)
            gumbel_word, cdf_word, _, _ = tl.philox(seed, tile.to(tl.uint32), step, position, STREAM)
            score = shift + tl.log(tile_sum) - tl.log(-tl.log(uniform(gumbel_word)))
            # The inverse CDF in two steps: the chunk of the tile, then the id in the chunk.
            target = uniform(cdf_word) * tile_sum
            chunk = _first_passed(tl.cumsum(chunk_sum, axis=1), chunk_sum, target, CHUNKS)
            before = tl.sum(tl.where(offs_c < chunk[:, None], chunk_sum, 0.0), axis=1)
            mass = tl.sum(tl.where((offs_c == chunk[:, None])[:, :, None], mass, 0.0), axis=1)
            id_in_chunk = _first_passed(before[:, None] + tl.cumsum(mass, axis=1), mass, target, TILE // CHUNKS)
            inside = chunk * (TILE // CHUNKS) + id_in_chunk
            chosen = shift + tl.log(tl.sum(tl.where(offs_i == id_in_chunk[:, None], mass, 0.0), axis=1))

        # A tile with NaN never wins; its row is invalid by running_sum.
        wins = score > best
        best = tl.where(wins, score, best)
        best_token = tl.where(wins, tile * TILE + inside, best_token)
        best_logit = tl.where(wins, chosen, best_logit)
        new_max = tl.maximum(running_max, tile_max)
        safe_max = tl.where(new_max == -float("inf"), 0.0, new_max)
        # A tile without mass adds nothing; its shift of 0 may lie far above the maximum. NaN goes through.
        added = tl.where(tile_sum == 0, 0.0, tile_sum * tl.exp(shift - safe_max))
        running_sum = running_sum * tl.exp(running_max - safe_max) + added
        running_max = new_max

    partial = partial_ptr + (offs_r * SPLITS + split) * 4
    tl.store(partial, best, mask=inside_r)
    tl.store(partial + 1, best_logit, mask=inside_r)
    tl.store(partial + 2, running_max, mask=inside_r)
    tl.store(partial + 3, running_sum, mask=inside_r)
    tl.store(partial_token_ptr + offs_r * SPLITS + split, best_token, mask=inside_r)


@triton.jit
def _merge_kernel(
    partial_ptr, partial_token_ptr, token_ptr, logprob_ptr, num_rows, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Each row's best split and its log-sum-exp over the splits; lower splits hold lower ids and win ties."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    best_logit = tl.full((BLOCK,), 0.0, tl.float32)
    token = tl.full((BLOCK,), -1, tl.int32)
    running_max = tl.full((BLOCK,), -float("inf"), tl.float32)
    running_sum = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        partial = partial_ptr + (row * SPLITS + split) * 4
        score = tl.load(partial, mask=inside, other=-float("inf"))
        wins = score > best
        best = tl.where(wins, score, best)
        best_logit = tl.where(wins, tl.load(partial + 1, mask=inside, other=0.0), best_logit)
        token = tl.where(wins, tl.load(partial_token_ptr + row * SPLITS + split, mask=inside, other=-1), token)
        largest = tl.load(partial + 2, mask=inside, other=-float("inf"))
        total = tl.load(partial + 3, mask=inside, other=0.0)
        new_max = tl.maximum(running_max, largest)
        safe_max = tl.where(new_max == -float("inf"), 0.0, new_max)
        added = tl.where(total == 0, 0.0, total * tl.exp(largest - safe_max))
        running_sum = running_sum * tl.exp(running_max - safe_max) + added
        running_max = new_max
    # NaN and +inf make running_sum NaN, nothing but -inf leaves it 0: a row without a distribution.
    valid = running_sum > 0
    logprob = best_logit - (running_max + tl.log(running_sum))
    tl.store(token_ptr + row, tl.where(valid, token, -1).to(tl.int64), mask=inside)
    tl.store(logprob_ptr + row, tl.where(valid, logprob, float("nan")), mask=inside)


@torch.no_grad()
def linear_sample(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, temperature: float, key: RandomKey
) -> tuple[Tensor, Tensor]:
    """The "triton" backend of kernels/linear_sample.py."""
    (num_rows, width), vocab_size = hidden.shape, weight.shape[0]
    token = torch.empty(num_rows, dtype=torch.int64, device=hidden.device)
    logprob = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    if num_rows == 0:
        return token, logprob
    on_gpu = hidden.device.type == "cuda"
    block_rows = _block_rows(10 * torch.cuda.get_device_capability(hidden.device)[0] if on_gpu else 90)
    row_blocks, num_tiles = triton.cdiv(num_rows, block_rows), triton.cdiv(vocab_size, SAMPLE_TILE)
    # A power of two, so that few variants are compiled.
    splits = min(triton.next_power_of_2(triton.cdiv(WANTED_PROGRAMS, row_blocks)), triton.next_power_of_2(num_tiles))
    partial = torch.empty(num_rows, splits, 4, dtype=torch.float32, device=hidden.device)
    partial_token = torch.empty(num_rows, splits, dtype=torch.int32, device=hidden.device)
    _linear_sample_kernel[(row_blocks, splits)](
        hidden,
        weight,
        hidden if bias is None else bias,
        key.seed,
        key.step,
        key.position,
        partial,
        partial_token,
        num_rows,
        vocab_size,
        width,
        *hidden.stride(),
        *weight.stride(),
        0 if bias is None else bias.stride(0),
        key.seed.stride(0),
        key.step.stride(0) if key.step.dim() else 0,
        key.position.stride(0),
        1.0 / temperature if temperature else 1.0,
        triton.cdiv(num_tiles, splits),
        STREAM=TOKEN_STREAM,
        HAS_BIAS=bias is not None,
        GREEDY=temperature == 0,
        SPLITS=splits,
        TILE=SAMPLE_TILE,
        CHUNKS=CHUNKS,
        BLOCK_R=block_rows,
        BLOCK_D=BLOCK_D,
        **OPTIONS,
    )
    _merge_kernel[(triton.cdiv(num_rows, 128),)](
        partial, partial_token, token, logprob, num_rows, SPLITS=splits, BLOCK=128
    )
    return token, logprob


_MERGE = {
    "partial_ptr": "*fp32", "partial_token_ptr": "*i32", "token_ptr": "*i64", "logprob_ptr": "*fp32",
    "num_rows": "i32:16", "SPLITS": 2, "BLOCK": 128,
}  # fmt: skip


def production(capability: int) -> list[tuple]:
    """For .ci/check-triton: the head of Show-o over its image codes."""
    arguments = {
        "hidden_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*bf16", "seed_ptr": "*i64", "step_ptr": "*i64",
        "position_ptr": "*i64", "partial_ptr": "*fp32", "partial_token_ptr": "*i32", "num_rows": "i32:16",
        "vocab_size": "i32:16", "width": "i32:16", "stride_hr": "i32:16", "stride_hd": 1, "stride_wv": "i32:16",
        "stride_wd": 1, "stride_b": 1, "stride_seed": 1, "stride_step": "i32", "stride_position": 1,
        "inverse_temperature": "fp32", "tiles_per_split": "i32", "STREAM": TOKEN_STREAM, "HAS_BIAS": True,
        "SPLITS": 2, "TILE": SAMPLE_TILE, "CHUNKS": CHUNKS, "BLOCK_R": _block_rows(capability), "BLOCK_D": BLOCK_D,
    }  # fmt: skip
    draws = [(_linear_sample_kernel, arguments | {"GREEDY": greedy}, OPTIONS) for greedy in (False, True)]
    return [*draws, (_merge_kernel, _MERGE, {"num_warps": 4})]
