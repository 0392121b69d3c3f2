"""Triton backends of linear_logprob, forward and backward; formulas and walk are in kernels/linear_logprob_blocked.py.

"chunked": the library's matmul leaves a block of fp32 logits, and one program a row takes it into the row's running
state; backward, one program a row and BLOCK_V ids turns the block into dz.
"triton": the matmul is here too, and the logits stay in registers. Forward: a program takes BLOCK_T rows and a split
of the vocabulary, tile by tile with the running state (Milakov and Gimelshein, "Online normalizer calculation for
softmax", arXiv 1805.02867); the splits' states are merged at the end. Backward: a tile of logits is computed again and
leaves as dz.

Tiles are taken in groups of GROUP_T row blocks, so that programs which run together share rows and ids in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hermesflow.kernels import linear_logprob_blocked as driver

MAX_BLOCK_V = 4096
GROUP_T = 8
# A split of 16 tiles keeps the splits' states small; of a few rows, fewer tiles make programs for all of a GPU's cores.
SPLIT_TILES = 16
NUM_PROGRAMS = 264


@triton.jit
def _add_to_state(z, axis: tl.constexpr, largest, total, weighted):
    """The running state with the logits z along axis: maximum, and the sums of exp(y) and y exp(y), y = z - maximum."""
    new_largest = tl.maximum(largest, tl.max(z, axis))
    # While all is -inf, subtract 0: -inf - -inf is NaN.
    shift = tl.where(new_largest == -float("inf"), 0.0, new_largest)
    y = z - tl.expand_dims(shift, axis)
    mass = tl.exp(y)
    by = largest - shift
    scale = tl.exp(by)
    # What has no mass, y below -104, adds nothing; 0 * -inf would be NaN.
    weighted = scale * (weighted + tl.maximum(by, -1000.0) * total)
    weighted += tl.sum(mass * tl.maximum(y, -1000.0), axis)
    return new_largest, total * scale + tl.sum(mass, axis), weighted


@triton.jit
def _block_kernel(
    logits_ptr, bias_ptr, target_ptr, state_ptr, stride_lt, stride_s, num_ids, first_id,
    HAS_BIAS: tl.constexpr, BLOCK_V: tl.constexpr,
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
        largest, total, weighted = _add_to_state(z, 0, largest, total, weighted)
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
def _tile_order(program, num_blocks_t, num_blocks_v, GROUP_T: tl.constexpr):
    """Block of rows and block of ids of a program: GROUP_T row blocks go through all ids before the next ones."""
    in_group = GROUP_T * num_blocks_v
    first_t = program // in_group * GROUP_T
    size_t = min(num_blocks_t - first_t, GROUP_T)
    return first_t + program % in_group % size_t, program % in_group // size_t


@triton.jit
def _logits_tile(
    x_ptr, weight_ptr, bias_ptr, offs_t, offs_v, stride_xt, stride_wv, stride_wd, num_rows, num_ids, width,
    HAS_BIAS: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """fp32 logits [BLOCK_T, BLOCK_V]. Rows and ids past the end repeat the last one; the caller drops them."""
    offs_d = tl.arange(0, BLOCK_D)
    rows = tl.minimum(offs_t, num_rows - 1).to(tl.int64)
    ids = tl.minimum(offs_v, num_ids - 1).to(tl.int64)
    row_ptrs = x_ptr + rows[:, None] * stride_xt + offs_d[None, :]
    id_ptrs = weight_ptr + ids[None, :] * stride_wv + offs_d[:, None] * stride_wd
    z = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for start in range(0, width, BLOCK_D):
        if EVEN_D:
            x, weight = tl.load(row_ptrs), tl.load(id_ptrs)
        else:
            x = tl.load(row_ptrs, mask=offs_d[None, :] < width - start, other=0.0)
            weight = tl.load(id_ptrs, mask=offs_d[:, None] < width - start, other=0.0)
        z = tl.dot(x, weight, z, input_precision="ieee")
        row_ptrs += BLOCK_D
        id_ptrs += BLOCK_D * stride_wd
    if HAS_BIAS:
        z += tl.load(bias_ptr + ids)[None, :]
    return z


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, target_ptr, states_ptr, stride_xt, stride_wv, stride_wd, stride_split, stride_s,
    num_rows, num_ids, width, num_splits, tiles_per_split,
    HAS_BIAS: tl.constexpr, EVEN_D: tl.constexpr, GROUP_T: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block_t, split = _tile_order(tl.program_id(0), tl.cdiv(num_rows, BLOCK_T), num_splits, GROUP_T)
    offs_t = block_t * BLOCK_T + tl.arange(0, BLOCK_T)
    target = tl.load(target_ptr + offs_t, mask=offs_t < num_rows, other=-1)
    largest = tl.full((BLOCK_T,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    weighted = tl.zeros((BLOCK_T,), tl.float32)
    chosen = tl.full((BLOCK_T,), float("nan"), tl.float32)
    first = split * tiles_per_split
    for tile in range(first, min(first + tiles_per_split, tl.cdiv(num_ids, BLOCK_V))):
        offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        z = _logits_tile(
            x_ptr,
            weight_ptr,
            bias_ptr,
            offs_t,
            offs_v,
            stride_xt,
            stride_wv,
            stride_wd,
            num_rows,
            num_ids,
            width,
            HAS_BIAS,
            EVEN_D,
            BLOCK_T,
            BLOCK_V,
            BLOCK_D,
        )
        z = tl.where(offs_v[None, :] < num_ids, z, -float("inf"))
        here = tl.sum(tl.where(offs_v[None, :] == target[:, None], z, 0.0), 1)
        is_here = (target >= tile * BLOCK_V) & (target < tl.minimum((tile + 1) * BLOCK_V, num_ids))
        chosen = tl.where(is_here, here, chosen)
        largest, total, weighted = _add_to_state(z, 1, largest, total, weighted)
    states_ptr += split.to(tl.int64) * stride_split + offs_t
    inside = offs_t < num_rows
    tl.store(states_ptr, largest, mask=inside)
    tl.store(states_ptr + stride_s, total, mask=inside)
    tl.store(states_ptr + 2 * stride_s, weighted, mask=inside)
    tl.store(states_ptr + 3 * stride_s, chosen, mask=inside)


@triton.jit
def _gradient_kernel(
    x_ptr, weight_ptr, bias_ptr, target_ptr, lse_ptr, grad_ptr, dz_ptr, stride_xt, stride_wv, stride_wd, stride_dt,
    num_rows, num_ids, width, first_id,
    HAS_BIAS: tl.constexpr, EVEN_D: tl.constexpr, GROUP_T: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block_t, block_v = _tile_order(tl.program_id(0), tl.cdiv(num_rows, BLOCK_T), tl.cdiv(num_ids, BLOCK_V), GROUP_T)
    offs_t = block_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_v = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
    z = _logits_tile(
        x_ptr,
        weight_ptr,
        bias_ptr,
        offs_t,
        offs_v,
        stride_xt,
        stride_wv,
        stride_wd,
        num_rows,
        num_ids,
        width,
        HAS_BIAS,
        EVEN_D,
        BLOCK_T,
        BLOCK_V,
        BLOCK_D,
    )
    inside = offs_t < num_rows
    target = tl.load(target_ptr + offs_t, mask=inside, other=0) - first_id
    lse = tl.load(lse_ptr + offs_t, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + offs_t, mask=inside, other=0.0)
    one_hot = tl.where(offs_v[None, :] == target[:, None], 1.0, 0.0)
    dz = grad[:, None] * (one_hot - tl.exp(z - lse[:, None]))
    dz_ptrs = dz_ptr + offs_t.to(tl.int64)[:, None] * stride_dt + offs_v[None, :]
    tl.store(dz_ptrs, dz.to(dz_ptr.dtype.element_ty), mask=inside[:, None] & (offs_v[None, :] < num_ids))


def _block(num_ids: int) -> dict[str, int]:
    block_v = min(MAX_BLOCK_V, triton.next_power_of_2(num_ids))
    return {"BLOCK_V": block_v, "num_warps": 8 if block_v > 1024 else 4}


def _update(logits: Tensor, bias: Tensor | None, target: Tensor, first_id: int, state: Tensor) -> None:
    num_rows, num_ids = logits.shape
    _block_kernel[(num_rows,)](
        logits,
        logits if bias is None else bias,
        target,
        state,
        logits.stride(0),
        state.stride(0),
        num_ids,
        first_id,
        HAS_BIAS=bias is not None,
        **_block(num_ids),
    )


def _epilogue(
    logits: Tensor, bias: Tensor | None, target: Tensor, lse: Tensor, grad_logprob: Tensor, first_id: int, dz: Tensor
) -> None:
    num_rows, num_ids = logits.shape
    options = _block(num_ids)
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


def _tiles(dtype: torch.dtype, width: int) -> dict[str, int]:
    """Tile sizes and the launch. fp32 has no tensor cores to feed: input_precision "ieee" multiplies in plain fp32."""
    low = dtype != torch.float32
    sizes = {"BLOCK_T": 128, "BLOCK_V": 128, "BLOCK_D": 64} if low else {"BLOCK_T": 64, "BLOCK_V": 64, "BLOCK_D": 32}
    return {**sizes, "EVEN_D": width % sizes["BLOCK_D"] == 0, "num_warps": 8, "num_stages": 3}


def _fused_forward(rows: driver.Rows, weight: Tensor, bias: Tensor | None, target: Tensor, state: Tensor) -> None:
    weight = weight.to(rows.dtype)  # the same dtype but in the interpreter, whose tensors lie on the CPU
    num_ids, width = weight.shape
    options = _tiles(rows.dtype, width)
    num_tiles = triton.cdiv(num_ids, options["BLOCK_V"])
    # x is copied where some rows are ignored: two copies, this one and the next, stay within a half of the workspace.
    max_rows = max(1, driver.block_sizes(weight.device, width).pass_rows // 2)
    for block in driver.slices(0, rows.count, max_rows):
        x = rows.block(block)
        blocks_t = triton.cdiv(len(x), options["BLOCK_T"])
        tiles_per_split = min(SPLIT_TILES, max(1, num_tiles * blocks_t // NUM_PROGRAMS))
        num_splits = triton.cdiv(num_tiles, tiles_per_split)
        states = state.new_empty(num_splits, 4, len(x))
        _forward_kernel[(blocks_t * num_splits,)](
            x,
            weight,
            x if bias is None else bias,
            target[block],
            states,
            x.stride(0),
            *weight.stride(),
            states.stride(0),
            states.stride(1),
            len(x),
            num_ids,
            width,
            num_splits,
            tiles_per_split,
            HAS_BIAS=bias is not None,
            GROUP_T=GROUP_T,
            **options,
        )
        split = target[block].clamp(0, num_ids - 1) // (tiles_per_split * options["BLOCK_V"])
        _merge(states, split, state[:, block])


def _merge(states: Tensor, split_of_target: Tensor, state: Tensor) -> None:
    """One state [4, T] of the states [S, 4, T] of all splits."""
    largest, total, weighted, chosen = states.unbind(1)
    state[driver.LARGEST] = largest.amax(0)
    shift = torch.where(state[driver.LARGEST] == float("-inf"), 0.0, state[driver.LARGEST])
    by = largest - shift
    scale = by.exp()
    state[driver.TOTAL] = (total * scale).sum(0)
    state[driver.WEIGHTED] = (scale * (weighted + by.clamp(min=-1000.0) * total)).sum(0)
    state[driver.CHOSEN] = chosen.gather(0, split_of_target[None]).squeeze(0)


def _fused_gradient(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    grad_logprob: Tensor,
    first_id: int,
) -> Tensor:
    (num_rows, width), num_ids = x.shape, len(weight)
    dz = driver.new_block(x, weight, x.dtype)
    options = _tiles(x.dtype, width)
    num_programs = triton.cdiv(num_rows, options["BLOCK_T"]) * triton.cdiv(num_ids, options["BLOCK_V"])
    _gradient_kernel[(num_programs,)](
        x,
        weight,
        x if bias is None else bias,
        target,
        lse,
        grad_logprob,
        dz,
        x.stride(0),
        *weight.stride(),
        dz.stride(0),
        num_rows,
        num_ids,
        width,
        first_id,
        HAS_BIAS=bias is not None,
        GROUP_T=GROUP_T,
        **options,
    )
    return dz


driver.KERNELS["chunked"] = driver.with_epilogues(_update, _epilogue)
driver.KERNELS["triton"] = driver.Kernels(_fused_forward, _fused_gradient)


def chunked(
    x: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None, ignore_index: int, return_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """The "chunked" backend of kernels/linear_logprob.py."""
    return driver.linear_logprob("chunked", x, weight, target, bias, ignore_index, return_entropy)


def fused(
    x: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None, ignore_index: int, return_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """The "triton" backend of kernels/linear_logprob.py."""
    return driver.linear_logprob("triton", x, weight, target, bias, ignore_index, return_entropy)


def _production() -> list[tuple]:
    """D 2048 and Show-o's joint vocabulary of 58498 ids; a block of 4096 ids, and the last one of 1154."""
    vectors = {"bias_ptr": "*fp32", "target_ptr": "*i64", "lse_ptr": "*fp32", "grad_ptr": "*fp32"}
    block = {
        "logits_ptr": "*fp32", **vectors, "state_ptr": "*fp32", "dz_ptr": "*bf16", "stride_lt": "i32:16",
        "stride_dt": "i32:16", "stride_s": "i32", "num_ids": "i32:16", "first_id": "i32:16", "HAS_BIAS": True,
        "BLOCK_V": MAX_BLOCK_V,
    }  # fmt: skip
    tile = {
        "x_ptr": "*bf16", "weight_ptr": "*bf16", **vectors, "dz_ptr": "*bf16", "states_ptr": "*fp32",
        "stride_xt": "i32:16", "stride_wv": "i32:16", "stride_wd": 1, "stride_dt": "i32:16", "stride_split": "i32:16",
        "stride_s": "i32:16", "num_rows": "i32:16", "num_ids": "i32", "width": "i32:16", "num_splits": "i32",
        "tiles_per_split": "i32:16", "first_id": "i32:16", "HAS_BIAS": True, "GROUP_T": GROUP_T,
    }  # fmt: skip
    cases = [
        (_block_kernel, block, {"num_warps": 8}),
        (_block_backward_kernel, block, {"num_warps": 8}),
        (_block_backward_kernel, block | {"num_ids": "i32", "dz_ptr": "*fp32"}, {"num_warps": 8}),
    ]
    for dtype, name in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
        options = _tiles(dtype, 2048)
        launch = {key: options.pop(key) for key in ("num_warps", "num_stages")}
        typed = tile | options | {"x_ptr": name, "weight_ptr": name, "dz_ptr": name}
        cases += [(_forward_kernel, typed, launch), (_gradient_kernel, typed, launch)]
    return [(kernel, {key: arguments[key] for key in kernel.arg_names}, launch) for kernel, arguments, launch in cases]


# For .ci/check-triton.
PRODUCTION = _production()
