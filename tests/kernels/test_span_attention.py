"""Attention over span trees against dense masked attention: forward and every gradient."""

import functools
import importlib.util
import sys
import types

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._pytree import tree_leaves

from hermesflow.kernels import registry
from hermesflow.kernels.registry import BackendError
from hermesflow.kernels.span_attention import cascade as span_attention_cascade
from hermesflow.kernels.span_attention import flex as span_attention_flex
from hermesflow.kernels.span_attention import span_attention
from hermesflow.kernels.span_attention import varlen as span_attention_varlen
from hermesflow.kernels.span_tree import SpanTree

OP = "span_attention"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


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


def answers_of_one_image():
    """64 answers with one token each, the image and its questions cached: rows of different spans share a block."""
    tree = SpanTree.build([(ids(40), -1, "full"), *[(ids(3 + k), 0, "causal") for k in range(8)]])
    return tree.extend([([1], 1 + k % 8, "causal") for k in range(64)], reserve=1)


def ragged_forest():
    """Several roots, children created in turns, so that the packed and the depth-first order differ."""
    generator = np.random.default_rng(0)
    spans = [(ids(int(generator.integers(1, 60))), -1, "full") for _ in range(3)]
    for span in range(3, 14):
        mode = "full" if span % 3 == 0 else "causal"
        spans.append((ids(int(generator.integers(1, 30))), int(generator.integers(0, span)), mode))
    return SpanTree.build(spans, reserve=2)


def first_root_unused():
    """Ragged new spans below all roots but the first, whose slots begin the storage."""
    tree = SpanTree.build([(ids(2), -1, "causal"), (ids(3), -1, "causal"), (ids(5), -1, "causal")])
    return tree.extend([(ids(2), 1, "full"), (ids(2), 2, "full"), (ids(3), 1, "causal")])


def questions_about_features():
    """Two images by features, of which a prompt of unequal length comes first and is causal, with their questions."""
    images = [(ids(40), -1, 7), (ids(45), -1, 12)]
    return SpanTree.build([*images, *[(ids(3 + 2 * k), k % 2, "causal") for k in range(5)]])


def mixed_forest():
    """Spans of all modes below one another; some of those that are causal in part are cached, some grow."""
    modes = ["causal", "full", 1, 5, 0, 9]
    spans = [(ids(9 + k), -1 if k < 3 else k - 3, modes[k % 6]) for k in range(12)]
    tree = SpanTree.build(spans, reserve=1)
    tree = tree.extend([(ids(8 + k), k, 3 + k % 5) for k in range(12)], reserve=1)
    return tree.grow([13, 14, 20], torch.tensor([1, 2, 3]))


def decoding_answers(reserve):
    """Answers of two images' questions, whose lengths the device holds; some have one token, some fill their region."""
    tree = SpanTree.build([(ids(20), -1, "full"), (ids(7), -1, 3), *[(ids(6 - k), k % 2, "causal") for k in range(4)]])
    reserve = np.broadcast_to(reserve, 12)
    tree = tree.extend([([1], 2 + k % 4, "causal") for k in range(12)], reserve=reserve)
    decoded = np.delete(np.arange(6, 18), 5)
    num_visible = torch.tensor([1 + 7 * span % (1 + int(reserve[span - 6])) for span in decoded])
    return tree.decode(decoded, torch.zeros(11, dtype=torch.int64), num_visible)


def parts_of_full_roots():
    """Of each some tokens are computed, in any order, and the others cached."""
    tree = SpanTree.build([(ids(20), -1, "full"), (ids(133), -1, "full"), (ids(7), -1, "full")])
    return tree.only([3, 60, 1], torch.tensor([19, 0, 3, *range(80, 20, -1), 155]))


TREES = {
    "parts-of-full-roots": parts_of_full_roots,
    "first-root-unused": first_root_unused,
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
    ),
    "deep-chain": lambda: SpanTree.build([(ids(4), span - 1, "full" if span % 2 else "causal") for span in range(6)]),
    "cached-leaves": cached_leaves,
    "grown-answers": grown_answers,
    "deeper-chain": lambda: SpanTree.build([(ids(1 + k % 3), k - 1, ("causal", "full")[k % 2]) for k in range(40)]),
    "images-of-one-prompt": lambda: SpanTree.build([(ids(5), -1, "causal"), *[(ids(18), 0, "full")] * 16]),
    "images-beyond-a-block": lambda: SpanTree.build(
        [(ids(9), -1, "causal"), (ids(130), 0, "full"), (ids(130), 0, "full"), (ids(258), -1, "full")]
    ),
    "answers-of-one-image": answers_of_one_image,
    "ragged-forest": ragged_forest,
    "causal-in-part": lambda: SpanTree.build([(ids(33), -1, 6)]),
    "questions-about-features": questions_about_features,
    "mixed-forest": mixed_forest,
    "decoding-equal-regions": lambda: decoding_answers(6),
    "decoding-ragged-regions": lambda: decoding_answers(range(0, 48, 4)),
    "decoding-long-regions": lambda: decoding_answers(150),
    "fixed": lambda: SpanTree.build(
        [(ids(5), -1, "causal"), *[(ids(18), 0, "full")] * 3, (ids(7), 1, "causal")], fixed=True
    ),
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


def inputs(tree, dtype, num_heads=4, num_kv_heads=2, head_dim=16, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(len(tree.token_ids), num_heads), (tree.capacity, num_kv_heads), (tree.capacity, num_kv_heads)]
    return [torch.randn(*shape, head_dim, generator=generator).to(device, dtype) for shape in shapes]


def on_device(tree, device):
    """The same structure with its tokens, and so its plans, on the device."""
    moved = [tensor.to(device) for tensor in (tree.token_ids, tree.position_ids, tree.slots)]
    num_visible = None if tree.num_visible is None else tree.num_visible.to(device)
    structure = (tree.starts, tree.lengths, tree.parents, tree.num_causal, tree.num_new, tree.regions, tree.places)
    return SpanTree(*moved, *structure, num_visible, tree.fixed)


def skip_what_is_refused(backend, *arguments):
    """A library's backend takes fewer dtypes, head sizes and trees than the op."""
    reason = dict(registry.explain(OP, *arguments))[backend]
    if backend in ("flash_attn", "xformers") and reason is not None:
        pytest.skip(reason)


def results(function, tensors, tree, weight):
    """Output, and the gradients of q, k and v given that of the output; without them where weight is None."""
    if weight is None:
        return [function(*tensors, tree)]
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*tensors, tree)
    return [out.detach(), *torch.autograd.grad(out, tensors, weight)]


def weight_of(q, backend):
    """A gradient of the output; None where the backend has none on the CPU."""
    if (backend == "cpu" and q.dtype != torch.float32) or (backend == "flex" and q.device.type == "cpu"):
        return None
    return torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q.device, q.dtype)


def check_against_dense(tree, tensors, backend, check_error_budget, **options):
    """Forward and gradients err no more than twice as much as dense attention in the same dtype."""
    skip_what_is_refused(backend, *tensors, tree)
    weight = weight_of(tensors[0], backend)

    def mine(q, k, v, tree):
        return span_attention(q, k, v, tree, backend=backend, **options)

    def dense(q, k, v, tree):
        return dense_attention(q, k, v, tree, **options)

    exact = [tensor.double() for tensor in tensors]
    truths = results(dense, exact, tree, None if weight is None else weight.double())
    found, plain = results(mine, tensors, tree, weight), results(dense, tensors, tree, weight)
    for got, truth, same_dtype in zip(found, truths, plain, strict=True):
        assert got.dtype == tensors[0].dtype
        check_error_budget(got, truth, same_dtype)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("name", TREES)
def test_reference_in_float64(name, num_kv_heads):
    tree = TREES[name]()
    tensors = inputs(tree, torch.float64, num_kv_heads=num_kv_heads, head_dim=8)
    weight = weight_of(tensors[0], "torch")
    for got, truth in zip(
        results(span_attention, tensors, tree, weight), results(dense_attention, tensors, tree, weight), strict=True
    ):
        torch.testing.assert_close(got, truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", [name for name in TREES if name != "one-token"])
def test_error_is_that_of_plain_torch(name, dtype, backend, device, check_error_budget):
    tree = on_device(TREES[name](), device)
    check_against_dense(tree, inputs(tree, dtype, device=device), backend, check_error_budget)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", [name for name in TREES if name != "one-token"])
def test_merged_parts_on_the_cpu(name, dtype, monkeypatch, check_error_budget):
    """Every ancestor shared, though none of these trees is large enough for it."""
    monkeypatch.setattr(span_attention_cascade, "_CALL_COST", -1e18)
    tree = TREES[name]()
    check_against_dense(tree, inputs(tree, dtype), "cpu", check_error_budget)
    if name not in ("causal", "full", "causal-in-part", "parts-of-full-roots"):
        planned = tree.settled() if dtype == torch.float32 else tree  # with gradients
        ((_, shared),) = (value for key, (_, value) in planned._plans.items() if key[0] == "cascade")
        assert shared


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("call_cost", [-1e18, 1e18], ids=["merged", "copied"])
@pytest.mark.parametrize("name", TREES)
def test_the_cpu_in_float64(name, call_cost, num_kv_heads, monkeypatch):
    """With gradients a few spans at a time."""
    monkeypatch.setattr(span_attention_cascade, "_CALL_COST", call_cost)
    monkeypatch.setattr(span_attention_cascade, "_GRADIENT_BLOCK_BYTES", 4000)
    tree = TREES[name]()
    tensors = inputs(tree, torch.float64, num_kv_heads=num_kv_heads, head_dim=8)
    weight = weight_of(tensors[0], "torch")
    mine = functools.partial(span_attention, backend="cpu")
    found, truths = (results(function, tensors, tree, weight) for function in (mine, dense_attention))
    for got, truth in zip(found, truths, strict=True):
        torch.testing.assert_close(got, truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_one_token(dtype, backend, device):
    """Its output is its value; the gradients of q and k are 0, save the rounding of the two equal terms they subtract,
    for which a bound relative to the truth would leave nothing."""
    tree = on_device(TREES["one-token"](), device)
    q, k, v = inputs(tree, dtype, num_kv_heads=4, device=device)
    skip_what_is_refused(backend, q, k, v, tree)
    weight = weight_of(q, backend)
    mine = functools.partial(span_attention, backend=backend)
    found = results(mine, (q, k, v), tree, weight)
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(found[0], v, rtol=epsilon, atol=0)
    if weight is not None:
        term = float((v.double() * weight.double()).sum(2).abs().max()) * 16**-0.5
        assert found[1].abs().max() <= 4 * epsilon * term * k.abs().max()
        assert found[2].abs().max() <= 4 * epsilon * term * q.abs().max()
        torch.testing.assert_close(found[3], weight, rtol=epsilon, atol=0)


@pytest.mark.parametrize("num_kv_heads", [4, 1], ids=["mha", "mqa"])
def test_heads_that_share_keys(num_kv_heads, backend, device, check_error_budget):
    tree = on_device(TREES["answers-of-ragged-questions"](), device)
    tensors = inputs(tree, torch.float16, num_kv_heads=num_kv_heads, device=device)
    check_against_dense(tree, tensors, backend, check_error_budget)


@pytest.mark.parametrize("head_dim", [8, 20, 32, 64, 80, 128, 256])
def test_head_sizes(head_dim, backend, device, check_error_budget):
    """Powers of two and others, and below the least size of a matrix product in Triton."""
    if backend == "flex" and device.type == "cuda" and head_dim < 16:
        pytest.skip("FlexAttention needs 16 channels on CUDA")
    tree = on_device(TREES["images-of-two-prompts"](), device)
    tensors = inputs(tree, torch.float16, num_heads=2, num_kv_heads=1, head_dim=head_dim, device=device)
    check_against_dense(tree, tensors, backend, check_error_budget)


@pytest.mark.parametrize("scale", [0.1, 0.0, -0.3])
def test_scale(scale, backend, device, check_error_budget):
    tree = on_device(TREES["images-of-two-prompts"](), device)
    tensors = inputs(tree, torch.float16, device=device)
    check_against_dense(tree, tensors, backend, check_error_budget, scale=scale)


def test_long_spans(backend, device, check_error_budget):
    """Blocks of rows and tiles of keys that are allowed as a whole, before, beside and after those that are not."""
    spans = [(ids(140), -1, "causal"), (ids(150), 0, "full"), (ids(70), 1, "causal"), (ids(40), 0, "full")]
    spans += [(ids(180), -1, 90), (ids(30), 4, "causal")]
    tree = on_device(SpanTree.build(spans), device)
    tensors = inputs(tree, torch.float16, num_heads=2, num_kv_heads=1, device=device)
    check_against_dense(tree, tensors, backend, check_error_budget)


@pytest.mark.parametrize(
    "name", ["grown-answers", "answers-of-one-image", "first-root-unused", "decoding-ragged-regions"]
)
def test_slots_that_are_not_attended_may_hold_anything(name, backend, device):
    """A cache's unused slots are never initialised to something finite by contract; what an answer of an earlier batch
    left in the region of one that decodes is finite, since only answers without a NaN are continued."""
    tree = on_device(TREES[name](), device)
    tensors = inputs(tree, torch.float16, device=device)
    skip_what_is_refused(backend, *tensors, tree)
    weight = weight_of(tensors[0], backend)
    mine = functools.partial(span_attention, backend=backend)
    expected = results(mine, tensors, tree, weight)
    unused = ~tree.allowed().any(0)
    assert unused.any()
    q, k, v = (tensor.clone() for tensor in tensors)
    finite = backend == "cpu" and tree.num_visible is not None
    k[unused], v[unused] = (-1e4, 1e4) if finite else (float("nan"), float("inf"))
    found = results(mine, (q, k, v), tree, weight)
    assert all(torch.equal(got, wanted) for got, wanted in zip(found, expected, strict=True))
    assert all((grad[unused] == 0).all() for grad in found[2:])


def test_one_plan_serves_every_decoding_step(backend, device, check_error_budget):
    """Layers share what a step derives from the lengths; the next step derives it anew, from the same plan."""
    tree = on_device(decoding_answers(9), device)
    for step in range(3):
        tree = tree.with_tokens(tree.token_ids, torch.full_like(tree.num_visible, 2 + 4 * step))
        settled = on_device(tree.settled(), device)
        tensors = inputs(tree, torch.float16, device=device, seed=step)
        check_against_dense(tree, tensors, backend, check_error_budget)
        num_plans = len(tree._plans)
        q, k, v = tensors
        for layer in range(2):
            out = span_attention(q, k + layer, v, tree, backend=backend)
            expected = span_attention(q, k + layer, v, settled, backend="torch")
            torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)
        assert len(tree._plans) == num_plans


def test_a_plan_that_took_over_another_structure(backend, device, check_error_budget):
    """Of fixed trees of as many rows, whatever their spans; on the backend's own plan where its sizes are fixed."""
    trees = [
        SpanTree.build([(ids(n), -1, "causal"), (ids(m), 0, "full")], fixed=True).extend(
            [(ids(9), k, mode) for k in range(2)] + [(ids(22), 1, "full")]
        )
        for n, m, mode in ((5, 30, "causal"), (17, 4, "full"))
    ]
    first, second = (on_device(tree, device) for tree in trees)
    tensors = inputs(second, torch.float16, device=device)
    skip_what_is_refused(backend, *tensors, second)
    span_attention(*inputs(first, torch.float16, device=device), first, backend=backend)
    held = [leaf for leaf in tree_leaves([value for _, value in first._plans.values()]) if torch.is_tensor(leaf)]
    assert first.load_(second) == (backend == "triton")
    if backend == "triton":
        check_against_dense(first, tensors, backend, check_error_budget)
        again = tree_leaves([value for _, value in first._plans.values()])
        assert all(any(leaf is tensor for leaf in again) for tensor in held)


def test_storage_may_be_larger_than_the_tree(backend, device):
    tree = on_device(TREES["cached-leaves"](), device)
    q, k, v = inputs(tree, torch.float16, device=device)
    skip_what_is_refused(backend, q, k, v, tree)
    more = torch.full((7, *k.shape[1:]), float("nan"), dtype=k.dtype, device=device)
    expected = span_attention(q, k, v, tree, backend=backend)
    found = span_attention(q, torch.cat([k, more]), torch.cat([v, more]), tree, backend=backend)
    assert torch.equal(found, expected)


def test_strides(backend, device):
    """Slices of one projection, as the model has them; a layer of a cache; channels that lie apart; expanded heads."""
    tree = on_device(TREES["images-of-two-prompts"](), device)
    heads = torch.randn(len(tree.token_ids), 8, 16, generator=torch.Generator().manual_seed(0)).to(device).half()
    slices = heads.split([4, 2, 2], dim=1)
    apart = [view.transpose(1, 2).contiguous().transpose(1, 2) for view in slices]
    expanded = [slices[0], *(view[:, :1].expand(-1, 2, -1) for view in slices[1:])]
    skip_what_is_refused(backend, *slices, tree)
    for views in (slices, apart, expanded):
        weight = weight_of(views[0], backend)
        weight = weight if weight is None else weight.transpose(0, 1).contiguous().transpose(0, 1)
        mine = functools.partial(span_attention, backend=backend)
        dense = [view.contiguous() for view in views]
        contiguous = weight if weight is None else weight.contiguous()
        for got, expected in zip(
            results(mine, views, tree, weight), results(mine, dense, tree, contiguous), strict=True
        ):
            assert torch.equal(got, expected)


def test_strides_beyond_two_to_the_31(backend, device):
    """The third row starts at element 2^31, though the stride fits into 32 bits; on the CPU pages that nobody touches
    are never allocated."""
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 2**34:
        pytest.skip("needs 16 GiB of GPU memory")
    tree = on_device(SpanTree.build([([1, 2, 3], -1, "causal")]), device)
    near = inputs(tree, torch.float16, num_heads=2, num_kv_heads=2, device=device)
    skip_what_is_refused(backend, *near, tree)
    far = []
    for tensor in near:
        storage = torch.empty(2**31 + 32, dtype=torch.float16, device=device)
        far.append(storage.as_strided((3, 2, 16), (2**30, 16, 1)).copy_(tensor))
    weight = weight_of(near[0], backend)
    mine = functools.partial(span_attention, backend=backend)
    for got, expected in zip(results(mine, far, tree, weight), results(mine, near, tree, weight), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("build", [lambda: SpanTree.build([]), lambda: SpanTree.build([([1], -1, "full")]).extend([])])
def test_nothing_new(build, backend, device):
    """An empty tree, and one whose spans are all cached."""
    tree = on_device(build(), device)
    tensors = inputs(tree, torch.float16, device=device)
    skip_what_is_refused(backend, *tensors, tree)
    assert span_attention(*tensors, tree, backend=backend).shape == (0, 4, 16)
    if weight_of(tensors[0], backend) is not None and backend == "triton":
        tensors = [tensor.requires_grad_() for tensor in tensors]
        grads = torch.autograd.grad(span_attention(*tensors, tree, backend=backend).sum(), tensors)
        assert [grad.shape for grad in grads] == [tensor.shape for tensor in tensors]
        assert all((grad == 0).all() for grad in grads)


def test_results_repeat_to_the_last_bit(backend, device):
    tree = on_device(TREES["ragged-forest"](), device)
    tensors = inputs(tree, torch.float16, device=device)
    skip_what_is_refused(backend, *tensors, tree)
    weight = weight_of(tensors[0], backend)
    mine = functools.partial(span_attention, backend=backend)
    once, again = (results(mine, tensors, tree, weight) for _ in range(2))
    assert all(torch.equal(first, second) for first, second in zip(once, again, strict=True))


def test_compiles_as_a_whole(backend, device):
    """torch.compile finds no graph break once the tree is planned; the compiled op gives the same, gradients too."""
    tree = on_device(TREES["cached-leaves"](), device)
    tensors = inputs(tree, torch.float32, device=device)
    skip_what_is_refused(backend, *tensors, tree)
    weight = weight_of(tensors[0], backend)

    def mine(q, k, v, tree):
        return span_attention(q, k, v, tree, backend=backend)

    expected = results(mine, tensors, tree, weight)
    # FlexAttention's compiled kernel for the CPU is not what this backend runs there, and refuses this mask.
    compiler = "eager" if backend == "flex" and device.type == "cpu" else "inductor"
    found = results(torch.compile(mine, fullgraph=True, backend=compiler), tensors, tree, weight)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-6)


def stand_in_flash_attn():
    """flash_attn with flash_attn_varlen_func as its documentation defines it, in plain torch and any dtype."""

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        deterministic=False,
    ):
        assert q.dim() == k.dim() == v.dim() == 3 and q.shape[1] % k.shape[1] == 0 and dropout_p == 0
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and deterministic
        bounds = [cu_seqlens.tolist() for cu_seqlens in (cu_seqlens_q, cu_seqlens_k)]
        assert [bound[-1] for bound in bounds] == [len(q), len(k)]
        assert [int(np.diff(bound).max()) for bound in bounds] == [max_seqlen_q, max_seqlen_k]
        repeats = q.shape[1] // k.shape[1]
        k, v = (tensor.repeat_interleave(repeats, 1) for tensor in (k, v))
        return ragged_attention(q, k, v, *bounds, softmax_scale, causal)

    return {"flash_attn": {"flash_attn_varlen_func": flash_attn_varlen_func}}


def stand_in_xformers():
    """xformers with memory_efficient_attention and the two masks as its documentation defines them."""

    class BlockDiagonalMask:
        causal = False

        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None):
            assert all(type(length) is int for length in q_seqlen + kv_seqlen)
            mask = cls()
            mask.bounds = [[0, *np.cumsum(lengths).tolist()] for lengths in (q_seqlen, kv_seqlen)]
            return mask

    class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
        causal = True

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
        assert query.dim() == 4 and query.shape[0] == 1 and query.shape[2:] == key.shape[2:] == value.shape[2:]
        assert [bound[-1] for bound in attn_bias.bounds] == [query.shape[1], key.shape[1]] and p == 0
        out = ragged_attention(query[0], key[0], value[0], *attn_bias.bounds, scale, attn_bias.causal)
        return out[None]

    return {
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": memory_efficient_attention},
        "xformers.ops.fmha": {},
        "xformers.ops.fmha.attn_bias": {
            "BlockDiagonalMask": BlockDiagonalMask,
            "BlockDiagonalCausalFromBottomRightMask": BlockDiagonalCausalFromBottomRightMask,
        },
    }


def ragged_attention(q, k, v, query_bounds, key_bounds, scale, causal):
    """Each sequence by itself; a causal mask is aligned at the bottom right."""
    outs = []
    for query, key in zip(
        map(slice, query_bounds[:-1], query_bounds[1:]), map(slice, key_bounds[:-1], key_bounds[1:]), strict=True
    ):
        scores = torch.einsum("qhd,khd->hqk", q[query], k[key]) * (q.shape[2] ** -0.5 if scale is None else scale)
        if causal:
            kept = torch.ones(scores.shape[1:], dtype=torch.bool).tril(scores.shape[2] - scores.shape[1])
            scores = scores.masked_fill(~kept, float("-inf"))
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(2), v[key]))
    return torch.cat(outs)


@pytest.fixture(params=["flash_attn", "xformers"])
def library_backend(request, monkeypatch):
    """The backend of a library, which a stand-in replaces: neither library runs without a GPU."""
    stand_in = {"flash_attn": stand_in_flash_attn, "xformers": stand_in_xformers}[request.param]
    for name, members in stand_in().items():
        module = types.ModuleType(name)
        module.__dict__.update(members, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
    return getattr(span_attention_varlen, request.param)


@pytest.mark.parametrize("name", [name for name in TREES if not TREES[name]().has_mixed])
def test_packing_for_libraries(name, library_backend):
    """What the backends hand to the libraries, against the truth in float64; twice, for the plan is kept."""
    tree = TREES[name]()
    tensors = inputs(tree, torch.float64, head_dim=8)
    weight = weight_of(tensors[0], "torch")
    expected = results(dense_attention, tensors, tree, weight)
    for _ in range(2):
        for got, truth in zip(results(library_backend, tensors, tree, weight), expected, strict=True):
            torch.testing.assert_close(got, truth, rtol=0, atol=1e-12)


def test_libraries_with_a_scale_and_nothing_to_do(library_backend):
    tree = TREES["images-of-two-prompts"]()
    tensors = inputs(tree, torch.float64)
    torch.testing.assert_close(library_backend(*tensors, tree, scale=0.1), dense_attention(*tensors, tree, 0.1))
    empty = torch.zeros(0, 4, 8)
    assert library_backend(empty, empty, empty, SpanTree.build([])).shape == (0, 4, 8)


@pytest.mark.parametrize("name", TREES)
def test_flex_block_mask(name):
    """The block mask from the plan is what FlexAttention makes of the dense mask."""
    mask = span_attention_flex._make_plan(TREES[name]().settled()).mask
    dense = create_block_mask(mask.mask_mod, None, None, *mask.seq_lengths, device="cpu")
    for field in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, field), getattr(dense, field)), field
    assert torch.equal(mask.to_dense(), dense.to_dense())


def test_messages():
    tree = SpanTree.build([([1, 2, 3], -1, "causal")])
    q, k, v = inputs(tree, torch.float32, head_dim=8)
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


@pytest.mark.parametrize(
    ("dtype", "head_dim", "refusals"),
    [
        (torch.float64, 16, {"triton": "needs fp32, bf16 or fp16", "flex": "needs fp32, bf16 or fp16"}),
        (torch.float32, 20, {"flash_attn": "needs fp16 or bf16", "xformers": "a multiple of 8"}),
        (torch.float16, 512, {"triton": "head_dim of at most 256", "flash_attn": "head_dim of at most 256"}),
        (torch.float16, 8, {"flex": "head_dim of at least 16", "xformers": "a tensor is on meta, needs cuda"}),
    ],
    ids=["fp64", "fp32", "wide", "narrow"],
)
def test_backends_that_cannot_run_say_why(dtype, head_dim, refusals, monkeypatch):
    monkeypatch.setattr(registry, "ENVIRONMENT_CHECKS", {})
    tree = SpanTree.build([([1, 2, 3], -1, "causal")])
    reasons = dict(registry.explain(OP, *inputs(tree, dtype, head_dim=head_dim, device="meta"), tree))
    assert list(reasons) == ["triton", "cpu", "torch", "flex", "flash_attn", "xformers"]
    assert next(name for name, reason in reasons.items() if reason is None) == "torch"
    assert reasons["cpu"] == "a tensor is on meta, needs cpu"
    assert all(reason in reasons[backend] for backend, reason in refusals.items())


@pytest.mark.parametrize("library", ["flash_attn", "xformers"])
def test_libraries_refuse_spans_that_are_causal_in_part(library, monkeypatch):
    """New ones only: a decoding step of answers, whose image is cached, is theirs again."""
    monkeypatch.setattr(registry, "ENVIRONMENT_CHECKS", {})
    tree = SpanTree.build([(ids(9), -1, 3)])
    answers = tree.extend([([1], 0, "causal")])
    reasons = [dict(registry.explain(OP, *inputs(tree, torch.float16), tree))[library] for tree in (tree, answers)]
    assert "causal in part" in reasons[0] and "needs cuda" in reasons[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_cpu_has_gradients_in_wide_dtypes(dtype):
    tree = SpanTree.build([([1, 2, 3], -1, "causal")])
    q, k, v = inputs(tree, dtype)
    v.requires_grad_()
    first = next(name for name, reason in registry.explain(OP, q, k, v, tree) if reason is None)
    assert first == ("cpu" if dtype == torch.float32 else "torch")
    if dtype == torch.bfloat16:
        with pytest.raises(BackendError, match="cpu: a gradient is wanted and q is torch.bfloat16, needs fp32 or fp64"):
            span_attention(q, k, v, tree, backend="cpu")
    with torch.no_grad():
        assert span_attention(q, k, v, tree, backend="cpu").shape == q.shape


@pytest.mark.parametrize("num_samples", [1, 64], ids=["copied", "shared"])
def test_shared_ancestors_are_not_copied_on_the_cpu(num_samples, largest_tensor):
    """A decoding step of many answers makes nothing as large as their questions' image once an answer; a single answer
    has its keys gathered, which costs less than merging."""
    tree = SpanTree.build([(ids(100), -1, "full")]).extend([([1], 0, "causal")] * num_samples, reserve=3)
    tensors = inputs(tree, torch.float32, num_heads=8, num_kv_heads=8, head_dim=64)
    span_attention(*tensors, tree, backend="cpu")
    with largest_tensor as seen:
        span_attention(*tensors, tree, backend="cpu")
    keys = (num_samples * 101 if num_samples == 1 else num_samples) * 8 * 64
    assert tensors[1].numel() >= seen.numel >= keys and len(tree._plans) == 1
    ((own, shared),) = (value for _, value in tree._plans.values())
    assert len(shared) == (num_samples > 1)


def test_flex_has_no_gradient_on_the_cpu():
    tree = SpanTree.build([([1, 2, 3], -1, "causal")])
    q, k, v = inputs(tree, torch.float32)
    with pytest.raises(BackendError, match="FlexAttention has no gradient on the CPU"):
        span_attention(q.requires_grad_(), k, v, tree, backend="flex")
    with torch.no_grad():
        assert span_attention(q, k, v, tree, backend="flex").shape == q.shape


def test_missing_libraries_are_named():
    for module, package in (("flash_attn", "flash-attn"), ("xformers", "xformers")):
        if importlib.util.find_spec(module) is None:
            reason = registry.backends()[OP][module]
            assert reason == f"{module} is not installed; run: pip install {package}"
