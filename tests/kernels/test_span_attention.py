"""Attention over span trees against dense masked attention: forward and every gradient."""

import pytest
import torch

from hermesflow.engine.span_tree import SpanTree
from hermesflow.kernels.registry import BackendError
from hermesflow.kernels.span_attention import span_attention


def ids(length):
    return list(range(length))


def cached_leaves():
    """A decoding step of images: prefixes cached, leaves of equal and of unequal prefixes new."""
    tree = SpanTree.build([(ids(5), -1, "causal"), (ids(9), -1, "causal")])
    return tree.extend([(ids(18), parent, "full") for parent in (0, 0, 1)])


def grown_answers():
    """A decoding step of answers: one new token on some spans, with slots that hold nothing yet."""
    tree = SpanTree.build([(ids(20), -1, "full"), (ids(6), 0, "causal"), (ids(3), 0, "causal")])
    tree = tree.extend([([1], 1, "causal"), ([2], 1, "causal"), ([3], 2, "causal")], reserve=4)
    return tree.grow([3, 5], torch.tensor([4, 5])).grow([3], torch.tensor([6]))


TREES = {
    "one-token": lambda: SpanTree.build([([1], -1, "causal")]),
    "causal": lambda: SpanTree.build([(ids(33), -1, "causal")]),
    "full": lambda: SpanTree.build([(ids(33), -1, "full")]),
    "images-of-two-prompts": lambda: SpanTree.build(
        [(ids(3), -1, "causal"), (ids(12), -1, "causal"), *[(ids(18), parent, "full") for parent in (0, 1, 1)]]
    ),
    "answers-of-ragged-questions": lambda: SpanTree.build(
        [
            (ids(19), -1, "full"),
            *[(ids(2 + 3 * k), 0, "causal") for k in range(4)],
            *[(ids(1 + k), 1 + k % 4, "causal") for k in range(9)],
        ]
    ),  # fmt: skip
    "deep-chain": lambda: SpanTree.build([(ids(4), span - 1, "full" if span % 2 else "causal") for span in range(6)]),
    "cached-leaves": cached_leaves,
    "grown-answers": grown_answers,
}


def dense_attention(q, k, v, tree, scale=None):
    """The op by its definition, one head at a time."""
    num_heads, group = q.shape[1], q.shape[1] // k.shape[1]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    blocked = ~tree.allowed()
    heads = []
    for head in range(num_heads):
        scores = (q[:, head] @ k[: tree.capacity, head // group].T * scale).masked_fill(blocked, float("-inf"))
        heads.append(scores.softmax(1) @ v[: tree.capacity, head // group])
    return torch.stack(heads, 1)


def inputs(tree, dtype, num_heads=4, num_kv_heads=2, head_dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(len(tree.token_ids), num_heads), (tree.capacity, num_kv_heads), (tree.capacity, num_kv_heads)]
    return [torch.randn(*shape, head_dim, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("name", TREES)
def test_forward_and_gradients_in_float64(name, num_kv_heads):
    tree = TREES[name]()
    tensors = [tensor.requires_grad_() for tensor in inputs(tree, torch.float64, num_kv_heads=num_kv_heads)]
    got, expected = span_attention(*tensors, tree), dense_attention(*tensors, tree)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    weight = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for mine, truth in zip(
        torch.autograd.grad((got * weight).sum(), tensors),
        torch.autograd.grad((expected * weight).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(mine, truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["causal", "images-of-two-prompts", "answers-of-ragged-questions", "grown-answers"])
def test_error_is_that_of_plain_torch(name, dtype, check_error_budget):
    """Forward and gradients in low precision err no more than twice as much as dense attention in the same dtype."""
    tree = TREES[name]()
    low = inputs(tree, dtype)
    weight = torch.randn(low[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def results(function, tensors, weight):
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        out = function(*tensors, tree)
        return [out.detach(), *torch.autograd.grad(out, tensors, weight)]

    truths = results(dense_attention, [tensor.double() for tensor in low], weight.double())
    for got, truth, plain in zip(
        results(span_attention, low, weight), truths, results(dense_attention, low, weight), strict=True
    ):
        check_error_budget(got, truth, plain)


def test_slots_that_are_not_attended_may_hold_anything():
    """A cache's unused slots are never initialised to something finite by contract."""
    tree = TREES["grown-answers"]()
    q, k, v = inputs(tree, torch.float32)
    expected = span_attention(q, k, v, tree)
    unused = ~tree.allowed().any(0)
    assert unused.any()
    k[unused], v[unused] = float("nan"), float("inf")
    assert torch.equal(span_attention(q, k, v, tree), expected)


def test_storage_may_be_larger_than_the_tree():
    tree = TREES["cached-leaves"]()
    q, k, v = inputs(tree, torch.float32)
    more = torch.full((7, *k.shape[1:]), float("nan"))
    expected = span_attention(q, k, v, tree)
    assert torch.equal(span_attention(q, torch.cat([k, more]), torch.cat([v, more]), tree), expected)


def test_views_of_one_projection():
    """Queries, keys and values as the model has them: slices of one tensor."""
    tree = TREES["images-of-two-prompts"]()
    heads = torch.randn(len(tree.token_ids), 8, 8, generator=torch.Generator().manual_seed(0))
    views = heads.split([4, 2, 2], dim=1)
    assert torch.equal(span_attention(*views, tree), span_attention(*(view.contiguous() for view in views), tree))


def test_scale():
    tree = TREES["images-of-two-prompts"]()
    q, k, v = inputs(tree, torch.float64)
    torch.testing.assert_close(span_attention(q, k, v, tree, scale=0.1), dense_attention(q, k, v, tree, 0.1))


def test_empty_tree():
    tree = SpanTree.build([])
    empty = torch.zeros(0, 4, 8)
    assert span_attention(empty, empty[:, :2], empty[:, :2], tree).shape == (0, 4, 8)


def test_messages():
    tree = SpanTree.build([([1, 2, 3], -1, "causal")])
    q, k, v = inputs(tree, torch.float32)
    with pytest.raises(ValueError, match=r"H a multiple of Hkv, got \(3, 3, 8\)"):
        span_attention(q[:, :3], k, v, tree)
    with pytest.raises(ValueError, match="3 new tokens and 3 slots, got 2 queries and 3 keys"):
        span_attention(q[:2], k, v, tree)
    with pytest.raises(ValueError, match="3 new tokens and 3 slots, got 3 queries and 2 keys"):
        span_attention(q, k[:2], v[:2], tree)
    with pytest.raises(ValueError, match="must share dtype and device, got torch.float32/cpu, torch.float64/cpu"):
        span_attention(q, k.double(), v, tree)
    with pytest.raises(BackendError, match="span_attention"):
        span_attention(q, k, v, tree, backend="abacus")
