"""Span trees: packed tokens, each stored and computed once, that attend to their ancestors and to themselves.

A span is a run of tokens with one parent. A token attends to every token of its span's ancestors and, inside its own
span, to all tokens ("full") or to itself and earlier ones ("causal"); if the mode is a number k, to itself and earlier
ones and to all tokens after the first k. The positions of a span continue from its parent's end. Sixteen images branch
from one prompt, ten captions from one image, win and lose from one condition: every batch of this project is a forest
of such trees.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Place(NamedTuple):
    """Where a span's tokens stand, and what computes them; the defaults are those of text.

    stride: how far one token's position is from the next one's; an image whose tokens have one position has 0.
    advance: how far a child's first position is from the span's first one; -1: the span's length.
    first: position of a root's first token.
    framed: (tokens before, tokens after) those that a second expert computes, in models that have one; None: it
        computes none.
    """

    stride: int = 1
    advance: int = -1
    first: int = 0
    framed: tuple[int, int] | None = None


Span = tuple[Sequence[int], int, str | int] | tuple[Sequence[int], int, str | int, Place]
"""(token ids, index of the parent span or -1, "causal", "full" or k), and its place unless it is that of text."""


class ExpertRows(NamedTuple):
    """Which packed rows the second expert computes: those from `split` on without those of `text` int64 [n], and before
    it those of `latent` int64 [m]."""

    split: int
    text: Tensor
    latent: Tensor


_EVERY_TOKEN = np.iinfo(np.int64).max
_OF_TEXT = Place()


class SpanForest:
    """Spans that are gathered one by one for a tree."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.ends: list[int] = []
        """By span, the packed row after its last token."""

    def add(self, ids: Sequence[int], parent: int, mode: str | int, place: Place | None = None) -> int:
        """Appends a span; returns its index. place None is that of text."""
        self.ends.append(self.packed + len(ids))
        self.spans.append((ids, parent, mode, place or _OF_TEXT))
        return len(self.spans) - 1

    @property
    def packed(self) -> int:
        """Tokens so far."""
        return self.ends[-1] if self.ends else 0

    def build(self, device: torch.device | str | None = None) -> SpanTree:
        """The tree of all spans."""
        return SpanTree.build(self.spans, device)


class AttentionGroup(NamedTuple):
    """Query spans of equal shape class that one batched attention call serves.

    query_rows [G, Lq] and key_slots [G, Lk] index the packed new tokens and the key/value storage. Both are padded
    with the span's own first row and slot, so that nothing of another span is read; mask [G, Lq, Lk] is False on
    padding and on what causality forbids, or None where everything is allowed.
    packed_rows [n] and batch_rows [n] pair the real queries: packed row -> row of the flattened [G * Lq].
    num_shared [G] counts the keys of the ancestors, which come first.
    """

    query_rows: Tensor
    key_slots: Tensor
    mask: Tensor | None
    packed_rows: Tensor
    batch_rows: Tensor
    num_shared: Tensor

    def visible(self, num_visible: Tensor) -> AttentionGroup:
        """The same where the rows' own spans have num_visible [Tq] tokens; slots beyond them are not read."""
        last = self.num_shared + num_visible[self.query_rows[:, 0]]
        seen = torch.arange(self.key_slots.shape[1], device=last.device) < last[:, None]
        key_slots = torch.where(seen, self.key_slots, self.key_slots.gather(1, self.num_shared[:, None]))
        return self._replace(key_slots=key_slots, mask=seen[:, None])


@dataclass
class SpanTree:
    """A forest of spans: the new tokens packed span by span, and the structure of all spans, cached ones included.

    token_ids, position_ids: int64 [Tq], the new tokens only (those that are computed now).
    slots: int64 [Tq], the storage slot (row of the key/value storage) of each new token.
    starts, lengths, parents, num_causal, num_new, regions, places: one entry a span, on the host. starts is the storage
    slot of the span's first token, num_causal its k (0: full; its length or more: causal), num_new counts its trailing
    tokens that are new (0: cached), regions the slots it may grow into, places [S, 5] its Place (framed: -1, 0 for
    None).
    num_visible: of a tree that decodes (see decode), int64 [Tq]: how many tokens a row's own span has by now, the row's
    included; the host then takes the span's whole region for its length. None: the host knows all lengths.
    most_visible: a bound on num_visible that the host knows, so that less need be read; None: the regions. How sums are
        rounded depends on it: give one that does not depend on what else is in the batch.
    fixed: whether plans of trees with as many rows, and about the capacity, have tensors of the same sizes, for load_;
        trees made from a fixed one are fixed.
    capacity: storage slots that the tree needs, reserved ones included.
    has_mixed: whether a span with new tokens is neither full nor causal.
    """

    token_ids: Tensor
    position_ids: Tensor
    slots: Tensor
    starts: np.ndarray
    lengths: np.ndarray
    parents: np.ndarray
    num_causal: np.ndarray
    num_new: np.ndarray
    regions: np.ndarray
    places: np.ndarray
    num_visible: Tensor | None = None
    fixed: bool = False
    _plans: dict[Hashable, tuple[Callable[[SpanTree], Any], Any]] = field(default_factory=dict, repr=False)
    most_visible: int | None = None
    _of_step: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)
    capacity: int = field(init=False)
    has_mixed: bool = field(init=False)

    def __post_init__(self) -> None:
        # Plain values, not properties over numpy: torch.compile reads them while it traces.
        self.capacity = int((self.starts + self.regions).max()) if len(self.starts) else 0
        self.has_mixed = bool(((self.num_new > 0) & ~self.full & ~self.causal).any())

    @classmethod
    def build(
        cls,
        spans: Sequence[Span],
        device: torch.device | str | None = None,
        reserve: int | Sequence[int] = 0,
        fixed: bool = False,
    ) -> SpanTree:
        """A tree whose spans are all new, parents before children; reserve adds storage slots to each span."""
        none = np.zeros(0, dtype=np.int64)
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        root = cls(empty, empty, empty, none, none, none, none, none, none, none.reshape(0, 5), fixed=fixed)
        return root.extend(spans, reserve=reserve)

    def extend(
        self, spans: Sequence[Span], reserve: int | Sequence[int] = 0, starts: np.ndarray | None = None
    ) -> SpanTree:
        """The same tree with its spans cached and new ones appended; parents count over all spans.

        reserve adds storage slots to each new span; starts [len(spans)] gives their first slots, which the caller keeps
        free; None places them behind all others.

        Raises:
            ValueError: an empty span, an unknown mode, or a parent that does not come before its child.
        """
        old = self.num_spans
        for index, (ids, parent, mode, *_) in enumerate(spans, start=old):
            known = 0 <= mode <= len(ids) if isinstance(mode, int) else mode in ("causal", "full")
            if not -1 <= parent < index or not known or len(ids) == 0:
                raise ValueError(
                    f"SpanTree: span {index} needs tokens, a parent in [-1, {index}) and mode 'causal', 'full' or a "
                    f"number of its tokens, got {len(ids)} tokens, parent {parent}, mode {mode!r}"
                )
        lengths = np.array([len(span[0]) for span in spans], dtype=np.int64)
        counts = {"causal": _EVERY_TOKEN, "full": 0}
        num_causal = np.array([counts.get(span[2], span[2]) for span in spans], dtype=np.int64)
        regions = lengths + np.asarray(reserve, dtype=np.int64)
        if starts is None:
            starts = self.capacity + np.cumsum(regions) - regions
        flat = np.concatenate([np.asarray(span[0], dtype=np.int64) for span in spans]) if spans else lengths
        places = [span[3] if len(span) == 4 else _OF_TEXT for span in spans]
        rows = [(*place[:3], *(place.framed or (-1, 0))) for place in places]
        return self._assemble(
            torch.from_numpy(flat).to(self.token_ids.device),
            np.concatenate([self.starts, starts]),
            np.concatenate([self.lengths, lengths]),
            np.concatenate([self.parents, np.array([span[1] for span in spans], dtype=np.int64)]),
            np.concatenate([self.num_causal, num_causal]),
            np.concatenate([np.zeros(old, dtype=np.int64), lengths]),
            np.concatenate([self.regions, regions]),
            np.concatenate([self.places, np.array(rows, dtype=np.int64).reshape(-1, 5)]),
        )

    def grow(self, spans: np.ndarray | Sequence[int], token_ids: Tensor) -> SpanTree:
        """One more token on each of the given spans (in ascending order); only those tokens are new.

        Raises:
            ValueError: a span has no reserved slot left, or token_ids is not [len(spans)].
        """
        spans = np.asarray(spans, dtype=np.int64)
        if token_ids.shape != (len(spans),) or (np.diff(spans) <= 0).any():
            raise ValueError(
                f"SpanTree.grow: expected ascending spans and token_ids [{len(spans)}], got {tuple(token_ids.shape)}"
            )
        lengths, num_new = self.lengths.copy(), np.zeros_like(self.num_new)
        lengths[spans] += 1
        num_new[spans] = 1
        if (lengths > self.regions).any():
            raise ValueError("SpanTree.grow: a span is out of reserved slots; build it with a larger reserve")
        return self._assemble(
            token_ids, self.starts, lengths, self.parents, self.num_causal, num_new, self.regions, self.places
        )

    def keep(self, spans: np.ndarray | Sequence[int]) -> SpanTree:
        """Only the given spans (ascending), all of them cached where they are, numbered anew from 0.

        Raises:
            ValueError: spans are not ascending, or the parent of one is not among them.
        """
        spans = np.asarray(spans, dtype=np.int64)
        number = np.full(self.num_spans + 1, -2)  # entry -1 stands for the parent of all roots
        number[-1], number[spans] = -1, np.arange(len(spans))
        parents = number[self.parents[spans]]
        if (np.diff(spans) <= 0).any() or (parents < -1).any():
            raise ValueError("SpanTree.keep: expected ascending spans together with their parents")
        return self._assemble(
            self.token_ids[:0],
            self.starts[spans],
            self.lengths[spans],
            parents,
            self.num_causal[spans],
            np.zeros(len(spans), dtype=np.int64),
            self.regions[spans],
            self.places[spans],
        )

    def only(self, num_new: np.ndarray | Sequence[int], rows: Tensor) -> SpanTree:
        """The same full root spans, of whose tokens some are computed, at their places, and the others are cached.

        Args:
            num_new: of each span, how many.
            rows: int64 [sum of num_new], their packed rows in this tree, all of whose tokens are new; span by span.
        Raises:
            ValueError: a span is not full, a root and new, or rows are of another number.
        """
        num_new = np.asarray(num_new, dtype=np.int64)
        is_new = (self.parents == -1) & self.full & (self.num_new == self.lengths)
        if not is_new.all() or num_new.shape != self.lengths.shape or len(rows) != num_new.sum():
            raise ValueError(
                f"SpanTree.only: expected full root spans, all new, and num_new of each with rows [their sum], got "
                f"{num_new.tolist()} and rows {list(rows.shape)}"
            )
        tree = self._assemble(
            self.token_ids[rows], self.starts, self.lengths, self.parents, self.num_causal, num_new, self.regions,
            self.places,
        )  # fmt: skip
        tree.position_ids, tree.slots = self.position_ids[rows], self.slots[rows]
        return tree

    def decode(self, spans: np.ndarray | Sequence[int], token_ids: Tensor, num_visible: Tensor) -> SpanTree:
        """One more token on each of the given causal spans (ascending), whose lengths the device holds.

        The host takes a span's whole region for its length, so one structure, and one plan of the attention, serves
        every step (with_tokens), and nothing waits for the device.

        Args:
            spans: n leaves.
            token_ids: int64 [n], the new tokens.
            num_visible: int64 [n], tokens of each span including the new one, from 1 to its region.
        Raises:
            ValueError: spans are not ascending, not causal or no leaves, or a tensor is not [n].
        """
        spans = np.asarray(spans, dtype=np.int64)
        shapes = (tuple(token_ids.shape), tuple(num_visible.shape))
        if (np.diff(spans) <= 0).any() or shapes != ((len(spans),),) * 2:
            raise ValueError(
                f"SpanTree.decode: expected ascending spans, token_ids and num_visible [{len(spans)}], got {shapes}"
            )
        if not self.causal[spans].all() or np.isin(spans, self.parents).any():
            raise ValueError("SpanTree.decode: expected causal spans without children")
        lengths, num_new = self.lengths.copy(), np.zeros_like(self.num_new)
        lengths[spans], num_new[spans] = self.regions[spans], 1
        tree = self._assemble(
            token_ids, self.starts, lengths, self.parents, self.num_causal, num_new, self.regions, self.places
        )
        return tree.with_tokens(token_ids, num_visible)

    def settled(self) -> SpanTree:
        """The same where the host knows all lengths; a tree that decodes waits for the device. For what cannot mask."""
        return self if self.num_visible is None else self.plan_step("settled", SpanTree._make_settled)

    def _make_settled(self) -> SpanTree:
        lengths = self.lengths.copy()
        lengths[self.num_new > 0] = self.num_visible.cpu().numpy()
        return self._assemble(
            self.token_ids, self.starts, lengths, self.parents, self.num_causal, self.num_new, self.regions,
            self.places,
        )  # fmt: skip

    def with_tokens(
        self, token_ids: Tensor, num_visible: Tensor | None = None, most_visible: int | None = None
    ) -> SpanTree:
        """The same structure over other token ids [Tq], and in a tree that decodes other lengths; plans are shared.

        Raises:
            ValueError: token_ids is not [Tq].
        """
        if token_ids.shape != self.token_ids.shape:
            raise ValueError(
                f"SpanTree.with_tokens: expected token_ids {list(self.token_ids.shape)}, got {list(token_ids.shape)}"
            )
        position_ids, slots = self.position_ids, self.slots
        if num_visible is None:
            num_visible = self.num_visible
        else:
            position_ids, slots = (before + num_visible for before in self.plan("before", SpanTree._make_before))
        return SpanTree(
            token_ids,
            position_ids,
            slots,
            self.starts,
            self.lengths,
            self.parents,
            self.num_causal,
            self.num_new,
            self.regions,
            self.places,
            num_visible,
            self.fixed,
            self._plans,
            most_visible,
        )

    def _make_before(self) -> tuple[Tensor, Tensor]:
        """Position and slot [Tq] before the first of each row's own span, of which each row is a token."""
        spans = np.flatnonzero(self.num_new)
        before = self.first_positions()[spans] - 1, self.starts[spans] - 1
        return tuple(torch.from_numpy(values).to(self.token_ids.device) for values in before)

    def load_(self, other: SpanTree) -> bool:
        """Take over the structure and the tokens of another tree in this one's tensors, those of its plans included.

        What a captured graph reads of this tree (and of those made by with_tokens) then is the other's. Plans of fixed
        trees fit where the number of rows and the capacity, rounded up to a power of two, agree; other plans where the
        structures have the same shapes.
        Returns: False, and nothing is changed, where anything that the tensors do not hold differs.
        """
        theirs = [other._state(), [other.plan(key, make) for key, (make, _) in self._plans.items()]]
        leaves, new_leaves = [], []
        structure = _structure([self._state(), [value for _, value in self._plans.values()]], leaves)
        if structure != _structure(theirs, new_leaves) or not all(map(_can_hold, leaves, new_leaves)):
            return False
        for leaf, new in zip(leaves, new_leaves, strict=True):
            if isinstance(leaf, Tensor):
                leaf.copy_(new)
        for name in ("starts", "lengths", "parents", "num_causal", "num_new", "regions", "places", "capacity"):
            setattr(self, name, getattr(other, name))
        self._of_step.clear()
        return True

    def _state(self) -> tuple:
        return self.token_ids, self.position_ids, self.slots, self.num_visible, self.fixed, self.has_mixed

    def _assemble(
        self,
        token_ids: Tensor,
        starts: np.ndarray,
        lengths: np.ndarray,
        parents: np.ndarray,
        num_causal: np.ndarray,
        num_new: np.ndarray,
        regions: np.ndarray,
        places: np.ndarray,
    ) -> SpanTree:
        """A tree of these spans, whose new tokens are their last ones."""
        tree = SpanTree(
            token_ids, token_ids, token_ids, starts, lengths, parents, num_causal, num_new, regions, places,
            fixed=self.fixed,
        )  # fmt: skip
        offsets = _ranges(lengths - num_new, num_new)
        of_span = np.repeat(np.arange(len(starts)), num_new)
        positions = tree.first_positions()[of_span] + places[of_span, 0] * offsets
        tree.position_ids = torch.from_numpy(positions).to(token_ids.device)
        tree.slots = torch.from_numpy(starts[of_span] + offsets).to(token_ids.device)
        return tree

    def first_positions(self) -> np.ndarray:
        """Position of each span's first token, int64 [S]."""
        first = self.places[self.roots, 2]
        advances = np.where(self.places[:, 1] < 0, self.lengths, self.places[:, 1])
        for ancestors in self.ancestor_levels():
            first += np.where(ancestors >= 0, advances[ancestors], 0)
        return first

    def expert_rows(self) -> ExpertRows | None:
        """What a second expert computes; None: nothing. Most is done where spans with such tokens come last."""
        return self.plan("experts", SpanTree._make_expert_rows)

    def _make_expert_rows(self) -> ExpertRows | None:
        spans = np.flatnonzero(self.num_new)
        before, after = self.places[spans, 3], self.places[spans, 4]
        if (before < 0).all():
            return None
        lengths, num_new = self.lengths[spans], self.num_new[spans]
        offsets = _ranges(lengths - num_new, num_new)
        before, after, lengths = (np.repeat(values, num_new) for values in (before, after, lengths))
        is_latent = (before >= 0) & (offsets >= before) & (offsets < lengths - after)
        others = np.flatnonzero(self.places[spans, 3] < 0)
        split = int(num_new[: others[-1] + 1].sum()) if len(others) else 0
        rows = np.flatnonzero(~is_latent[split:]) + split, np.flatnonzero(is_latent[:split])
        return ExpertRows(split, *(torch.from_numpy(each).to(self.token_ids.device) for each in rows))

    def chain_lengths(self, chains: list[np.ndarray]) -> np.ndarray:
        """Tokens of each chain, int64 [G]; chains: spans [G] of each level, -1 where a chain has none there."""
        return sum(np.where(level >= 0, self.lengths[level], 0) for level in chains)

    def chain_slots(self, chains: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Storage slots of each chain's tokens, int64 [G, the longest chain], padded with the last span's first slot,
        and how many each has."""
        num_keys, spans = self.chain_lengths(chains), np.stack(chains, axis=1)
        lengths = np.where(spans >= 0, self.lengths[spans], 0)
        used = lengths > 0
        packed = _ranges(self.starts[spans[used]], lengths[used])
        if (num_keys == num_keys.max()).all():
            return packed.reshape(len(spans), -1), num_keys
        slots = np.repeat(self.starts[chains[-1]][:, None], num_keys.max(), axis=1)
        slots[np.arange(num_keys.max()) < num_keys[:, None]] = packed
        return slots, num_keys

    def ancestor_levels(self) -> list[np.ndarray]:
        """[parents, grandparents, ...] of every span, int64 [S] each, -1 where there is none."""
        levels, level = [], self.parents
        while (level >= 0).any():
            levels.append(level)
            level = np.where(level >= 0, self.parents[level], -1)
        return levels

    @property
    def roots(self) -> np.ndarray:
        """The root above each span, or the span itself, int64 [S]."""
        roots = np.arange(self.num_spans)
        for level in self.ancestor_levels():
            roots = np.where(level >= 0, level, roots)
        return roots

    @property
    def num_spans(self) -> int:
        """Number of spans, cached ones included."""
        return len(self.starts)

    @property
    def full(self) -> np.ndarray:
        """Whether all tokens of a span see one another, bool [S]."""
        return self.num_causal == 0

    @property
    def causal(self) -> np.ndarray:
        """Whether no token of a span sees a later one, bool [S]."""
        return self.num_causal >= self.lengths

    @property
    def packed_starts(self) -> np.ndarray:
        """First packed row of each span's new tokens, int64 [S]."""
        return np.cumsum(self.num_new) - self.num_new

    def span_rows(self, span: int) -> slice:
        """Packed rows of one span's new tokens."""
        start = int(self.packed_starts[span])
        return slice(start, start + int(self.num_new[span]))

    def allowed(self) -> Tensor:
        """The dense truth, bool [Tq, capacity]: whether a new token attends to a storage slot. For tests and masks."""
        if self.num_visible is not None:
            allowed = self.settled().allowed()
            return torch.nn.functional.pad(allowed, (0, self.capacity - allowed.shape[1]))
        allowed = torch.zeros(len(self.token_ids), self.capacity, dtype=torch.bool)
        for span in range(self.num_spans):
            rows = self.span_rows(span)
            ancestor = int(self.parents[span])
            while ancestor >= 0:
                start, length = int(self.starts[ancestor]), int(self.lengths[ancestor])
                allowed[rows, start : start + length] = True
                ancestor = int(self.parents[ancestor])
            start, length, new = int(self.starts[span]), int(self.lengths[span]), int(self.num_new[span])
            own = torch.ones(new, length, dtype=torch.bool).tril(length - new)
            own[:, int(self.num_causal[span]) :] = True
            allowed[rows, start : start + length] = own
        return allowed.to(self.token_ids.device)

    def plan(self, key: Hashable, make: Callable[[SpanTree], Any]) -> Any:
        """What make(tree) derives from the structure alone, computed once for all trees that share it (with_tokens)."""
        if key not in self._plans:
            self._plans[key] = make, make(self)
        return self._plans[key][1]

    def plan_step(self, key: Hashable, make: Callable[[SpanTree], Any]) -> Any:
        """What make(tree) derives from num_visible too, computed once for this tree: all layers of a step share it."""
        if key not in self._of_step:
            self._of_step[key] = make(self)
        return self._of_step[key]

    def groups(self) -> list[AttentionGroup]:
        """The attention plan of batched calls: query spans bucketed by length, full ones apart."""
        groups = self.plan("groups", SpanTree._make_groups)
        if self.num_visible is None:
            return groups
        return self.plan_step("groups", lambda tree: [group.visible(tree.num_visible) for group in groups])

    def _make_groups(self) -> list[AttentionGroup]:
        spans = np.flatnonzero(self.num_new)
        chains = [level[spans] for level in reversed(self.ancestor_levels())] + [spans]
        key_lengths = self.chain_lengths(chains)
        # Buckets of 8 queries and 16 keys keep the padding small and the calls few; equal spans need no padding at all.
        # The only new token of a causal span sees all its tokens, as those of a full one do: a call without a mask.
        whole = self.full[spans] | (self.causal[spans] & (self.num_new[spans] == 1))
        shape_class = np.stack([whole, -(-self.num_new[spans] // 8), -(-key_lengths // 16)], axis=1)
        groups = []
        for key in np.unique(shape_class, axis=0):
            members = np.flatnonzero((shape_class == key).all(axis=1))
            groups.append(self._group([level[members] for level in chains], key_lengths[members], bool(key[0])))
        return groups

    def _group(self, chains: list[np.ndarray], key_lengths: np.ndarray, whole: bool) -> AttentionGroup:
        spans = chains[-1]
        queries = self.num_new[spans]
        key_slots, _ = self.chain_slots(chains)
        num_queries, num_keys = int(queries.max()), key_slots.shape[1]
        row = np.repeat(np.arange(len(spans)), queries)
        offsets = _ranges(np.zeros_like(queries), queries)
        packed_rows = _ranges(self.packed_starts[spans], queries)
        query_rows = np.repeat(self.packed_starts[spans][:, None], num_queries, axis=1)
        query_rows[row, offsets] = packed_rows
        mask = None
        if not whole or (key_lengths != num_keys).any():
            last_key = np.broadcast_to(key_lengths[:, None], query_rows.shape)
            if not whole:
                last_key = last_key - queries[:, None] + 1 + np.arange(num_queries)
            key = np.arange(num_keys)
            mask = key < np.minimum(last_key, key_lengths[:, None])[:, :, None]
            if not whole and self.has_mixed:
                num_shared = np.maximum(self.lengths[spans] - self.num_causal[spans], 0)
                shared = (key >= (key_lengths - num_shared)[:, None]) & (key < key_lengths[:, None])
                mask |= shared[:, None]
        device = self.token_ids.device
        return AttentionGroup(
            torch.from_numpy(query_rows).to(device),
            torch.from_numpy(key_slots).to(device),
            None if mask is None else torch.from_numpy(mask).to(device),
            torch.from_numpy(packed_rows).to(device),
            torch.from_numpy(row * num_queries + offsets).to(device),
            torch.from_numpy(key_lengths - self.lengths[spans]).to(device),
        )


def _structure(value: Any, leaves: list[Any]) -> Any:
    """How lists, tuples and dictionaries are nested in a value; what they hold is added to leaves, in order."""
    if isinstance(value, dict):
        return [dict, list(value), [_structure(item, leaves) for item in value.values()]]
    if isinstance(value, list | tuple):
        return [type(value), [_structure(item, leaves) for item in value]]
    leaves.append(value)
    return None


def _can_hold(old: Any, new: Any) -> bool:
    """Whether copying into the old leaf of a structure makes it the new one."""
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return old.shape == new.shape and old.dtype == new.dtype and old.device == new.device
    return type(old) is type(new) and old == new


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenation of range(start, start + length) over all pairs."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)
