"""Linear layers by oneDNN: accuracy, gradients, independence of mode and batch, and where F.linear is kept."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from hermesflow.kernels import matmul
from hermesflow.kernels.matmul import linear

SHAPES = [(1, 32, 96), (2, 48, 32), (37, 64, 192), (300, 512, 256)]
"""One row, few, a ragged edge, and many blocks."""


def case(num_rows, width, out, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((num_rows, width), (out, width), (out,))
    x, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x.to(dtype), (weight / width**0.5).to(dtype), bias.to(dtype)


@pytest.fixture
def onednn_calls(monkeypatch):
    """Shapes that oneDNN's linear layer is given."""
    calls, op = [], torch.ops.mkldnn._linear_pointwise

    def counted(x, *args):
        calls.append(tuple(x.shape))
        return op(x, *args)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return calls


@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_f_linear(shape, dtype, gelu):
    """The error against float64 is at most twice F.linear's, plus a few roundings of the largest result."""
    x, weight, bias = case(*shape, dtype)
    truth = F.linear(x.double(), weight.double(), bias.double())
    plain = F.linear(x, weight, bias)
    if gelu is not None:
        truth, plain = (F.gelu(values, approximate=gelu) for values in (truth, plain))
    with torch.inference_mode():
        got = linear(x, weight, bias, gelu=gelu)
    assert got.dtype == dtype and got.shape == truth.shape
    floor = 2 * torch.finfo(dtype).eps * truth.abs().max()
    assert (got - truth).abs().max() <= 2 * (plain - truth).abs().max() + floor


def test_without_bias_and_rows_that_are_not_contiguous():
    x, weight, _ = case(64, 48, 32, torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x[::2], weight), F.linear(x[::2], weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gelu", [None, "tanh"])
@pytest.mark.parametrize(("width", "out"), [(32, 96), (512, 1536)], ids=str)
def test_a_row_does_not_depend_on_the_number_of_rows(width, out, gelu):
    x, weight, bias = case(500, width, out, torch.float32)
    with torch.inference_mode():
        whole = linear(x, weight, bias, gelu=gelu)
        for num_rows in (1, 2, 3, 7, 16, 33, 100, 499):
            assert torch.equal(linear(x[-num_rows:], weight, bias, gelu=gelu), whole[-num_rows:])


def test_inference_mode_takes_onednn(onednn_calls):
    x, weight, bias = case(4, 32, 16, torch.float32)
    with torch.inference_mode():
        linear(x, weight, bias)
    assert onednn_calls == [(8, 32)]


def test_onednn_meets_few_numbers_of_rows(onednn_calls):
    """It keeps code for each. Few rows get at most 7 more, many a sixteenth, and never more than 63."""
    x, weight, bias = case(3000, 32, 16, torch.float32)
    with torch.inference_mode():
        for num_rows in range(1, 3000):
            assert len(linear(x[:num_rows], weight, bias)) == num_rows
    rows = [shape[0] for shape in onednn_calls]
    assert len(set(rows)) <= 100
    for wanted, given in enumerate(rows, start=1):
        assert 0 <= given - wanted < max(8, min(wanted / 16 + 1, 64))


@contextlib.contextmanager
def _gradients():
    yield


MODES = {"gradients": _gradients, "no_grad": torch.no_grad, "inference mode": torch.inference_mode}


@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
@pytest.mark.parametrize("shape", [*SHAPES, (7, 31, 17), (885, 512, 1536)], ids=str)
def test_a_row_is_the_same_in_every_mode(shape, gelu):
    """To the last bit: a policy with gradients and its reference without them round alike."""
    x, weight, bias = case(*shape, torch.float32)
    weight.requires_grad_()
    results = []
    for mode in MODES.values():
        with mode():
            results.append(linear(x, weight, bias, gelu=gelu))
    assert [result.requires_grad for result in results] == [True, False, False]
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[2])


@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
@pytest.mark.parametrize("layout", ["contiguous", "across", "one number"])
@pytest.mark.parametrize("shape", [*SHAPES, (8, 16, 24), (400, 64, 600)], ids=str)
def test_gradients_are_as_exact_as_f_linears(shape, layout, gelu):
    """Products too small for oneDNN, and larger ones on both sides of the choice of what is laid out anew."""
    values = case(*shape)
    grad = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if layout != "contiguous":
        grad = grad.t().contiguous().t() if layout == "across" else grad[0, 0].expand(grad.shape)

    def gradients(function, dtype):
        inputs = [value.to(dtype).requires_grad_() for value in values]
        y = function(*inputs)
        return torch.autograd.grad(y if gelu is None else F.gelu(y, approximate=gelu), inputs, grad.to(dtype))

    inputs = [value.float().requires_grad_() for value in values]
    got = torch.autograd.grad(linear(*inputs, gelu=gelu), inputs, grad.float())
    plain_ones, true_ones = (gradients(F.linear, dtype) for dtype in (torch.float32, torch.float64))
    for mine, plain, truth in zip(got, plain_ones, true_ones, strict=True):
        floor = 4 * torch.finfo(torch.float32).eps * truth.abs().max()
        assert mine.shape == truth.shape and mine.dtype == torch.float32
        assert (mine - truth).abs().max() <= 2 * (plain - truth).abs().max() + floor


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_only_wanted_gradients_are_computed(onednn_calls, wanted):
    inputs = case(300, 512, 256, torch.float32)
    expected_inputs = [value.clone() for value in inputs]
    for index in wanted:
        inputs[index].requires_grad_()
        expected_inputs[index].requires_grad_()
    linear(*inputs).sum().backward()
    F.linear(*expected_inputs).sum().backward()
    for got, expected in zip(inputs, expected_inputs, strict=True):
        assert (got.grad is None) == (expected.grad is None)
        if got.grad is not None:
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-3)
    assert len(onednn_calls) == 1 + len({0, 1} & set(wanted))


def test_gradients_meet_few_numbers_of_rows(onednn_calls):
    """Up to 256 rows multiples of 8, then of 16: 17 shapes for each of the three products, and not 200."""
    for num_rows in range(200, 400):
        x, weight, bias = (value.requires_grad_() for value in case(num_rows, 64, 192, torch.float32))
        linear(x, weight, bias).sum().backward()
    assert len(onednn_calls) == 600 and len(set(onednn_calls)) == 51


@pytest.mark.parametrize("gelu", [None, "tanh"])
def test_checkpointed_gradients_are_the_same(gelu):
    x, weight, bias = (value.requires_grad_() for value in case(40, 64, 96, torch.float32))
    expected = torch.autograd.grad(linear(x, weight, bias, gelu=gelu).square().sum(), (x, weight, bias))
    y = checkpoint(linear, x, weight, bias, gelu=gelu, use_reentrant=False)
    got = torch.autograd.grad(y.square().sum(), (x, weight, bias))
    assert all(torch.equal(mine, truth) for mine, truth in zip(got, expected, strict=True))


def test_second_derivatives_are_refused():
    x, weight, bias = (value.requires_grad_() for value in case(40, 32, 16, torch.float32))
    (gradient,) = torch.autograd.grad(linear(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_compile_sees_f_linear(onednn_calls):
    torch._dynamo.reset()
    x, weight, bias = (value.requires_grad_() for value in case(40, 32, 16, torch.float32))
    y = torch.compile(linear, fullgraph=True, backend="eager")(x, weight, bias, gelu="tanh")
    assert torch.equal(y, F.gelu(F.linear(x, weight, bias), approximate="tanh"))
    y.sum().backward()
    assert onednn_calls == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", ["float64", "no rows", "autocast"])
def test_what_onednn_is_not_given(onednn_calls, change, mode):
    dtype = torch.float64 if change == "float64" else torch.float32
    x, weight, bias = case(0 if change == "no rows" else 4, 32, 16, dtype)
    weight.requires_grad_()
    with MODES[mode](), torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert onednn_calls == []


@pytest.mark.parametrize("mode", ["gradients", "no_grad"])
def test_bfloat16_outside_inference_mode_is_f_linear(onednn_calls, mode):
    x, weight, bias = case(40, 32, 16, torch.bfloat16)
    weight.requires_grad_()
    with MODES[mode]():
        assert torch.equal(linear(x, weight, bias, gelu="none"), F.gelu(F.linear(x, weight, bias)))
    assert onednn_calls == []


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_rows_of_an_odd_vocabulary_are_aligned(with_bias):
    x, weight, bias = torch.randn(5, 16), torch.randn(51, 16), torch.randn(51) if with_bias else None
    found = matmul._padded_linear(x, weight, bias)
    torch.testing.assert_close(found, F.linear(x, weight, bias))
    assert found.shape == (5, 51) and found.stride() == (64, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_an_odd_vocabulary_on_a_gpu():
    x, weight = (torch.randn(n, 64, device="cuda", dtype=torch.bfloat16) for n in (7, 515))
    found = matmul.linear(x, weight)
    torch.testing.assert_close(found, F.linear(x, weight))
    assert found.stride() == (576, 1) and matmul.linear(x.requires_grad_(), weight).requires_grad
