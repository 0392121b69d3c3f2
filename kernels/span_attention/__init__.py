"""Attention over a span tree: every token attends to its span's ancestors and to its own span.

Formula: softmax(q k^T * scale) v over the storage slots that the tree allows (kernels/span_tree.py states the rule).
The torch backend batches spans of equal shape class and calls scaled_dot_product_attention once a class; full spans of
equal shape, and single tokens, pass no mask, so that its flash and cuDNN kernels serve them. Padding exists inside a
class only and never reaches the output.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hermesflow.kernels import registry
from hermesflow.kernels.checks import FLOAT_DTYPES, not_on, not_on_triton_device, wants_gradient
from hermesflow.kernels.span_tree import SpanTree

OP = "span_attention"
_FLASH = "_scaled_dot_product_flash_attention_for_cpu"
_HAS_FLASH = hasattr(torch.ops.aten, _FLASH)
"""Whether torch has this internal op, which gives log-sum-exps on the CPU."""
_NO_MIXED_SPANS = "a span with new tokens is causal in part, needs spans that are causal or full as a whole"


def span_attention(
    q: Tensor, k: Tensor, v: Tensor, tree: SpanTree, *, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """Attention of the tree's new tokens over its storage.

    Args:
        q: queries [Tq, H, head_dim], one a new token, packed in the tree's order; fp32, bf16, fp16 or fp64.
        k, v: storage [slots, Hkv, head_dim] of at least tree.capacity slots, H a multiple of Hkv; dtype and device of
            q. Slots that no token attends to are not read and have gradient 0; of a tree that decodes the backend
            "cpu" reads the whole regions, which must be finite, and gives what lies beyond num_visible the weight 0.
        tree: the SpanTree, on q's device. The first call over a structure plans it, which torch.compile does not trace:
            with fullgraph=True call the op before, with its backward pass (for "torch", tree.groups() will do).
        scale: factor on q k^T; None is head_dim ** -0.5.
        backend: "triton", "cpu", "torch", "flex", "flash_attn" or "xformers"; None takes the first
            that can run. Where a tree decodes, the last three wait for the device, once a step.
    Returns: [Tq, H, head_dim]. Differentiable in q, k and v.
    Raises: ValueError on shapes, dtypes or devices; BackendError if the named backend cannot run.
    Source: attention rule of Show-o (arXiv 2408.12528), section 3.2, restated for shared prefixes.
    """
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"span_attention: expected q [Tq, H, d] and k, v [slots, Hkv, d] with H a multiple of Hkv, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[0] != len(tree.token_ids) or k.shape[0] < tree.capacity:
        raise ValueError(
            f"span_attention: the tree has {len(tree.token_ids)} new tokens and {tree.capacity} slots, "
            f"got {q.shape[0]} queries and {k.shape[0]} keys"
        )
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device == tree.token_ids.device):
        raise ValueError(
            f"span_attention: q, k, v and tree must share dtype and device, got {q.dtype}/{q.device}, "
            f"{k.dtype}/{k.device}, {v.dtype}/{v.device}, tree on {tree.token_ids.device}"
        )
    return registry.dispatch(OP, backend, q, k, v, tree, scale=scale)


def span_attention_reference(q: Tensor, k: Tensor, v: Tensor, tree: SpanTree, *, scale: float | None = None) -> Tensor:
    """The same in plain torch, one batched scaled_dot_product_attention a shape class."""
    num_queries, num_heads, head_dim = q.shape
    pieces, rows = [], []
    for group in tree.groups():
        query = _gather(q, group.query_rows)
        key, value = (_gather(storage, group.key_slots) for storage in (k, v))
        mask = None if group.mask is None else group.mask[:, None]
        out = _attend(query, key, value, mask, scale)
        pieces.append(out.transpose(1, 2).reshape(-1, num_heads * head_dim)[group.batch_rows])
        rows.append(group.packed_rows)
    if not pieces:
        return torch.zeros_like(q)
    order = torch.argsort(torch.cat(rows))
    return torch.cat(pieces)[order].view(num_queries, num_heads, head_dim)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    grouped = key.shape[1] != query.shape[1]
    call = functools.partial(F.scaled_dot_product_attention, query, key, value, mask, scale=scale, enable_gqa=grouped)
    if query.device.type == "cpu" and (query.requires_grad or key.requires_grad or value.requires_grad):
        # The CPU's flash backward is ten times slower than plain products at the lengths of a span.
        with sdpa_kernel(SDPBackend.MATH):
            return call()
    return call()


def _gather(storage: Tensor, rows: Tensor) -> Tensor:
    """storage [S, H, d] at rows [G, L] -> [G, H, L, d]. Embedding's backward is parallel, indexing's is not."""
    flat = F.embedding(rows, storage.flatten(1))
    return flat.view(*rows.shape, *storage.shape[1:]).transpose(1, 2)


def _triton_can_run(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> str | None:
    if q.dtype not in FLOAT_DTYPES or q.shape[2] > 256:
        return f"q is {q.dtype} with head_dim {q.shape[2]}, needs fp32, bf16 or fp16 and a head_dim of at most 256"
    return not_on_triton_device(q, k, v, with_dot=True)


def _cpu_can_run(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> str | None:
    if not _HAS_FLASH:
        return f"torch {torch.__version__} has no aten::{_FLASH}"
    if wants_gradient(q, k, v) and q.dtype not in (torch.float32, torch.float64):
        return f"a gradient is wanted and q is {q.dtype}, needs fp32 or fp64 for it"
    return not_on("cpu", q, k, v)


def _flex_can_run(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> str | None:
    if q.device.type == "cpu":
        return "FlexAttention has no gradient on the CPU" if wants_gradient(q, k, v) else None
    if q.dtype not in FLOAT_DTYPES or q.shape[2] < 16:
        return f"q is {q.dtype} with head_dim {q.shape[2]}, needs fp32, bf16 or fp16 and a head_dim of at least 16"
    return not_on("cuda", q, k, v)


def _flash_attn_can_run(q: Tensor, k: Tensor, v: Tensor, tree: SpanTree, **_: object) -> str | None:
    if tree.has_mixed:
        return _NO_MIXED_SPANS
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[2] > 256:
        return f"q is {q.dtype} with head_dim {q.shape[2]}, needs fp16 or bf16 and a head_dim of at most 256"
    return not_on("cuda", q, k, v)


def _xformers_can_run(q: Tensor, k: Tensor, v: Tensor, tree: SpanTree, **_: object) -> str | None:
    if tree.has_mixed:
        return _NO_MIXED_SPANS
    if q.dtype not in FLOAT_DTYPES or q.shape[2] % 8:
        return f"q is {q.dtype} with head_dim {q.shape[2]}, needs fp32, bf16 or fp16 and a multiple of 8"
    return not_on("cuda", q, k, v)


# On CUDA the order is a guess, not measured: Triton where it is there, else SDPA, whose flash and cuDNN kernels run
# unmasked groups and which needs nothing but torch. The libraries read a shared ancestor once a span, as SDPA does, and
# FlexAttention compiles for minutes.
_HERE = "hermesflow.kernels.span_attention"
registry.register(OP, "triton", f"{_HERE}.span_attention_triton:span_attention", _triton_can_run)
registry.register(OP, "cpu", f"{_HERE}.cascade:span_attention", _cpu_can_run)
registry.register(OP, "torch", f"{_HERE}:span_attention_reference", lambda *_, **__: None)
registry.register(OP, "flex", f"{_HERE}.flex:span_attention", _flex_can_run)
registry.register(OP, "flash_attn", f"{_HERE}.varlen:flash_attn", _flash_attn_can_run)
registry.register(OP, "xformers", f"{_HERE}.varlen:xformers", _xformers_can_run)
