import pytest
import torch

from hermesflow.kernels import linear_logprob as workspace
from hermesflow.kernels.guided_sample import guided_sample
from hermesflow.kernels.linear_sample import linear_sample
from hermesflow.kernels.philox import RandomKey

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = {  # R, D, V
    "one_tile": (5, 16, 40),
    "ragged_tiles": (300, 32, 8 * 128 + 3),
    "one_row": (1, 8, 300),
    "one_id": (4, 8, 1),
}


def make_case(num_rows, width, vocab_size, dtype=torch.float32):
    """Multiples of 1/8, for which a matmul is exact whatever its order of summation: equal tokens on every machine."""
    generator = torch.Generator().manual_seed(num_rows * 1000 + vocab_size)
    shapes = ((num_rows, width), (vocab_size, width), (vocab_size,))
    hidden, weight, bias = (torch.randint(-8, 9, shape, generator=generator) / 8 for shape in shapes)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), make_key(num_rows)


def make_key(num_rows):
    return RandomKey(torch.arange(num_rows) * 7919, torch.arange(num_rows) % 5, torch.arange(num_rows) % 11)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_guided_sample_of_the_logits(shape, dtype, with_bias, temperature):
    hidden, weight, bias, key = make_case(*shape, dtype)
    logits = hidden.float() @ weight.float().t() + (bias.float() if with_bias else 0)
    expected = guided_sample(logits, None, guidance_scale=0.0, temperature=temperature, key=key, backend="torch")
    token, logprob = linear_sample(hidden, weight, bias if with_bias else None, temperature=temperature, key=key)
    assert token.dtype == torch.int64 and logprob.dtype == torch.float32
    assert (token == expected[0]).all()
    torch.testing.assert_close(logprob, expected[1], rtol=1e-6, atol=1e-6)


def test_logprob_against_fp64():
    hidden, weight, bias, key = make_case(50, 64, 500, torch.bfloat16)
    token, logprob = linear_sample(hidden, weight, bias, temperature=0.7, key=key)
    logits = hidden.double() @ weight.double().t() + bias.double()
    truth = (logits / 0.7).log_softmax(1).gather(1, token[:, None]).squeeze(1)
    torch.testing.assert_close(logprob.double(), truth, rtol=1e-5, atol=1e-5)


def test_guidance_on_hidden_states_is_guidance_on_logits():
    cond, weight, bias, key = make_case(200, 32, 500)
    uncond = cond.flip(0)
    expected = guided_sample(
        cond @ weight.t() + bias,
        uncond @ weight.t() + bias,
        guidance_scale=2.5,
        temperature=1.0,
        key=key,
        backend="torch",
    )
    token, logprob = linear_sample(3.5 * cond - 2.5 * uncond, weight, bias, temperature=1.0, key=key)
    assert (token == expected[0]).all()
    torch.testing.assert_close(logprob, expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared_step", [False, True], ids=["step_a_row", "one_step"])
def test_blocks_give_the_same(shared_step, monkeypatch):
    hidden, weight, bias, key = make_case(10, 16, 300)
    key = key._replace(step=torch.tensor(4)) if shared_step else key
    expected = linear_sample(hidden, weight, bias, temperature=1.0, key=key)
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", 3 * 300 * 4)
    token, logprob = linear_sample(hidden, weight, bias, temperature=1.0, key=key)
    assert (token == expected[0]).all()
    torch.testing.assert_close(logprob, expected[1], rtol=1e-5, atol=1e-5)


def test_no_tensor_above_the_workspace(monkeypatch, largest_tensor):
    hidden, weight, bias, key = make_case(64, 4, 256)
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", 5 * 256 * 4)
    with largest_tensor as seen:
        linear_sample(hidden, weight, bias, temperature=1.0, key=key)
    assert seen.numel == 5 * 256


def test_rows_without_a_distribution():
    hidden, weight, bias, key = make_case(4, 8, 200)
    clean = linear_sample(hidden, weight, bias, temperature=1.0, key=key)
    hidden[1] = float("nan")
    token, logprob = linear_sample(hidden, weight, bias, temperature=1.0, key=key)
    assert token[1] == -1 and logprob[1].isnan()
    kept = [0, 2, 3]
    assert (token[kept] == clean[0][kept]).all()
    bias[:] = float("-inf")
    assert (linear_sample(hidden, weight, bias, temperature=0.0, key=key)[0] == -1).all()


def test_non_contiguous_and_empty():
    hidden, weight, bias, key = make_case(6, 10, 300)
    expected = linear_sample(hidden, weight, bias, temperature=1.0, key=key)
    strided = (hidden.t().contiguous().t(), weight.repeat_interleave(2, 0)[::2], bias.repeat_interleave(2)[::2])
    token, logprob = linear_sample(*strided, temperature=1.0, key=key)
    assert (token == expected[0]).all()
    torch.testing.assert_close(logprob, expected[1], rtol=1e-5, atol=1e-5)
    token, logprob = linear_sample(hidden[:0], weight, bias, temperature=1.0, key=make_key(0))
    assert token.shape == logprob.shape == (0,) and token.dtype == torch.int64


H, W, B = torch.zeros(4, 6), torch.zeros(5, 6), torch.zeros(5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": H[0]}, r"linear_sample: expected hidden .*\[R, D\], got float32 \[6\]"),
        ({"hidden": H.double()}, r"expected hidden float32 or .*got float64"),
        ({"weight": W[:, :3]}, r"expected hidden \[R, D\] and weight \[V, D\], got \[4, 6\] and \[5, 3\]"),
        ({"weight": W.half()}, r"expected weight float32 .*got float16"),
        ({"weight": W[:0], "bias": None}, r"expected at least one token id, got weight \[0, 6\]"),
        ({"bias": B[:2]}, r"expected bias float32 \[V\] = \[5\].*got float32 \[2\]"),
        ({"temperature": -0.5}, r"expected temperature to be a finite number of at least 0, got -0.5"),
        ({"key": make_key(3)}, r"expected key.seed int64 \[R\] = \[4\].*got int64 \[3\]"),
    ],
)
def test_errors(changes, message):
    arguments = {"hidden": H, "weight": W, "bias": B, "temperature": 1.0, "key": make_key(4)} | changes
    with pytest.raises(ValueError, match=message):
        linear_sample(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("bias"), **arguments)
