import pytest
import torch
import torch.nn.functional as F

from hermesflow.kernels import linear_logprob as module
from hermesflow.kernels.linear_logprob import linear_logprob, row_blocks

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = {  # T, D, V, rows a block (None: the default workspace)
    "one_block": (6, 16, 40, None),
    "ragged_blocks": (11, 16, 129, 4),
    "block_a_row": (3, 8, 50, 1),
    "one_row": (1, 8, 50, None),
    "one_id": (4, 8, 1, None),
}


def make_case(num_tokens, width, vocab_size, dtype, ignored=()):
    generator = torch.Generator().manual_seed(num_tokens * 1000 + vocab_size)
    x, weight, bias = (
        torch.randn(*s, generator=generator) for s in ((num_tokens, width), (vocab_size, width), (vocab_size,))
    )
    target = torch.randint(vocab_size, (num_tokens,), generator=generator)
    target[list(ignored)] = -100
    return [t.to(dtype) for t in (x, weight, bias)], target, torch.randn(num_tokens, generator=generator)


def plain(x, weight, bias, target):
    """The head, log_softmax and gather in the inputs' own dtype, the whole [T, V] at once."""
    kept = target != -100
    logprob = F.linear(x, weight, bias).log_softmax(1).gather(1, torch.where(kept, target, 0)[:, None]).squeeze(1)
    return torch.where(kept, logprob, 0.0)


def run(function, inputs, grad):
    """Output and the gradients of function(*inputs)."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))


def call(target, **options):
    """linear_logprob of (x, weight) or (x, weight, bias) as positional arguments."""
    return lambda x, weight, bias=None: linear_logprob(x, weight, target, bias=bias, **options)


@pytest.fixture
def set_block_rows(monkeypatch):
    """Make the workspace hold that many rows of fp32 logits."""

    def set_rows(rows, vocab_size, itemsize=4):
        if rows is not None:
            monkeypatch.setattr(module, "WORKSPACE_BYTES", rows * vocab_size * itemsize)

    return set_rows


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_and_gradients(shape, dtype, with_bias, set_block_rows, check_error_budget):
    *sizes, block_rows = shape
    inputs, target, grad = make_case(*sizes, dtype, ignored=[1] if sizes[0] > 1 else [])
    inputs = inputs if with_bias else inputs[:2]
    set_block_rows(block_rows, sizes[2])
    got = run(call(target), inputs, grad)

    def whole(x, weight, bias=None):
        return plain(x, weight, bias, target)

    truth = run(whole, [t.double() for t in inputs], grad)
    low = run(whole, inputs, grad)
    high = whole(*(t.float() for t in inputs))
    assert got[0].dtype == torch.float32 and all(g.dtype == dtype for g in got[1:])
    # The output is fp32 whatever the inputs: plain torch in fp32 sets its budget, in the inputs' dtype the gradients'.
    for mine, exact, peer in zip(got, truth, (high, *low[1:]), strict=True):
        check_error_budget(mine, exact, peer)


def test_non_contiguous():
    (x, weight, bias), target, grad = make_case(6, 10, 33, torch.float32, ignored=[2])
    expected = run(call(target), (x, weight, bias), grad)
    strided = run(
        lambda x, w, b: linear_logprob(
            x.t().contiguous().t(), w.repeat_interleave(2, 0)[::2], target.repeat_interleave(2)[::2],
            bias=b.repeat_interleave(2)[::2],
        ),
        (x, weight, bias), grad,
    )  # fmt: skip
    torch.testing.assert_close(strided, expected, rtol=1e-5, atol=1e-6)


def test_blocks_give_the_same(set_block_rows):
    inputs, target, grad = make_case(10, 16, 70, torch.float32, ignored=[0, 7])
    expected = run(call(target), inputs, grad)
    set_block_rows(3, 70)
    torch.testing.assert_close(run(call(target), inputs, grad), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_ignored_rows(ignore_index):
    inputs, target, grad = make_case(5, 8, 20, torch.float32)
    target = torch.where(target == 3, 4, target)
    target[1:3] = ignore_index
    out, grad_x, grad_weight, grad_bias = run(call(target, ignore_index=ignore_index), inputs, grad)
    assert (out[1:3] == 0).all() and (grad_x[1:3] == 0).all()
    kept = [0, 3, 4]
    expected = run(call(target[kept]), (inputs[0][kept], *inputs[1:]), grad[kept])
    torch.testing.assert_close((out[kept], grad_x[kept], grad_weight, grad_bias), expected)


def test_all_ignored_and_empty():
    for num_tokens in (3, 0):
        inputs, _, grad = make_case(num_tokens, 8, 20, torch.float32)
        out, *grads = run(call(torch.full((num_tokens,), -100)), inputs, grad)
        assert out.shape == (num_tokens,) and not out.any()
        assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, inputs, strict=True))


@pytest.mark.parametrize("wanted", range(3), ids=["x", "weight", "bias"])
def test_one_gradient_alone(wanted):
    inputs, target, grad = make_case(5, 8, 20, torch.float32)
    expected = run(call(target), inputs, grad)[1 + wanted]
    inputs[wanted].requires_grad_()
    linear_logprob(*inputs[:2], target, bias=inputs[2]).backward(grad)
    torch.testing.assert_close(inputs[wanted].grad, expected)


def test_autocast_does_not_lower_the_precision():
    inputs, target, grad = make_case(5, 32, 40, torch.float32)
    expected = run(call(target), inputs, grad)

    def under_autocast(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return call(target)(*inputs)

    torch.testing.assert_close(run(under_autocast, inputs, grad), expected, rtol=0, atol=0)


def test_no_tensor_above_the_workspace(set_block_rows, largest_tensor):
    num_tokens, width, vocab_size, block_rows = 64, 4, 100, 5
    inputs, target, grad = make_case(num_tokens, width, vocab_size, torch.float32)
    set_block_rows(block_rows, vocab_size)
    with largest_tensor as seen:
        run(call(target), inputs, grad)
    assert seen.numel == block_rows * vocab_size


def test_no_logits_are_kept_for_the_backward(set_block_rows):
    num_tokens, width, vocab_size = 64, 4, 100
    inputs, target, _ = make_case(num_tokens, width, vocab_size, torch.float32)
    set_block_rows(5, vocab_size)
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call(target)(*(t.requires_grad_() for t in inputs))
    assert sum(kept) < 5 * vocab_size


def test_row_blocks(set_block_rows):
    set_block_rows(4, 10)
    assert list(row_blocks(9, 40)) == [slice(0, 4), slice(4, 8), slice(8, 9)]
    assert list(row_blocks(2, 1000)) == [slice(0, 1), slice(1, 2)]
    assert list(row_blocks(0, 40)) == [slice(0, 0)]


def test_gradcheck(set_block_rows):
    inputs, target, _ = make_case(5, 3, 7, torch.float64, ignored=[3])
    set_block_rows(2, 7, itemsize=8)
    assert torch.autograd.gradcheck(call(target), [t.requires_grad_() for t in inputs])


X, W, B, Y = torch.zeros(4, 6), torch.zeros(5, 6), torch.zeros(5), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[0], W, Y, B), r"linear_logprob: expected x .*\[T, D\], got float32 \[6\]"),
        ((X.int(), W, Y, B), r"expected x float32 or .*got int32"),
        ((X, W[:, :3], Y, B), r"expected x \[T, D\] and weight \[V, D\], got \[4, 6\] and \[5, 3\]"),
        ((X, W.half(), Y, B), r"expected weight float32 .*got float16"),
        ((X, W, Y, B[:3]), r"expected bias float32 \[V\] = \[5\].*got float32 \[3\]"),
        ((X, W, Y[:3], B), r"expected target int64 \[T\] = \[4\].*got int64 \[3\]"),
        ((X, W[:0], Y, B[:0]), r"expected at least one token id"),
        ((X, W, Y + 5, B), r"expected target ids in \[0, 5\) or ignore_index -100, got 5 in row 0"),
        ((X, W.to("meta"), Y, B), r"expected weight .*on cpu, got .*meta"),
    ],
    ids=["rank", "dtype", "width", "weight_dtype", "bias_length", "target_length", "no_ids", "target_range", "device"],
)
def test_errors(arguments, message):
    x, weight, target, bias = arguments
    with pytest.raises(ValueError, match=message):
        linear_logprob(x, weight, target, bias=bias)
