"""Linear layers by oneDNN in inference mode: accuracy, independence of the batch, and where F.linear is kept."""

import pytest
import torch
import torch.nn.functional as F

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_with_gradients_and_for_a_reference_it_is_f_linear_to_the_last_bit(onednn_calls, dtype):
    x, weight, bias = case(40, 32, 16, dtype)
    weight.requires_grad_()
    assert torch.equal(linear(x, weight, bias, gelu="tanh"), F.gelu(F.linear(x, weight, bias), approximate="tanh"))
    with torch.no_grad():
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert onednn_calls == []


@pytest.mark.parametrize("change", ["float64", "no rows", "autocast"])
def test_what_onednn_is_not_given(onednn_calls, change):
    dtype = torch.float64 if change == "float64" else torch.float32
    x, weight, bias = case(0 if change == "no rows" else 4, 32, 16, dtype)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert onednn_calls == []
