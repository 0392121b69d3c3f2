import os
import subprocess
import sys

import pytest
import torch

from hermesflow.kernels import checks, registry
from hermesflow.kernels.token_logprob import token_logprob

INTERPRETS = checks.triton_interprets()
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETS else "cpu"
needs_triton = pytest.mark.skipif(
    checks.triton_missing() is not None, reason="test_interpreter runs the Triton cases in a process of its own"
)
BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = {
    "one_block": (3, 8),
    "ragged": (5, 129),
    "many_blocks": (3, 2 * 4096 + 77),  # above the Triton kernel's largest block, so that the running maximum moves
    "one_row": (1, 50),
    "one_id": (2, 1),  # the log-probability is 0, and so is the gradient
}


def make_case(num_tokens, vocab_size, dtype, ignored=()):
    generator = torch.Generator().manual_seed(num_tokens * 1000 + vocab_size)
    logits = (4 * torch.randn(num_tokens, vocab_size, generator=generator)).to(dtype)
    target = torch.randint(vocab_size, (num_tokens,), generator=generator)
    target[list(ignored)] = -100
    grad = torch.randn(num_tokens, generator=generator)
    return logits.to(DEVICE), target.to(DEVICE), grad.to(DEVICE)


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_and_gradient(shape, dtype, backend, check_error_budget):
    logits, target, grad = make_case(*shape, dtype, ignored=[1] if shape[0] > 2 else [])
    out, grad_logits = run(lambda x: token_logprob(x, target, backend=backend), logits, grad)
    truth, grad_truth = run(lambda x: plain(x, target), logits.double(), grad)
    low, grad_low = run(lambda x: plain(x, target), logits, grad)
    assert out.dtype == torch.float32 and grad_logits.dtype == dtype
    # The output is fp32 whatever the input: plain torch in fp32 sets its budget, in the input's dtype the gradient's.
    check_error_budget(out, truth, plain(logits.float(), target))
    check_error_budget(grad_logits, grad_truth, grad_low)
    assert (out - truth).abs().max() <= (low.double() - truth).abs().max() + 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["transposed", "column_step", "row_step"])
def test_non_contiguous(layout, backend):
    dense, target, grad = make_case(6, 130, torch.float32, ignored=[2])
    make_view = {
        "transposed": lambda x: x.t().contiguous().t(),
        "column_step": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
        "row_step": lambda x: x.repeat_interleave(3, dim=0)[::3],
    }[layout]
    assert not make_view(dense).is_contiguous()
    strided_target = target.repeat_interleave(2)[::2]
    expected = run(lambda x: token_logprob(x, target, backend=backend), dense, grad)
    result = run(lambda x: token_logprob(make_view(x), strided_target, backend=backend), dense, grad)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_gradient(backend):
    logits, target, _ = make_case(4, 33, torch.float32)
    logits.requires_grad_()
    token_logprob(logits, target, backend=backend).sum().backward()
    expected = torch.nn.functional.one_hot(target, 33) - logits.detach().softmax(1)
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_ignored_rows_are_not_read(ignore_index, backend):
    logits, target, grad = make_case(4, 20, torch.float32)
    target = torch.where(target == 3, 4, target)
    target[1:3] = ignore_index
    clean = run(lambda x: token_logprob(x, target, ignore_index=ignore_index, backend=backend), logits, grad)
    assert (clean[0][1:3] == 0).all() and (clean[1][1:3] == 0).all() and clean[1][0].abs().max() > 0
    logits[1:3] = float("nan")
    poisoned = run(lambda x: token_logprob(x, target, ignore_index=ignore_index, backend=backend), logits, grad)
    torch.testing.assert_close(poisoned, clean, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_ignored_and_empty(backend):
    for num_tokens in (3, 0):
        logits, _, grad = make_case(num_tokens, 20, torch.float32)
        target = torch.full((num_tokens,), -100, device=DEVICE)
        out, grad_logits = run(lambda x, target=target: token_logprob(x, target, backend=backend), logits, grad)
        assert out.shape == (num_tokens,) and not out.any()
        assert grad_logits.shape == logits.shape and not grad_logits.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_logits(backend):
    logits, target, grad = make_case(6, 2 * 4096 + 5, torch.float32)
    target[:] = 4100
    logits[0, :4096] = float("-inf")  # the whole first block of the kernel
    logits[1, 4096:] = float("-inf")  # the target among them
    logits[2] = float("-inf")
    logits[3, 7] = float("nan")
    logits[4, 7] = float("inf")
    logits[5] += 1e4
    out, grad_logits = run(lambda x: token_logprob(x, target, backend=backend), logits, grad)
    truth, grad_truth = run(lambda x: plain(x, target), logits.double(), grad)
    assert out[1] == float("-inf") and out[2:5].isnan().all()
    torch.testing.assert_close(out, truth.float(), equal_nan=True, rtol=1e-5, atol=1e-5)
    finite = [0, 1, 5]
    torch.testing.assert_close(grad_logits[finite], grad_truth[finite].float(), rtol=2e-3, atol=1e-6)


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


def test_triton_gives_its_reason(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    logits, target = torch.zeros(2, 5, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    if checks.triton_missing():
        pytest.skip("triton is not installed")
    with pytest.raises(registry.BackendError, match="logits are fp64"):
        token_logprob(logits, target, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(registry.BackendError, match="needs cuda|sees no CUDA device"):
        token_logprob(logits.float(), target, backend="triton")


@needs_triton
def test_triton_out_of_range_gives_nan():
    from hermesflow.kernels.token_logprob_triton import token_logprob as kernel

    logits, target, _ = make_case(3, 9, torch.float32)
    target[0], target[2] = 9, -1
    out = kernel(logits, target)
    assert out[[0, 2]].isnan().all() and torch.isfinite(out[1])


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETS, reason="the Triton cases run in this process")
def test_interpreter():
    """The Triton cases by Triton's interpreter, which must be chosen before Triton is first imported."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1"}
    command += ["-k", "triton", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and " passed" in result.stdout and "skipped" not in result.stdout, result.stdout
