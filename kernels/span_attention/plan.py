"""How the tiled backends of span_attention walk a span tree.

Rows (the new tokens) and keys (the storage slots that some row attends to) are sorted depth first: a span's own rows,
then those of its descendants, child by child. The rows that see a key are then one interval: all rows of its span (for
a causal key those from its own row on) and of the descendants, which follow without a gap. So two numbers a key are the
whole mask, spans that share ancestors sit together, and cutting rows and keys into equal blocks and tiles leaves few
pairs of a block and a tile that meet.

A long span's keys begin a tile: what is left over beyond whole tiles comes after all of them, where it shares tiles
with short spans. Rows are cut likewise into two parts, each a plan of its own (row_parts): whole blocks of long spans,
and in smaller blocks the rest. Else an image of 1,026 tokens would straddle a block and a tile more than it fills.
Source: a mask of row intervals a key, FlashMask (arXiv 2410.01359).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hermesflow.kernels.span_tree import SpanTree

LEAST_BLOCK = 16
"""Rows of the smallest block: those of a tensor core's product."""
_LARGEST_REST = 0.25  # of the rows in whole blocks, beyond which rows are not cut into parts: small blocks are slower
_LEAST_ROOM = 1024  # keys of the smallest fixed plan


class SortedTree(NamedTuple):
    """Depth-first order: packed row [R] of each sorted row; slot [K] of each sorted key, its span and its number there,
    seen by the sorted rows [first_row, end_row)."""

    rows: np.ndarray
    slots: np.ndarray
    span: np.ndarray
    position: np.ndarray
    first_row: np.ndarray
    end_row: np.ndarray


class TileLists(NamedTuple):
    """For each block b the tiles that it meets, int32, ascending: tiles[bounds[2 b] : bounds[2 b + 1]] are allowed as
    a whole, tiles[bounds[2 b + 1] : bounds[2 b + 2]] need the mask."""

    bounds: Tensor
    tiles: Tensor


class TilePlan(NamedTuple):
    """A SortedTree cut into blocks of rows and tiles of keys, int32 on the tree's device.

    rows is padded to whole blocks with -1, slots to whole tiles with its last entry (so that nothing is read that
    nobody attends to); no row sees the padding keys, whose intervals are empty. Of a fixed tree slots is padded to a
    power of two and the lists to all pairs of a block and a tile, so that their sizes do not show the structure.
    own_row, own_position: of a tree that decodes, for each key of a row's own span that row and the key's number in the
    span; -1 for the number of any other key.
    """

    num_rows: int
    num_keys: int
    rows: Tensor
    slots: Tensor
    first_row: Tensor
    end_row: Tensor
    tiles_of_block: TileLists
    blocks_of_tile: TileLists
    own_row: Tensor | None = None
    own_position: Tensor | None = None

    def visible(self, num_visible: Tensor) -> TilePlan:
        """The same where the rows' own spans have num_visible [Tq] tokens: nobody sees a key beyond them, and the
        span's first slot is read in its place."""
        if self.num_rows == 0:
            return self
        seen = self.own_position < num_visible.index_select(0, self.own_row)
        slots = torch.where(seen, self.slots, self.slots - self.own_position)
        return self._replace(slots=slots, end_row=torch.where(seen, self.end_row, 0))


def tile_plan(tree: SpanTree, block_rows: int, tile_keys: int) -> TilePlan:
    """The tree's plan for these sizes, computed once a structure, and on the device once a step where it decodes."""
    key, make = ("tiles", block_rows, tile_keys), functools.partial(_cut, block_rows=block_rows, tile_keys=tile_keys)
    plan = tree.plan(key, make)
    return plan if tree.num_visible is None else tree.plan_step(key, lambda step: plan.visible(step.num_visible))


def row_parts(tree: SpanTree, block_rows: int, tile_keys: int) -> list[tuple[int, TilePlan]]:
    """(rows of a block, plan) of each part of the tree's rows: whole blocks of long spans, and the rest in blocks of
    LEAST_BLOCK; or all rows in one plan where the rest is large, the tree is fixed or it decodes."""
    if tree.fixed or tree.num_visible is not None:
        return [(block_rows, tile_plan(tree, block_rows, tile_keys))]
    make = functools.partial(_make_parts, block_rows=block_rows, tile_keys=tile_keys)
    return tree.plan(("parts", block_rows, tile_keys), make)


def _make_parts(tree: SpanTree, block_rows: int, tile_keys: int) -> list[tuple[int, TilePlan]]:
    in_blocks = tree.num_new // block_rows * block_rows
    rest = tree.num_new - in_blocks
    if block_rows <= LEAST_BLOCK or not 0 < rest.sum() <= _LARGEST_REST * in_blocks.sum():
        return [(block_rows, tile_plan(tree, block_rows, tile_keys))]
    order = depth_first(tree)
    bulk, small = (
        _some_rows(tree, order, 0, in_blocks, block_rows),
        _some_rows(tree, order, in_blocks, rest, LEAST_BLOCK),
    )
    return [
        (block_rows, _cut(tree, block_rows, tile_keys, bulk)),
        (LEAST_BLOCK, _cut(tree, LEAST_BLOCK, tile_keys, small)),
    ]


def _some_rows(tree: SpanTree, order: SortedTree, first: np.ndarray | int, count: np.ndarray, block: int) -> SortedTree:
    """Of each span's rows, count [S] from number first on; each span begins a block, and -1 stands between them."""
    span = np.repeat(np.arange(tree.num_spans), tree.num_new)[order.rows]
    number = order.rows - tree.packed_starts[span] - np.broadcast_to(first, count.shape)[span]
    taken = np.flatnonzero((number >= 0) & (number < count[span]))
    begins = number[taken] == 0
    room = -(-count[span[taken[begins]]] // block) * block
    start = np.cumsum(room) - room
    position = start[np.cumsum(begins) - 1] + number[taken]
    rows = np.full(room.sum(), -1)
    rows[position] = order.rows[taken]
    # The place of the first row that is taken, from each sorted row on.
    place = np.append(position, len(rows))[np.searchsorted(taken, np.arange(len(order.rows) + 1))]
    first_row, end_row = place[order.first_row], place[order.end_row]
    seen = first_row < end_row
    return SortedTree(rows, *(x[seen] for x in (order.slots, order.span, order.position, first_row, end_row)))


def row_intervals(tree: SpanTree) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packed row [R] of each sorted row; and of each span the first of its sorted rows, and the end of those that it
    and its descendants have together, [S] each."""
    num_below, num_spans = tree.num_new.copy(), tree.num_spans
    levels = tree.ancestor_levels()
    for ancestors in levels:
        below = ancestors >= 0
        num_below += np.bincount(ancestors[below], tree.num_new[below], num_spans).astype(np.int64)
    by_parent = np.argsort(tree.parents, kind="stable")
    before = np.cumsum(num_below[by_parent]) - num_below[by_parent]
    is_first = np.diff(tree.parents[by_parent], prepend=-2) > 0
    after_siblings = np.empty(num_spans, dtype=np.int64)
    after_siblings[by_parent] = before - before[is_first][np.cumsum(is_first) - 1]
    first = after_siblings.copy()
    for ancestors in levels:
        first += np.where(ancestors >= 0, (after_siblings + tree.num_new)[ancestors], 0)
    rows = np.empty(len(tree.token_ids), dtype=np.int64)
    rows[np.repeat(first, tree.num_new) + _counting(tree.num_new)] = np.arange(len(rows))
    return rows, first, first + num_below


def depth_first(tree: SpanTree) -> SortedTree:
    """Sort the tree's rows and keys."""
    rows, first, end = row_intervals(tree)
    spans = np.flatnonzero(end > first)
    # A span comes before its first child, which has its first row if the span has no new tokens.
    spans = spans[np.lexsort((spans, first[spans]))]
    span, position = np.repeat(spans, tree.lengths[spans]), _counting(tree.lengths[spans])
    num_cached = (tree.lengths - tree.num_new)[span]
    own_row = np.where(position < tree.num_causal[span], np.maximum(position - num_cached, 0), 0)
    return SortedTree(rows, tree.starts[span] + position, span, position, first[span] + own_row, end[span])


def _keys_by_tile(tree: SpanTree, order: SortedTree, tile_keys: int) -> SortedTree:
    """The same keys, whole tiles of long spans first; then what is left over of each tree of the forest, which begins a
    tile where it would straddle two: keys that nobody sees, of empty interval, stand before it."""
    in_tiles = order.position < tree.lengths[order.span] // tile_keys * tile_keys
    by_tile = np.argsort(~in_tiles, kind="stable")
    order = SortedTree(order.rows, *(values[by_tile] for values in order[1:]))
    if tree.fixed or in_tiles.all():
        return order
    rest = np.count_nonzero(in_tiles)
    first = rest + np.flatnonzero(np.diff(tree.roots[order.span[rest:]], prepend=-1))  # of each tree
    shift = np.zeros(len(order.slots), dtype=np.int64)
    end, moved = np.append(first[1:], len(shift)), 0
    for begin, size in zip(first.tolist(), (end - first).tolist(), strict=True):
        room = -(begin + moved) % tile_keys
        moved += room if room < size else 0
        shift[begin] = moved
    place = np.arange(len(shift)) + np.maximum.accumulate(shift)
    source = np.searchsorted(place, np.arange(len(shift) + moved), side="right") - 1
    slots, span, position, first_row, end_row = (values[source] for values in order[1:])
    padding = place[source] != np.arange(len(source))
    return SortedTree(order.rows, slots, span, position, first_row, np.where(padding, first_row, end_row))


def _cut(tree: SpanTree, block_rows: int, tile_keys: int, order: SortedTree | None = None) -> TilePlan:
    order = _keys_by_tile(tree, order or depth_first(tree), tile_keys)
    num_rows, num_keys = len(order.rows), len(order.slots)
    if tree.fixed:
        num_keys = max(_LEAST_ROOM, 1 << (tree.capacity - 1).bit_length())
    num_blocks, num_tiles = -(-num_rows // block_rows), -(-num_keys // tile_keys)

    def padded(values: np.ndarray, size: int) -> np.ndarray:
        return np.pad(values, (0, size - len(values)), mode="edge" if len(values) else "constant")

    decodes = tree.num_visible is not None
    is_own = decodes & (tree.num_new > 0)[order.span]
    own_row = np.where(is_own, tree.packed_starts[order.span], 0)
    own_position = np.where(is_own, order.position, -1)
    slots, own_row, own_position = (
        padded(values, num_tiles * tile_keys) for values in (order.slots, own_row, own_position)
    )
    first_row, end_row = (
        np.pad(values, (0, num_tiles * tile_keys - len(values))) for values in (order.first_row, order.end_row)
    )

    # Every (block, tile) in which a row sees a key; an interval inside its predecessor's in the same tile adds none.
    inside = (first_row[1:] >= first_row[:-1]) & (end_row[1:] <= end_row[:-1])
    kept = np.flatnonzero(~np.insert(inside, 0, False)[: len(first_row)] | (np.arange(len(first_row)) % tile_keys == 0))
    first_block = first_row[kept] // block_rows
    num_met = -(-end_row[kept] // block_rows) - first_block
    block = np.repeat(first_block, num_met) + _counting(num_met)
    tile = np.repeat(kept // tile_keys, num_met)

    last_first = first_row.reshape(-1, tile_keys).max(axis=1)[tile]
    # A key that may be beyond a span's end needs the mask, whoever sees it.
    first_end = np.where(own_position > 0, 0, end_row).reshape(-1, tile_keys).min(axis=1)[tile]
    masked = (last_first > block * block_rows) | (first_end < (block + 1) * block_rows)

    device = tree.token_ids.device

    def to_device(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int32)).to(device)

    def lists(outer: np.ndarray, inner: np.ndarray, num_outer: int, num_inner: int) -> TileLists:
        codes = np.unique((2 * outer + masked) * num_inner + inner)
        bounds = np.searchsorted(codes, np.arange(2 * num_outer + 1) * num_inner)
        unused = num_outer * num_inner - len(codes) if tree.fixed else 0
        return TileLists(to_device(bounds), to_device(np.pad(codes % max(num_inner, 1), (0, unused))))

    return TilePlan(
        num_rows,
        num_keys,
        to_device(np.pad(order.rows, (0, num_blocks * block_rows - num_rows), constant_values=-1)),
        to_device(slots),
        to_device(first_row),
        to_device(end_row),
        lists(block, tile, num_blocks, num_tiles),
        lists(tile, block, num_tiles, num_blocks),
        to_device(own_row) if decodes else None,
        to_device(own_position) if decodes else None,
    )


def _counting(lengths: np.ndarray) -> np.ndarray:
    """Concatenation of range(length) over all lengths."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
