import pytest
import torch
import torch.nn.functional as F

from hermesflow.kernels import checks, registry
from hermesflow.kernels.token_logprob import token_logprob

OP = "token_logprob"
needs_extension = pytest.mark.skipif(checks.cpu_missing() is not None, reason=str(checks.cpu_missing()))
INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = {
    "one_block": (3, 8),
    "ragged": (5, 129),
    "many_blocks": (3, 2 * 4096 + 77),  # above the Triton kernel's largest block, so that the running maximum moves
    "one_row": (1, 50),
    "short_rows": (9, 3),  # at every distance from a 16-byte boundary
    "one_id": (2, 1),  # the log-probability is 0, and so is the gradient
    "image_codes": (2, 8192),
    "show_o": (3, 58_498),  # rows of bf16 start at every second multiple of two bytes
}


def make_case(num_tokens, vocab_size, dtype, device="cpu", ignored=()):
    generator = torch.Generator().manual_seed(num_tokens * 1000 + vocab_size)
    logits = (4 * torch.randn(num_tokens, vocab_size, generator=generator)).to(dtype)
    target = torch.randint(vocab_size, (num_tokens,), generator=generator)
    target[list(ignored)] = -100
    grad = torch.randn(num_tokens, generator=generator)
    return logits.to(device), target.to(device), grad.to(device)


def plain(logits, target):
    """log_softmax and gather in the logits' own dtype."""
    kept = target != -100
    logprob = logits.log_softmax(1).gather(1, torch.where(kept, target, 0)[:, None]).squeeze(1)
    return torch.where(kept, logprob, 0.0)


def run(function, logits, grad):
    """Output and gradient of function(logits)."""
    logits = logits.detach().requires_grad_()
    out = function(logits)
    (grad_logits,) = torch.autograd.grad(out, logits, grad.to(out.dtype))
    return out.detach(), grad_logits


def entropy_of(logits, target):
    """Entropy of softmax(logits) in the logits' own dtype."""
    logprobs = logits.log_softmax(1)
    summands = torch.where(logprobs == -INF, 0.0, logprobs * logprobs.exp())
    return torch.where(target != -100, -summands.sum(1), 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_and_gradient(shape, dtype, backend, device, check_error_budget):
    logits, target, grad = make_case(*shape, dtype, device, ignored=[1] if shape[0] > 2 else [])
    out, grad_logits = run(lambda x: token_logprob(x, target, backend=backend), logits, grad)
    truth, grad_truth = run(lambda x: plain(x, target), logits.double(), grad)
    low, grad_low = run(lambda x: plain(x, target), logits, grad)
    assert out.dtype == torch.float32 and grad_logits.dtype == dtype
    # The output is fp32 whatever the input: plain torch in fp32 sets its budget, in the input's dtype the gradient's.
    check_error_budget(out, truth, plain(logits.float(), target))
    check_error_budget(grad_logits, grad_truth, grad_low)
    assert (out - truth).abs().max() <= (low.double() - truth).abs().max() + 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_entropy(shape, dtype, backend, device, check_error_budget):
    logits, target, grad = make_case(*shape, dtype, device, ignored=[1] if shape[0] > 2 else [])
    logits[0, shape[1] // 2 :] = -INF if shape[1] > 1 else 0.0
    target[0] = 0
    leaf = logits.clone().requires_grad_()
    out, entropy = token_logprob(leaf, target, return_entropy=True, backend=backend)
    alone = run(lambda x: token_logprob(x, target, backend=backend), logits, grad)
    assert torch.equal(out, alone[0]) and torch.equal(torch.autograd.grad(out, leaf, grad)[0], alone[1])
    assert entropy.dtype == torch.float32 and not entropy.requires_grad
    assert not (target == -100).any() or not entropy[target == -100].any()
    check_error_budget(entropy, entropy_of(logits.double(), target), entropy_of(logits.float(), target))


@pytest.mark.parametrize("level", [-3000.0, 40.0, 1e4])
def test_logits_far_from_zero(level, backend, device, check_error_budget):
    """A log-sum-exp of 1e4 in fp32 is off by 5e-4; the results must not be."""
    logits, target, grad = make_case(4, 500, torch.float32, device)
    logits += level
    target[:2] = logits[:2].argmax(1)
    truth, grad_truth = run(lambda x: plain(x, target), logits.double(), grad)
    low, grad_low = run(lambda x: plain(x, target), logits, grad)
    out, grad_logits = run(lambda x: token_logprob(x, target, backend=backend), logits, grad)
    check_error_budget(out, truth, low)
    check_error_budget(grad_logits, grad_truth, grad_low)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["transposed", "column_step", "row_step", "offset", "padded", "expanded"])
def test_non_contiguous(layout, dtype, backend, device):
    dense, target, grad = make_case(6, 1030, dtype, device, ignored=[2])
    if layout == "expanded":
        dense = dense[:1].repeat(6, 1)
    make_view = {
        "transposed": lambda x: x.t().contiguous().t(),
        "column_step": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
        "row_step": lambda x: x.repeat_interleave(3, dim=0)[::3],
        "offset": lambda x: F.pad(x, (1, 0), value=NAN)[:, 1:],  # off every 16-byte boundary that its gradient is on
        "padded": lambda x: F.pad(x, (3, 6), value=NAN)[:, 3:-6],
        "expanded": lambda x: x[:1].expand(6, -1),
    }[layout]
    assert not make_view(dense).is_contiguous()
    strided_target = target.repeat_interleave(2)[::2]
    expected = run(lambda x: token_logprob(x, target, backend=backend), dense, grad)
    result = run(lambda x: token_logprob(x, strided_target, backend=backend), make_view(dense), grad)
    torch.testing.assert_close(result, expected, rtol=1e-6 if dtype == torch.float32 else 1e-3, atol=1e-6)


@pytest.mark.parametrize("strides", [(2**31, 1), (1, 2**30)], ids=["rows", "columns"])
def test_strides_beyond_int32(strides, backend, device):
    """Two rows of three logits in a storage of 4 GiB, of which only a few pages are touched."""
    storage = torch.empty(2**31 + 8, dtype=torch.float16, device=device)
    far = storage.as_strided((2, 3), strides)
    far.copy_(torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.5, 4.0]]))
    target, grad = torch.tensor([2, 1], device=device), torch.ones(2, device=device)
    result = run(lambda x: token_logprob(x, target, backend=backend), far, grad)
    expected = run(lambda x: token_logprob(x, target, backend=backend), far.contiguous(), grad)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=0)


def test_expanded_gradient(backend, device):
    logits, target, _ = make_case(4, 33, torch.float32, device)
    logits.requires_grad_()
    token_logprob(logits, target, backend=backend).sum().backward()
    expected = F.one_hot(target, 33) - logits.detach().softmax(1)
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_ignored_rows_are_not_read(ignore_index, backend, device):
    logits, target, grad = make_case(4, 20, torch.float32, device)
    target = torch.where(target == 3, 4, target)
    target[1:3] = ignore_index
    options = {"ignore_index": ignore_index, "return_entropy": True, "backend": backend}
    clean = run(lambda x: token_logprob(x, target, **options)[0], logits, grad)
    assert (clean[0][1:3] == 0).all() and (clean[1][1:3] == 0).all() and clean[1][0].abs().max() > 0
    logits[1:3] = NAN
    poisoned = run(lambda x: token_logprob(x, target, **options)[0], logits, grad)
    torch.testing.assert_close(poisoned, clean, rtol=0, atol=0)
    assert (token_logprob(logits, target, **options)[1][1:3] == 0).all()


def test_all_ignored_and_empty(backend, device):
    for num_tokens in (3, 0):
        logits, _, grad = make_case(num_tokens, 20, torch.float32, device)
        target = torch.full((num_tokens,), -100, device=device)
        out, grad_logits = run(lambda x, target=target: token_logprob(x, target, backend=backend), logits, grad)
        _, entropy = token_logprob(logits, target, return_entropy=True, backend=backend)
        assert out.shape == entropy.shape == (num_tokens,) and not out.any() and not entropy.any()
        assert grad_logits.shape == logits.shape and not grad_logits.any()


def test_infinite_logits(backend, device):
    logits, target, grad = make_case(6, 2 * 4096 + 5, torch.float32, device)
    target[:] = 4100
    logits[0, :4096] = -INF  # the whole first block of the kernel
    logits[1, 4096:] = -INF  # the target among them
    logits[2] = -INF
    logits[3, 7] = NAN
    logits[4, 7] = INF
    logits[5] += 1e4
    out, grad_logits = run(lambda x: token_logprob(x, target, backend=backend), logits, grad)
    truth, grad_truth = run(lambda x: plain(x, target), logits.double(), grad)
    _, entropy = token_logprob(logits, target, return_entropy=True, backend=backend)
    assert out[1] == -INF and out[2:5].isnan().all() and grad_logits[2:5].isnan().all()
    torch.testing.assert_close(out, truth.float(), equal_nan=True, rtol=1e-5, atol=1e-5)
    entropy_truth = entropy_of(logits.double(), target).float()
    torch.testing.assert_close(entropy, entropy_truth, equal_nan=True, rtol=1e-5, atol=1e-5)
    finite = [0, 1, 5]
    torch.testing.assert_close(grad_logits[finite], grad_truth[finite].float(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_rounded_to_nearest(dtype, backend, device):
    """softmax is exactly (1, 0), so that the gradient of the first logit is minus the output's: here any fp32 bits."""
    edges = [0.0, NAN, 65504.0, 65519.99, 65520.0, 6e-8, 2**-24, 2**-25, 1.5 * 2**-24, 2**-14, 1 + 2**-8, 1 + 3 * 2**-8]
    edges += [1 + 2**-11, 1 + 3 * 2**-11, 3.39e38, 1e-40]
    bits = torch.randint(-(2**31), 2**31, (100,), generator=torch.Generator().manual_seed(0)).int()
    small = torch.randn(100, generator=torch.Generator().manual_seed(1)) * 1e-5  # about fp16's subnormal range
    grad = torch.cat([torch.tensor(edges), bits.view(torch.float32), small]).to(device)
    logits = torch.tensor([0.0, -INF], device=device, dtype=dtype).repeat(len(grad), 1)
    _, grad_logits = run(
        lambda x: token_logprob(x, torch.ones_like(grad, dtype=torch.int64), backend=backend), logits, grad
    )
    torch.testing.assert_close(grad_logits[:, 0], (-grad).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_out_of_range_gives_nan(backend, device):
    """Where the public op does not look at values, on a GPU and under torch.compile."""
    if backend == "torch":
        pytest.skip("torch's gather raises an error of its own")
    logits, target, _ = make_case(3, 9, torch.float32, device)
    target[0], target[2] = 9, -1
    out, _ = registry.dispatch(OP, backend, logits, target, ignore_index=-100, return_entropy=False)
    assert out[[0, 2]].isnan().all() and torch.isfinite(out[1])


def test_compiles_as_a_whole(backend, device):
    """torch.compile finds no graph break, and the compiled op gives the same log-probability, entropy and gradient."""
    logits, target, grad = make_case(5, 300, torch.float32, device, ignored=[2])

    def call(logits, target):
        return token_logprob(logits, target, return_entropy=True, backend=backend)

    results = []
    for function in (torch.compile(call, fullgraph=True), call):
        leaf = logits.clone().requires_grad_()
        logprob, entropy = function(leaf, target)
        results.append((logprob, entropy, *torch.autograd.grad(logprob, leaf, grad)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_gradcheck():
    logits, target, _ = make_case(5, 7, torch.float64, ignored=[3])
    assert torch.autograd.gradcheck(lambda x: token_logprob(x, target, backend="torch"), logits.requires_grad_())


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (
            torch.zeros(4),
            torch.zeros(4, dtype=torch.int64),
            r"token_logprob: expected logits .*\[T, V\], got float32 \[4\]",
        ),
        (
            torch.zeros(4, 5, dtype=torch.int32),
            torch.zeros(4, dtype=torch.int64),
            r"expected logits float32 or .*got int32",
        ),
        (torch.zeros(4, 5), torch.zeros(3, dtype=torch.int64), r"expected target int64 \[T\] = \[4\].*got int64 \[3\]"),
        (torch.zeros(4, 5), torch.zeros(4), r"expected target int64 .*got float32"),
        (torch.zeros(4, 0), torch.full((4,), -100), r"expected at least one token id"),
        (torch.zeros(2, 5), torch.tensor([0, 5]), r"target ids in \[0, 5\) or ignore_index -100, got 5 in row 1"),
        (torch.zeros(2, 5), torch.tensor([-1, 0]), r"target ids in \[0, 5\) .*got -1 in row 0"),
        (torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64, device="meta"), r"expected target .*on cpu, got .*meta"),
    ],
    ids=["rank", "dtype", "length", "target_dtype", "no_ids", "above", "below", "device"],
)
def test_errors(logits, target, message):
    with pytest.raises(ValueError, match=message):
        token_logprob(logits, target)


def test_backends_give_their_reason():
    logits, target = torch.zeros(2, 5, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    reasons = dict(registry.explain(OP, logits, target))
    assert reasons.pop("torch") is None
    for name, reason in reasons.items():
        assert reason == registry._environment_refusal(name) or "logits are fp64" in reason
    assert "cpu" in reasons and token_logprob(logits, target).dtype == torch.float64
    if not torch.cuda.is_available():
        with pytest.raises(registry.BackendError, match="needs cuda|sees no CUDA device|triton is not installed"):
            token_logprob(logits.float(), target, backend="triton")


@needs_extension
def test_exponential():
    """The backward pass of a row with largest 0, total 1 and gradient -1 at no target is exp of each logit, 0 below
    2^-100, of which products with a gradient would be subnormal."""
    logits = torch.cat([torch.linspace(-69.314, 0, 200_001), -torch.rand(100_000), torch.tensor([0.0, -1e-30])])[None]
    values = torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([-1.0])
    out = backward_of_row(logits, *values)
    truth = logits.double().exp()
    assert ((out - truth).abs() / truth).max() < 1.5e-7 and out[0, -2] == 1.0  # 1.25 ulp below a power of two
    below = torch.tensor([[-69.315, -87.34, -100.0, -104.0, -1000.0, -3e38, -INF, NAN]])
    out = backward_of_row(below, *values)
    assert not out[0, :-1].any() and out[0, -1].isnan()


def backward_of_row(logits, largest, total, grad):
    return torch.ops.hermesflow.token_logprob_backward(logits, torch.tensor([-1]), largest, total, grad, -100)


@needs_extension
def test_makes_nothing_of_the_logits_size_but_the_gradient(largest_tensor):
    logits, target, _ = make_case(8, 500, torch.bfloat16)
    logits.requires_grad_()
    with largest_tensor as seen:
        out = token_logprob(logits, target, return_entropy=True, backend="cpu")[0].sum()
    assert seen.numel <= 8
    out.backward()
    assert logits.grad.dtype == torch.bfloat16


@needs_extension
def test_opcheck():
    logits, target, grad = make_case(5, 200, torch.float32, ignored=[1])
    ops = torch.ops.hermesflow
    token_logprob(logits, target, backend="cpu")  # loads the extension
    for return_entropy in (False, True):
        torch.library.opcheck(ops.token_logprob.default, (logits, target, -100, return_entropy))
    _, largest, total, _ = ops.token_logprob(logits, target, -100, False)
    torch.library.opcheck(ops.token_logprob_backward.default, (logits, target, largest, total, grad, -100))


@needs_extension
def test_extension_checks_its_arguments():
    """Callers of torch.ops.hermesflow bypass the public function's checks."""
    logits, target, _ = make_case(2, 5, torch.float32)
    token_logprob(logits, target, backend="cpu")
    forward, backward = torch.ops.hermesflow.token_logprob, torch.ops.hermesflow.token_logprob_backward
    for wrong in (logits[0], logits[:, :0]):
        with pytest.raises(ValueError, match=r"expected logits \[T, V\] of at least one token id"):
            forward(wrong, target, -100, False)
    with pytest.raises(ValueError, match="expected fp32, bf16 or fp16"):
        forward(logits.double(), target, -100, False)
    for wrong in (target[:1], target.int(), target[None]):
        with pytest.raises(ValueError, match=r"expected target int64 \[2\]"):
            forward(logits, wrong, -100, False)
    row = torch.ones(2)
    for rows in ((row[:1], row, row), (row, row.double(), row), (row, row, row[None])):
        with pytest.raises(ValueError, match=r"expected fp32 largest, total and grad_logprob \[2\]"):
            backward(logits, target, *rows, -100)
    with pytest.raises(ValueError, match=r"expected target int64 \[3\]"):
        backward(torch.zeros(3, 5), target, row, row, row, -100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ids_masked_by_the_lowest_number(dtype, backend, device):
    """finfo.min in the place of -inf: the running sums move from it to a finite maximum, and its mass is 0."""
    logits, target, _ = make_case(3, 2 * 4096 + 77, dtype, device=device)
    logits[:, :5000] = torch.finfo(dtype).min
    target[:] = 6000
    logprob, entropy = token_logprob(logits, target, return_entropy=True, backend=backend)
    kept = logits[:, 5000:].double().log_softmax(1)
    torch.testing.assert_close(logprob.double(), kept[:, 1000], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(kept.exp() * kept).sum(1), rtol=1e-5, atol=1e-5)
