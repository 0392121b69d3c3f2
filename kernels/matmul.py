"""Library matmuls with fp32 results, for the ops whose kernels take up where the matmul ends."""

from __future__ import annotations

import torch
from torch import Tensor


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
