"""The depth-first plan of a span tree against the dense truth."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from hermesflow.kernels.span_attention.plan import depth_first, row_parts, tile_plan
from hermesflow.kernels.span_tree import SpanTree


@st.composite
def spans_below(draw, num_parents):
    """1 to 8 spans, each below an earlier one or at a root."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    return [
        (
            [0] * length,
            draw(st.integers(-1, num_parents + index - 1)),
            draw(st.sampled_from(["causal", "full", *range(length + 1)])),
        )
        for index, length in enumerate(lengths)
    ]


@st.composite
def trees(draw):
    """Trees in all states: all new, with cached spans, grown by single tokens, with reserved slots."""
    tree = SpanTree.build(draw(spans_below(0)), reserve=draw(st.integers(0, 3)))
    if draw(st.booleans()):
        tree = tree.extend(draw(spans_below(tree.num_spans)), reserve=2)
    if draw(st.booleans()):
        room = np.flatnonzero(tree.lengths < tree.regions)
        grown = sorted(draw(st.sets(st.sampled_from(room.tolist()), min_size=1))) if len(room) else []
        tree = tree.grow(grown, torch.zeros(len(grown), dtype=torch.int64))
    return tree


@st.composite
def decoding_trees(draw):
    """Leaves of unequal regions below anything, some of which decode, with lengths on the device."""
    tree = SpanTree.build(draw(spans_below(0)), fixed=draw(st.booleans()))
    parents = draw(st.lists(st.integers(0, tree.num_spans - 1), min_size=1, max_size=6))
    reserve = [draw(st.integers(0, 12)) for _ in parents]
    tree = tree.extend([([0], parent, "causal") for parent in parents], reserve=reserve)
    decoded = tree.num_spans - 1 - np.array(sorted(draw(st.sets(st.sampled_from(range(len(parents)))))), int)[::-1]
    num_visible = [draw(st.integers(1, int(tree.regions[span]))) for span in decoded]
    return tree.decode(decoded, torch.zeros(len(decoded), dtype=torch.int64), torch.tensor(num_visible, dtype=int))


def allowed_in_sorted_order(plan):
    """bool [rows, keys] of a plan's intervals, padding included."""
    row = torch.arange(len(plan.rows))[:, None]
    return (plan.first_row <= row) & (row < plan.end_row) & (plan.rows[:, None] >= 0)


def dense(tree, plan):
    """bool [Tq, slots] of what the rows of a plan attend to."""
    row, key = allowed_in_sorted_order(plan).nonzero(as_tuple=True)
    allowed = torch.zeros(len(tree.token_ids), tree.capacity, dtype=torch.bool)
    allowed[plan.rows[row].long(), plan.slots[key].long()] = True
    return allowed


def check_lists(plan, sizes):
    """The lists name the tiles that meet a block, those without a mask first."""

    def tiles(allowed):
        return allowed.unflatten(1, (-1, sizes[1])).unflatten(0, (-1, sizes[0]))

    allowed = allowed_in_sorted_order(plan)
    some, whole = tiles(allowed).any(3).any(1), tiles(allowed).all(3).all(1)
    padded = tiles(allowed | (plan.rows[:, None] < 0)).all(3).all(1)  # what padding rows see nobody reads
    of_blocks, of_tiles = (plan.tiles_of_block, some, whole, padded), (plan.blocks_of_tile, some.T, whole.T, padded.T)
    for lists, meets, full, harmless in (of_blocks, of_tiles):
        assert len(lists.bounds) == 2 * len(meets) + 1 and int(lists.bounds[-1]) <= len(lists.tiles)
        for index in range(len(meets)):
            begin, middle, end = lists.bounds[2 * index : 2 * index + 3].tolist()
            assert set(lists.tiles[begin:end].tolist()) >= set(meets[index].nonzero().flatten().tolist())
            assert all(harmless[index, other] for other in lists.tiles[begin:middle].tolist())
            yield lists.tiles[begin:middle].tolist(), lists.tiles[middle:end].tolist(), meets[index], full[index]


@settings(max_examples=150, deadline=None)
@given(trees())
def test_intervals_are_the_mask(tree):
    order = depth_first(tree)
    row = np.arange(len(order.rows))[:, None]
    allowed = np.zeros((len(order.rows), tree.capacity), dtype=bool)
    allowed[np.ix_(order.rows, order.slots)] = (order.first_row <= row) & (row < order.end_row)
    assert np.array_equal(allowed, tree.allowed().numpy())
    # A key that nobody attends to must not be read.
    assert set(order.slots) == set(np.flatnonzero(allowed.any(axis=0)))


@settings(max_examples=150, deadline=None)
@given(trees(), st.sampled_from([(4, 8), (8, 4), (2, 2), (64, 16)]))
def test_lists_name_every_tile_that_meets_a_block(tree, sizes):
    plan = tile_plan(tree, *sizes)
    order = depth_first(tree)
    assert plan.rows[: plan.num_rows].tolist() == order.rows.tolist()
    assert torch.equal(dense(tree, plan), tree.allowed())
    assert set(plan.slots.tolist()) == set(order.slots.tolist()), "padding reads an attended slot"
    for unmasked, masked, meets, full in check_lists(plan, sizes):
        assert unmasked == full.nonzero().flatten().tolist()
        assert masked == (meets & ~full).nonzero().flatten().tolist()


@settings(max_examples=150, deadline=None)
@given(trees(), st.sampled_from([(20, 8), (32, 4)]), st.integers(1, 30))
def test_parts_share_out_the_rows(tree, sizes, repeats):
    """Long spans, whose whole blocks and whose rest have plans of their own."""
    tree = tree.extend([([0] * (sizes[0] * 3 + repeats % 5), repeats % tree.num_spans, "full")] * repeats)
    parts = row_parts(tree, *sizes)
    assert len(parts) == (2 if repeats % 5 else 1)
    rows = torch.cat([plan.rows[plan.rows >= 0] for _, plan in parts])
    assert rows.sort().values.tolist() == list(range(len(tree.token_ids)))
    assert torch.equal(sum(dense(tree, plan).int() for _, plan in parts), tree.allowed().int())
    for block_rows, plan in parts:
        assert len(list(check_lists(plan, (block_rows, sizes[1]))))


@settings(max_examples=150, deadline=None)
@given(decoding_trees(), st.sampled_from([(4, 8), (8, 4), (2, 2), (64, 16)]))
def test_a_decoding_plan_is_the_mask_of_its_step(tree, sizes):
    plan = tile_plan(tree, *sizes)
    assert torch.equal(dense(tree, plan), tree.allowed())
    if plan.num_rows:
        assert set(plan.slots.tolist()) == set(dense(tree, plan).any(0).nonzero().flatten().tolist()), "reads too much"
    assert len(list(check_lists(plan, sizes))) == len(plan.rows) // sizes[0] + len(plan.slots) // sizes[1]


def test_later_steps_share_the_plan():
    tree = SpanTree.build([([0] * 5, -1, "full"), ([0], 0, "causal"), ([0], 0, "causal")], reserve=4)
    tree = tree.decode([1, 2], torch.zeros(2, dtype=torch.int64), torch.tensor([1, 3]))
    later = tree.with_tokens(tree.token_ids, torch.tensor([2, 5]))
    first, second = tile_plan(tree, 16, 16), tile_plan(later, 16, 16)
    assert tile_plan(tree, 16, 16) is first and second.tiles_of_block is first.tiles_of_block
    assert [(plan.end_row > plan.first_row).sum().item() for plan in (first, second)] == [5 + 1 + 3, 5 + 2 + 5]


def fixed_forests():
    """Different structures of 40 new tokens and at most 1,024 slots."""
    yield SpanTree.build([([0] * 10, -1, "causal"), *[([0] * 15, 0, "full")] * 2], fixed=True)
    yield SpanTree.build([([0] * 2, -1, 1), *[([0] * 19, k, "causal") for k in range(2)]], reserve=3, fixed=True)
    images = SpanTree.build([([0] * 490, -1, "full")] * 2, fixed=True)
    yield images.extend([([0] * 4, k % 2, "full") for k in range(10)])
    yield SpanTree.build([([0], -1, "full")] * 40, fixed=True)


@pytest.mark.parametrize("sizes", [(16, 32), (64, 64)], ids=str)
def test_fixed_plans_are_of_one_size_and_take_over_one_another(sizes):
    tree = next(fixed_forests())
    held = tree_leaves(tile_plan(tree, *sizes))
    for other in fixed_forests():
        assert tree.load_(other) or tree.has_mixed != other.has_mixed
        if tree.has_mixed == other.has_mixed:
            fresh = tree_leaves(tile_plan(other, *sizes))
            assert [np.shape(leaf) for leaf in held] == [np.shape(leaf) for leaf in fresh]
            assert all(np.array_equal(leaf, new) for leaf, new in zip(held, fresh, strict=True))
            assert np.array_equal(tree.allowed(), other.allowed())


@pytest.mark.parametrize("sizes", [(16, 32), (64, 64)], ids=str)
def test_fixed_plans_only_add_padding(sizes):
    for fixed in fixed_forests():
        plan = tile_plan(fixed, *sizes)
        num_keys = len(depth_first(fixed).slots)
        assert plan.num_keys == 1024 and torch.equal(dense(fixed, plan), fixed.allowed())
        assert (plan.slots[num_keys:] == plan.slots[num_keys - 1]).all() and not plan.end_row[num_keys:].any()
        assert len(list(check_lists(plan, sizes)))
        num_pairs = -(-40 // sizes[0]) * 1024 // sizes[1]
        assert len(plan.tiles_of_block.tiles) == len(plan.blocks_of_tile.tiles) == num_pairs


def test_answers_of_one_image_share_a_block():
    """A decoding step of 64 answers to 8 questions reads the image, the questions and the answers once."""
    tree = SpanTree.build([([0] * 1027, -1, "full"), *[([0] * 20, 0, "causal")] * 8])
    tree = tree.extend([([0], 1 + answer % 8, "causal") for answer in range(64)], reserve=9)
    for _ in range(9):
        tree = tree.grow(np.arange(9, 73), torch.zeros(64, dtype=torch.int64))
    plan = tile_plan(tree, 64, 64)
    assert len(plan.rows) == 64 and plan.num_keys == 1027 + 8 * 20 + 64 * 10
    assert plan.tiles_of_block.tiles.tolist() == list(range(-(-plan.num_keys // 64)))
    assert int(plan.tiles_of_block.bounds[1]) == 1027 // 64, "the image's tiles need no mask"


def test_images_of_one_prompt_do_not_read_one_another():
    """A block inside one image meets the prompt's tiles and the image's own, not those of its 15 siblings."""
    tree = SpanTree.build([([0] * 128, -1, "causal"), *[([0] * 256, 0, "full")] * 16])
    plan = tile_plan(tree, 64, 64)
    bounds = plan.tiles_of_block.bounds[::2]
    assert (bounds.diff()[2:] == 2 + 4).all()


def useful_share(tree, block_rows, tile_keys):
    """Pairs of a row and a key that it sees, of all pairs in the blocks and tiles that are computed."""
    order = depth_first(tree)
    parts = row_parts(tree, block_rows, tile_keys)
    computed = sum(int(plan.tiles_of_block.bounds[-1]) * size * tile_keys for size, plan in parts)
    return (order.end_row - order.first_row).sum() / computed


@pytest.mark.parametrize(
    ("num_tokens", "of_a_step", "of_training"), [(1024, 0.935, 0.945), (256, 0.79, 0.81)], ids=["1024", "256"]
)
def test_blocks_and_tiles_of_images_are_full(num_tokens, of_a_step, of_training):
    """Show-o's images with the tokens before and after them: 32 guided ones of prompts of 20 tokens, and pairs' win and
    lose. At 256 tokens more cannot be had: of 278 keys 22 have a tile of 64, and of 258 rows 2 a block of 16."""
    image, prompt = [0] * (num_tokens + 2), [0] * 20
    prompts = SpanTree.build([*[(prompt, -1, "causal")] * 4, ([0] * 2, -1, "causal")])
    step = prompts.extend([(image, k // 8, "full") for k in range(32)] + [(image, 4, "full")] * 32)
    pairs = [(prompt, -1, "causal"), (image, 0, "full"), (image, 0, "full")]
    pairs = SpanTree.build([(ids, -1 if parent < 0 else 3 * k, mode) for k in range(4) for ids, parent, mode in pairs])
    assert useful_share(step, 128, 64) >= of_a_step
    assert useful_share(pairs, 128, 64) >= of_training


def test_a_decoding_step_fills_the_device():
    """64 captions of 6.4 images: at least two programs for each of an H100's 132 multiprocessors."""
    launches = pytest.importorskip("hermesflow.kernels.span_attention.span_attention_triton")
    tree = SpanTree.build([([0] * 1027, -1, "full")] * 7)
    tree = tree.extend([([0], caption // 10, "causal") for caption in range(64)], reserve=24)
    tree = tree.decode(range(7, 71), torch.zeros(64, dtype=torch.int64), torch.full((64,), 2))
    launch = launches._fit(tree, launches._launches(torch.bfloat16, 64, 9).forward)
    ((block_rows, plan),) = row_parts(tree, launch.block_rows, launch.tile_keys)
    num_programs = len(plan.rows) // block_rows * 32
    assert num_programs * launches._num_shares(num_programs, len(plan.slots) // launch.tile_keys) >= 264


def test_plans_are_shared_by_trees_of_one_structure():
    tree = SpanTree.build([([1, 2], -1, "causal"), ([3, 4, 5], 0, "full")])
    other = tree.with_tokens(torch.tensor([6, 7, 8, 9, 10]))
    plan = tile_plan(other, 16, 16)
    assert tile_plan(tree, 16, 16) is plan and tile_plan(tree, 32, 16) is not plan
    assert other.groups() is tree.groups()


@pytest.mark.parametrize(
    "tree", [SpanTree.build([]), SpanTree.build([([1, 2], -1, "causal")]).extend([])], ids=["no-spans", "all-cached"]
)
def test_nothing_to_attend(tree):
    plan = tile_plan(tree, 16, 16)
    assert plan.num_rows == plan.num_keys == len(plan.rows) == len(plan.slots) == len(plan.tiles_of_block.tiles) == 0
