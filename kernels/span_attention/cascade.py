"""CPU backend of span_attention: the keys of a shared ancestor are not copied for the branches below it.

    out = sum_i softmax_i(lse_i) out_i,    one i for the row's own span and one for each shared ancestor

All new tokens below a shared ancestor attend to it in one product; the log-sum-exps of the parts merge them exactly, in
fp32. Equal shapes make one batched call, whose keys are a view of the storage where the spans lie equally far apart
(the candidates of a prompt, the answers of a batch), else are gathered once a span. Where merging would cost more than
copying (a short prompt above long images), an ancestor's keys are gathered together with those of the branch.

The backward pass goes over the same parts: with the merged log-sum-exp and D = sum_d grad_out out, each gives

    P = exp(q k^T scale - lse)    dS = P * (grad_out v^T - D)    grad_q += dS k scale    grad_k += dS^T q scale
    grad_v += P^T grad_out

a few spans at a time, so that P and dS stay in the cache. Where a gradient is wanted the forward pass is the same one.
Source: cascade inference (FlashInfer, arXiv 2501.01005), Hydragen (arXiv 2402.05099).
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hermesflow.kernels.span_attention.plan import row_intervals
from hermesflow.kernels.span_tree import SpanTree

# Merging costs about twice the time of copying as many bytes, and a call as much as copying this many (measured on two
# cores of an AMD EPYC with AVX-512, fp32: image steps of 258 tokens, and steps of the built-in model).
_MERGE_COST, _CALL_COST = 2, 4_000_000
# How a span's tokens see one another; for the keys of ancestors their depth, from 0 on, stands in the place of these.
_WHOLE, _TRIANGLE, _MASKED = -3, -2, -1
# Of P and of dS each; the last-level cache of a small machine holds both.
_GRADIENT_BLOCK_BYTES = 4 << 20
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class _Runs(NamedTuple):
    """G = num_runs times L = length rows: run g begins at first + g * step; where they do not, indices [G * L] tell."""

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

    def add_to(self, storage: Tensor, values: Tensor) -> None:
        """Adds values [G, H, L, d] to their rows of storage [S, H, d]."""
        values = values.transpose(1, 2)
        if self.indices is not None:
            storage.index_add_(0, self.indices, values.flatten(0, 1))
            return
        for run in range(self.num_runs):
            start = self.first + run * self.step
            storage[start : start + self.length] += values[run]

    def begin(self, length: int) -> _Runs:
        """The first length rows of each run."""
        indices = None if self.indices is None else self.indices.view(self.num_runs, -1)[:, :length].flatten()
        return self._replace(length=min(self.length, length), indices=indices)

    def some(self, start: int, stop: int) -> _Runs:
        """Runs [start, stop)."""
        indices = None if self.indices is None else self.indices[start * self.length : stop * self.length]
        return _Runs(stop - start, self.length, self.first + start * self.step, self.step, indices)


class _Part(NamedTuple):
    """One batched call: queries against keys, under a mask [G, 1, L or 1, K] (0 or -inf) or, if causal, the triangle.

    rows are the packed rows of the real queries, a slice where they are one run; picked names them among the flattened
    G * L queries (None: all), padded [G, L] the others (None: none). visible, of spans that decode: packed rows [G],
    and the keys [G] before their own span's, of which num_visible says how many there are.
    """

    queries: _Runs
    keys: _Runs
    causal: bool
    mask: Tensor | None
    rows: Tensor | slice
    picked: Tensor | None
    padded: Tensor | None
    visible: tuple[Tensor, Tensor] | None

    def of_step(self, tree: SpanTree) -> _Part:
        """The same with the keys that there are by now, and a mask [G, 1, 1, K] of what each row sees of them."""
        if self.visible is None:
            return self
        rows, num_before = self.visible
        keys = self.keys
        if tree.most_visible is not None:
            keys = keys.begin(int(num_before.max()) + tree.most_visible)
        is_seen = torch.arange(keys.length) < (num_before + tree.num_visible[rows])[:, None, None, None]
        return self._replace(keys=keys, mask=torch.where(is_seen, 0.0, float("-inf")), visible=None)


def span_attention(q: Tensor, k: Tensor, v: Tensor, tree: SpanTree, *, scale: float | None = None) -> Tensor:
    """hermesflow.kernels.span_attention.span_attention on the CPU.

    Regions of spans that decode are read under a mask, to tree.most_visible or as a whole: what lies there beyond their
    tokens must be finite.
    """
    if not len(tree.token_ids):
        return torch.zeros_like(q)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return _WithGradient.apply(q, k, v, tree.settled(), scale)
    return _forward(q, k, v, tree, scale)[0]


def _parts(q: Tensor, k: Tensor, tree: SpanTree) -> tuple[list[_Part], list[_Part]]:
    """The plan of _make_plan, made once for a tree, with what a decoding step sees, found once for its layers."""
    key_bytes = 2 * k.shape[1] * k.shape[2] * k.element_size()
    row_bytes = _MERGE_COST * 2 * q.shape[1] * q.shape[2] * 4
    key = ("cascade", key_bytes, row_bytes)
    plan = tree.plan(key, functools.partial(_make_plan, key_bytes=key_bytes, row_bytes=row_bytes))
    if tree.num_visible is None:
        return plan
    own, shared = plan
    return tree.plan_step(key, lambda tree: ([part.of_step(tree) for part in own], shared))


def _forward(q: Tensor, k: Tensor, v: Tensor, tree: SpanTree, scale: float | None) -> tuple[Tensor, Tensor]:
    """Output [Tq, H, d] and log-sum-exp [Tq, H]."""
    own, shared = _parts(q, k, tree)
    # The aten op takes channels that lie apart for contiguous ones, without a message.
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    if scale is not None and scale <= 0:
        # It also scales what its triangle has masked with -inf.
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
    dtype = torch.promote_types(q.dtype, torch.float32) if shared else q.dtype
    results = [_attend(q, k, v, part, scale) for part in own]
    if len(own) == 1 and isinstance(own[0].rows, slice):
        out, lse = results[0]
        out = out.to(dtype)
    else:
        out, lse = q.new_empty(q.shape, dtype=dtype), results[0][1].new_empty(q.shape[:2])
        for part, (part_out, part_lse) in zip(own, results, strict=True):
            _put(out, part.rows, part_out.to(dtype))
            _put(lse, part.rows, part_lse)
    for part in shared:
        part_out, part_lse = _attend(q, k, v, part, scale)
        old_out, old_lse = _rows(out, part.rows), _rows(lse, part.rows)
        weight = torch.sigmoid(part_lse - old_lse)[..., None]
        _put(out, part.rows, torch.lerp(old_out, part_out.to(dtype), weight))
        _put(lse, part.rows, torch.logaddexp(old_lse, part_lse))
    return out.to(q.dtype), lse


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tree: SpanTree, scale: float | None) -> Tensor:
        out, lse = _forward(q, k, v, tree, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tree, ctx.scale = tree, q.shape[2] ** -0.5 if scale is None else scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grads = tuple(torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v))
        grad_dot_out = (grad_out * out).sum(2)
        for part in itertools.chain(*_parts(q, k, ctx.tree)):
            block_bytes = part.queries.length * part.keys.length * q.shape[1] * q.element_size()
            step = max(1, _GRADIENT_BLOCK_BYTES // block_bytes)
            for start in range(0, part.queries.num_runs, step):
                stop = min(start + step, part.queries.num_runs)
                _add_gradients(grads, (q, k, v), (grad_out, lse, grad_dot_out), part, start, stop, ctx.scale)
        return *grads, None, None


def _add_gradients(
    grads: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    results: tuple[Tensor, ...],
    part: _Part,
    start: int,
    stop: int,
    scale: float,
) -> None:
    """Adds what the runs [start, stop) of a part give to the gradients of q, k and v.

    Args:
        grads, inputs: q [Tq, H, d], k and v [S, Hkv, d].
        results: gradient of the output [Tq, H, d], log-sum-exp [Tq, H] and grad_out . out [Tq, H].
    """
    queries, keys = part.queries.some(start, stop), part.keys.some(start, stop)
    num_kv_heads = inputs[1].shape[1]
    batch = queries.num_runs * num_kv_heads
    # Heads that share keys lie below one another: [G * Hkv, H / Hkv * L, d].
    query, grad_out = (queries.of(x).reshape(batch, -1, x.shape[2]) for x in (inputs[0], results[0]))
    lse, grad_dot_out = (queries.of(x[:, :, None]).reshape(batch, -1, 1) for x in results[1:])
    key, value = (keys.of(x).reshape(batch, keys.length, -1) for x in inputs[1:])
    whole = (queries.num_runs, num_kv_heads, -1, queries.length, keys.length)

    probs = torch.baddbmm(-lse, query, key.mT, alpha=scale)
    if part.mask is not None:
        probs.view(whole).add_(part.mask[start:stop, :, None])
    probs.exp_()
    if part.causal:
        probs.view(whole).tril_()
    if part.padded is not None:
        probs.view(whole).masked_fill_(part.padded[start:stop, None, None, :, None], 0.0)
    grad_scores = torch.baddbmm(-grad_dot_out, grad_out, value.mT).mul_(probs)

    def heads(values: Tensor, runs: _Runs) -> Tensor:
        return values.view(runs.num_runs, -1, runs.length, values.shape[-1])

    queries.add_to(grads[0], heads(torch.bmm(grad_scores, key).mul_(scale), queries))
    keys.add_to(grads[1], heads(torch.bmm(grad_scores.mT, query).mul_(scale), keys))
    keys.add_to(grads[2], heads(torch.bmm(probs.mT, grad_out), keys))


def _attend(q: Tensor, k: Tensor, v: Tensor, part: _Part, scale: float | None) -> tuple[Tensor, Tensor]:
    """Output [n, H, d] and log-sum-exp [n, H] of the part's rows."""
    query, key, value, mask = part.queries.of(q), part.keys.of(k), part.keys.of(v), part.mask
    if mask is not None:
        mask = mask.to(q.dtype).expand(-1, -1, part.queries.length, -1)
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


def _make_plan(tree: SpanTree, key_bytes: int, row_bytes: int) -> tuple[list[_Part], list[_Part]]:
    """The parts of the rows' own spans, which cover each row once, and those of the shared ancestors."""
    order, first, end = row_intervals(tree)
    levels = tree.ancestor_levels()
    spans, below = np.flatnonzero(tree.num_new), first + tree.num_new
    depth = sum((ancestors >= 0).astype(np.int64) for ancestors in levels) + np.zeros_like(first)
    # A copied ancestor is copied for every branch, and for its children their own keys are then copied too.
    copied = np.zeros_like(first)
    for number, ancestors in enumerate(levels):
        branch = spans[ancestors[spans] >= 0]
        keys = tree.lengths[ancestors[branch]] + (0 if number else tree.lengths[branch])
        copied += np.bincount(ancestors[branch], keys, len(first)).astype(np.int64)
    gain = copied * key_bytes - (end - below) * row_bytes
    inner = np.flatnonzero(end > below)
    # Spans of one depth have no row in common, so one call may hold them.
    calls = _classes(end[inner] - below[inner], tree.lengths[inner], depth[inner])
    shared = [inner[call] for call in calls if gain[inner[call]].sum() > _CALL_COST]
    is_shared = np.isin(np.arange(tree.num_spans), np.concatenate([spans[:0], *shared]))

    chains = [np.where(is_shared[ancestors], -1, ancestors)[spans] for ancestors in reversed(levels)] + [spans]
    num_new, num_keys = tree.num_new[spans], tree.chain_lengths(chains)
    # The only new token of a causal span sees all its tokens.
    whole = tree.full[spans] | (tree.causal[spans] & (num_new == 1))
    kind = np.where(whole, _WHOLE, np.where(tree.causal[spans] & (num_new == num_keys), _TRIANGLE, _MASKED))
    own = [
        _part(tree, order, [level[call] for level in chains], first[spans[call]], num_new[call], int(kind[call[0]]))
        for call in _classes(num_new, num_keys, kind)
    ]
    return own, [_part(tree, order, [call], below[call], (end - below)[call], 0) for call in shared]


def _classes(num_queries: np.ndarray, num_keys: np.ndarray, kind: np.ndarray) -> list[np.ndarray]:
    """Numbers of the entries that share a call. Buckets as the torch backend's keep padding small and calls few."""
    shape_class = np.stack([-(-num_queries // 8), -(-num_keys // 16), kind])
    _, class_of = np.unique(shape_class, axis=1, return_inverse=True)
    return [np.flatnonzero(class_of == number) for number in range(class_of.max(initial=-1) + 1)]


def _part(
    tree: SpanTree, order: np.ndarray, chains: list[np.ndarray], first: np.ndarray, num_queries: np.ndarray, kind: int
) -> _Part:
    """One call: the keys of chains, seen by num_queries rows of order from first on."""
    spans, slots, num_keys = chains[-1], *tree.chain_slots(chains)
    query, key = np.arange(num_queries.max()), np.arange(slots.shape[1])
    real, inside = query < num_queries[:, None], key < num_keys[:, None]
    # Padding repeats the first row, as that of the keys does, so that nothing of another span is read.
    rows = order[first[:, None] + np.where(real, query, 0)]
    num_before = num_keys - tree.lengths[spans]
    mask = visible = None
    if kind == _WHOLE and tree.num_visible is not None:
        visible = torch.from_numpy(rows[:, 0]), torch.from_numpy(num_before)
    elif kind == _MASKED:
        seen = key < (num_keys - num_queries + 1)[:, None, None] + query[:, None]
        seen |= key >= (num_before + np.minimum(tree.num_causal[spans], tree.lengths[spans]))[:, None, None]
        mask = inside[:, None] & seen
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
        None if real.all() else torch.from_numpy(~real),
        visible,
    )


def _runs(indices: np.ndarray) -> _Runs:
    num_runs, length = indices.shape
    first = int(indices[0, 0])
    step = int(indices[1, 0]) - first if num_runs > 1 else length
    regular = step > 0 and (indices == first + step * np.arange(num_runs)[:, None] + np.arange(length)).all()
    return _Runs(num_runs, length, first, step, None if regular else torch.from_numpy(indices.ravel()))
