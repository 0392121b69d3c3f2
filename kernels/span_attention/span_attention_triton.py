"""Triton backend of span_attention, forward and backward, over the tiles of plan.py.

    s = scale q k^T       p = exp(s - lse)       out = p v
    delta = sum(d_out * out)    ds = p * (d_out v^T - delta)
    dq = scale ds k       dk = scale ds^T q      dv = p^T d_out

Forward and dq: a program takes a block of sorted rows of one head and walks the tiles of keys that meet it, those that
are allowed as a whole first, without a mask. Where that makes few programs, as in a decoding step, several share out a
block's tiles, and a second kernel merges their results by their log-sum-exps. dk, dv: a program takes a tile of keys of
one key/value head and walks the blocks of rows that meet it, for each query head of the group. Each result has one
writer, so results repeat to the last bit. Kept for the backward pass: out and lse (fp32 [H, R], base 2). Softmax, sums
and delta are fp32; products take the inputs' dtype, fp32 without TF32.
Source: FlashAttention-2 (arXiv 2307.08691), Flash-Decoding (pytorch.org/blog/flash-decoding).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from hermesflow.kernels.span_attention.plan import LEAST_BLOCK, TilePlan, row_parts, tile_plan
from hermesflow.kernels.span_tree import SpanTree

LOG2_E = math.log2(math.e)
_FULL_GRID, _MOST_SHARES = 264, 32


@triton.jit
def _load_rows(ptr, index, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows index [N] of one head -> [N, BLOCK_D], zero past HEAD_DIM."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + index.to(tl.int64)[:, None] * stride + offs_d[None, :]
    if HEAD_DIM == BLOCK_D:
        rows = tl.load(ptrs)
    else:
        rows = tl.load(ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
    return rows


@triton.jit
def _block_rows(rows_ptr, offs_m):
    """Packed rows of a block's places, and which are rows: -1 is padding, of which row 0 is read in its place."""
    rows = tl.load(rows_ptr + offs_m)
    return tl.maximum(rows, 0), rows >= 0


@triton.jit
def _store_rows(ptr, index, stride, values, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + index.to(tl.int64)[:, None] * stride + offs_d[None, :]
    tl.store(ptrs, values.to(ptr.dtype.element_ty), mask=inside[:, None] & (offs_d < HEAD_DIM)[None, :])


@triton.jit
def _entry(list_ptr, entry, end, index_ptr, BLOCK: tl.constexpr):
    """A tile (or block) of a list, and the slots (or rows) in it; at the list's end tile 0, which nobody uses.

    Loops carry both from turn to turn: Triton prefetches no load whose address is loaded in the same turn.
    """
    tile = tl.load(list_ptr + entry, mask=entry < end, other=0)
    return tile, tl.load(index_ptr + tile * BLOCK + tl.arange(0, BLOCK))


@triton.jit
def _attend(
    acc, row_max, row_sum, q, offs_m, k_ptr, v_ptr, slots_ptr, first_row_ptr, end_row_ptr, tiles_ptr, begin, end,
    stride_kt, stride_vt, scale_log2, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Online softmax over the tiles tiles[begin:end]; scale_log2 is above 0."""
    tile, slots = _entry(tiles_ptr, begin, end, slots_ptr, BLOCK_N)
    for entry in range(begin, end):
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        k = _load_rows(k_ptr, slots, stride_kt, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            first_row, end_row = tl.load(first_row_ptr + offs_n), tl.load(end_row_ptr + offs_n)
            allowed = (offs_m[:, None] >= first_row[None, :]) & (offs_m[:, None] < end_row[None, :])
            scores = tl.where(allowed, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        shift = new_max
        if MASKED:
            # While a row has seen no key, subtract 0: -inf - -inf is NaN.
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(scores * scale_log2 - shift[:, None])
        decay = tl.exp2(row_max - shift)
        row_sum = row_sum * decay + tl.sum(p, 1)
        v = _load_rows(v_ptr, slots, stride_vt, HEAD_DIM, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        row_max = new_max
        tile, slots = _entry(tiles_ptr, entry + 1, end, slots_ptr, BLOCK_N)
    return acc, row_max, row_sum


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, rows_ptr, slots_ptr, first_row_ptr, end_row_ptr, bounds_ptr, tiles_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_os, stride_ot, stride_oh, num_rows, group,
    scale_log2, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out and lse over one share of a block's tiles; shares count along the grid's third axis."""
    block, head, share = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, inside = _block_rows(rows_ptr, offs_m)
    q = _load_rows(q_ptr + head * stride_qh, rows, stride_qt, HEAD_DIM, BLOCK_D)
    k_ptr += head // group * stride_kh
    v_ptr += head // group * stride_vh
    begin, middle = tl.load(bounds_ptr + 2 * block), tl.load(bounds_ptr + 2 * block + 1)
    end = tl.load(bounds_ptr + 2 * block + 2)
    size = tl.cdiv(end - begin, tl.num_programs(2))
    begin += share.to(tl.int32) * size
    end = tl.minimum(begin + size, end)
    begin = tl.minimum(begin, end)
    middle = tl.minimum(tl.maximum(middle, begin), end)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc, row_max, row_sum = _attend(
        acc,
        row_max,
        row_sum,
        q,
        offs_m,
        k_ptr,
        v_ptr,
        slots_ptr,
        first_row_ptr,
        end_row_ptr,
        tiles_ptr,
        begin,
        middle,
        stride_kt,
        stride_vt,
        scale_log2,
        False,
        HEAD_DIM,
        BLOCK_N,
        BLOCK_D,
    )
    acc, row_max, row_sum = _attend(
        acc,
        row_max,
        row_sum,
        q,
        offs_m,
        k_ptr,
        v_ptr,
        slots_ptr,
        first_row_ptr,
        end_row_ptr,
        tiles_ptr,
        middle,
        end,
        stride_kt,
        stride_vt,
        scale_log2,
        True,
        HEAD_DIM,
        BLOCK_N,
        BLOCK_D,
    )
    row_sum = tl.where(row_max == float("-inf"), 1.0, row_sum)  # such a row has seen no key of this share
    out_ptr += share * stride_os + head * stride_oh
    _store_rows(out_ptr, rows, stride_ot, acc / row_sum[:, None], inside, HEAD_DIM, BLOCK_D)
    lse_ptr += (share * tl.num_programs(1) + head) * num_rows
    tl.store(lse_ptr + rows, row_max + tl.log2(row_sum), mask=inside)


@triton.jit
def _merge_kernel(
    parts_ptr, part_lse_ptr, out_ptr, lse_ptr, rows_ptr, stride_ot, stride_oh, num_rows, num_shares,
    HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out and lse of one row and head from those of its shares, fp32 [S, R, H, d] and [S, H, R]."""
    row = tl.load(rows_ptr + tl.program_id(0)).to(tl.int64)
    head, num_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    if row >= 0:
        shares, offs_d = tl.arange(0, BLOCK_S).to(tl.int64), tl.arange(0, BLOCK_D)
        used = shares < num_shares
        lse = tl.load(part_lse_ptr + (shares * num_heads + head) * num_rows + row, mask=used, other=float("-inf"))
        top = tl.max(lse, 0)
        weight = tl.exp2(lse - top)
        total = tl.sum(weight, 0)
        ptrs = parts_ptr + ((shares * num_rows + row) * num_heads + head)[:, None] * HEAD_DIM + offs_d[None, :]
        parts = tl.load(ptrs, mask=used[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
        out = tl.sum(weight[:, None] * parts, 0) / total
        out_ptr += row * stride_ot + head * stride_oh
        tl.store(out_ptr + offs_d, out.to(out_ptr.dtype.element_ty), mask=offs_d < HEAD_DIM)
        tl.store(lse_ptr + head * num_rows + row, top + tl.log2(total))


@triton.jit
def _add_dq(
    dq, q, d_out, lse, delta, offs_m, k_ptr, v_ptr, slots_ptr, first_row_ptr, end_row_ptr, tiles_ptr, begin, end,
    stride_kt, stride_vt, scale_log2, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile, slots = _entry(tiles_ptr, begin, end, slots_ptr, BLOCK_N)
    for entry in range(begin, end):
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        k = _load_rows(k_ptr, slots, stride_kt, HEAD_DIM, BLOCK_D)
        v = _load_rows(v_ptr, slots, stride_vt, HEAD_DIM, BLOCK_D)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse[:, None])
        if MASKED:
            first_row, end_row = tl.load(first_row_ptr + offs_n), tl.load(end_row_ptr + offs_n)
            allowed = (offs_m[:, None] >= first_row[None, :]) & (offs_m[:, None] < end_row[None, :])
            p = tl.where(allowed, p, 0.0)
        ds = p * (tl.dot(d_out, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        tile, slots = _entry(tiles_ptr, entry + 1, end, slots_ptr, BLOCK_N)
    return dq


@triton.jit
def _backward_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, d_out_ptr, lse_ptr, delta_ptr, dq_ptr, rows_ptr, slots_ptr, first_row_ptr,
    end_row_ptr, bounds_ptr, tiles_ptr, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot,
    stride_oh, stride_gt, stride_gh, stride_dqt, stride_dqh, num_rows, group, scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq, and delta [H, R] for the kernel of dk and dv."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, inside = _block_rows(rows_ptr, offs_m)
    q = _load_rows(q_ptr + head * stride_qh, rows, stride_qt, HEAD_DIM, BLOCK_D)
    out = _load_rows(out_ptr + head * stride_oh, rows, stride_ot, HEAD_DIM, BLOCK_D)
    d_out = _load_rows(d_out_ptr + head * stride_gh, rows, stride_gt, HEAD_DIM, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(delta_ptr + head * num_rows + rows, delta, mask=inside)
    lse = tl.load(lse_ptr + head * num_rows + rows)
    k_ptr += head // group * stride_kh
    v_ptr += head // group * stride_vh
    begin, middle = tl.load(bounds_ptr + 2 * block), tl.load(bounds_ptr + 2 * block + 1)
    end = tl.load(bounds_ptr + 2 * block + 2)

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dq = _add_dq(
        dq,
        q,
        d_out,
        lse,
        delta,
        offs_m,
        k_ptr,
        v_ptr,
        slots_ptr,
        first_row_ptr,
        end_row_ptr,
        tiles_ptr,
        begin,
        middle,
        stride_kt,
        stride_vt,
        scale_log2,
        False,
        HEAD_DIM,
        BLOCK_N,
        BLOCK_D,
    )
    dq = _add_dq(
        dq,
        q,
        d_out,
        lse,
        delta,
        offs_m,
        k_ptr,
        v_ptr,
        slots_ptr,
        first_row_ptr,
        end_row_ptr,
        tiles_ptr,
        middle,
        end,
        stride_kt,
        stride_vt,
        scale_log2,
        True,
        HEAD_DIM,
        BLOCK_N,
        BLOCK_D,
    )
    _store_rows(dq_ptr + head * stride_dqh, rows, stride_dqt, dq * scale, inside, HEAD_DIM, BLOCK_D)


@triton.jit
def _add_dk_dv(
    dk, dv, k, v, first_row, end_row, q_ptr, d_out_ptr, lse_ptr, delta_ptr, rows_ptr, blocks_ptr, begin, end,
    stride_qt, stride_gt, num_rows, scale_log2, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    block, rows = _entry(blocks_ptr, begin, end, rows_ptr, BLOCK_M)
    for entry in range(begin, end):
        offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        rows = tl.maximum(rows, 0)  # padding, which no key's interval holds
        q = _load_rows(q_ptr, rows, stride_qt, HEAD_DIM, BLOCK_D)
        d_out = _load_rows(d_out_ptr, rows, stride_gt, HEAD_DIM, BLOCK_D)
        lse, delta = tl.load(lse_ptr + rows), tl.load(delta_ptr + rows)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 - lse[None, :])
        if MASKED:
            allowed = (offs_m[None, :] >= first_row[:, None]) & (offs_m[None, :] < end_row[:, None])
            p = tl.where(allowed, p, 0.0)
        dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(d_out), input_precision="ieee") - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
        block, rows = _entry(blocks_ptr, entry + 1, end, rows_ptr, BLOCK_M)
    return dk, dv


@triton.jit
def _backward_dk_dv_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, rows_ptr, slots_ptr, first_row_ptr,
    end_row_ptr, bounds_ptr, blocks_ptr, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_gt,
    stride_gh, stride_dkt, stride_dkh, stride_dvt, stride_dvh, num_rows, group, scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile, kv_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    slots = tl.load(slots_ptr + offs_n)
    first_row, end_row = tl.load(first_row_ptr + offs_n), tl.load(end_row_ptr + offs_n)
    k = _load_rows(k_ptr + kv_head * stride_kh, slots, stride_kt, HEAD_DIM, BLOCK_D)
    v = _load_rows(v_ptr + kv_head * stride_vh, slots, stride_vt, HEAD_DIM, BLOCK_D)
    begin, middle = tl.load(bounds_ptr + 2 * tile), tl.load(bounds_ptr + 2 * tile + 1)
    end = tl.load(bounds_ptr + 2 * tile + 2)

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for head in range(kv_head * group, kv_head * group + group):
        q_of_head, d_out_of_head = q_ptr + head * stride_qh, d_out_ptr + head * stride_gh
        lse_of_head, delta_of_head = lse_ptr + head * num_rows, delta_ptr + head * num_rows
        dk, dv = _add_dk_dv(
            dk,
            dv,
            k,
            v,
            first_row,
            end_row,
            q_of_head,
            d_out_of_head,
            lse_of_head,
            delta_of_head,
            rows_ptr,
            blocks_ptr,
            begin,
            middle,
            stride_qt,
            stride_gt,
            num_rows,
            scale_log2,
            False,
            HEAD_DIM,
            BLOCK_M,
            BLOCK_D,
        )
        dk, dv = _add_dk_dv(
            dk,
            dv,
            k,
            v,
            first_row,
            end_row,
            q_of_head,
            d_out_of_head,
            lse_of_head,
            delta_of_head,
            rows_ptr,
            blocks_ptr,
            middle,
            end,
            stride_qt,
            stride_gt,
            num_rows,
            scale_log2,
            True,
            HEAD_DIM,
            BLOCK_M,
            BLOCK_D,
        )
    inside = first_row < end_row  # not padding, and within its span's present length
    _store_rows(dk_ptr + kv_head * stride_dkh, slots, stride_dkt, dk * scale, inside, HEAD_DIM, BLOCK_D)
    _store_rows(dv_ptr + kv_head * stride_dvh, slots, stride_dvt, dv, inside, HEAD_DIM, BLOCK_D)


class _Launch(NamedTuple):
    """Sizes of a kernel's blocks and how Triton compiles it."""

    block_rows: int
    tile_keys: int
    num_warps: int
    num_stages: int

    def for_rows(self, num_rows: int) -> _Launch:
        """No larger blocks than hold num_rows."""
        block_rows = LEAST_BLOCK
        while block_rows < self.block_rows and block_rows < num_rows:
            block_rows *= 2
        return self._replace(block_rows=block_rows)

    def options(self, head_dim: int) -> dict[str, int]:
        return {
            "HEAD_DIM": head_dim,
            "BLOCK_M": self.block_rows,
            "BLOCK_N": self.tile_keys,
            "BLOCK_D": _block_d(head_dim),
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


class _Launches(NamedTuple):
    """Of each kernel; those of the backward pass have blocks and tiles of their own."""

    forward: _Launch
    dq: _Launch
    dk_dv: _Launch


def _block_d(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


@functools.cache
def _capability(device: torch.device) -> int:
    """Major number of a GPU's compute capability; the interpreter's CPU stands for Hopper."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def _launches(dtype: torch.dtype, head_dim: int, capability: int) -> _Launches:
    """Before Hopper products take their operands from registers, which the larger blocks spill."""
    block_d = _block_d(head_dim)
    if dtype == torch.float32:
        # Without tensor cores the products are unrolled, which larger tiles spill.
        sizes = (32, 32, 8, 2) if block_d <= 64 else (32, 16, 8, 2) if block_d <= 128 else (16, 16, 4, 2)
        return _Launches(*[_Launch(*sizes)] * 3)
    if capability < 9 and block_d <= 64:
        return _Launches(_Launch(128, 64, 8, 3), _Launch(64, 64, 4, 3), _Launch(32, 64, 8, 3))
    if capability < 9 and block_d <= 128:
        return _Launches(*[_Launch(64, 64, 8, 3)] * 2, _Launch(32, 64, 8, 2))
    if block_d <= 64:
        return _Launches(_Launch(128, 64, 8, 3), _Launch(64, 64, 4, 3), _Launch(64, 128, 8, 3))
    if block_d <= 128:
        return _Launches(
            _Launch(128, 64, 8, 3), _Launch(64, 64, 8, 3), _Launch(32, 64 if capability == 9 else 32, 8, 2)
        )
    return _Launches(_Launch(64, 32, 8, 2), *[_Launch(32, 32, 8, 2)] * 2)


def _fit(tree: SpanTree, launch: _Launch) -> _Launch:
    """Blocks for the tree's rows: small ones where each span has one, whose keys differ from span to span."""
    return launch.for_rows(len(tree.token_ids) if (tree.num_new > 1).any() else LEAST_BLOCK)


def _num_shares(num_programs: int, num_tiles: int) -> int:
    """Into how many shares a block's tiles are cut, so that as many programs run as an H100 takes, two on each SM."""
    return max(1, min(-(-_FULL_GRID // num_programs), num_tiles, _MOST_SHARES))


def _head_strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def _forward(q: Tensor, k: Tensor, v: Tensor, tree: SpanTree, scale: float) -> tuple[Tensor, Tensor]:
    """out [R, H, d] and lse [H, R]."""
    num_rows, num_heads, head_dim = q.shape
    out, lse = torch.empty_like(q), q.new_empty(num_heads, num_rows, dtype=torch.float32)
    if not num_rows:
        return out, lse
    launch = _fit(tree, _launches(q.dtype, head_dim, _capability(q.device)).forward)
    for block_rows, plan in row_parts(tree, launch.block_rows, launch.tile_keys):
        num_blocks = len(plan.rows) // block_rows
        num_shares = _num_shares(num_blocks * num_heads, len(plan.slots) // launch.tile_keys)
        if num_shares == 1:
            _launch_forward(q, k, v, out[None], lse, scale, plan, launch.for_rows(block_rows))
            continue
        parts = q.new_empty(num_shares, *q.shape, dtype=torch.float32)
        part_lse = lse.new_empty(num_shares, *lse.shape)
        _launch_forward(q, k, v, parts, part_lse, scale, plan, launch.for_rows(block_rows))
        sizes = {"BLOCK_S": triton.next_power_of_2(num_shares), "BLOCK_D": _block_d(head_dim), "num_warps": 1}
        arguments = (parts, part_lse, out, lse, plan.rows, *_head_strides(out), num_rows, num_shares, head_dim)
        _merge_kernel[(len(plan.rows), num_heads)](*arguments, **sizes)
    return out, lse


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, plan: TilePlan, launch: _Launch
) -> None:
    """Fills out [S, R, H, d] and lse [S, H, R] in the rows of a plan, S shares of each block's tiles apart."""
    num_heads = q.shape[1]
    _forward_kernel[(len(plan.rows) // launch.block_rows, num_heads, len(out))](
        q,
        k,
        v,
        out,
        lse,
        plan.rows,
        plan.slots,
        plan.first_row,
        plan.end_row,
        *plan.tiles_of_block,
        *_head_strides(q, k, v),
        *out.stride()[:3],
        q.shape[0],
        num_heads // k.shape[1],
        scale * LOG2_E,
        **launch.options(q.shape[2]),
    )


def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, tree: SpanTree, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv; zero in slots that nobody attends to."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    dq, delta = torch.empty_like(q), torch.empty_like(lse)
    dk, dv = (torch.zeros(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    if not num_rows:
        return dq, dk, dv
    _, of_dq, of_dk_dv = (_fit(tree, launch) for launch in _launches(q.dtype, head_dim, _capability(q.device)))
    settings = (num_rows, num_heads // num_kv_heads, scale, scale * LOG2_E)
    for block_rows, plan in row_parts(tree, of_dq.block_rows, of_dq.tile_keys):
        _backward_dq_kernel[(len(plan.rows) // block_rows, num_heads)](
            q,
            k,
            v,
            out,
            d_out,
            lse,
            delta,
            dq,
            plan.rows,
            plan.slots,
            plan.first_row,
            plan.end_row,
            *plan.tiles_of_block,
            *_head_strides(q, k, v, out, d_out, dq),
            *settings,
            **of_dq.for_rows(block_rows).options(head_dim),
        )
    plan = tile_plan(tree, of_dk_dv.block_rows, of_dk_dv.tile_keys)
    _backward_dk_dv_kernel[(len(plan.slots) // of_dk_dv.tile_keys, num_kv_heads)](
        q,
        k,
        v,
        d_out,
        lse,
        delta,
        dk,
        dv,
        plan.rows,
        plan.slots,
        plan.first_row,
        plan.end_row,
        *plan.blocks_of_tile,
        *_head_strides(q, k, v, d_out, dk, dv),
        *settings,
        **of_dk_dv.options(head_dim),
    )
    return dq, dk, dv


class _SpanAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tree: SpanTree, scale: float) -> Tensor:
        out, lse = _forward(q, k, v, tree, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tree, ctx.scale = tree, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        return *_backward(*ctx.saved_tensors, _rows_contiguous(d_out), ctx.tree, ctx.scale), None, None


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def span_attention(q: Tensor, k: Tensor, v: Tensor, tree: SpanTree, *, scale: float | None = None) -> Tensor:
    """hermesflow.kernels.span_attention.span_attention on the GPU."""
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if scale <= 0:  # the kernels take a row's largest score before they scale it
        q, scale = q * (scale and -1), abs(scale) or 1.0
    q, k, v = (_rows_contiguous(tensor) for tensor in (q, k, v))
    return _SpanAttention.apply(q, k, v, tree, scale)


def _production(head_dim: int, group: int | str, capability: int) -> list[tuple]:
    launches = _launches(torch.bfloat16, head_dim, capability)
    tensors = ("q", "k", "v", "out", "d_out", "dq", "dk", "dv")
    types = {f"{name}_ptr": "*bf16" for name in tensors} | {"lse_ptr": "*fp32", "delta_ptr": "*fp32"}
    types |= {"scale": "fp32", "scale_log2": "fp32", "num_rows": "i32", "group": group}
    found = []
    for kernel, launch, of_kernel in (
        (_forward_kernel, launches.forward, {}),
        (_forward_kernel, launches.forward.for_rows(1), {"out_ptr": "*fp32"}),  # decoding, in shares
        (_backward_dq_kernel, launches.dq, {}),
        (_backward_dk_dv_kernel, launches.dk_dv, {}),
    ):
        options = launch.options(head_dim)
        compiler = {name: options.pop(name) for name in ("num_warps", "num_stages")}
        types_of_rest = {name: "i32:16" if name.startswith("stride") else "*i32" for name in kernel.arg_names}
        arguments = {name: (types_of_rest | types | of_kernel | options)[name] for name in kernel.arg_names}
        found.append((kernel, arguments, compiler))
    merge = dict.fromkeys(("parts_ptr", "part_lse_ptr", "lse_ptr"), "*fp32") | {"out_ptr": "*bf16"}
    merge |= {"rows_ptr": "*i32", "stride_ot": "i32:16", "stride_oh": "i32:16", "num_rows": "i32", "num_shares": "i32"}
    merge |= {"HEAD_DIM": head_dim, "BLOCK_S": 8, "BLOCK_D": _block_d(head_dim)}
    return [*found, (_merge_kernel, merge, {"num_warps": 1})]


def production(capability: int) -> list[tuple]:
    """For .ci/check-triton: Show-o, and grouped queries at the head size of larger models."""
    return [*_production(64, 1, capability // 10), *_production(128, "i32", capability // 10)]
