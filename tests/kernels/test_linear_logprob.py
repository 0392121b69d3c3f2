import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from hermesflow.kernels import checks, registry
from hermesflow.kernels import linear_logprob as module
from hermesflow.kernels import linear_logprob_blocked as driver
from hermesflow.kernels.linear_logprob import linear_logprob, row_blocks

OP = "linear_logprob"
needs_extension = pytest.mark.skipif(checks.cpu_missing() is not None, reason=str(checks.cpu_missing()))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = {  # T, D, V, rows and ids a block (None: the default sizes)
    "one_block": (6, 16, 40, None),
    "ragged_blocks": (11, 16, 129, (4, 50)),
    "block_a_row": (3, 8, 50, (1, 50)),
    "many_tiles": (140, 24, 200, None),  # more than one of the Triton kernels' tiles each way, D no multiple of theirs
    "one_row": (1, 8, 50, None),
    "one_id": (4, 8, 1, None),
}


def make_case(num_tokens, width, vocab_size, dtype, ignored=(), device="cpu"):
    generator = torch.Generator().manual_seed(num_tokens * 1000 + vocab_size)
    x, weight, bias = (
        torch.randn(*s, generator=generator) for s in ((num_tokens, width), (vocab_size, width), (vocab_size,))
    )
    target = torch.randint(vocab_size, (num_tokens,), generator=generator)
    target[list(ignored)] = -100
    grad = torch.randn(num_tokens, generator=generator)
    return [t.to(device, dtype) for t in (x, weight, bias)], target.to(device), grad.to(device)


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


def call(target, backend="torch", **options):
    """linear_logprob of (x, weight) or (x, weight, bias) as positional arguments."""
    return lambda x, weight, bias=None: linear_logprob(x, weight, target, bias=bias, backend=backend, **options)


@pytest.fixture
def set_blocks(monkeypatch):
    """Make the blocks of the reference, or of the other backends' walk, hold so many rows and ids."""

    def set_sizes(rows, ids, itemsize=4):
        monkeypatch.setattr(module, "REFERENCE_BLOCK_BYTES", rows * ids * itemsize)
        monkeypatch.setattr(driver, "BLOCK_ROWS", dict.fromkeys(driver.BLOCK_ROWS, rows))
        monkeypatch.setattr(driver, "BLOCK_IDS", dict.fromkeys(driver.BLOCK_IDS, ids))

    return set_sizes


@pytest.fixture
def keep_rows(monkeypatch):
    """Keep so many rows' logits of a vocabulary, fp32, for the backward pass."""

    def set_bytes(num_rows, vocab_size):
        tiles = -(-vocab_size // driver.TILE)
        monkeypatch.setattr(driver, "KEPT_BYTES", num_rows * tiles * driver.TILE * 4)

    return set_bytes


@pytest.fixture
def set_workspace(monkeypatch):
    """Make the walk's workspace so many bytes."""
    return lambda size: monkeypatch.setattr(driver, "WORKSPACE_BYTES", dict.fromkeys(driver.WORKSPACE_BYTES, size))


def check_against_truth(inputs, target, grad, backend, check_error_budget):
    """Forward and every gradient against fp64."""
    got = run(call(target, backend), inputs, grad)

    def whole(x, weight, bias=None):
        return plain(x, weight, bias, target)

    truth = run(whole, [t.double() for t in inputs], grad)
    low = run(whole, inputs, grad)
    high = whole(*(t.float() for t in inputs))
    assert got[0].dtype == torch.float32 and all(g.dtype == inputs[0].dtype for g in got[1:])
    # The output is fp32 whatever the inputs: plain torch in fp32 sets its budget, in the inputs' dtype the gradients'.
    for mine, exact, peer in zip(got, truth, (high, *low[1:]), strict=True):
        check_error_budget(mine, exact, peer)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_and_gradients(shape, dtype, with_bias, backend, device, set_blocks, check_error_budget):
    *sizes, blocks = shape
    inputs, target, grad = make_case(*sizes, dtype, ignored=[1] if sizes[0] > 1 else [], device=device)
    if blocks:
        set_blocks(*blocks)
    check_against_truth(inputs if with_bias else inputs[:2], target, grad, backend, check_error_budget)


@pytest.mark.parametrize("num_kept", [0, 5, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_kept_and_rows_that_are_not(
    dtype, num_kept, backend, device, set_blocks, keep_rows, check_error_budget
):
    """Blocks of 4 rows and 128 ids, of which the first 5 rows are kept: 4 + 1, and 4 + 2 computed again."""
    inputs, target, grad = make_case(12, 16, 310, dtype, ignored=[2], device=device)
    set_blocks(4, 128)
    keep_rows(num_kept, 310)
    check_against_truth(inputs, target, grad, backend, check_error_budget)


@pytest.mark.parametrize("num_kept", [0, 40])
def test_a_graph_may_be_used_twice(num_kept, backend, device, keep_rows):
    inputs, target, grad = make_case(9, 16, 200, torch.float32, device=device)
    keep_rows(num_kept, 200)
    inputs = [t.requires_grad_() for t in inputs]
    logprob = call(target, backend)(*inputs)
    first = torch.autograd.grad(logprob, inputs, grad, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(logprob, inputs, grad), first, rtol=0, atol=0)


@pytest.mark.parametrize("vocab_size", [58498, 8192])
def test_production_vocabularies(vocab_size, backend, device, check_error_budget):
    inputs, target, grad = make_case(3, 8, vocab_size, torch.float32, ignored=[1], device=device)
    target[2] = vocab_size - 1
    check_against_truth(inputs, target, grad, backend, check_error_budget)


@pytest.mark.parametrize("ignored", [[], [0, 6, 7]], ids=["all_rows", "ignored_rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_passes(dtype, ignored, backend, device, monkeypatch, check_error_budget):
    """More rows than the workspace has room for in grad_x: passes of 5 rows, in blocks of 3."""
    num_tokens, width, vocab_size = 13, 8, 30
    inputs, target, grad = make_case(num_tokens, width, vocab_size, dtype, ignored, device)
    monkeypatch.setattr(driver, "block_sizes", lambda device, width: driver.BlockSizes(3, 16, 5))
    check_against_truth(inputs, target, grad, backend, check_error_budget)


def test_non_contiguous(backend, device):
    (x, weight, bias), target, grad = make_case(6, 10, 33, torch.float32, ignored=[2], device=device)
    expected = run(call(target, backend), (x, weight, bias), grad)
    for dense in (target, torch.where(target == -100, 3, target)):
        expected = run(call(dense, backend), (x, weight, bias), grad)
        strided = run(
            lambda x, w, b, dense=dense: linear_logprob(
                x.t().contiguous().t(),
                w.repeat_interleave(2, 0)[::2],
                dense.repeat_interleave(2)[::2],
                bias=b.repeat_interleave(2)[::2],
                backend=backend,
            ),
            (x, weight, bias),
            grad.repeat_interleave(2)[::2],
        )
        torch.testing.assert_close(strided, expected, rtol=1e-5, atol=1e-6)
        transposed = run(
            lambda x, w, b, dense=dense: linear_logprob(x, w.t().contiguous().t(), dense, bias=b, backend=backend),
            (x, weight, bias),
            grad,
        )
        torch.testing.assert_close(transposed, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", ["x", "weight"])
def test_strides_beyond_32_bits(which, backend, device):
    """Rows 2^31 elements apart; only the pages that are written exist."""
    (x, weight, _), target, grad = make_case(2, 8, 2, torch.float16, device=device)
    storage = torch.empty(2**31 + 8, dtype=torch.float16, device=device)
    far = storage.as_strided((2, 8), (2**31, 1))
    far.copy_({"x": x, "weight": weight}[which])
    inputs = (far, weight) if which == "x" else (x, far)
    out = linear_logprob(*inputs, target, backend=backend)
    torch.testing.assert_close(out, linear_logprob(x, weight, target, backend="torch"), rtol=1e-5, atol=1e-5)
    leaf = (x if which == "weight" else weight).detach().requires_grad_()
    inputs = (far, leaf) if which == "x" else (leaf, far)
    (found,) = torch.autograd.grad(linear_logprob(*inputs, target, backend=backend), leaf, grad)
    inputs = (x, leaf) if which == "x" else (leaf, weight)
    (expected,) = torch.autograd.grad(linear_logprob(*inputs, target, backend="torch"), leaf, grad)
    torch.testing.assert_close(found, expected)


def test_blocks_give_the_same(backend, device, set_blocks):
    inputs, target, grad = make_case(10, 16, 70, torch.float32, ignored=[0, 7], device=device)
    expected = run(call(target, backend), inputs, grad)
    set_blocks(3, 70)
    torch.testing.assert_close(run(call(target, backend), inputs, grad), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_ignored_rows(ignore_index, backend, device):
    inputs, target, grad = make_case(5, 8, 20, torch.float32, device=device)
    target = torch.where(target == 3, 4, target)
    target[1:3] = ignore_index
    out, grad_x, *grads = run(call(target, backend, ignore_index=ignore_index), inputs, grad)
    assert (out[1:3] == 0).all() and (grad_x[1:3] == 0).all()
    kept = [0, 3, 4]
    expected = run(call(target[kept], backend), (inputs[0][kept], *inputs[1:]), grad[kept])
    torch.testing.assert_close((out[kept], grad_x[kept], *grads), expected)
    inputs[0][1:3] = float("nan")
    poisoned = run(call(target, backend, ignore_index=ignore_index), inputs, grad)
    torch.testing.assert_close(poisoned, (out, grad_x, *grads))


def test_all_ignored_and_empty(backend, device):
    for num_tokens in (3, 0):
        inputs, _, grad = make_case(num_tokens, 8, 20, torch.float32, device=device)
        target = torch.full((num_tokens,), -100, device=device)
        out, *grads = run(call(target, backend), inputs, grad)
        assert out.shape == (num_tokens,) and not out.any()
        assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, inputs, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entropy(dtype, backend, device, set_blocks):
    """Without gradient, 0 where ignored; ids that a bias of -inf forbids add nothing, a certain row has none."""
    (x, weight, bias), target, grad = make_case(7, 8, 45, dtype, ignored=[2], device=device)
    bias[[3, 44]] = -float("inf")
    target[(target == 3) | (target == 44)] = 5
    x[6] *= 40
    set_blocks(4, 20)
    weight.requires_grad_()
    logprob, entropy = linear_logprob(x, weight, target, bias=bias, return_entropy=True, backend=backend)
    assert logprob.requires_grad and not entropy.requires_grad and entropy.dtype == torch.float32
    truth = F.linear(x.double(), weight.double(), bias.double()).log_softmax(1)
    truth = -(truth.exp() * truth.clamp(min=-1e4)).sum(1)
    truth[2] = 0
    # Logits reach a few hundred: a rounding there is 3e-5.
    torch.testing.assert_close(entropy.double(), truth.detach(), rtol=1e-5, atol=1e-4)
    (found,) = torch.autograd.grad(logprob, weight, grad)
    (expected,) = torch.autograd.grad(linear_logprob(x, weight, target, bias=bias, backend="torch"), weight, grad)
    torch.testing.assert_close(found, expected)
    alone = linear_logprob(x, weight, target, bias=bias, backend=backend)
    assert torch.equal(alone, logprob)


def test_rows_without_a_distribution(backend, device):
    """NaN beside good rows, and nothing but -inf: NaN."""
    (x, weight, bias), target, _ = make_case(3, 8, 20, torch.float32, device=device)
    x[1] = float("nan")
    found = linear_logprob(x, weight, target, bias=bias, backend=backend)
    assert torch.isnan(found).tolist() == [False, True, False]
    found = linear_logprob(x[:1], weight, target[:1], bias=torch.full_like(bias, -float("inf")), backend=backend)
    assert torch.isnan(found).all()


@pytest.mark.parametrize("wanted", range(3), ids=["x", "weight", "bias"])
def test_one_gradient_alone(wanted, backend, device):
    inputs, target, grad = make_case(5, 8, 20, torch.float32, device=device)
    expected = run(call(target, backend), inputs, grad)[1 + wanted]
    inputs[wanted].requires_grad_()
    linear_logprob(*inputs[:2], target, bias=inputs[2], backend=backend).backward(grad)
    torch.testing.assert_close(inputs[wanted].grad, expected)


@pytest.mark.parametrize("wanted", range(3), ids=["x", "weight", "bias"])
def test_only_wanted_gradients_are_computed(wanted, backend, monkeypatch):
    if backend == "torch":
        pytest.skip("plain autograd decides")
    (x, weight, bias), target, grad = make_case(5, 8, 20, torch.float32)
    products, multiply = [], driver.multiply

    def counted(a, b, out, **options):
        if out.shape != (5, 20):  # not the logits
            products.append(out.shape)
        multiply(a, b, out, **options)

    monkeypatch.setattr(driver, "multiply", counted)
    inputs = [x, weight, bias]
    inputs[wanted].requires_grad_()
    logprob = linear_logprob(x, weight, target, bias=bias, backend=backend)
    products.clear()
    logprob.backward(grad)
    assert products == [[x.shape], [weight.shape], []][wanted]


def test_inference_mode(backend, device):
    inputs, target, _ = make_case(5, 8, 20, torch.float32, ignored=[1], device=device)
    expected = call(target, "torch")(*inputs)
    with torch.inference_mode():
        torch.testing.assert_close(call(target, backend)(*inputs), expected)


def test_autocast_does_not_lower_the_precision(backend, device):
    inputs, target, grad = make_case(5, 32, 40, torch.float32, device=device)
    expected = run(call(target, backend), inputs, grad)

    def under_autocast(*inputs):
        with torch.autocast(device.type, torch.bfloat16):
            return call(target, backend)(*inputs)

    torch.testing.assert_close(run(under_autocast, inputs, grad), expected, rtol=0, atol=0)


def test_no_tensor_above_the_workspace(set_blocks, largest_tensor):
    num_tokens, width, vocab_size, block_rows = 64, 4, 100, 5
    inputs, target, grad = make_case(num_tokens, width, vocab_size, torch.float32)
    set_blocks(block_rows, vocab_size)
    with largest_tensor as seen:
        run(call(target), inputs, grad)
    assert seen.numel == block_rows * vocab_size


@needs_extension
@pytest.mark.parametrize("ignored", [[], [0, 900]], ids=["all_rows", "ignored_rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_stays_in_the_workspace(dtype, ignored, set_blocks, set_workspace, peak_bytes):
    """Beside gradients and a few vectors; the logits would take 18 times the workspace."""
    num_tokens, width, vocab_size, workspace = 1000, 16, 600, 128 << 10
    inputs, target, grad = make_case(num_tokens, width, vocab_size, dtype, ignored)
    set_blocks(64, 64)
    set_workspace(workspace)
    run(call(target, "cpu"), inputs, grad)  # what is made once is not counted
    gradients = sum(t.nbytes for t in inputs)
    vectors = 16 * 8 * (num_tokens + vocab_size)
    assert peak_bytes(lambda: run(call(target, "cpu"), inputs, grad)) <= workspace + gradients + vectors
    assert num_tokens * vocab_size * 4 > 18 * workspace


def test_the_rows_are_let_go_at_once():
    """A reference cycle would hold the last block of x until the garbage collector comes."""
    (x, _, _), target, _ = make_case(6, 8, 30, torch.bfloat16, ignored=[1])
    gc.collect()
    gc.disable()
    try:
        rows = driver.Rows(x, target, -100)
        block = weakref.ref(rows.block(slice(0, 5)))
        assert block() is rows.block(slice(0, 5))
        del rows
        assert block() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("width", [1, 512, 2048, 8192])
def test_block_sizes_stay_in_the_workspace(width, device_type):
    """The sum of what the walk holds, in its worst case: fp32, ignored rows, every gradient."""
    sizes = driver.block_sizes(torch.device(device_type), width)
    grad_x, block = 4 * width * sizes.pass_rows, 4 * sizes.rows * sizes.ids
    x_and_weight = 4 * width * (2 * sizes.rows + sizes.ids)
    # dz of the block before, and this one's logits.
    blocks = 2 * block
    assert grad_x + x_and_weight + blocks <= driver.WORKSPACE_BYTES[device_type]


@pytest.mark.parametrize("num_kept", [0, 10])
def test_so_many_rows_are_kept_for_the_backward(num_kept, backend, device, set_blocks, keep_rows):
    num_tokens, width, vocab_size = 64, 4, 100
    keep_rows(num_kept, vocab_size)
    inputs, target, _ = make_case(num_tokens, width, vocab_size, torch.float32, device=device)
    set_blocks(5, vocab_size)
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call(target, backend)(*(t.requires_grad_() for t in inputs))
    # Beside the inputs and lse.
    given = {t.data_ptr() for t in (*inputs, target)}
    num_logits = num_kept * (driver.TILE + 1) if backend == "triton" else 0
    assert sum(size for pointer, size in kept.items() if pointer not in given) <= num_tokens + num_logits


def test_row_blocks(set_blocks):
    set_blocks(4, 10)
    assert list(row_blocks(9, 40)) == [slice(0, 4), slice(4, 8), slice(8, 9)]
    assert list(row_blocks(2, 1000)) == [slice(0, 1), slice(1, 2)]
    assert list(row_blocks(0, 40)) == [slice(0, 0)]


def test_gradcheck(set_blocks):
    inputs, target, _ = make_case(5, 3, 7, torch.float64, ignored=[3])
    set_blocks(2, 7, itemsize=8)
    assert torch.autograd.gradcheck(call(target), [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_a_block_in_low_precision(dtype, backend, device):
    """dz is rounded once, from fp32, to the dtype that a GPU's next matmuls take."""
    if backend != "triton":
        pytest.skip("its matmuls take fp32")
    (x, weight, bias), target, grad = make_case(5, 16, 70, torch.float32, device=device)
    x, weight = x.to(dtype), weight.to(dtype)
    logits = F.linear(x.float(), weight.float())
    lse = (logits + bias).logsumexp(1)
    first, out = 20, torch.full((5, 33), float("nan"), dtype=dtype, device=device)[:, :27]
    ids = slice(first, first + 27)
    driver.KERNELS[backend].gradient(logits[:, ids], bias[ids], target, lse, grad, first, out)
    one_hot = F.one_hot(target, 70)
    expected = (grad[:, None] * (one_hot - (logits + bias - lse[:, None]).exp()))[:, ids]
    torch.testing.assert_close(out.float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_compiles_as_a_whole(backend, device):
    """torch.compile finds no graph break, forward and backward, and gives the same."""
    inputs, target, grad = make_case(6, 16, 90, torch.float32, ignored=[2], device=device)
    compiled = torch.compile(call(target, backend), fullgraph=True)
    expected = run(call(target, backend), inputs, grad)
    torch.testing.assert_close(run(compiled, inputs, grad), expected, rtol=1e-5, atol=1e-6)


@needs_extension
def test_opcheck():
    registry.dispatch(
        OP,
        "cpu",
        *make_case(1, 4, 4, torch.float32)[0][:2],
        torch.tensor([0]),
        bias=None,
        ignore_index=-100,
        return_entropy=False,
    )
    (logits, _, bias), target, grad = make_case(5, 30, 30, torch.float32)
    state = torch.tensor([-float("inf"), 0, 0, float("nan")])[:, None].repeat(1, 5)
    for some_bias in (bias, None):
        ops = torch.ops.hermesflow
        torch.library.opcheck(ops.linear_logprob_block.default, (logits, some_bias, target, 3, state))
        arguments = (logits, some_bias, target, torch.ones(5), grad, 3, torch.empty_like(logits))
        torch.library.opcheck(ops.linear_logprob_block_backward.default, arguments)
    (x, weight, bias), target, grad = make_case(5, 8, 30, torch.float32)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    for keep in (False, True):
        torch.library.opcheck(ops.linear_logprob.default, (*inputs, target, -100, "extension", keep))
    kept = (torch.empty(0, 128), torch.empty(0, 0))
    for needed in ([True, True, True], [False, True, False]):
        arguments = (grad, x, weight, bias, target, torch.ones(5), *kept, -100, "extension", needed)
        torch.library.opcheck(
            ops.linear_logprob_backward.default, [t.detach() if torch.is_tensor(t) else t for t in arguments]
        )


@needs_extension
def test_extension_checks_its_arguments():
    """Callers of torch.ops.hermesflow bypass the public function's checks."""
    registry.dispatch(
        OP,
        "cpu",
        *make_case(1, 4, 4, torch.float32)[0][:2],
        torch.tensor([0]),
        bias=None,
        ignore_index=-100,
        return_entropy=False,
    )
    forward, backward = (
        getattr(torch.ops.hermesflow, name) for name in ("linear_logprob_block", "linear_logprob_block_backward")
    )
    z, b, state, row = torch.zeros(2, 5), torch.zeros(5), torch.zeros(4, 2), torch.zeros(2)
    y = torch.zeros(2, dtype=torch.int64)
    for arguments, message in (
        ((z[0], b, y, 0, state), r"expected fp32 logits \[R, C\]"),
        ((z.half(), b, y, 0, state), r"expected fp32 logits \[R, C\]"),
        ((z, b[:4], y, 0, state), r"expected contiguous fp32 bias \[5\]"),
        ((z, b, y.int(), 0, state), r"expected contiguous int64 target \[2\]"),
        ((z, b, y, 0, state[:3]), r"expected fp32 state \[4, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            forward(*arguments)
    with pytest.raises(ValueError, match=r"expected contiguous fp32 lse and grad_logprob \[2\]"):
        backward(z, b, y, row[:1], row, 0, z)
    with pytest.raises(ValueError, match=r"expected grad_logits \[2, 5\]"):
        backward(z, b, y, row, row, 0, z[:, :4])
    with pytest.raises(ValueError, match="expected fp32 grad_logits"):
        backward(z, b, y, row, row, 0, z.half())


def test_backends_that_cannot_run_say_why():
    x = torch.zeros(2, 4, dtype=torch.float64)
    target = torch.zeros(2, dtype=torch.int64)
    reasons = dict(registry.explain(OP, x, x, target, bias=None))
    assert reasons["torch"] is None
    assert reasons["cpu"] == (checks.cpu_missing() or "the kernels compute in fp32, x is fp64")
    assert reasons["triton"] == (checks.triton_missing() or "the kernels compute in fp32, x is fp64")


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


def test_ids_masked_by_the_lowest_number(backend, device):
    """finfo.min in the place of -inf: the running sums move from it to a finite maximum, and its mass is 0."""
    (x, weight, bias), target, _ = make_case(4, 8, 700, torch.float32, device=device)
    bias[:300] = torch.finfo(torch.float32).min
    target[:] = 400
    logprob, entropy = linear_logprob(x, weight, target, bias=bias, return_entropy=True, backend=backend)
    kept = F.linear(x.double(), weight[300:].double(), bias[300:].double()).log_softmax(1)
    torch.testing.assert_close(logprob.double(), kept[:, 100], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(kept.exp() * kept).sum(1), rtol=1e-5, atol=1e-5)


def test_out_of_range_gives_nan(backend, device):
    """On a GPU and under torch.compile no check reads the targets."""
    if backend == "torch":
        pytest.skip("torch's gather raises an error of its own")
    (x, weight, bias), target, _ = make_case(4, 8, 300, torch.float32, device=device)
    target[:3] = torch.tensor([-5, 300, 9000], device=device)
    options = {"bias": bias, "ignore_index": -100, "return_entropy": False}
    logprob, _ = registry.dispatch(OP, backend, x, weight, target, **options)
    assert logprob[:3].isnan().all() and torch.isfinite(logprob[3])
