"""Library matmuls: with fp32 results, for the ops whose kernels take up where the matmul ends, and linear layers."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hermesflow.kernels.checks import wants_gradient

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether torch has this internal op; torch.addmm serves where it has not."""
_LEAST_PRODUCT = 1 << 21
"""Multiplications and additions of a gradient below which a call to oneDNN takes longer than one to MKL."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: str | None = None) -> Tensor:
    """x @ weight.T + bias, and GELU of it; on the CPU by oneDNN where that is the faster, otherwise by F.linear.

    oneDNN computes fp32, also with gradients, and bf16 in inference mode; elsewhere F.linear takes oneDNN for bf16
    itself. In fp32 a row has the same result, bit by bit, with gradients, without them and in inference mode, and it
    does not depend on the number of rows, as MKL's does.

    Args:
        x: [T, D].
        weight: [V, D]; dtype and device of x.
        bias: [V] or None.
        gelu: "none" or "tanh", F.gelu's approximations; None is no activation.
    Returns: [T, V]; on a GPU, where V is odd and no gradient is wanted, rows lie apart. torch.compile sees F.linear.
        Differentiable once.
    """
    if _is_inference_on_gpu(x, weight, bias):
        return _linear_on_gpu(x, weight, bias, gelu)
    if not _onednn_computes(x, weight):
        x = F.linear(x, weight, bias)
        return x if gelu is None else F.gelu(x, approximate=gelu)
    if wants_gradient(x, weight, bias):
        return _Linear.apply(x, weight, bias, gelu)
    return _linear_pointwise(_fill_rows(x), weight, bias, gelu)[: len(x)]


def _is_inference_on_gpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if not x.is_cuda or torch.compiler.is_compiling() or torch.is_autocast_enabled("cuda"):
        return False
    return not wants_gradient(x, weight, bias)


def _linear_on_gpu(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None) -> Tensor:
    if gelu == "tanh" and bias is not None:  # cuBLAS applies it to its sums: one kernel
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    is_odd = len(weight) * weight.itemsize % 16 > 0
    x = _padded_linear(x, weight, bias) if is_odd else F.linear(x, weight, bias)
    return x if gelu is None else F.gelu(x, approximate=gelu)


def _padded_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear whose rows begin at multiples of 128 bytes: of an odd vocabulary every second row of bf16 logits would
    else lie between two numbers of 4 bytes, which keeps matmuls and samplers from wide loads and stores."""
    out = _aligned(x, weight, x.dtype)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        product = _linear_pointwise(_fill_rows(x), weight, bias, None)
        ctx.gelu = gelu
        ctx.save_for_backward(
            x if need_weight else None, weight if need_x else None, None if gelu is None else product[: len(x)]
        )
        # Its input is what GELU's gradient needs, and storing it is cheaper than a second product.
        return (product if gelu is None else _fused_gelu(product, gelu))[: len(x)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, product = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        grad = grad.contiguous()  # a sum's gradient is one number, all strides 0
        if ctx.gelu is not None:
            grad = torch.ops.aten.gelu_backward(grad, product, approximate=ctx.gelu)
        grad_x = _input_gradient(grad, weight) if need_x else None
        grad_weight = _weight_gradient(grad, x) if need_weight else None
        return grad_x, grad_weight, grad.sum(0) if need_bias else None, None


def _input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    if grad.numel() * weight.shape[1] < _LEAST_PRODUCT:
        return grad @ weight
    return _onednn_product(_fill_rows(grad), weight)[: len(grad)]


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    if grad.numel() * x.shape[1] < _LEAST_PRODUCT:
        return grad.t() @ x
    # oneDNN lays out its first factor anew, here grad or x; after x the result lies across and is laid out anew too.
    copies_grad = grad.numel() < x.numel() + grad.shape[1] * x.shape[1]
    grad, x = _fill_rows(grad), _fill_rows(x)
    if copies_grad:
        return _linear_pointwise(grad.t(), x.t(), None, None)
    return _linear_pointwise(x.t(), grad.t(), None, None).t()


def _fill_rows(x: Tensor) -> Tensor:
    """x with rows of zeros after it, so that oneDNN meets few numbers of rows: it keeps code for each, some 0.3 MB a
    layer. One row alone would go to a matrix-vector product, which adds up in another order."""
    step = min(max(8, 1 << (len(x) - 1).bit_length() >> 5), 64)
    missing = -len(x) % step
    return F.pad(x, (0, 0, 0, missing)) if missing else x  # a pad of nothing copies


def _linear_pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None) -> Tensor:
    attr, algorithm = ("none", "") if gelu is None else ("gelu", gelu)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, attr, [], algorithm)


def _fused_gelu(x: Tensor, gelu: str) -> Tensor:
    """GELU of x, bit by bit as _linear_pointwise fuses it, which F.gelu is not: that of a product with a unit matrix.

    [885, 2048] fp32 on one core of a Zen 5: 1.2 ms with "tanh", where F.gelu takes 2.1.
    """
    unit = torch.eye(math.gcd(x.numel(), 16), dtype=x.dtype)
    return _linear_pointwise(x.view(-1, len(unit)), unit, None, gelu).view(x.shape)


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
    """Memory for a block's logits or dz. On a GPU its rows begin at multiples of 128 bytes at least, as matmuls like
    them; on a CPU they follow one another: oneDNN takes a hundred times as long where they do not."""
    return x.new_empty(len(x), len(weight), dtype=dtype) if x.device.type == "cpu" else _aligned(x, weight, dtype)


def _aligned(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(len(x), -(-len(weight) // 64) * 64, dtype=dtype)[:, : len(weight)]


def _onednn_computes(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or not _takes_onednn(x):
        return False
    if x.dtype == torch.bfloat16:
        there = torch.is_inference_mode_enabled() and _onednn_has_bf16()
    else:
        there = x.dtype == torch.float32
    return there and x.dtype == weight.dtype


@functools.cache
def _onednn_has_bf16() -> bool:
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # internal too
    return supported is not None and supported()


def _takes_onednn(a: Tensor) -> bool:
    return a.device.type == "cpu" and _HAS_ONEDNN and a.numel() > 0


def _onednn_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b by the op that torch.compile uses, for torch.mm takes MKL's matmul in fp32, which avoids AVX-512 on AMD.

    One core of a Zen 5, blocks of 2048 rows by 512 to 2048 ids, D 512: 215 to 249 GFLOP/s against 105 to 110.
    """
    if a.stride(1) == 1:
        return _linear_pointwise(a, b.t(), None, None)
    # It copies its first factor to be contiguous, but takes the second as it lies: let dz be that one.
    return _linear_pointwise(b.t(), a, None, None).t()
