import pytest
import torch

from hermesflow.kernels import checks
from hermesflow.kernels.mask_topk import mask_topk
from hermesflow.kernels.philox import MASK_STREAM, RandomKey, gumbel, philox4x32, random_words

OP = "mask_topk"
needs_extension = pytest.mark.skipif(checks.cpu_missing() is not None, reason=str(checks.cpu_missing()))
# An emulator needs time; it masks what the reference does, which is tested with more draws.
SLOW_ROWS = {"cuda": 500} if checks.cuda_emulated() else {}
INF, NAN = float("inf"), float("nan")


def make_key(num_rows, device="cpu", *, step=2):
    seed = torch.arange(num_rows, device=device) * 977 - 5
    return RandomKey(seed, torch.tensor(step, device=device), torch.zeros_like(seed))


def mask(logprob, known=None, num_masked=1, *, temperature=0.0, key=None, backend="torch"):
    known = torch.zeros_like(logprob, dtype=torch.bool) if known is None else known
    if not isinstance(num_masked, torch.Tensor):
        num_masked = torch.full((len(logprob),), num_masked, device=logprob.device)
    key = key or make_key(len(logprob), logprob.device)
    return mask_topk(logprob, known, num_masked, temperature=temperature, key=key, backend=backend)


def make_case(num_rows, num_tokens, device="cpu"):
    generator = torch.Generator().manual_seed(num_rows + num_tokens)
    logprob = torch.randn(num_rows, num_tokens, generator=generator)
    known = torch.rand(num_rows, num_tokens, generator=generator) < 0.3
    num_masked = torch.randint(0, num_tokens, (num_rows,), generator=generator)
    return logprob.to(device), known.to(device), num_masked.to(device)


def check_equal_save_near_ties(found, case, temperature):
    """As the reference, but for scores beside a row's boundary that differ by rounding alone: one row in 1,000."""
    logprob, known, _ = case
    expected = mask(*case, temperature=temperature)
    assert torch.equal(found.sum(1), expected.sum(1)) and not (found & known).any()
    wrong = (found != expected).any(dim=1)
    assert wrong.sum() <= (max(1, len(logprob) // 1000) if temperature else 0)
    key = make_key(len(logprob), logprob.device)
    noise = gumbel(random_words(key, logprob.shape[1], MASK_STREAM, use_position=False)[0])
    score = (logprob + temperature * noise)[wrong]
    highest = score.masked_fill(~found[wrong], -INF).amax(1), score.masked_fill(~expected[wrong], -INF).amax(1)
    assert torch.allclose(*highest, rtol=1e-5, atol=1e-5)


def naive_row(logprob, known, num_masked, temperature, seed, step):
    """One row by the definition, token by token."""
    scores = []
    for n, value in enumerate(logprob.tolist()):
        counter = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, n, step, 0, MASK_STREAM)
        noise = gumbel(philox4x32(*(torch.tensor(word) for word in counter))[0])
        if not known[n]:
            scores.append((float(torch.tensor(value) + temperature * noise), n))
    return sorted(n for _, n in sorted(scores)[: max(num_masked, 0)])


@pytest.mark.parametrize("temperature", [0.0, 1.5, torch.tensor([0.0, 0.5, 4.0])], ids=["0", "1.5", "per_row"])
def test_against_the_definition(backend, temperature, device):
    logprob, known, _ = make_case(3, 20, device)
    num_masked, key = torch.tensor([4, 7, 1], device=device), make_key(3, device)
    temperature = temperature.to(device) if isinstance(temperature, torch.Tensor) else temperature
    masked = mask(logprob, known, num_masked, temperature=temperature, key=key, backend=backend)
    for row in range(3):
        scale = float(temperature[row]) if isinstance(temperature, torch.Tensor) else temperature
        settings = (scale, int(key.seed[row]), int(key.step))
        expected = naive_row(logprob[row], known[row], int(num_masked[row]), *settings)
        assert masked[row].nonzero().flatten().tolist() == expected


SHAPES = {
    "one_token": (1, 1),
    "one_chunk": (20, 64),  # of the C++ kernel
    "ragged": (20, 37),
    "image": (5, 1024),
    "kept_keys": (2, 8192),  # the longest row whose keys the CUDA kernel keeps
    "recomputed_keys": (2, 9001),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_equals_the_reference(shape, temperature, backend, device):
    case = make_case(*shape, device)
    check_equal_save_near_ties(mask(*case, temperature=temperature, backend=backend), case, temperature)


def test_many_rows(backend, device):
    case = make_case(SLOW_ROWS.get(backend, 10_000), 40, device)
    check_equal_save_near_ties(mask(*case, temperature=3.0, backend=backend), case, 3.0)


def test_long_rows(backend, device):
    """A whole vocabulary's length."""
    case = make_case(2, 58_498, device)
    check_equal_save_near_ties(mask(*case, temperature=1.0, backend=backend), case, 1.0)


def test_strides_beyond_32_bits(backend, device):
    """Rows 2^31 elements apart; of the storage only the pages of the rows are ever touched."""
    storage = torch.empty(2**31 + 64, dtype=torch.bool, device=device)
    known = storage.as_strided((2, 50), (2**31, 1))
    logprob, dense, num_masked = make_case(2, 50, device)
    known.copy_(dense)
    masked = mask(logprob, known, num_masked, temperature=1.0, backend=backend)
    assert torch.equal(masked, mask(logprob, dense, num_masked, temperature=1.0))


def test_number_is_cut_to_the_unknown_tokens(backend, device):
    known = torch.tensor([[True, False, False, True]], device=device).expand(6, -1)
    num_masked = torch.tensor([-3, 0, 1, 2, 9, 2**40], device=device)
    masked = mask(torch.zeros(6, 4, device=device), known, num_masked, temperature=1.0, backend=backend)
    assert masked.sum(1).tolist() == [0, 0, 1, 2, 2, 2]
    assert not (masked & known).any()


def test_all_known(backend, device):
    logprob = torch.zeros(2, 5, device=device)
    assert not mask(logprob, torch.ones_like(logprob, dtype=torch.bool), 3, backend=backend).any()


def test_ties_mask_the_lower_index(backend, device):
    known = torch.tensor([[False, True, False, False, False]], device=device)
    logprob = torch.tensor([[1.0, 0.0, 0.0, -0.0, 0.0]], device=device)
    assert mask(logprob, known, 2, backend=backend).tolist() == [[False, False, True, True, False]]
    # Ties that reach beyond one warp and one chunk.
    masked = mask(torch.zeros(1, 300, device=device), num_masked=170, backend=backend)
    assert masked[0].nonzero().flatten().tolist() == list(range(170))


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_values_that_are_not_finite(backend, temperature, device):
    """NaN and -inf count as the lowest, +inf as the highest, yet before a known token, whatever that one holds."""
    known = torch.tensor([[False, False, False, False, True]], device=device)
    logprob = torch.tensor([[-9.0, NAN, INF, -INF, NAN]], device=device)
    for num_masked, expected in ((1, [1]), (2, [1, 3]), (3, [0, 1, 3]), (4, [0, 1, 2, 3])):
        masked = mask(logprob, known, num_masked, temperature=temperature, backend=backend)
        assert masked[0].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
def test_empty(backend, shape, device):
    masked = mask(torch.zeros(shape, device=device), temperature=1.0, backend=backend)
    assert masked.shape == shape and masked.dtype == torch.bool


def test_rows_do_not_depend_on_their_batch(backend, device):
    logprob, known, num_masked = make_case(6, 50, device)
    key, rows = make_key(6, device), torch.tensor([4, 1], device=device)
    masked = mask(logprob, known, num_masked, temperature=2.0, key=key, backend=backend)
    part = RandomKey(key.seed[rows], key.step.expand(2), rows + 8)
    again = mask(logprob[rows], known[rows], num_masked[rows], temperature=2.0, key=part, backend=backend)
    assert torch.equal(again, masked[rows])


def test_strides(backend, device):
    logprob, known, num_masked = make_case(8, 40, device)
    strided = (logprob[::2, 5:30], known[::2, 5:30], num_masked[::2])
    dense = mask(*(part.contiguous() for part in strided), temperature=1.0)
    key = make_key(4, device)
    key = RandomKey(key.seed.repeat_interleave(2)[::2], key.step.expand(4), key.position)
    temperature = torch.ones(8, device=device)[::2]
    assert torch.equal(mask(*strided, temperature=temperature, key=key, backend=backend), dense)
    columns = mask(logprob.t().contiguous().t(), known.t().contiguous().t(), num_masked, backend=backend)
    assert torch.equal(columns, mask(logprob, known, num_masked))


def test_noise_makes_the_draw_that_gumbel_top_k_promises(backend, device):
    """Of logprobs log(p) under noise of temperature 1, the token left unmasked is n with probability p[n]."""
    probability = torch.tensor([0.1, 0.2, 0.3, 0.4], device=device)
    num_draws = SLOW_ROWS.get(backend, 20_000)
    masked = mask(probability.log().expand(num_draws, -1), num_masked=3, temperature=1.0, backend=backend)
    share = (~masked).double().mean(0)
    standard_error = (probability * (1 - probability) / num_draws).sqrt()
    assert ((share - probability).abs() < 4 * standard_error).all()


@needs_extension
def test_opcheck():
    logprob, known, num_masked = make_case(4, 16)
    key = make_key(4)
    for temperatures in (None, torch.rand(4)):
        arguments = (logprob, known, num_masked, 1.0, temperatures, key.seed, key.step)
        torch.library.opcheck(torch.ops.hermesflow.mask_topk.default, arguments)


@needs_extension
def test_extension_checks_its_arguments():
    """Callers of torch.ops.hermesflow bypass the public function's checks."""
    assert not mask(torch.zeros(1, 4), num_masked=0, backend="cpu").any()
    logprob, known, num_masked = make_case(4, 16)
    key, call = make_key(4), torch.ops.hermesflow.mask_topk
    noise = (1.0, None)
    with pytest.raises(ValueError, match=r"expected logprob fp32 \[B, N\]"):
        call(logprob.double(), known, num_masked, *noise, key.seed, key.step)
    with pytest.raises(ValueError, match="expected known bool"):
        call(logprob, known[:, :3], num_masked, *noise, key.seed, key.step)
    with pytest.raises(ValueError, match=r"expected \[4\] per-row values"):
        call(logprob, known, num_masked[:2], *noise, key.seed, key.step)
    with pytest.raises(ValueError, match=r"expected \[4\] per-row values"):
        call(logprob, known, num_masked, 1.0, torch.ones(3), key.seed, key.step)
    with pytest.raises(ValueError, match="expected int64 seed, step and position"):
        call(logprob, known, num_masked, *noise, key.seed[:2], key.step)
    with pytest.raises(ValueError, match="expected temperatures fp32"):
        call(logprob, known, num_masked, 1.0, torch.ones(4).double(), key.seed, key.step)
    with pytest.raises(ValueError, match="expected int64 num_masked"):
        call(logprob, known, num_masked.int(), *noise, key.seed, key.step)


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


@pytest.mark.parametrize("per_row", [False, True], ids=["one", "per_row"])
def test_compiles_as_a_whole(per_row, backend, device):
    """torch.compile finds no graph break, and the compiled op masks the same."""
    case = make_case(6, 50, device)
    key = make_key(6, device)
    temperature = torch.linspace(0, 2, 6, device=device) if per_row else 0.8

    def call(logprob, known, num_masked, key):
        return mask(logprob, known, num_masked, temperature=temperature, key=key, backend=backend)

    assert torch.equal(torch.compile(call, fullgraph=True)(*case, key), call(*case, key))
