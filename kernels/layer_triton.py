"""Kernels of a transformer layer between its matmuls, for inference: norms, rotary embedding and storage of heads,
activations.

Each kernel reads its input once and writes its result once, computed in fp32. A program takes a token, or some of its
heads. engine/fused_layers.py calls them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "relu2": 2, "silu": 3}
_NO_NORM, _LAYER_NORM, _RMS_NORM = range(3)
_BLOCK = 2048
"""Values that a program handles."""


class _Norm(NamedTuple):
    """A norm as arguments of a kernel."""

    kind: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @classmethod
    def of(cls, module: nn.Module, dtype: torch.dtype) -> _Norm:
        if isinstance(module, nn.Identity):
            return cls(_NO_NORM, None, None, 0.0)
        kind = _RMS_NORM if isinstance(module, nn.RMSNorm) else _LAYER_NORM
        eps = torch.finfo(dtype).eps if module.eps is None else module.eps
        return cls(kind, module.weight, getattr(module, "bias", None), eps)


@triton.jit
def _affine(x, weight_ptr, bias_ptr, offs, inside, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    if HAS_WEIGHT:
        x *= tl.load(weight_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _moments(x, inside, size, eps, KIND: tl.constexpr):
    """Mean and inverse deviation of rows x [N, BLOCK], each [N, 1]."""
    mean = tl.zeros((x.shape[0], 1), tl.float32)
    if KIND == 1:
        mean = (tl.sum(x, 1) / size)[:, None]
    centered = tl.where(inside, x - mean, 0.0)
    return mean, tl.rsqrt(tl.sum(centered * centered, 1) / size + eps)[:, None]


@triton.jit
def _norm_kernel(
    x_ptr, shift_ptr, weight_ptr, bias_ptr, out_ptr, stride_x, size, eps,
    KIND: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)[None, :]
    inside = offs < size
    x = tl.load(x_ptr + row * stride_x + offs, mask=inside, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        x += tl.load(shift_ptr + offs, mask=inside, other=0.0)
    mean, scale = _moments(x, inside, size, eps, KIND)
    x = _affine((x - mean) * scale, weight_ptr, bias_ptr, offs, inside, HAS_WEIGHT, HAS_BIAS)
    tl.store(out_ptr + row * size + offs, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _activated(x, KIND: tl.constexpr):
    if KIND == 0:
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif KIND == 1:  # x (1 + tanh(u)) / 2 = x / (1 + exp(-2u))
        x = x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif KIND == 2:
        x = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    else:
        x = x / (1 + tl.exp(-x))
    return x


@triton.jit
def _activate_block(
    x_ptr, out_ptr, block, SIZE: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):
    """One token's block: activation(x), or with a gate before x activation(gate) * x."""
    offs = block * BLOCK + tl.arange(0, BLOCK)
    inside = offs < SIZE
    x = _activated(tl.load(x_ptr + offs, mask=inside, other=0.0).to(tl.float32), KIND)
    if GATED:
        x *= tl.load(x_ptr + SIZE + offs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _activation_kernel(
    x_ptr, out_ptr, stride_x, SIZE: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    _activate_block(x_ptr + row * stride_x, out_ptr + row * SIZE, tl.program_id(1), SIZE, KIND, GATED, BLOCK)


@triton.jit
def _copy_heads(x_ptr, out_ptr, block, NUM: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    offs = block * BLOCK + tl.arange(0, BLOCK)
    inside = offs < NUM * HEAD_DIM
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=inside).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _channels(
    x_ptr, block, first, NUM: tl.constexpr, HEAD_DIM: tl.constexpr, SIZE: tl.constexpr, BLOCK_H: tl.constexpr
):
    """SIZE channels of a block of heads, [BLOCK_H, next power of 2]: values, places, which are there."""
    BLOCK: tl.constexpr = triton.next_power_of_2(SIZE)
    heads = (block * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    channels = tl.arange(0, BLOCK)[None, :]
    places, inside = heads * HEAD_DIM + first + channels, (heads < NUM) & (channels < SIZE)
    return tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32), places, inside


@triton.jit
def _squares(x, mean, inside):
    centered = tl.where(inside, x - mean, 0.0)
    return tl.sum(centered * centered, 1)[:, None]


@triton.jit
def _rotate_heads(
    x_ptr, out_ptr, cos_ptr, sin_ptr, weight_ptr, bias_ptr, block, eps, NUM: tl.constexpr, HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr, KIND: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, PERIOD: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Norm and rotation of a token's heads: of their first HALF channels with the next HALF; the other channels are
    copied. The norm's weights repeat every PERIOD channels: those of a head, or of all heads where each has its own."""
    REST: tl.constexpr = HEAD_DIM - 2 * HALF
    mean, squares = tl.zeros((BLOCK_H, 1), tl.float32), tl.zeros((BLOCK_H, 1), tl.float32)
    if HALF > 0:
        a, a_places, paired = _channels(x_ptr, block, 0, NUM, HEAD_DIM, HALF, BLOCK_H)
        b, b_places, _ = _channels(x_ptr, block, HALF, NUM, HEAD_DIM, HALF, BLOCK_H)
    if REST > 0:
        rest, rest_places, single = _channels(x_ptr, block, 2 * HALF, NUM, HEAD_DIM, REST, BLOCK_H)
    if KIND == 1:
        if HALF > 0:
            mean += (tl.sum(a, 1) + tl.sum(b, 1))[:, None]
        if REST > 0:
            mean += tl.sum(rest, 1)[:, None]
        mean /= HEAD_DIM
    if KIND > 0:
        if HALF > 0:
            squares += _squares(a, mean, paired) + _squares(b, mean, paired)
        if REST > 0:
            squares += _squares(rest, mean, single)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)
        if HALF > 0:
            a_channels = a_places % PERIOD
            a = _affine((a - mean) * scale, weight_ptr, bias_ptr, a_channels, paired, HAS_WEIGHT, HAS_BIAS)
            b = _affine((b - mean) * scale, weight_ptr, bias_ptr, a_channels + HALF, paired, HAS_WEIGHT, HAS_BIAS)
        if REST > 0:
            channels = rest_places % PERIOD
            rest = _affine((rest - mean) * scale, weight_ptr, bias_ptr, channels, single, HAS_WEIGHT, HAS_BIAS)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if HALF > 0:
        angles = a_places % HEAD_DIM
        cos, sin = tl.load(cos_ptr + angles, mask=paired), tl.load(sin_ptr + angles, mask=paired)
        tl.store(out_ptr + a_places, (a * cos - b * sin).to(dtype), mask=paired)
        tl.store(out_ptr + b_places, (b * cos + a * sin).to(dtype), mask=paired)
    if REST > 0:
        tl.store(out_ptr + rest_places, rest.to(dtype), mask=single)


@triton.jit
def _heads_kernel(
    x_ptr, cos_ptr, sin_ptr, slots_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr, q_ptr, k_ptr, v_ptr,
    mlp_ptr, stride_x, eps, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr, KIND: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, PER_HEAD: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    MLP_SIZE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token's row [q | k | v | up]: along the grid's second axis blocks of q, of k, of v and of up."""
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    Q_END: tl.constexpr = (NUM_HEADS + BLOCK_H - 1) // BLOCK_H
    K_END: tl.constexpr = Q_END + (NUM_KV_HEADS + BLOCK_H - 1) // BLOCK_H
    V_END: tl.constexpr = K_END + (NUM_KV_HEADS * HEAD_DIM + BLOCK - 1) // BLOCK
    KV_WIDTH: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
    x_ptr += token * stride_x
    cos_ptr += token * HALF
    sin_ptr += token * HALF
    slot = token
    if HAS_SLOTS:
        slot = tl.load(slots_ptr + token)
    if block < Q_END:
        _rotate_heads(
            x_ptr, q_ptr + token * (NUM_HEADS * HEAD_DIM), cos_ptr, sin_ptr, q_weight_ptr, q_bias_ptr, block, eps,
            NUM_HEADS, HEAD_DIM, HALF, KIND, HAS_WEIGHT, HAS_BIAS,
            NUM_HEADS * HEAD_DIM if PER_HEAD else HEAD_DIM, BLOCK_H,
        )  # fmt: skip
    elif block < K_END:
        _rotate_heads(
            x_ptr + NUM_HEADS * HEAD_DIM, k_ptr + slot * KV_WIDTH, cos_ptr, sin_ptr, k_weight_ptr, k_bias_ptr,
            block - Q_END, eps, NUM_KV_HEADS, HEAD_DIM, HALF, KIND, HAS_WEIGHT, HAS_BIAS,
            KV_WIDTH if PER_HEAD else HEAD_DIM, BLOCK_H,
        )  # fmt: skip
    elif block < V_END:
        v_of_token = x_ptr + (NUM_HEADS + NUM_KV_HEADS) * HEAD_DIM
        _copy_heads(v_of_token, v_ptr + slot * KV_WIDTH, block - K_END, NUM_KV_HEADS, HEAD_DIM, BLOCK)
    else:
        up = x_ptr + (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
        _activate_block(up, mlp_ptr + token * MLP_SIZE, block - V_END, MLP_SIZE, ACTIVATION, False, BLOCK)


def norm(module: nn.Module, x: Tensor, shift: Tensor | None) -> Tensor:
    """module(x + shift) of an nn.LayerNorm or nn.RMSNorm; x [T, D], shift fp32 [D] -> [T, D] in x's dtype."""
    found, out = _Norm.of(module, x.dtype), torch.empty_like(x)
    if len(x):
        block = triton.next_power_of_2(x.shape[1])
        arguments = (x, shift, found.weight, found.bias, out, x.stride(0), x.shape[1], found.eps)
        flags = (value is not None for value in (shift, found.weight, found.bias))
        _norm_kernel[(len(x),)](*arguments, found.kind, *flags, block, num_warps=min(16, max(1, block // 512)))
    return out


def activation(name: str, x: Tensor, *, gated: bool) -> Tensor:
    """x [T, W] -> activation(x) [T, W]; gated: x [T, 2 W] is [gate | up] -> activation(gate) * up [T, W]."""
    size = x.shape[1] // (2 if gated else 1)
    out = x.new_empty(len(x), size)
    if len(x):
        grid = (len(x), triton.cdiv(size, _BLOCK))
        _activation_kernel[grid](x, out, x.stride(0), size, ACTIVATIONS[name], gated, _BLOCK)
    return out


def heads(
    x: Tensor,
    rotary: tuple[Tensor, Tensor],
    norms: tuple[nn.Module, nn.Module],
    num_heads: int,
    keys: Tensor,
    values: Tensor,
    slots: Tensor | None,
    mlp: tuple[str, int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Norm and rotation of queries and keys; keys and values go into their storage.

    Args:
        x: [T, (H + 2 Hkv) head_dim], or with the MLP's rows after it.
        rotary: cosine and sine fp32 [T, 1, n], contiguous; the heads' first n channels are rotated with the next n.
        norms: of queries and of keys, of one kind and eps, weights [head_dim] or a row a head; nn.Identity for none.
        num_heads: H.
        keys, values: storage [slots, Hkv, head_dim], contiguous.
        slots: int64 [T], where each token is stored; None: token t in slot t.
        mlp: activation and width of further columns of x.
    Returns: queries [T, H, head_dim] in the keys' dtype, and activation(further columns) or None.
    """
    num_kv_heads, head_dim = keys.shape[1:]
    q_norm, k_norm = (_Norm.of(module, x.dtype) for module in norms)
    q = keys.new_empty(len(x), num_heads, head_dim)
    name, mlp_size = mlp or ("gelu", 0)
    activated = x.new_empty(len(x), mlp_size) if mlp else None
    if not len(x):
        return q, activated
    block_h = max(1, _BLOCK // triton.next_power_of_2(head_dim))
    blocks_of_kv = triton.cdiv(num_kv_heads, block_h) + triton.cdiv(num_kv_heads * head_dim, _BLOCK)
    _heads_kernel[(len(x), triton.cdiv(num_heads, block_h) + blocks_of_kv + triton.cdiv(mlp_size, _BLOCK))](
        x,
        *rotary,
        slots,
        q_norm.weight,
        q_norm.bias,
        k_norm.weight,
        k_norm.bias,
        q,
        keys,
        values,
        activated,
        x.stride(0),
        q_norm.eps,
        num_heads,
        num_kv_heads,
        head_dim,
        rotary[0].shape[-1],
        q_norm.kind,
        q_norm.weight is not None,
        q_norm.bias is not None,
        q_norm.weight is not None and q_norm.weight.dim() == 2,
        slots is not None,
        mlp_size,
        ACTIVATIONS[name],
        block_h,
        _BLOCK,
    )
    return q, activated


def _production(kind: int, width: int, num_heads: int, num_kv_heads: int, head_dim: int, half: int, mlp: int) -> list:
    has_bias = kind == _LAYER_NORM
    pointers = dict.fromkeys(("x_ptr", "q_ptr", "k_ptr", "v_ptr", "mlp_ptr", "out_ptr", "weight_ptr"), "*bf16")
    pointers |= {f"{name}_weight_ptr": "*bf16" for name in "qk"} | {"cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    pointers |= dict.fromkeys(("bias_ptr", "q_bias_ptr", "k_bias_ptr"), "*bf16" if has_bias else None)
    pointers |= {"slots_ptr": "*i64", "shift_ptr": "*fp32" if has_bias else None, "stride_x": "i32:16"}
    sizes = {"NUM_HEADS": num_heads, "NUM_KV_HEADS": num_kv_heads, "HEAD_DIM": head_dim, "HALF": half, "KIND": kind}
    sizes |= {
        "HAS_WEIGHT": True,
        "HAS_BIAS": has_bias,
        "PER_HEAD": False,
        "HAS_SLOTS": True,
        "HAS_SHIFT": has_bias,
        "GATED": not has_bias,
    }
    sizes |= {"MLP_SIZE": mlp if has_bias else 0, "ACTIVATION": 1 if has_bias else 3, "SIZE": mlp, "eps": "fp32"}
    sizes |= {"size": "i32:16", "BLOCK_H": _BLOCK // head_dim, "BLOCK": _BLOCK}
    found = []
    for kernel, changed in ((_norm_kernel, {"BLOCK": triton.next_power_of_2(width)}), (_heads_kernel, {})):
        arguments = pointers | sizes | changed
        options = {"num_warps": width // 512 if kernel is _norm_kernel else 4}
        found.append((kernel, {name: arguments[name] for name in kernel.arg_names}, options))
    arguments = pointers | sizes | {"KIND": sizes["ACTIVATION"]}
    found.append((_activation_kernel, {name: arguments[name] for name in _activation_kernel.arg_names}, {}))
    return found


# For .ci/check-triton: Show-o, and a Llama of 8 billion weights.
PRODUCTION = _production(_LAYER_NORM, 2048, 32, 32, 64, 16, 8192) + _production(_RMS_NORM, 4096, 32, 8, 128, 64, 14336)
