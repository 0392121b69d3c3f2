"""FlexAttention backend of span_attention.

Rows and keys are gathered in the depth-first order of plan.py, so that storage which nobody attends to
is never read and the mask of a key is one interval of rows. The block mask comes from the plan's tile lists, not from
a dense mask. On CUDA the call is compiled; on the CPU, FlexAttention's eager path computes it from the mask alone.
A tree that decodes waits for the device, once a step.
Source: FlexAttention (arXiv 2412.05496).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from hermesflow.kernels.span_attention.plan import TileLists, tile_plan
from hermesflow.kernels.span_tree import SpanTree

BLOCK = 128
_compiled = torch.compile(flex_attention)


class _FlexPlan(NamedTuple):
    """Packed row of each sorted row and back, slot of each sorted key, and the mask between them."""

    rows: Tensor
    sorted_rows: Tensor
    slots: Tensor
    mask: BlockMask


def span_attention(q: Tensor, k: Tensor, v: Tensor, tree: SpanTree, *, scale: float | None = None) -> Tensor:
    """hermesflow.kernels.span_attention.span_attention by FlexAttention."""
    if q.shape[0] == 0:
        return torch.zeros_like(q)
    plan = tree.settled().plan("flex", _make_plan)
    query, key, value = (
        tensor.index_select(0, index).transpose(0, 1)[None]
        for tensor, index in ((q, plan.rows), (k, plan.slots), (v, plan.slots))
    )
    attend = _compiled if q.device.type == "cuda" else flex_attention
    out = attend(query, key, value, block_mask=plan.mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1).index_select(0, plan.sorted_rows)


def _make_plan(tree: SpanTree) -> _FlexPlan:
    plan = tile_plan(tree, BLOCK, BLOCK)
    first_row, end_row = plan.first_row, plan.end_row

    def allowed(_batch: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (first_row[key] <= row) & (row < end_row[key])

    full, masked = (_block_indices(plan.tiles_of_block, len(plan.slots) // BLOCK, first) for first in (0, 1))
    mask = BlockMask.from_kv_blocks(
        *masked, *full, BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(plan.num_rows, plan.num_keys)
    )
    rows = plan.rows[: plan.num_rows].long()
    return _FlexPlan(rows, torch.argsort(rows), plan.slots[: plan.num_keys].long(), mask)


def _block_indices(lists: TileLists, num_tiles: int, first: int) -> tuple[Tensor, Tensor]:
    """Number [1, 1, blocks] and indices [1, 1, blocks, tiles] of each block's full (first 0) or masked (1) tiles."""
    begin, end = lists.bounds[first:-1:2, None], lists.bounds[first + 1 :: 2, None]
    column = torch.arange(num_tiles, dtype=torch.int32, device=begin.device)
    entry = (begin + column).clamp(max=len(lists.tiles) - 1)
    indices = torch.where(column < end - begin, lists.tiles[entry.long()], 0)
    return (end - begin)[None, None, :, 0].contiguous(), indices[None, None].contiguous()
