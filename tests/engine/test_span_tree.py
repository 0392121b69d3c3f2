"""Span trees against the rule, written out token by token."""

import timeit
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hermesflow.engine.device_graph import DeviceGraph
from hermesflow.kernels.span_attention import span_attention
from hermesflow.kernels.span_attention.plan import depth_first
from hermesflow.kernels.span_tree import SpanTree


@st.composite
def forests(draw, first=0, minimum=1):
    """Spans whose parents lie before them, counted from span number first on."""
    count = draw(st.integers(minimum, 7))
    parents = [draw(st.integers(-1, first + index - 1)) for index in range(count)]
    lengths = [draw(st.integers(1, 11)) for _ in range(count)]
    modes = [draw(st.sampled_from(["causal", "full", *range(length + 1)])) for length in lengths]
    ids = iter(range(1000))
    tokens = [[next(ids) for _ in range(length)] for length in lengths]
    return list(zip(tokens, parents, modes, strict=True))


def truth(tree, spans, new):
    """What the rule says: allowed [Tq, capacity] and positions [Tq] of the new tokens, given as (span, index) pairs."""

    def ancestors(span):
        parent = spans[span][1]
        return [] if parent < 0 else [parent, *ancestors(parent)]

    allowed = torch.zeros(len(new), tree.capacity, dtype=torch.bool)
    positions = []
    for row, (span, index) in enumerate(new):
        positions.append(index + sum(len(spans[ancestor][0]) for ancestor in ancestors(span)))
        for other, (ids, _, _) in enumerate(spans):
            for key in range(len(ids)):
                mode = spans[other][2]
                own = other == span and (key <= index or mode == "full" or (mode != "causal" and key >= mode))
                allowed[row, int(tree.starts[other]) + key] = own or other in ancestors(span)
    return allowed, torch.tensor(positions)


def plan_as_mask(tree):
    """The dense mask that the attention plan stands for."""
    dense = torch.zeros(len(tree.token_ids), tree.capacity, dtype=torch.bool)
    for group in tree.groups():
        num_queries = group.query_rows.shape[1]
        for packed, batch in zip(group.packed_rows.tolist(), group.batch_rows.tolist(), strict=True):
            span, query = divmod(batch, num_queries)
            assert group.query_rows[span, query] == packed
            slots = group.key_slots[span]
            kept = slots if group.mask is None else slots[group.mask[span, query]]
            assert len(kept) == len(kept.unique()), "a key would count twice"
            dense[packed, kept] = True
    return dense


def check(tree, spans, new):
    allowed, positions = truth(tree, spans, new)
    assert torch.equal(tree.allowed(), allowed)
    assert torch.equal(plan_as_mask(tree), allowed)
    assert torch.equal(tree.position_ids, positions)
    assert tree.token_ids.tolist() == [spans[span][0][index] for span, index in new]
    assert tree.slots.tolist() == [int(tree.starts[span]) + index for span, index in new]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rule_on_random_trees(data):
    """Built, then extended, then grown, with reserved slots in between."""
    spans = data.draw(forests())
    tree = SpanTree.build(spans, reserve=data.draw(st.integers(0, 3)))
    check(tree, spans, [(span, index) for span, (ids, _, _) in enumerate(spans) for index in range(len(ids))])

    added = data.draw(forests(first=len(spans), minimum=0))
    tree = tree.extend(added, reserve=2)
    first, spans = len(spans), spans + added
    check(tree, spans, [(first + span, index) for span, (ids, _, _) in enumerate(added) for index in range(len(ids))])

    # Only spans without children grow, as answers do.
    leaves = [span for span in range(first, len(spans)) if all(parent != span for _, parent, _ in spans)]
    for _ in range(2):
        grown = [span for span in leaves if data.draw(st.booleans())]
        for span in grown:
            spans[span] = ([*spans[span][0], 7 + span], spans[span][1], spans[span][2])
        tree = tree.grow(grown, torch.tensor([7 + span for span in grown], dtype=torch.int64))
        check(tree, spans, [(span, len(spans[span][0]) - 1) for span in grown])


def test_spans_never_share_slots():
    tree = SpanTree.build([([1, 2], -1, "causal"), ([3], 0, "full")], reserve=2).extend([([4, 5], 1, "causal")])
    assert tree.starts.tolist() == [0, 4, 7]
    assert tree.capacity == 9


def test_rows_of_spans():
    tree = SpanTree.build([([1, 2], -1, "causal"), ([3, 4, 5], 0, "full")])
    assert tree.span_rows(0) == slice(0, 2)
    assert tree.span_rows(1) == slice(2, 5)
    later = tree.extend([([6], 1, "causal")])
    assert later.span_rows(1) == slice(0, 0)
    assert later.span_rows(2) == slice(0, 1)


def test_empty_tree():
    tree = SpanTree.build([])
    assert tree.capacity == tree.num_spans == 0
    assert tree.groups() == []
    assert tree.allowed().shape == (0, 0)


def test_with_tokens_shares_the_plan():
    tree = SpanTree.build([([1, 2], -1, "causal"), ([3], 0, "full")])
    other = tree.with_tokens(torch.tensor([7, 8, 9]))
    assert other.token_ids.tolist() == [7, 8, 9]
    assert other.groups() is tree.groups()
    assert tree.token_ids.tolist() == [1, 2, 3]


def test_equal_full_spans_need_no_mask():
    """Images of prompts of one length are one group without padding: the fast path of generation."""
    images = [(list(range(10)), parent, "full") for parent in (0, 1, 0, 1)]
    tree = SpanTree.build([([1, 2, 3], -1, "causal"), ([4, 5, 6], -1, "causal")]).extend(images)
    (group,) = tree.groups()
    assert group.mask is None
    assert group.key_slots.shape == (4, 13)


def test_single_tokens_need_no_mask():
    """A decoding step of answers of one length to questions of one length."""
    tree = SpanTree.build([([1, 2], -1, "causal")] * 2).extend([([3, 4], k % 2, "causal") for k in range(6)], reserve=1)
    (group,) = tree.grow(range(2, 8), torch.zeros(6, dtype=torch.int64)).groups()
    assert group.mask is None and group.key_slots.shape == (6, 5)


def test_kinds_of_spans():
    """k at either end is full or causal; only new spans count as mixed, and a grown causal span stays causal."""
    modes = ["causal", "full", 0, 1, 2]
    tree = SpanTree.build([([1, 2], -1, mode) for mode in modes], reserve=1)
    assert tree.causal.tolist() == [True, False, False, False, True]
    assert tree.full.tolist() == [False, True, True, False, False]
    assert tree.has_mixed and not tree.extend([([3], 3, "causal")]).has_mixed
    assert tree.grow([0], torch.tensor([3])).causal[0]


@pytest.mark.parametrize(
    "spans",
    [
        [([], -1, "causal")],
        [([1], 0, "causal")],
        [([1], -1, "both")],
        [([1], -2, "full")],
        [([1], -1, 2)],
        [([1], -1, -1)],
    ],
    ids=["empty-span", "own-parent", "unknown-mode", "parent-before-root", "beyond-its-end", "negative"],
)
def test_bad_spans(spans):
    with pytest.raises(ValueError, match="SpanTree: span 0 needs tokens, a parent"):
        SpanTree.build(spans)


def test_bad_growth():
    tree = SpanTree.build([([1], -1, "causal"), ([2], 0, "causal"), ([3], 0, "causal")], reserve=1)
    grown = tree.grow(np.array([1, 2]), torch.tensor([5, 6]))
    with pytest.raises(ValueError, match="larger reserve"):
        grown.grow([1], torch.tensor([7]))
    with pytest.raises(ValueError, match="ascending spans"):
        tree.grow([2, 1], torch.tensor([5, 6]))
    with pytest.raises(ValueError, match=r"token_ids \[2\], got \(1,\)"):
        tree.grow([1, 2], torch.tensor([5]))
    with pytest.raises(ValueError, match=r"with_tokens: expected token_ids \[3\], got \[2\]"):
        tree.with_tokens(torch.tensor([5, 6]))


def test_a_decoding_tree_is_the_grown_tree():
    spans = [([1, 2, 3], -1, "full"), ([4, 5], 0, "causal"), ([6], 1, "causal"), ([7, 8], 1, "causal")]
    tree = SpanTree.build(spans, reserve=[0, 0, 3, 3])
    tokens = torch.tensor([10, 11])
    grown = tree.grow([2, 3], tokens)
    decoding = tree.decode([2, 3], tokens, torch.tensor([2, 3]))
    assert torch.equal(decoding.position_ids, grown.position_ids) and torch.equal(decoding.slots, grown.slots)
    assert torch.equal(decoding.allowed()[:, : grown.capacity], grown.allowed())
    later = grown.grow([2, 3], tokens)
    stepped = decoding.with_tokens(tokens, torch.tensor([3, 4]))
    assert torch.equal(stepped.position_ids, later.position_ids) and torch.equal(stepped.slots, later.slots)
    assert torch.equal(stepped.settled().allowed(), later.allowed())
    torch.manual_seed(0)
    q, storage = torch.randn(2, 4, 8), torch.randn(2, tree.capacity, 2, 8)
    outs = [span_attention(q, *storage, other, backend="torch") for other in (stepped, later)]
    torch.testing.assert_close(*outs)


def test_kept_spans_stay_where_they_are():
    spans = [([1, 2], -1, "full"), ([3], -1, "full"), ([4], 1, "causal"), ([5, 6], 2, "causal")]
    kept = SpanTree.build(spans, reserve=[0, 1, 2, 0]).keep([1, 2])
    assert kept.parents.tolist() == [-1, 0] and kept.starts.tolist() == [2, 4] and len(kept.token_ids) == 0
    added = kept.extend([([9, 9], 1, "causal")], starts=np.array([0]))
    assert added.slots.tolist() == [0, 1] and added.position_ids.tolist() == [2, 3] and added.capacity == 7
    with pytest.raises(ValueError, match="together with their parents"):
        kept.keep([1])


def test_tokens_alone_leave_the_lengths_of_a_decoding_tree():
    tree = SpanTree.build([([1, 2], -1, "full"), ([3], 0, "causal")], reserve=2)
    tree = tree.decode([1], torch.tensor([4]), torch.tensor([2]))
    other = tree.with_tokens(torch.tensor([5]))
    assert torch.equal(other.num_visible, tree.num_visible) and torch.equal(other.slots, tree.slots)
    assert torch.equal(other.allowed(), tree.allowed()) and tree.settled() is tree.settled()


def test_trees_made_from_a_fixed_one_are_fixed():
    tree = SpanTree.build([([1, 2], -1, "causal"), ([3], 0, "causal")], reserve=2, fixed=True)
    made = [
        tree.extend([([4], 0, "causal")]), tree.grow([1], torch.tensor([4])), tree.keep([0]),
        tree.with_tokens(tree.slots), tree.decode([1], torch.tensor([4]), torch.tensor([2])),
    ]  # fmt: skip
    assert all(other.fixed for other in made) and made[-1].settled().fixed
    assert not SpanTree.build([([1], -1, "causal")]).fixed


def images_of(*parents, reserve=0):
    """Two cached prompts and new images below the named ones; reserve moves the images' slots."""
    prompts = SpanTree.build([([1, 2, 3], -1, "causal"), ([4, 5, 6], -1, "causal")], reserve=reserve)
    return prompts.extend([(list(range(9)), parent, "full") for parent in parents])


def answers_of(*parents, lengths):
    """Two cached questions of 3 and 5 tokens and answers below the named ones that decode."""
    tree = SpanTree.build([([1, 2, 3], -1, "causal"), ([4, 5, 6, 7, 8], -1, "causal")])
    tree = tree.extend([([9], parent, "causal") for parent in parents], reserve=7)
    spans = np.arange(2, 2 + len(parents))
    return tree.decode(spans, torch.arange(len(parents)), torch.tensor(lengths))


def test_a_graph_over_a_tree_serves_the_structure_that_it_takes_over(recorded_graphs):
    first, second = images_of(0, 1, 1), images_of(1, 0, 0, reserve=2)
    torch.manual_seed(0)
    q, k, v, out = torch.randn(27, 4, 8), torch.randn(40, 2, 8), torch.randn(40, 2, 8), torch.empty(27, 4, 8)
    positions = torch.empty_like(first.position_ids)

    def function():
        tree = first.with_tokens(first.token_ids)
        positions.copy_(tree.position_ids)
        out.copy_(span_attention(q, k, v, tree, backend="torch"))

    graph = DeviceGraph(function, torch.device("cpu"))
    graph(), graph()
    assert torch.equal(out, span_attention(q, k, v, images_of(0, 1, 1), backend="torch"))
    assert first.load_(second)
    graph()
    assert len(recorded_graphs) == 1 and torch.equal(positions, second.position_ids)
    assert torch.equal(out, span_attention(q, k, v, second, backend="torch"))
    assert torch.equal(first.allowed(), second.allowed()) and first.capacity == second.capacity


def test_a_graph_of_decoding_steps_serves_another_structure(recorded_graphs):
    first, second = answers_of(0, 1, lengths=[1, 2]), answers_of(1, 0, lengths=[3, 1])
    torch.manual_seed(0)
    q, k, v, out = torch.randn(2, 4, 8), torch.randn(24, 2, 8), torch.randn(24, 2, 8), torch.empty(2, 4, 8)
    tokens, num_visible = first.token_ids.clone(), first.num_visible.clone()
    slots = torch.empty_like(first.slots)

    def function():
        tree = first.with_tokens(tokens, num_visible)
        slots.copy_(tree.slots)
        out.copy_(span_attention(q, k, v, tree, backend="torch"))
        num_visible.add_(1)

    graph = DeviceGraph(function, torch.device("cpu"))
    for tree in (first, second):
        if tree is second:
            assert first.load_(second)
            num_visible.copy_(second.num_visible)
        for _ in range(3):
            step = tree.with_tokens(tokens, num_visible.clone())
            graph()
            assert torch.equal(slots, step.slots)
            torch.testing.assert_close(out, span_attention(q, k, v, step.settled(), backend="torch"))
    assert len(recorded_graphs) == 1


@pytest.mark.parametrize(
    "other",
    [
        lambda: images_of(0, 1),
        lambda: images_of(0, 1, 1).extend([([1] * 27, 0, "causal")]),
        lambda: SpanTree.build([([1] * 27, -1, 5)]),
        lambda: replace(images_of(0, 1, 1), fixed=True, _plans={}),
    ],
    ids=["fewer rows", "other groups", "mixed spans", "fixed"],
)
def test_what_does_not_fit_changes_nothing(other):
    tree, same = images_of(0, 1, 1), images_of(0, 1, 1)
    tree.groups()
    assert not tree.load_(other())
    assert torch.equal(tree.allowed(), same.allowed()) and torch.equal(tree.token_ids, same.token_ids)
    assert torch.equal(plan_as_mask(tree), same.allowed()) and tree.capacity == same.capacity


def test_a_tree_that_decodes_is_not_one_that_does_not():
    tree = answers_of(0, 1, lengths=[1, 2])
    assert not tree.load_(tree.settled()) and not tree.settled().load_(tree)


def test_planning_a_large_forest_takes_milliseconds():
    """64 images, six questions each, ten answers a question: plans are made between steps, while a GPU waits."""
    spans = [(range(259), -1, "full")] * 64 + [(range(5 + k % 9), k // 6, "causal") for k in range(384)]
    tree = SpanTree.build(spans).extend([([1], 64 + k // 10, "causal") for k in range(3840)], reserve=31)
    tree = tree.decode(range(448, 4288), torch.zeros(3840, dtype=torch.int64), torch.full((3840,), 2))

    def seconds(function):
        return min(timeit.repeat(function, number=1, repeat=5))

    assert seconds(lambda: depth_first(tree)) < 0.02  # 1 ms
    assert seconds(tree._make_groups) < 0.1  # 9 ms
