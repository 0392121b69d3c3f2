import pytest
import torch

from hermesflow.kernels import checks
from hermesflow.kernels.mask_topk import mask_topk
from hermesflow.kernels.philox import MASK_STREAM, RandomKey, gumbel, philox4x32

needs_extension = pytest.mark.skipif(checks.extension_missing() is not None, reason=str(checks.extension_missing()))
BACKENDS = ["torch", pytest.param("cpu", marks=needs_extension)]
INF, NAN = float("inf"), float("nan")


def make_key(num_rows, *, step=2):
    return RandomKey(torch.arange(num_rows) * 977 - 5, torch.tensor(step), torch.zeros(num_rows, dtype=torch.int64))


def mask(logprob, known=None, num_masked=1, *, temperature=0.0, key=None, backend="torch"):
    logprob = torch.as_tensor(logprob, dtype=torch.float32)
    known = torch.zeros(logprob.shape, dtype=torch.bool) if known is None else known
    if not isinstance(num_masked, torch.Tensor):
        num_masked = torch.full((len(logprob),), num_masked)
    key = key or make_key(len(logprob))
    return mask_topk(logprob, known, num_masked, temperature=temperature, key=key, backend=backend)


def make_case(num_rows, num_tokens):
    generator = torch.Generator().manual_seed(num_rows + num_tokens)
    logprob = torch.randn(num_rows, num_tokens, generator=generator)
    known = torch.rand(num_rows, num_tokens, generator=generator) < 0.3
    return logprob, known, torch.randint(0, num_tokens, (num_rows,), generator=generator)


def naive_row(logprob, known, num_masked, temperature, seed, step):
    """One row by the definition, token by token."""
    scores = []
    for n, value in enumerate(logprob.tolist()):
        counter = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, n, step, 0, MASK_STREAM)
        noise = gumbel(philox4x32(*(torch.tensor(word) for word in counter))[0])
        if not known[n]:
            scores.append((float(torch.tensor(value) + temperature * noise), n))
    return sorted(n for _, n in sorted(scores)[: max(num_masked, 0)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.0, 1.5, torch.tensor([0.0, 0.5, 4.0])], ids=["0", "1.5", "per_row"])
def test_against_the_definition(backend, temperature):
    logprob, known, _ = make_case(3, 20)
    num_masked, key = torch.tensor([4, 7, 1]), make_key(3)
    masked = mask(logprob, known, num_masked, temperature=temperature, key=key, backend=backend)
    for row in range(3):
        scale = float(temperature[row]) if isinstance(temperature, torch.Tensor) else temperature
        settings = (scale, int(key.seed[row]), int(key.step))
        expected = naive_row(logprob[row], known[row], int(num_masked[row]), *settings)
        assert masked[row].nonzero().flatten().tolist() == expected


@needs_extension
@pytest.mark.parametrize("shape", [(1, 1), (300, 64), (5, 1024), (200, 37)], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_cpu_equals_the_reference(shape, temperature):
    """Scores that differ in their last bit may swap at a row's boundary: at most one row in 100."""
    case = make_case(*shape)
    found, expected = (mask(*case, temperature=temperature, backend=name) for name in ("cpu", "torch"))
    assert (found != expected).any(dim=1).sum() <= (shape[0] // 100 if temperature else 0)
    assert torch.equal(found.sum(1), expected.sum(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_number_is_cut_to_the_unknown_tokens(backend):
    known = torch.tensor([[True, False, False, True]]).expand(5, -1)
    masked = mask(torch.zeros(5, 4), known, torch.tensor([-3, 0, 1, 2, 9]), temperature=1.0, backend=backend)
    assert masked.sum(1).tolist() == [0, 0, 1, 2, 2]
    assert not (masked & known).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_known(backend):
    assert not mask(torch.zeros(2, 5), torch.ones(2, 5, dtype=torch.bool), 3, backend=backend).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_mask_the_lower_index(backend):
    known = torch.tensor([[False, True, False, False, False]])
    assert mask([[1.0, 0.0, 0.0, -0.0, 0.0]], known, 2, backend=backend).tolist() == [[False, False, True, True, False]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_that_are_not_finite(backend):
    """NaN and -inf count as the lowest, +inf as the highest, yet before a known token, whatever that one holds."""
    known = torch.tensor([[False, False, False, False, True]])
    logprob = torch.tensor([[-9.0, NAN, INF, -INF, NAN]])
    for num_masked, expected in ((1, [1]), (2, [1, 3]), (3, [0, 1, 3]), (4, [0, 1, 2, 3])):
        assert mask(logprob, known, num_masked, backend=backend)[0].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
def test_empty(backend, shape):
    masked = mask(torch.zeros(shape), temperature=1.0, backend=backend)
    assert masked.shape == shape and masked.dtype == torch.bool


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_depend_on_their_batch(backend):
    logprob, known, num_masked = make_case(6, 50)
    key, rows = make_key(6), torch.tensor([4, 1])
    masked = mask(logprob, known, num_masked, temperature=2.0, key=key, backend=backend)
    part = RandomKey(key.seed[rows], key.step.expand(2), torch.tensor([8, 9]))
    again = mask(logprob[rows], known[rows], num_masked[rows], temperature=2.0, key=part, backend=backend)
    assert torch.equal(again, masked[rows])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    logprob, known, num_masked = make_case(8, 40)
    key = make_key(8)
    dense = mask(logprob[::2, 5:30], known[::2, 5:30], num_masked[::2], temperature=1.0, key=make_key(4))
    key = RandomKey(make_key(4).seed.repeat_interleave(2)[::2], key.step, key.position[::2])
    found = mask(logprob[::2, 5:30], known[::2, 5:30], num_masked[::2], temperature=1.0, key=key, backend=backend)
    assert torch.equal(found, dense)
    columns = mask(logprob.t().contiguous().t(), known.t().contiguous().t(), num_masked, backend=backend)
    assert torch.equal(columns, mask(logprob, known, num_masked))


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_makes_the_draw_that_gumbel_top_k_promises(backend):
    """Of logprobs log(p) under noise of temperature 1, the token left unmasked is n with probability p[n]."""
    probability = torch.tensor([0.1, 0.2, 0.3, 0.4])
    num_draws = 20_000
    masked = mask(probability.log().expand(num_draws, -1), num_masked=3, temperature=1.0, backend=backend)
    share = (~masked).double().mean(0)
    standard_error = (probability * (1 - probability) / num_draws).sqrt()
    assert ((share - probability).abs() < 4 * standard_error).all()


@needs_extension
def test_opcheck():
    logprob, known, num_masked = make_case(4, 16)
    key = make_key(4)
    for temperature in (torch.tensor(1.0), torch.rand(4)):
        arguments = (logprob, known, num_masked, temperature, key.seed, key.step)
        torch.library.opcheck(torch.ops.hermesflow.mask_topk.default, arguments)


@needs_extension
def test_extension_checks_its_arguments():
    """Callers of torch.ops.hermesflow bypass the public function's checks."""
    logprob, known, num_masked = make_case(4, 16)
    key, call = make_key(4), torch.ops.hermesflow.mask_topk
    one = torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"expected logprob fp32 \[B, N\]"):
        call(logprob.double(), known, num_masked, one, key.seed, key.step)
    with pytest.raises(ValueError, match="expected known bool"):
        call(logprob, known[:, :3], num_masked, one, key.seed, key.step)
    with pytest.raises(ValueError, match=r"expected \[4\] per-row values"):
        call(logprob, known, num_masked[:2], one, key.seed, key.step)
    with pytest.raises(ValueError, match="expected temperature fp32"):
        call(logprob, known, num_masked, one.double(), key.seed, key.step)
    with pytest.raises(ValueError, match="expected int64 num_masked"):
        call(logprob, known, num_masked.int(), one, key.seed, key.step)


def test_error_messages():
    logprob, known, num_masked = make_case(4, 16)
    with pytest.raises(ValueError, match=r"mask_topk: expected logprob float32 \[B, N\], got float64"):
        mask_topk(logprob.double(), known, num_masked, temperature=0.0, key=make_key(4))
    with pytest.raises(ValueError, match=r"expected known bool \[B, N\] = \[4, 16\]"):
        mask(logprob, known[:3], num_masked)
    with pytest.raises(ValueError, match="expected num_masked int64"):
        mask(logprob, known, num_masked.float())
    with pytest.raises(ValueError, match="temperature to be a finite number of at least 0"):
        mask(logprob, known, num_masked, temperature=-1.0)
    with pytest.raises(ValueError, match=r"expected temperature float32 \[B\] = \[4\]"):
        mask(logprob, known, num_masked, temperature=torch.ones(3))
    with pytest.raises(ValueError, match="key.seed"):
        mask(logprob, known, num_masked, key=make_key(3))
