"""Triton backend of linear_logprob, forward and backward; formulas and walk are in kernels/linear_logprob_blocked.py.

The library's matmul leaves a block of fp32 logits, and one program a row takes it into the row's running state (Milakov
and Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867); backward, one program a row and BLOCK_V
ids turns the block into dz.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hermesflow.kernels import linear_logprob_blocked as driver

MAX_BLOCK_V = 4096
MAX_BACKWARD_V = 2048  # more spill with Triton 3.6


@triton.jit
def _add_to_state(z, largest, total, weighted):
    """The running state with more logits z: maximum, and the sums of exp(y) and y exp(y), y = z - maximum."""
    new_largest = tl.maximum(largest, tl.max(z, 0))
    # While all is -inf, subtract 0: -inf - -inf is NaN.
    shift = tl.where(new_largest == -float("inf"), 0.0, new_largest)
    y = z - shift
    mass = tl.exp(y)
    by = largest - shift
    scale = tl.exp(by)
    # What has no mass, y below -104, adds nothing; 0 * -inf would be NaN.
    weighted = scale * (weighted + tl.maximum(by, -1000.0) * total)
    weighted += tl.sum(mass * tl.maximum(y, -1000.0), 0)
    return new_largest, total * scale + tl.sum(mass, 0), weighted


@triton.jit
def _block_kernel(
    logits_ptr, bias_ptr, target_ptr, state_ptr, kept_ptr, tops_ptr, stride_lt, stride_s, stride_kt, stride_pt, num_ids,
    first_id, HAS_BIAS: tl.constexpr, KEEP: tl.constexpr, TILE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_lt
    state_ptr += row
    largest = tl.load(state_ptr)
    total = tl.load(state_ptr + stride_s)
    weighted = tl.load(state_ptr + 2 * stride_s)
    for start in range(0, num_ids, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        inside = offs_v < num_ids
        z = tl.load(logits_ptr + offs_v, mask=inside, other=-float("inf"))
        if HAS_BIAS:
            z += tl.load(bias_ptr + offs_v, mask=inside, other=0.0)
        largest, total, weighted = _add_to_state(z, largest, total, weighted)
        if KEEP:
            tiles = tl.reshape(z, (BLOCK_V // TILE, TILE))
            tops = tl.max(tiles, 1)
            shift = tl.where(tops == -float("inf"), 0.0, tops)
            kept = tl.reshape(tl.exp(tiles - shift[:, None]), (BLOCK_V,))
            tl.store(kept_ptr + row * stride_kt + offs_v, kept.to(kept_ptr.dtype.element_ty), mask=inside)
            offs_p = start // TILE + tl.arange(0, BLOCK_V // TILE)
            tl.store(tops_ptr + row * stride_pt + offs_p, shift, mask=offs_p * TILE < num_ids)
    tl.store(state_ptr, largest)
    tl.store(state_ptr + stride_s, total)
    tl.store(state_ptr + 2 * stride_s, weighted)
    target = tl.load(target_ptr + row) - first_id
    if (target >= 0) & (target < num_ids):
        chosen = tl.load(logits_ptr + target)
        if HAS_BIAS:
            chosen += tl.load(bias_ptr + target)
        tl.store(state_ptr + 3 * stride_s, chosen)


@triton.jit
def _block_backward_kernel(
    logits_ptr, bias_ptr, target_ptr, lse_ptr, grad_ptr, dz_ptr, stride_lt, stride_dt, num_ids, first_id,
    HAS_BIAS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = offs_v < num_ids
    z = tl.load(logits_ptr + row * stride_lt + offs_v, mask=inside, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + offs_v, mask=inside, other=0.0)
    one_hot = tl.where(offs_v == tl.load(target_ptr + row) - first_id, 1.0, 0.0)
    dz = tl.load(grad_ptr + row) * (one_hot - tl.exp(z - tl.load(lse_ptr + row)))
    tl.store(dz_ptr + row * stride_dt + offs_v, dz.to(dz_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _kept_backward_kernel(
    kept_ptr, tops_ptr, target_ptr, lse_ptr, grad_ptr, dz_ptr, stride_kt, stride_pt, stride_dt, num_ids, first_id,
    TILE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_p = tl.program_id(1) * (BLOCK_V // TILE) + tl.arange(0, BLOCK_V // TILE)
    inside = offs_v < num_ids
    kept = tl.load(kept_ptr + row * stride_kt + offs_v, mask=inside, other=0.0).to(tl.float32)
    tops = tl.load(tops_ptr + row * stride_pt + offs_p, mask=offs_p * TILE < num_ids, other=0.0)
    scale = tl.exp(tops - tl.load(lse_ptr + row))
    probability = tl.reshape(tl.reshape(kept, (BLOCK_V // TILE, TILE)) * scale[:, None], (BLOCK_V,))
    one_hot = tl.where(offs_v == tl.load(target_ptr + row) - first_id, 1.0, 0.0)
    dz = tl.load(grad_ptr + row) * (one_hot - probability)
    tl.store(dz_ptr + row * stride_dt + offs_v, dz.to(dz_ptr.dtype.element_ty), mask=inside)


def _block(num_ids: int, most: int = MAX_BLOCK_V) -> dict[str, int]:
    block_v = min(most, max(driver.TILE, triton.next_power_of_2(num_ids)))
    return {"BLOCK_V": block_v, "num_warps": 8 if block_v > 1024 else 4}


def _update(
    logits: Tensor, bias: Tensor | None, target: Tensor, first_id: int, state: Tensor, kept: driver.Kept | None
) -> None:
    num_rows, num_ids = logits.shape
    values, tops = (logits, logits) if kept is None else kept
    _block_kernel[(num_rows,)](
        logits,
        logits if bias is None else bias,
        target,
        state,
        values,
        tops,
        logits.stride(0),
        state.stride(0),
        values.stride(0),
        tops.stride(0),
        num_ids,
        first_id,
        HAS_BIAS=bias is not None,
        KEEP=kept is not None,
        TILE=driver.TILE,
        **_block(num_ids),
    )


def _epilogue(
    logits: Tensor, bias: Tensor | None, target: Tensor, lse: Tensor, grad_logprob: Tensor, first_id: int, dz: Tensor
) -> None:
    num_rows, num_ids = logits.shape
    options = _block(num_ids, MAX_BACKWARD_V)
    _block_backward_kernel[(num_rows, triton.cdiv(num_ids, options["BLOCK_V"]))](
        logits,
        logits if bias is None else bias,
        target,
        lse,
        grad_logprob,
        dz,
        logits.stride(0),
        dz.stride(0),
        num_ids,
        first_id,
        HAS_BIAS=bias is not None,
        **options,
    )


def _kept_gradient(
    kept: driver.Kept,
    target: Tensor,
    lse: Tensor,
    grad_logprob: Tensor,
    first_id: int,
    dz: Tensor,
) -> None:
    num_rows, num_ids = dz.shape
    options = _block(num_ids)
    _kept_backward_kernel[(num_rows, triton.cdiv(num_ids, options["BLOCK_V"]))](
        *kept,
        target,
        lse,
        grad_logprob,
        dz,
        kept.values.stride(0),
        kept.tops.stride(0),
        dz.stride(0),
        num_ids,
        first_id,
        TILE=driver.TILE,
        **options,
    )


driver.KERNELS["triton"] = driver.Kernels(_update, _epilogue, _kept_gradient)


def linear_logprob(
    x: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None, ignore_index: int, return_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """The "triton" backend of kernels/linear_logprob.py."""
    return driver.linear_logprob("triton", x, weight, target, bias, ignore_index, return_entropy)


def _production() -> list[tuple]:
    """Of Show-o's joint vocabulary of 58498 ids a block of 4096, and the last one of 1154."""
    vectors = {"bias_ptr": "*fp32", "target_ptr": "*i64", "lse_ptr": "*fp32", "grad_ptr": "*fp32"}
    block = {
        "logits_ptr": "*fp32", **vectors, "state_ptr": "*fp32", "dz_ptr": "*bf16", "stride_lt": "i32:16",
        "stride_dt": "i32:16", "stride_s": "i32", "num_ids": "i32:16", "first_id": "i32:16", "HAS_BIAS": True,
        "BLOCK_V": MAX_BLOCK_V, "kept_ptr": "*bf16", "tops_ptr": "*fp32", "stride_kt": "i32:16", "stride_pt": "i32",
        "KEEP": True, "TILE": driver.TILE,
    }  # fmt: skip
    cases = [
        (_block_kernel, block),
        (_kept_backward_kernel, block),
        (_block_backward_kernel, block | {"BLOCK_V": MAX_BACKWARD_V}),
        (_block_backward_kernel, block | {"BLOCK_V": MAX_BACKWARD_V, "num_ids": "i32", "dz_ptr": "*fp32"}),
    ]
    return [(kernel, {key: of[key] for key in kernel.arg_names}, {"num_warps": 8}) for kernel, of in cases]


# For .ci/check-triton.
PRODUCTION = _production()
