from importlib import import_module

import pytest
import torch

from hermesflow.kernels import checks, registry
from hermesflow.kernels.guided_sample import guided_sample
from hermesflow.kernels.philox import TOKEN_STREAM, RandomKey, random_words, uniform
from hermesflow.kernels.sampling import SAMPLE_TILE

OP = "guided_sample"
needs_extension = pytest.mark.skipif(checks.cpu_missing() is not None, reason=str(checks.cpu_missing()))
# An interpreter and an emulator need time; both draw the tokens of the reference, which is tested with more draws.
NUM_ROWS = {"torch": 10, "cpu": 10_000, "cuda": 10_000, "triton": 10_000 if torch.cuda.is_available() else 400}
NUM_DRAWS = {"torch": 20_000, "cpu": 60_000, "cuda": 4_000, "triton": 4_000 if torch.cuda.is_available() else 400}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INF, NAN = float("inf"), float("nan")
SHAPES = {
    "one_id": (3, 1),
    "one_tile": (6, 128),
    "ragged": (5, 131),  # the last tile holds three ids
    "many_tiles": (4, 16 * 128 + 500),  # more than one block of the Triton kernel
    "many_turns": (3, 2 * 8192 + 1600),  # more than one turn of the CUDA kernel's warps
}


def make_key(num_rows, device="cpu", *, step=3):
    generator = torch.Generator().manual_seed(num_rows)
    seed = torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=generator)
    return RandomKey(seed.to(device), torch.tensor(step, device=device), torch.arange(num_rows, device=device))


def make_logits(num_rows, vocab_size, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(num_rows * 1000 + vocab_size)
    pair = 3 * torch.randn(2, num_rows, vocab_size, generator=generator)
    return pair.to(device, dtype).unbind()


def sample(cond, uncond=None, *, guidance_scale=0.0, temperature=1.0, key=None, backend="torch"):
    key = key or make_key(len(cond), cond.device)
    return guided_sample(cond, uncond, guidance_scale=guidance_scale, temperature=temperature, key=key, backend=backend)


def guided_logprobs(cond, uncond, guidance_scale, temperature):
    """log_softmax of the guided, tempered logits in fp64."""
    logits = (1 + guidance_scale) * cond.double() - guidance_scale * uncond.double()
    return torch.log_softmax(logits / (temperature or 1.0), dim=1)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_token_and_logprob(shape, dtype, temperature, backend, device):
    cond, uncond = make_logits(*shape, dtype, device=device)
    token, logprob = sample(cond, uncond, guidance_scale=1.5, temperature=temperature, backend=backend)
    expected, _ = sample(cond, uncond, guidance_scale=1.5, temperature=temperature)
    assert token.dtype == torch.int64 and logprob.dtype == torch.float32
    assert torch.equal(token, expected)
    truth = guided_logprobs(cond, uncond, 1.5, temperature)
    if temperature == 0:
        assert torch.equal(token, truth.argmax(dim=1))
    # Logits reach about 40; each of the few fp32 roundings at that size is at most 2e-6.
    assert (logprob - truth.gather(1, token[:, None]).squeeze(1)).abs().max() < 2e-5


def distance_to_a_tie(logits, key):
    """How far the draw of each row, tempered fp64 logits [R, V], is from another tile's and another id's in it."""
    tiles = torch.nn.functional.pad(logits, (0, -logits.shape[1] % SAMPLE_TILE), value=-INF)
    tiles = tiles.view(len(logits), -1, SAMPLE_TILE)
    words = random_words(key, tiles.shape[1], TOKEN_STREAM)
    scores = tiles.logsumexp(-1) - torch.log(-torch.log(uniform(words[0]).double()))
    by_tile = torch.full((len(logits),), INF, dtype=torch.float64, device=logits.device)
    if tiles.shape[1] > 1:
        best = scores.topk(2, dim=1).values
        by_tile = best[:, 0] - best[:, 1]
    winner = scores.argmax(1, keepdim=True)
    cumulative = tiles.gather(1, winner[..., None].expand(-1, -1, SAMPLE_TILE)).squeeze(1).softmax(1).cumsum(1)
    inside = (cumulative - uniform(words[1]).double().gather(1, winner)).abs().amin(1)
    return torch.minimum(by_tile, inside)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.3])
def test_tokens_equal_the_reference(temperature, backend, device):
    """Rounding may move at most one draw in 10,000, across a near-tie; the argmax never."""
    cond, uncond = make_logits(NUM_ROWS[backend], 300, device=device)
    key = make_key(len(cond), device)
    found = sample(cond, uncond, guidance_scale=2.0, temperature=temperature, key=key, backend=backend)
    expected = sample(cond, uncond, guidance_scale=2.0, temperature=temperature, key=key)
    same = found[0] == expected[0]
    assert (found[1] - expected[1])[same].abs().max() < 2e-5
    assert (~same).sum() <= (1 if temperature else 0)
    if temperature:
        guided = guided_logprobs(cond, uncond, 2.0, temperature)
        assert (distance_to_a_tie(guided, key)[~same] < 1e-5).all()
        assert distance_to_a_tie(guided, key).median() > 1e-3  # so that the line above says something


def chi_square_z(counts, expected):
    """About a standard normal if counts follow expected (Wilson and Hilferty); classes of fewer than 20 are pooled."""
    order = torch.argsort(expected)
    bins = torch.div(expected[order].cumsum(0), 20, rounding_mode="floor").long()
    bins = torch.unique(bins, return_inverse=True)[1]
    counts, expected = (
        torch.zeros(int(bins.max()) + 1, dtype=torch.float64).index_add(0, bins, values[order].double())
        for values in (counts, expected)
    )
    freedom = len(expected) - 1
    statistic = ((counts - expected) ** 2 / expected).sum() / freedom
    return float((statistic ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5)


@pytest.mark.parametrize("vocab_size", [7, 64, 8192])
@pytest.mark.parametrize("varied", ["seed", "step", "position"])
def test_distribution(vocab_size, varied, backend, device):
    """Draws of one distribution over running seeds, steps and positions, each of which must give independent draws."""
    num_draws = NUM_DRAWS[backend] // (8 if vocab_size == 8192 and backend != "cpu" else 1)
    generator = torch.Generator().manual_seed(vocab_size)
    cond, uncond = torch.randn(2, 1, vocab_size, generator=generator).to(device).unbind()
    fixed = {name: torch.full((num_draws,), 11, device=device) for name in RandomKey._fields}
    key = RandomKey(**(fixed | {varied: torch.arange(num_draws, device=device)}))
    pair = (logits.expand(num_draws, -1) for logits in (cond, uncond))
    token, _ = sample(*pair, guidance_scale=0.5, temperature=0.8, key=key, backend=backend)
    expected = guided_logprobs(cond, uncond, 0.5, 0.8)[0].exp() * num_draws
    z = chi_square_z(torch.bincount(token, minlength=vocab_size).cpu(), expected.cpu())
    assert abs(z) < 4


@needs_extension
def test_chi_square_notices_a_wrong_distribution():
    cond, _ = make_logits(1, 64)
    token, _ = sample(cond.expand(20_000, -1), temperature=1.1, key=make_key(20_000), backend="cpu")
    expected = torch.softmax(cond[0].double(), dim=0) * 20_000
    assert chi_square_z(torch.bincount(token, minlength=64), expected) > 10


def test_no_gradient(backend, device):
    """The model's logits carry a graph; the draw leaves it."""
    cond, uncond = (logits.requires_grad_() for logits in make_logits(3, 200, device=device))
    _, logprob = sample(cond, uncond, guidance_scale=1.0, backend=backend)
    assert not logprob.requires_grad


def test_rows_do_not_depend_on_their_batch(backend, device):
    cond, uncond = make_logits(6, 200, device=device)
    key = make_key(6, device)
    token, logprob = sample(cond, uncond, guidance_scale=1.0, key=key, backend=backend)
    rows = torch.tensor([4, 1], device=device)
    part = RandomKey(key.seed[rows], key.step.expand(2), key.position[rows])
    again = sample(cond[rows], uncond[rows], guidance_scale=1.0, key=part, backend=backend)
    assert torch.equal(again[0], token[rows]) and torch.equal(again[1], logprob[rows])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_distribution(backend, temperature, device):
    """NaN, +inf and nothing but -inf; also NaN in a tile of -inf, and beside good rows."""
    cond, _ = make_logits(6, 300, device=device)
    cond[0, 299] = NAN
    cond[1] = -INF
    cond[2, 5] = INF
    cond[3] = -INF
    cond[3, 130] = NAN
    cond[4] = NAN
    token, logprob = sample(cond, temperature=temperature, backend=backend)
    assert (token[:5] == -1).all() and torch.isnan(logprob[:5]).all()
    assert token[5] >= 0 and torch.isfinite(logprob[5])


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_forbidden_ids_are_never_drawn(backend, temperature, device):
    """Whole tiles of -inf before, between and after the allowed ids, forbidden in both logits or in cond alone."""
    cond, uncond = make_logits(40, 700, device=device)
    cond -= 300  # a tile without mass must not lift the others' maximum to 0
    allowed = torch.tensor([200, 201, 385, 512], device=device)
    forbidden = torch.ones(700, dtype=torch.bool, device=device).index_fill(0, allowed, False)
    cond[:, forbidden] = -INF
    uncond[:20, forbidden] = -INF
    token, logprob = sample(cond, uncond, guidance_scale=2.0, temperature=temperature, backend=backend)
    expected, _ = sample(cond, uncond, guidance_scale=2.0, temperature=temperature)
    assert torch.equal(token, expected) and torch.isin(token, allowed).all()
    truth = guided_logprobs(cond[:, allowed], uncond[:, allowed], 2.0, temperature)
    inside = torch.searchsorted(allowed, token)
    # Logits near -900: half a rounding there is 3e-5.
    assert (logprob - truth.gather(1, inside[:, None]).squeeze(1)).abs().max() < 4e-4


def test_one_allowed_id(backend, device):
    cond = torch.full((3, 300), -INF, device=device)
    cond[:, 131] = torch.tensor([-5.0, 0.0, 88.0], device=device)
    token, logprob = sample(cond, backend=backend)
    assert (token == 131).all() and (logprob == 0).all()


def test_no_guidance(backend, device):
    """None and a scale of 0 draw from cond alone, even where uncond is not finite."""
    cond, uncond = make_logits(20, 150, device=device)
    uncond[:, 3] = -INF
    alone = sample(cond, backend=backend)
    for other, scale in ((uncond, 0.0), (None, 2.0)):
        found = sample(cond, other, guidance_scale=scale, backend=backend)
        assert torch.equal(found[0], alone[0]) and torch.equal(found[1], alone[1])


def test_negative_guidance(backend, device):
    cond, uncond = make_logits(20, 150, device=device)
    flipped = sample(cond, uncond, guidance_scale=-1.0, backend=backend)
    assert torch.equal(flipped[0], sample(uncond, backend=backend)[0])


def test_argmax_takes_the_lower_id_on_ties(backend, device):
    cond = torch.zeros(2, 400, device=device)
    cond[0, [129, 130, 300]] = 2.0
    token, logprob = sample(cond, temperature=0.0, backend=backend)
    assert token.tolist() == [129, 0]
    truth = torch.log_softmax(cond.double(), dim=1)[[0, 1], [129, 0]]
    assert (logprob - truth).abs().max() < 1e-5


def test_empty_batch(backend, device):
    cond = torch.empty(0, 50, device=device)
    token, logprob = sample(cond, cond, guidance_scale=1.0, backend=backend)
    assert token.shape == (0,) and token.dtype == torch.int64 and logprob.shape == (0,)


def test_strides(backend, device):
    """Rows cut from wider storage, transposed columns, rows that share storage, a strided key."""
    wide = make_logits(6, 500, device=device)[0]
    key = make_key(12, device)
    strided = RandomKey(*(part[::2] if part.dim() else part for part in key))
    dense = RandomKey(*(part.contiguous() for part in strided))
    for cond in (wide[:, 100:333], wide.t().contiguous().t(), wide[:1].expand(6, -1)):
        found = sample(cond, wide[:, : cond.shape[1]], guidance_scale=1.0, key=strided, backend=backend)
        expected = sample(
            cond.contiguous(), wide[:, : cond.shape[1]].contiguous(), guidance_scale=1.0, key=dense, backend=backend
        )
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_the_warp_shift_follows_the_row(temperature, backend, device):
    """Turns of a warp with far larger, far smaller and no logits, in either order."""
    cond, _ = make_logits(6, 3 * 8192 + 40, device=device)
    cond[0, :8192] -= 500
    cond[1, 8192:] -= 500
    cond[2, 8192 : 2 * 8192] = -INF
    cond[3, : 2 * 8192] = -INF
    cond[4] += torch.arange(cond.shape[1], device=device) // 1024 * 30.0
    token, logprob = sample(cond, temperature=temperature, backend=backend)
    expected = sample(cond, temperature=temperature)
    assert torch.equal(token, expected[0])
    assert (logprob - expected[1]).abs().max() < 2e-4  # logits reach 1500


@pytest.mark.parametrize("offset", [0, 1, 3], ids=["aligned", "odd", "even"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alignment(dtype, offset, backend, device):
    """Rows that start at any value of a vector load, in storage that is poisoned with NaN around them."""
    storage = torch.full((2, 3, 1024 * 2 + 56), NAN, dtype=dtype, device=device)
    rows = storage[:, :, 8 + offset : 8 + offset + 2020]
    for row, logits in zip(rows, make_logits(3, 2020, dtype, device), strict=True):
        row.copy_(logits)
    found = sample(*rows.unbind(), guidance_scale=1.5, backend=backend)
    expected = sample(*(row.contiguous() for row in rows), guidance_scale=1.5)
    assert torch.equal(found[0], expected[0])
    assert (found[1] - expected[1]).abs().max() < 2e-5


@pytest.mark.parametrize("guidance_scale", [0.0, 1.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_is_added_to_cond(dtype, guidance_scale, backend, device):
    """linear_sample passes a bias to the kernels."""
    if backend == "torch":
        pytest.skip("the reference takes no bias")
    kernel = import_module(f"hermesflow.kernels.{'guided_sample_triton' if backend == 'triton' else 'extension_ops'}")
    cond, uncond = make_logits(4, 1100, dtype, device)
    bias = make_logits(1, 1100, device=device)[0][0]
    bias[::3] = -INF
    options = {"guidance_scale": guidance_scale, "temperature": 0.7, "key": make_key(4, device)}
    found = kernel.guided_sample(cond, uncond if guidance_scale else None, bias=bias, **options)
    expected = guided_sample(cond.float() + bias, uncond.float(), backend="torch", **options)
    assert torch.equal(found[0], expected[0])
    assert (found[1] - expected[1]).abs().max() < 2e-5


def test_half_precision_extremes(backend, device):
    """Subnormal, largest and infinite fp16 values are read exactly."""
    values = torch.tensor([6e-8, -6e-8, 65504, 6.1e-5, 0.0, -65504, -INF], device=device).half()
    cond = values.repeat(2, 30)
    cond[1] = (cond[1].float() * 1e-4).half()
    token, logprob = sample(cond, backend=backend)
    expected = sample(cond.float(), backend="torch")
    assert torch.equal(token, expected[0])
    assert (logprob - expected[1]).abs().max() < 1e-5


@needs_extension
def test_memory_past_the_row_is_not_read():
    """Rows in storage that is poisoned with NaN around them."""
    storage = torch.full((4, 400), NAN)
    storage[:, 100:231] = make_logits(4, 131)[0]
    found = sample(storage[:, 100:231], backend="cpu")
    assert torch.equal(found[0], sample(make_logits(4, 131)[0])[0])


@needs_extension
def test_opcheck():
    cond, uncond = make_logits(5, 200)
    key = make_key(5)
    for other, bias in ((uncond, None), (None, torch.zeros(200))):
        torch.library.opcheck(torch.ops.hermesflow.guided_sample.default, (cond, other, bias, 1.0, 0.7, *key))


@needs_extension
def test_extension_checks_its_arguments():
    """Callers of torch.ops.hermesflow bypass the public function's checks."""
    registry.dispatch("guided_sample", "cpu", *make_logits(1, 4), guidance_scale=1.0, temperature=1.0, key=make_key(1))
    call, key = torch.ops.hermesflow.guided_sample, make_key(2)
    with pytest.raises(ValueError, match=r"expected cond \[R, V\]"):
        call(torch.zeros(4), None, None, 0.0, 1.0, *key)
    with pytest.raises(ValueError, match="expected fp32, bf16 or fp16"):
        call(torch.zeros(2, 4).double(), None, None, 0.0, 1.0, *key)
    with pytest.raises(ValueError, match="expected uncond like cond"):
        call(torch.zeros(2, 4), torch.zeros(2, 5), None, 0.0, 1.0, *key)
    with pytest.raises(ValueError, match=r"expected bias fp32 \[4\]"):
        call(torch.zeros(2, 4), None, torch.zeros(5), 0.0, 1.0, *key)
    with pytest.raises(ValueError, match="expected int64 seed, step and position"):
        call(torch.zeros(3, 4), None, None, 0.0, 1.0, *key)


def test_error_messages():
    cond, key = torch.zeros(2, 4), make_key(2)
    with pytest.raises(ValueError, match=r"guided_sample: expected cond .*\[R, V\], got float32 \[4\]"):
        sample(cond[0], key=key)
    with pytest.raises(ValueError, match="expected cond float32 or bfloat16 or float16"):
        sample(cond.double(), key=key)
    with pytest.raises(ValueError, match="at least one token id"):
        sample(cond[:, :0], key=key)
    with pytest.raises(ValueError, match=r"expected uncond float32 \[R, V\] = \[2, 4\]"):
        sample(cond, cond[:, :3], key=key)
    with pytest.raises(ValueError, match="guidance_scale to be a finite number"):
        sample(cond, guidance_scale=NAN, key=key)
    with pytest.raises(ValueError, match="temperature to be a finite number of at least 0"):
        sample(cond, temperature=-1.0, key=key)
    with pytest.raises(ValueError, match="expected temperature to be at most 1e30, got 1e\\+40"):
        sample(cond, temperature=1e40, key=key)
    with pytest.raises(ValueError, match="key.seed"):
        sample(cond, key=make_key(3))


def test_backends_that_cannot_run_say_why():
    meta = torch.zeros(2, 4, device="meta")
    reasons = dict(registry.explain("guided_sample", meta, None))
    assert reasons["torch"] is None
    assert reasons["cpu"] in (checks.extension_missing(), "a tensor is on meta, needs cpu")
    assert reasons["triton"] == checks.triton_missing() or "a tensor is on meta" in reasons["triton"]


def test_compiles_as_a_whole(backend, device):
    """torch.compile finds no graph break, and the compiled op draws the same."""
    cond, uncond = make_logits(6, 300, device=device)
    key = make_key(6, device)

    def call(cond, uncond, key):
        return sample(cond, uncond, guidance_scale=1.5, temperature=0.8, key=key, backend=backend)

    found, expected = torch.compile(call, fullgraph=True)(cond, uncond, key), call(cond, uncond, key)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=2e-6)
