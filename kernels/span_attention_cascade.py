"""CPU backend of span_attention: no key of a shared ancestor is copied for the branches below it.

    out = sum_i softmax_i(lse_i) out_i,    one i for the row's own span and one for each ancestor

Every new token attends to its own span, and all new tokens below one ancestor attend to that ancestor in one product;
the log-sum-exps of the parts merge them exactly. Equal shapes make one batched call, whose keys are a view of the
storage where the spans lie equally far apart (an image's candidates, the answers of a batch), else gathered once a span.
Partial results are merged in fp32. There is no gradient.
Source: cascade inference (FlashInfer, arXiv 2501.01005), Hydragen (arXiv 2402.05099).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .span_attention_plan import row_intervals

if TYPE_CHECKING:
    from hermesflow.engine.span_tree import SpanTree

# How a span's tokens see it; below it, its depth, from 0 on, stands in their place.
_WHOLE, _TRIANGLE, _MASKED = -3, -2, -1
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class _Runs(NamedTuple):
    """num_runs x length storage rows: run g begins at first + g * step; or, where it does not, indices [G * L]."""

    num_runs: int
    length: int
    first: int
    step: int
    indices: Tensor | None

    def of(self, storage: Tensor) -> Tensor:
        """storage [S, H, d] -> [G, H, L, d], a view where the runs are equally spaced."""
        if self.indices is not None:
            runs = storage.index_select(0, self.indices).unflatten(0, (self.num_runs, self.length))
            return runs.transpose(1, 2)
        end = self.first + (self.num_runs - 1) * self.step + self.length
        return storage[self.first : end].unfold(0, self.length, self.step).transpose(2, 3)


class _Part(NamedTuple):
    """One batched call: queries against keys, under a mask [G, 1, L or 1, K] (0 or -inf) or, if causal, the triangle.

    rows are the packed rows of the real queries, a slice where they are one run; picked names them among the flattened
    G * L queries (None: all, in this order). is_own: the rows attend to their own spans, else to an ancestor.
    visible_rows [G]: of spans that decode, where num_visible has how many keys they see.
    """

    queries: _Runs
    keys: _Runs
    causal: bool
    mask: Tensor | None
    rows: Tensor | slice
    picked: Tensor | None
    visible_rows: Tensor | None


def span_attention(q: Tensor, k: Tensor, v: Tensor, tree: SpanTree, *, scale: float | None = None) -> Tensor:
    """hermesflow.kernels.span_attention.span_attention on the CPU."""
    own, shared = tree.plan("cascade", _make_plan)
    if not own:
        return torch.zeros_like(q)
    # The aten op takes channels that lie apart for contiguous ones, without a message.
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    if scale is not None and scale <= 0:
        # It also scales what its triangle has masked with -inf.
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
    dtype = torch.promote_types(q.dtype, torch.float32) if shared else q.dtype
    results = [_attend(q, k, v, part, tree, scale) for part in own]
    if len(own) == 1 and isinstance(own[0].rows, slice):
        out, lse = results[0]
        out = out.to(dtype)
    else:
        out = torch.empty(q.shape, dtype=dtype)
        lse = torch.empty(q.shape[:2], dtype=results[0][1].dtype)
        for part, (part_out, part_lse) in zip(own, results, strict=True):
            _put(out, part.rows, part_out.to(dtype))
            _put(lse, part.rows, part_lse)
    for part in shared:
        part_out, part_lse = _attend(q, k, v, part, tree, scale)
        old_out, old_lse = _rows(out, part.rows), _rows(lse, part.rows)
        weight = torch.sigmoid(part_lse - old_lse)[..., None]
        _put(out, part.rows, torch.lerp(old_out, part_out.to(dtype), weight))
        _put(lse, part.rows, torch.logaddexp(old_lse, part_lse))
    return out.to(q.dtype)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, part: _Part, tree: SpanTree, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Output [n, H, d] and log-sum-exp [n, H] of the part's rows."""
    mask = part.mask
    if part.visible_rows is not None:
        visible = torch.arange(part.keys.length) < tree.num_visible[part.visible_rows][:, None, None, None]
        mask = torch.where(visible, 0.0, float("-inf"))
    if mask is not None:
        mask = mask.to(q.dtype).expand(-1, -1, part.queries.length, -1)
    query, key, value = part.queries.of(q), part.keys.of(k), part.keys.of(v)
    out, lse = _flash(query, key, value, 0.0, part.causal, attn_mask=mask, scale=scale)
    out, lse = out.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)
    return (out, lse) if part.picked is None else (out.index_select(0, part.picked), lse.index_select(0, part.picked))


def _rows(x: Tensor, rows: Tensor | slice) -> Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _put(x: Tensor, rows: Tensor | slice, values: Tensor) -> None:
    if isinstance(rows, slice):
        x[rows] = values
    else:
        x.index_copy_(0, rows, values)


def _make_plan(tree: SpanTree) -> tuple[list[_Part], list[_Part]]:
    """The parts of the rows' own spans, which cover each row once, and those of the ancestors."""
    order, first, end = row_intervals(tree)
    depth = sum((ancestors >= 0).astype(np.int64) for ancestors in tree.ancestor_levels()) + np.zeros_like(first)
    spans, inner = np.flatnonzero(tree.num_new), np.flatnonzero(end - first > tree.num_new)
    new, inner_first = tree.num_new[spans], (first + tree.num_new)[inner]
    # A span's only new token sees all its tokens; where all tokens of a causal span are new, the call has the triangle.
    whole = tree.full[spans] | (tree.causal[spans] & (new == 1))
    kind = np.where(whole, _WHOLE, np.where(tree.causal[spans] & (new == tree.lengths[spans]), _TRIANGLE, _MASKED))
    return (
        _parts(tree, order, spans, first[spans], new, kind),
        # Spans of one depth have no row in common, so one call may hold them.
        _parts(tree, order, inner, inner_first, end[inner] - inner_first, depth[inner]),
    )


def _parts(
    tree: SpanTree, order: np.ndarray, spans: np.ndarray, first: np.ndarray, num_queries: np.ndarray,
    kind: np.ndarray,
) -> list[_Part]:  # fmt: skip
    """Batched calls, each over spans of one kind, whose keys are seen by num_queries rows of order from first on."""
    # Buckets as those of the torch backend keep the padding small and the calls few.
    shape_class = np.stack([-(-num_queries // 8), -(-tree.lengths[spans] // 16), kind])
    _, class_of = np.unique(shape_class, axis=1, return_inverse=True)
    parts = []
    for number in range(class_of.max(initial=-1) + 1):
        members = np.flatnonzero(class_of == number)
        parts.append(_part(tree, order, spans[members], first[members], num_queries[members], int(kind[members[0]])))
    return parts


def _part(
    tree: SpanTree, order: np.ndarray, spans: np.ndarray, first: np.ndarray, num_queries: np.ndarray, kind: int
) -> _Part:
    query, key = np.arange(num_queries.max()), np.arange(tree.lengths[spans].max())
    real, inside = query < num_queries[:, None], key < tree.lengths[spans, None]
    # Padding repeats the first row and the first key of its span, so that nothing of another span is read.
    rows = order[first[:, None] + np.where(real, query, 0)]
    slots = tree.starts[spans, None] + np.where(inside, key, 0)
    mask = visible_rows = None
    if kind == _WHOLE and tree.num_visible is not None:
        visible_rows = torch.from_numpy(rows[:, 0])
    elif kind == _MASKED:
        num_before = (tree.lengths[spans] - num_queries)[:, None] + 1 + query
        mask = inside[:, None] & (
            (key < num_before[:, :, None]) | (key >= tree.num_causal[spans, None])[:, None]
        )
    elif kind != _TRIANGLE and not inside.all():
        mask = inside[:, None]
    own = torch.from_numpy(rows[real])
    contiguous = bool((np.diff(rows[real]) == 1).all())
    return _Part(
        _runs(rows),
        _runs(slots),
        kind == _TRIANGLE,
        None if mask is None else torch.where(torch.from_numpy(mask)[:, None], 0.0, float("-inf")),
        slice(int(own[0]), int(own[-1]) + 1) if contiguous else own,
        None if real.all() else torch.from_numpy(np.flatnonzero(real)),
        visible_rows,
    )


def _runs(indices: np.ndarray) -> _Runs:
    num_runs, length = indices.shape
    first = int(indices[0, 0])
    step = int(indices[1, 0]) - first if num_runs > 1 else length
    regular = step > 0 and (indices == first + step * np.arange(num_runs)[:, None] + np.arange(length)).all()
    return _Runs(num_runs, length, first, step, None if regular else torch.from_numpy(indices.ravel()))
