"""Library matmuls: with fp32 results, for the ops whose kernels take up where the matmul ends, and linear layers."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: str | None = None) -> Tensor:
    """x @ weight.T + bias, and GELU of it; in inference mode on the CPU by oneDNN, otherwise by F.linear.

    In inference mode alone, so that the policy and the reference of a training step, which differ in whether gradients
    are wanted, take the same way. There a row's result does not depend on the number of rows, as MKL's does.

    Args:
        x: [T, D].
        weight: [V, D]; dtype and device of x.
        bias: [V] or None.
        gelu: "none" or "tanh", F.gelu's approximations; None is no activation.
    Returns: [T, V]. torch.compile sees F.linear.
    """
    if not _onednn_computes(x, weight):
        x = F.linear(x, weight, bias)
        return x if gelu is None else F.gelu(x, approximate=gelu)
    # oneDNN keeps code for each number of rows that it meets, some 0.3 MB a layer: rows are filled up to few numbers.
    # One row alone would go to a matrix-vector product, which adds up in another order.
    step = min(max(8, 1 << (len(x) - 1).bit_length() >> 5), 64)
    missing = -len(x) % step
    rows = F.pad(x, (0, 0, 0, missing)) if missing else x  # a pad of nothing copies
    attr, algorithm = ("none", "") if gelu is None else ("gelu", gelu)
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, attr, [], algorithm)[: len(x)]


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = a @ b, or out += a @ b, in fp32; a and b may be of lower precision on a GPU."""
    if _takes_onednn(a):
        product = _onednn_product(a, b)
        out.add_(product) if add else out.copy_(product)
    else:
        mixed = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
        torch.addmm(out, a, b, beta=int(add), out=out, **mixed)


def logits_of(x: Tensor, weight: Tensor) -> Tensor:
    """A block of x @ weight.T, fp32."""
    if _takes_onednn(x):
        return _onednn_product(x, weight.t())
    logits = new_block(x, weight, torch.float32)
    multiply(x, weight.t(), logits)
    return logits


def new_block(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for a block's logits or dz; its rows begin at multiples of 128 bytes at least, as matmuls like them."""
    return x.new_empty(len(x), -(-len(weight) // 64) * 64, dtype=dtype)[:, : len(weight)]


def _onednn_computes(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled() or not _takes_onednn(x):
        return False
    if x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and _onednn_has_bf16())


@functools.cache
def _onednn_has_bf16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _takes_onednn(a: Tensor) -> bool:
    # An internal op: where a version of torch has it not, torch.addmm serves.
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return a.device.type == "cpu" and there and a.numel() > 0


def _onednn_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b by the op that torch.compile uses, for torch.mm takes MKL's matmul in fp32, which avoids AVX-512 on AMD.

    One core of a Zen 5, blocks of 2048 rows by 512 to 2048 ids, D 512: 215 to 249 GFLOP/s against 105 to 110.
    """
    product = torch.ops.mkldnn._linear_pointwise
    if a.stride(1) == 1:
        return product(a, b.t(), None, "none", [], "")
    # It copies its first factor to be contiguous, but takes the second as it lies: let dz be that one.
    return product(b.t(), a, None, "none", [], "").t()
