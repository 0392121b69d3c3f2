"""Triton backend of span_attention, forward and backward, over the tiles of plan.py.

    s = scale q k^T       p = exp(s - lse)       out = p v
    delta = sum(d_out * out)    ds = p * (d_out v^T - delta)
    dq = scale ds k       dk = scale ds^T q      dv = p^T d_out

Forward and dq: a program takes a block of sorted rows of one head and walks the tiles of keys that meet it, those that
are allowed as a whole first, without a mask. dk, dv: a program takes a tile of keys of one key/value head and walks the
blocks of rows that meet it, for each query head of the group. Each result has one writer, so results repeat to the last
bit. Kept for the backward pass: out and lse (fp32 [H, R], base 2, in the order of sorted rows). Softmax, sums and delta
are fp32; products take the inputs' dtype, fp32 without TF32.
Source: FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from hermesflow.kernels.span_attention.plan import TilePlan, tile_plan
from hermesflow.kernels.span_tree import SpanTree

LOG2_E = math.log2(math.e)


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
def _store_rows(ptr, index, stride, values, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + index.to(tl.int64)[:, None] * stride + offs_d[None, :]
    tl.store(ptrs, values.to(ptr.dtype.element_ty), mask=inside[:, None] & (offs_d < HEAD_DIM)[None, :])


@triton.jit
def _attend(
    acc, row_max, row_sum, q, offs_m, k_ptr, v_ptr, slots_ptr, first_row_ptr, end_row_ptr, tiles_ptr, begin, end,
    stride_kt, stride_vt, scale_log2, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Online softmax over the tiles tiles[begin:end]."""
    for entry in range(begin, end):
        offs_n = tl.load(tiles_ptr + entry) * BLOCK_N + tl.arange(0, BLOCK_N)
        slots = tl.load(slots_ptr + offs_n)
        k = _load_rows(k_ptr, slots, stride_kt, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        if MASKED:
            first_row, end_row = tl.load(first_row_ptr + offs_n), tl.load(end_row_ptr + offs_n)
            allowed = (offs_m[:, None] >= first_row[None, :]) & (offs_m[:, None] < end_row[None, :])
            scores = tl.where(allowed, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        shift = new_max
        if MASKED:
            # While a row has seen no key, subtract 0: -inf - -inf is NaN.
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(row_max - shift)
        row_sum = row_sum * decay + tl.sum(p, 1)
        v = _load_rows(v_ptr, slots, stride_vt, HEAD_DIM, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, rows_ptr, slots_ptr, first_row_ptr, end_row_ptr, bounds_ptr, tiles_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh, num_rows, group,
    scale_log2, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.load(rows_ptr + offs_m)
    q = _load_rows(q_ptr + head * stride_qh, rows, stride_qt, HEAD_DIM, BLOCK_D)
    k_ptr += head // group * stride_kh
    v_ptr += head // group * stride_vh
    begin, middle = tl.load(bounds_ptr + 2 * block), tl.load(bounds_ptr + 2 * block + 1)
    end = tl.load(bounds_ptr + 2 * block + 2)

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
    inside = offs_m < num_rows
    row_sum = tl.where(inside, row_sum, 1.0)  # padding rows have seen no key
    _store_rows(out_ptr + head * stride_oh, rows, stride_ot, acc / row_sum[:, None], inside, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + head * num_rows + offs_m, row_max + tl.log2(row_sum), mask=inside)


@triton.jit
def _add_dq(
    dq, q, d_out, lse, delta, offs_m, k_ptr, v_ptr, slots_ptr, first_row_ptr, end_row_ptr, tiles_ptr, begin, end,
    stride_kt, stride_vt, scale_log2, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    for entry in range(begin, end):
        offs_n = tl.load(tiles_ptr + entry) * BLOCK_N + tl.arange(0, BLOCK_N)
        slots = tl.load(slots_ptr + offs_n)
        k = _load_rows(k_ptr, slots, stride_kt, HEAD_DIM, BLOCK_D)
        v = _load_rows(v_ptr, slots, stride_vt, HEAD_DIM, BLOCK_D)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse[:, None])
        if MASKED:
            first_row, end_row = tl.load(first_row_ptr + offs_n), tl.load(end_row_ptr + offs_n)
            allowed = (offs_m[:, None] >= first_row[None, :]) & (offs_m[:, None] < end_row[None, :])
            p = tl.where(allowed, p, 0.0)
        ds = p * (tl.dot(d_out, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
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
    inside = offs_m < num_rows
    rows = tl.load(rows_ptr + offs_m)
    q = _load_rows(q_ptr + head * stride_qh, rows, stride_qt, HEAD_DIM, BLOCK_D)
    out = _load_rows(out_ptr + head * stride_oh, rows, stride_ot, HEAD_DIM, BLOCK_D)
    d_out = _load_rows(d_out_ptr + head * stride_gh, rows, stride_gt, HEAD_DIM, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(delta_ptr + head * num_rows + offs_m, delta, mask=inside)
    lse = tl.load(lse_ptr + head * num_rows + offs_m, mask=inside, other=0.0)
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
    for entry in range(begin, end):
        offs_m = tl.load(blocks_ptr + entry) * BLOCK_M + tl.arange(0, BLOCK_M)
        rows = tl.load(rows_ptr + offs_m)
        q = _load_rows(q_ptr, rows, stride_qt, HEAD_DIM, BLOCK_D)
        d_out = _load_rows(d_out_ptr, rows, stride_gt, HEAD_DIM, BLOCK_D)
        if MASKED:
            lse = tl.load(lse_ptr + offs_m, mask=offs_m < num_rows, other=0.0)
            delta = tl.load(delta_ptr + offs_m, mask=offs_m < num_rows, other=0.0)
        else:
            lse, delta = tl.load(lse_ptr + offs_m), tl.load(delta_ptr + offs_m)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 - lse[None, :])
        if MASKED:
            allowed = (offs_m[None, :] >= first_row[:, None]) & (offs_m[None, :] < end_row[:, None])
            p = tl.where(allowed, p, 0.0)
        dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(d_out), input_precision="ieee") - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
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
        """No larger blocks than hold num_rows, which is small in a decoding step."""
        block_rows = 16
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


def _block_d(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _launches(dtype: torch.dtype, head_dim: int, num_rows: int) -> tuple[_Launch, _Launch]:
    """For forward and for both backward kernels."""
    block_d = _block_d(head_dim)
    if dtype == torch.float32:
        # Without tensor cores the products are unrolled, which larger tiles spill.
        sizes = (32, 32, 8, 2) if block_d <= 64 else (32, 16, 8, 2) if block_d <= 128 else (16, 16, 4, 2)
        forward = backward = _Launch(*sizes)
    elif block_d <= 64:
        forward, backward = _Launch(128, 64, 8, 3), _Launch(64, 64, 4, 3)
    elif block_d <= 128:
        forward, backward = _Launch(128, 64, 8, 2), _Launch(64, 32, 4, 2)
    else:
        forward, backward = _Launch(64, 32, 8, 2), _Launch(32, 32, 8, 2)
    return forward.for_rows(num_rows), backward.for_rows(num_rows)


def _head_strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, plan: TilePlan, launch: _Launch
) -> tuple[Tensor, Tensor]:
    num_rows, num_heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(num_heads, num_rows, dtype=torch.float32, device=q.device)
    if num_rows:
        _forward_kernel[(plan.rows.shape[0] // launch.block_rows, num_heads)](
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
            *_head_strides(q, k, v, out),
            num_rows,
            num_heads // k.shape[1],
            scale * LOG2_E,
            **launch.options(head_dim),
        )
    return out, lse


def _launch_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    scale: float,
    plan: TilePlan,
    launch: _Launch,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv; zero in slots that nobody attends to."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    if num_rows:
        delta = torch.empty_like(lse)
        group, scales, options = num_heads // num_kv_heads, (scale, scale * LOG2_E), launch.options(head_dim)
        order = (plan.rows, plan.slots, plan.first_row, plan.end_row)
        _backward_dq_kernel[(plan.rows.shape[0] // launch.block_rows, num_heads)](
            q,
            k,
            v,
            out,
            d_out,
            lse,
            delta,
            dq,
            *order,
            *plan.tiles_of_block,
            *_head_strides(q, k, v, out, d_out, dq),
            num_rows,
            group,
            *scales,
            **options,
        )
        _backward_dk_dv_kernel[(plan.slots.shape[0] // launch.tile_keys, num_kv_heads)](
            q,
            k,
            v,
            d_out,
            lse,
            delta,
            dk,
            dv,
            *order,
            *plan.blocks_of_tile,
            *_head_strides(q, k, v, d_out, dk, dv),
            num_rows,
            group,
            *scales,
            **options,
        )
    return dq, dk, dv


class _SpanAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tree: SpanTree, scale: float) -> Tensor:
        launch, ctx.launch = _launches(q.dtype, q.shape[2], q.shape[0])
        out, lse = _launch_forward(q, k, v, scale, tile_plan(tree, launch.block_rows, launch.tile_keys), launch)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tree, ctx.scale = tree, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        plan = tile_plan(ctx.tree, ctx.launch.block_rows, ctx.launch.tile_keys)
        grads = _launch_backward(*ctx.saved_tensors, _rows_contiguous(d_out), ctx.scale, plan, ctx.launch)
        return *grads, None, None


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def span_attention(q: Tensor, k: Tensor, v: Tensor, tree: SpanTree, *, scale: float | None = None) -> Tensor:
    """hermesflow.kernels.span_attention.span_attention on the GPU."""
    q, k, v = (_rows_contiguous(tensor) for tensor in (q, k, v))
    return _SpanAttention.apply(q, k, v, tree, q.shape[2] ** -0.5 if scale is None else scale)


def _production(head_dim: int, group: int | str) -> list[tuple]:
    forward, backward = _launches(torch.bfloat16, head_dim, 16_384)
    tensors = ("q", "k", "v", "out", "d_out", "dq", "dk", "dv")
    types = {f"{name}_ptr": "*bf16" for name in tensors} | {"lse_ptr": "*fp32", "delta_ptr": "*fp32"}
    types |= {"scale": "fp32", "scale_log2": "fp32", "num_rows": "i32", "group": group}
    found = []
    for kernel, launch in (
        (_forward_kernel, forward),
        (_backward_dq_kernel, backward),
        (_backward_dk_dv_kernel, backward),
    ):
        options = launch.options(head_dim)
        compiler = {name: options.pop(name) for name in ("num_warps", "num_stages")}
        types_of_rest = {name: "i32:16" if name.startswith("stride") else "*i32" for name in kernel.arg_names}
        arguments = {name: (types_of_rest | types | options)[name] for name in kernel.arg_names}
        found.append((kernel, arguments, compiler))
    return found


# For .ci/check-triton: Show-o, and grouped queries at the head size of larger models.
PRODUCTION = [*_production(64, 1), *_production(128, "i32")]
