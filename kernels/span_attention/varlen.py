"""Backends of span_attention that call a library's attention over ragged batches: FlashAttention and xFormers.

Each span with new tokens is one sequence: its queries are those tokens, its keys those of its ancestors and its own,
gathered together. Full spans go into one call, causal spans into another, whose mask is aligned at the bottom right:
the last new token sees all keys, which is the tree's rule. Spans that are causal in part have no such call. Shared
ancestors are gathered once a span. A tree that decodes waits for the device, once a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hermesflow.kernels.span_tree import SpanTree


class _RaggedBatch(NamedTuple):
    """Spans of one mode: packed rows of their queries, storage slots of their keys, and the lengths of both."""

    causal: bool
    rows: Tensor
    slots: Tensor
    query_lengths: list[int]
    key_lengths: list[int]


def flash_attn(q: Tensor, k: Tensor, v: Tensor, tree: SpanTree, *, scale: float | None = None) -> Tensor:
    """hermesflow.kernels.span_attention.span_attention by flash_attn.flash_attn_varlen_func."""
    from flash_attn import flash_attn_varlen_func

    tree = tree.settled()

    def bounds(lengths: list[int]) -> Tensor:
        return F.pad(torch.tensor(lengths), (1, 0)).cumsum(0, dtype=torch.int32).to(tree.token_ids.device)

    def make_bounds(_: SpanTree) -> list[tuple[Tensor, Tensor, int, int]]:
        return [
            (bounds(batch.query_lengths), bounds(batch.key_lengths), max(batch.query_lengths), max(batch.key_lengths))
            for batch in _batches(tree)
        ]

    def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool, ragged: tuple) -> Tensor:
        return flash_attn_varlen_func(
            query, key, value, *ragged, softmax_scale=scale, causal=causal, deterministic=True
        )

    return _attend_batches(q, k, v, tree, attend, tree.plan("flash_attn", make_bounds))


def xformers(q: Tensor, k: Tensor, v: Tensor, tree: SpanTree, *, scale: float | None = None) -> Tensor:
    """hermesflow.kernels.span_attention.span_attention by xformers.ops.memory_efficient_attention."""
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalFromBottomRightMask, BlockDiagonalMask

    tree = tree.settled()

    def make_masks(_: SpanTree) -> list[Any]:
        masks = {False: BlockDiagonalMask, True: BlockDiagonalCausalFromBottomRightMask}
        return [masks[batch.causal].from_seqlens(batch.query_lengths, batch.key_lengths) for batch in _batches(tree)]

    group = q.shape[1] // k.shape[1]

    def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Any) -> Tensor:
        if group > 1:  # its own grouped layout has no gradient
            key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
        return memory_efficient_attention(query[None], key[None], value[None], attn_bias=mask, scale=scale)[0]

    return _attend_batches(q, k, v, tree, attend, tree.plan("xformers", make_masks))


def _attend_batches(
    q: Tensor, k: Tensor, v: Tensor, tree: SpanTree, attend: Callable[..., Tensor], ragged: list[Any]
) -> Tensor:
    """attend(query, key, value, causal, ragged) for each batch, and the outputs in the packed order."""
    if q.shape[0] == 0:
        return torch.zeros_like(q)
    batches = _batches(tree)
    outs = [
        attend(_gather(q, batch.rows), _gather(k, batch.slots), _gather(v, batch.slots), batch.causal, of_library)
        for batch, of_library in zip(batches, ragged, strict=True)
    ]
    return _gather(torch.cat(outs), torch.argsort(torch.cat([batch.rows for batch in batches])))


def _gather(tensor: Tensor, rows: Tensor) -> Tensor:
    """tensor [N, H, d] at rows; embedding's backward adds up repeated rows in a fixed order."""
    return F.embedding(rows, tensor.flatten(1)).unflatten(1, tensor.shape[1:])


def _batches(tree: SpanTree) -> list[_RaggedBatch]:
    return tree.plan("ragged", _make_batches)


def _make_batches(tree: SpanTree) -> list[_RaggedBatch]:
    device = tree.token_ids.device
    batches = []
    for causal in (False, True):
        spans = np.flatnonzero((tree.num_new > 0) & (tree.full != causal)).tolist()
        if not spans:
            continue
        rows = [np.arange(len(tree.token_ids))[tree.span_rows(span)] for span in spans]
        slots = [_path_slots(tree, span) for span in spans]
        batch_rows, batch_slots = (torch.from_numpy(np.concatenate(parts)).to(device) for parts in (rows, slots))
        batches.append(_RaggedBatch(causal, batch_rows, batch_slots, list(map(len, rows)), list(map(len, slots))))
    return batches


def _path_slots(tree: SpanTree, span: int) -> np.ndarray:
    """Storage slots of a span's ancestors and of the span, root first."""
    path = []
    while span >= 0:
        path.append(np.arange(tree.starts[span], tree.starts[span] + tree.lengths[span]))
        span = int(tree.parents[span])
    return np.concatenate(path[::-1])
