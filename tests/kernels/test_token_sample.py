import math

import pytest
import torch

from hermesflow.kernels import checks, registry
from hermesflow.kernels.guided_sample import guided_sample
from hermesflow.kernels.philox import RandomKey
from hermesflow.kernels.token_sample import token_sample

OP = "token_sample"
needs_extension = pytest.mark.skipif(checks.cpu_missing() is not None, reason=str(checks.cpu_missing()))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INF, NAN = float("inf"), float("nan")


def at_most(num_rows, backend):
    """Rows of a test: an emulator takes 20 ms and more a row."""
    slow = backend == "cuda" and not torch.cuda.is_available()
    return min(num_rows, 40) if slow else num_rows


def make_key(num_rows, device="cpu", seed=7):
    """The same seed and step in all rows, positions 0, 1, ..."""
    seeds = torch.full((num_rows,), seed, device=device)
    return RandomKey(seeds, torch.tensor(3, device=device), torch.arange(num_rows, device=device))


def make_logits(num_rows, vocab_size, device="cpu", scale=1.0):
    generator = torch.Generator().manual_seed(1000 * num_rows + vocab_size)
    return (scale * torch.randn(num_rows, vocab_size, generator=generator)).to(device)


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, key=None, backend="torch"):
    """token_sample with settings that are numbers or one number a row."""
    num_rows = logits.shape[0]

    def rows(value, dtype=torch.float32):
        return torch.as_tensor(value, dtype=dtype, device=logits.device).expand(num_rows)

    settings = {
        "temperature": rows(temperature),
        "top_k": rows(top_k, torch.int64),
        "top_p": rows(top_p),
        "min_p": rows(min_p),
    }
    return token_sample(logits, key=key or make_key(num_rows, logits.device), **settings, backend=backend)


def filtered_by_hand(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The filtered distribution of one row by the definition, in Python's floats."""
    largest = max(logits)
    weight = {token: math.exp((logit - largest) / temperature) for token, logit in enumerate(logits)}
    if top_k:
        last = sorted(weight.values(), reverse=True)[:top_k][-1]
        weight = {token: w for token, w in weight.items() if w >= last}
    if top_p < 1:
        total, mass = sum(weight.values()), 0.0
        for last in sorted(weight.values(), reverse=True):
            mass += last / total
            if mass >= top_p:
                break
        weight = {token: w for token, w in weight.items() if w >= last}
    weight = {token: w for token, w in weight.items() if w >= min_p * max(weight.values())}
    return {token: w / sum(weight.values()) for token, w in weight.items()}


def check_distribution(token, probability):
    """Chi-square test: the draws follow the probabilities {token: p}; ids outside are never drawn.

    Classes of fewer than 10 expected draws are pooled.
    """
    counts = dict(zip(*(t.tolist() for t in token.unique(return_counts=True)), strict=True))
    assert set(counts) <= set(probability)
    classes, count, expected = [], 0, 0.0
    for t, p in sorted(probability.items(), key=lambda item: item[1]):
        count, expected = count + counts.get(t, 0), expected + p * len(token)
        if expected >= 10:
            classes.append((count, expected))
            count, expected = 0, 0.0
    classes[-1] = (classes[-1][0] + count, classes[-1][1] + expected)
    statistic = sum((count - expected) ** 2 / expected for count, expected in classes)
    freedom, spread = len(classes) - 1, 2 / (9 * max(len(classes) - 1, 1))
    # Wilson and Hilferty's approximation of the quantile that one test in 10,000 passes by chance.
    assert statistic <= freedom * (1 - spread + 3.719 * spread**0.5) ** 3 + 1e-9


# Two tiles and a ragged one of the sampler; the filters alone and together.
FILTERS = {
    "none": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 20},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "all": {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.03},
}


@pytest.mark.parametrize(
    ("vocab_size", "settings"),
    [*((300, settings) for settings in FILTERS.values()), *((size, FILTERS["all"]) for size in (7, 64, 8192))],
    ids=[*FILTERS, "7_ids", "64_ids", "8192_ids"],
)
def test_distribution(vocab_size, settings, backend, device):
    logits = 1.5 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(1))
    expected = filtered_by_hand(logits.tolist(), **settings)
    num_draws = at_most(6000, backend) // 3 if vocab_size == 8192 else at_most(20_000, backend)
    token, logprob = sample(logits.to(device).expand(num_draws, -1), **settings, backend=backend)
    check_distribution(token, expected)
    exact = torch.tensor([math.log(expected[t]) for t in token.tolist()])
    torch.testing.assert_close(logprob.cpu(), exact, rtol=1e-5, atol=1e-5)


def random_settings(num_rows, most_kept, generator):
    """Settings of each row's own, each filter and the temperature off in some rows."""

    def draw(low, high):
        return low + (high - low) * torch.rand(num_rows, generator=generator)

    settings = {"temperature": draw(0.3, 2), "top_p": draw(0.05, 1), "min_p": draw(0, 0.3)}
    settings["top_k"] = torch.exp(draw(0, math.log(most_kept + 1))).long()
    for name, off, share in (("top_k", 0, 0.3), ("top_p", 1.0, 0.3), ("min_p", 0.0, 0.5), ("temperature", 0.0, 0.1)):
        settings[name][torch.rand(num_rows, generator=generator) < share] = off
    return settings


def distance_to_top_p(logits, temperature, top_k, top_p, **_):
    """How near the mass of some of the most probable ids of a row comes to its top_p."""
    ordered = (logits.float() / temperature[:, None]).sort(dim=1, descending=True).values
    num_kept = torch.where(top_k == 0, logits.shape[1], top_k.clamp(max=logits.shape[1]))
    ordered = ordered.masked_fill(ordered < ordered.gather(1, num_kept[:, None] - 1), -INF)
    mass = ordered.softmax(dim=1, dtype=torch.float64).cumsum(dim=1)
    return (mass - top_p[:, None]).abs().amin(dim=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [300, 8192, 58_498])
def test_tokens_equal_the_reference(vocab_size, dtype, backend, device):
    """One draw in 10,000 may cross a near-tie of the Gumbel scores.

    Which ids are kept may differ only where a mass comes within rounding of top_p.
    """
    num_rows = at_most(10_000, backend) if vocab_size == 300 else at_most(800, backend) // 40
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (2 * torch.randn(num_rows, vocab_size, generator=generator)).to(device, dtype)
    settings = random_settings(num_rows, vocab_size, generator)
    settings = {name: value.to(device) for name, value in settings.items()}
    found, expected = (
        token_sample(logits, key=make_key(num_rows, device), **settings, backend=name) for name in (backend, "torch")
    )
    same = found[0] == expected[0]
    assert (~same).sum() <= 1
    kept_others = same & ((found[1] - expected[1]).abs() > 2e-5)
    near_ties = {name: value[kept_others] for name, value in settings.items()}
    assert (distance_to_top_p(logits[kept_others], **near_ties) < 1e-6).all()


def test_rows_have_settings_of_their_own(backend, device):
    """Random settings and coarse logits, so that many ids tie; the log-probability shows which ids were kept."""
    generator = torch.Generator().manual_seed(2)
    num_rows = at_most(400, backend)
    logits = torch.randint(-4, 5, (num_rows, 17), generator=generator) / 2

    def draw(low, high):
        return low + (high - low) * torch.rand(num_rows, generator=generator)

    settings = {"temperature": draw(0.3, 2), "top_p": draw(0.05, 1), "min_p": draw(0, 0.5)}
    settings["top_k"] = torch.randint(0, 20, (num_rows,), generator=generator)
    for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
        settings[name][torch.rand(num_rows, generator=generator) < 0.3] = off
    token, logprob = sample(logits.to(device), **settings, backend=backend)
    for row in range(num_rows):
        expected = filtered_by_hand(
            logits[row].tolist(), **{name: values[row].item() for name, values in settings.items()}
        )
        assert logprob[row].item() == pytest.approx(math.log(expected[token[row].item()]), abs=1e-5), row


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_guided_sample_without_filters(dtype, temperature, backend, device):
    num_rows = at_most(500, backend)
    logits = make_logits(num_rows, 257, device, scale=3).to(dtype)
    key = make_key(num_rows, device)
    expected = guided_sample(logits, None, guidance_scale=0.0, temperature=temperature, key=key, backend="torch")
    result = sample(logits, temperature, key=key, backend=backend)
    assert torch.equal(result[0], expected[0])
    torch.testing.assert_close(result[1], expected[1], rtol=1e-6, atol=2e-6)
    # Filters that keep everything are no filters.
    again = sample(logits, temperature, top_k=257, key=key, backend=backend)
    assert torch.equal(again[0], result[0]) and torch.equal(again[1], result[1])


def test_a_row_does_not_depend_on_its_batch(backend, device):
    logits = make_logits(6, 200, device)
    key = make_key(6, device)
    together = sample(logits, 0.9, 30, 0.9, 0.01, key, backend)
    for row in range(6):
        alone = RandomKey(key.seed[row : row + 1], key.step, key.position[row : row + 1])
        token, logprob = sample(logits[row : row + 1], 0.9, 30, 0.9, 0.01, alone, backend)
        assert token[0] == together[0][row] and logprob[0] == together[1][row]


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 0.0}], ids=str)
def test_one_id_left(settings, backend, device):
    logits = make_logits(at_most(50, backend) // 2, 300, device)
    token, logprob = sample(logits, **settings, backend=backend)
    assert (token == logits.argmax(1)).all()
    kept_all = "temperature" in settings  # greedy: the confidence under the whole distribution
    expected = logits.log_softmax(1).amax(1) if kept_all else torch.zeros_like(logprob)
    torch.testing.assert_close(logprob, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings", [{"top_k": 1}, {"top_k": 2}, {"top_p": 0.0}, {"top_p": 0.3}, {"min_p": 1.0}], ids=str
)
def test_ties_are_kept_together(settings, backend, device):
    num_draws = at_most(3000, backend)
    logits = torch.tensor([0.0, 5.0, 1.0, 5.0, 5.0, 2.0], device=device).expand(num_draws, -1)
    token, logprob = sample(logits, **settings, backend=backend)
    check_distribution(token, dict.fromkeys((1, 3, 4), 1 / 3))
    torch.testing.assert_close(logprob, torch.full_like(logprob, -math.log(3)))


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 0.0}, {"top_p": 0.1}, {"min_p": 1.0}], ids=str)
def test_ties_that_bits_do_not_show(settings, backend, device):
    """0 and -0 are one logit; so are neighbors that the division by the temperature makes one."""
    neighbors = torch.linspace(1.5, 2, 100)
    neighbors = torch.stack([neighbors, neighbors.nextafter(torch.tensor(3.0))])
    neighbors = neighbors[:, neighbors[0] / 3 == neighbors[1] / 3][:, 0].tolist()
    logits = torch.tensor([[-1.0, 0.0, -2.0, -0.0, -1.0], [-1.0, neighbors[0], 0.0, neighbors[1], 1.0]], device=device)
    token, logprob = sample(logits, 3.0, **settings, backend=backend)
    assert torch.isin(token.cpu(), torch.tensor([1, 3])).all()
    torch.testing.assert_close(logprob, torch.full_like(logprob, -math.log(2)))


def test_greedy_takes_the_lower_id_and_no_filter(backend, device):
    logits = torch.tensor([[0.0, 5.0, 1.0, 5.0]], device=device)
    token, logprob = sample(logits, 0.0, top_k=1, top_p=0.1, min_p=0.9, backend=backend)
    assert token.item() == 1
    torch.testing.assert_close(logprob, logits.log_softmax(1)[:, 1])


def test_greedy_and_drawn_rows_in_one_batch(backend, device):
    logits = make_logits(4, 50, device)
    temperature = torch.tensor([0.0, 1.0, 0.0, 0.5], device=device)
    together = sample(logits, temperature, backend=backend)
    for value in (0.0, 1.0, 0.5):
        rows = temperature == value
        alone = sample(logits, value, backend=backend)
        assert (together[0][rows] == alone[0][rows]).all() and (together[1][rows] == alone[1][rows]).all()


def test_order_of_the_filters(backend, device):
    """top_p counts the mass after top_k, min_p after both."""
    num_draws = at_most(2000, backend)
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1], device=device).log().expand(num_draws, -1)
    # top_k leaves 4/7 and 3/7, so that 0.5 is reached by the first alone; of the whole, 0.5 would need two.
    assert (sample(logits, top_k=2, top_p=0.5, backend=backend)[0] == 0).all()
    check_distribution(sample(logits, top_p=0.5, backend=backend)[0], {0: 4 / 7, 1: 3 / 7})
    check_distribution(sample(logits, top_k=3, min_p=0.6, backend=backend)[0], {0: 4 / 7, 1: 3 / 7})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
def test_rows_without_a_distribution(settings, temperature, backend, device):
    """NaN, +inf, nothing but -inf, and NaN among -inf, beside good rows."""
    logits, key = make_logits(6, 140, device), make_key(6, device)
    logits[0, 3], logits[1, 130], logits[2:4] = NAN, INF, -INF
    logits[3, 131] = NAN
    good = RandomKey(key.seed[4:], key.step, key.position[4:])
    clean = sample(logits[4:], temperature, key=good, **settings, backend=backend)
    token, logprob = sample(logits, temperature, key=key, **settings, backend=backend)
    assert (token[:4] == -1).all() and logprob[:4].isnan().all()
    assert (token[4:] == clean[0]).all() and (logprob[4:] == clean[1]).all()
    assert (clean[0] >= 0).all() and clean[1].isfinite().all()


@pytest.mark.parametrize("settings", [{}, {"top_k": 50}, {"top_p": 0.9999}, {"min_p": 0.0}], ids=str)
def test_forbidden_ids_are_never_drawn(settings, backend, device):
    """The others are ids of the first and the last tile, far below 0."""
    logits = torch.full((at_most(2000, backend), 200), -INF, device=device)
    logits[:, [3, 150, 199]] = -500.0
    token, _ = sample(logits, **settings, backend=backend)
    check_distribution(token, dict.fromkeys((3, 150, 199), 1 / 3))


def test_extreme_logits(backend, device):
    """Logits far apart, subnormal, or at the ends of fp32 go through every filter."""
    logits = torch.tensor([[1e-40, 2e-40, -1e-40], [3e38, -3e38, 1e38], [-3e38, -3.1e38, -3.2e38]], device=device)
    for settings in ({"top_k": 1}, {"top_p": 0.2}, {"min_p": 1.0}, {"top_k": 2, "top_p": 0.9999}):
        token, logprob = sample(logits, **settings, backend=backend)
        expected = sample(logits, **settings)
        assert torch.equal(token[1:], expected[0][1:]) and (0 <= token[0] < 3)
        torch.testing.assert_close(logprob[1:], expected[1][1:])


def test_one_row_one_id_and_empty(backend, device):
    logits = make_logits(5, 40, device)
    for num_rows in (1, 0):
        token, logprob = sample(logits[:num_rows], backend=backend)
        assert token.shape == logprob.shape == (num_rows,)
        assert token.dtype == torch.int64 and logprob.dtype == torch.float32
    assert sample(torch.zeros(2, 1, device=device), 0.5, 1, 0.5, 0.5, backend=backend)[0].tolist() == [0, 0]


def test_strides(backend, device):
    """Rows cut from wider storage, transposed columns, rows that share storage; strided settings and key."""
    wide = make_logits(6, 500, device)
    settings = random_settings(12, 100, torch.Generator().manual_seed(3))
    settings = {name: value.to(device)[::2] for name, value in settings.items()}
    key = make_key(12, device)
    key = RandomKey(key.seed[::2], torch.arange(12, device=device)[::2], key.position[::2])
    dense = {name: value.contiguous() for name, value in settings.items()}
    dense_key = RandomKey(*(part.contiguous() for part in key))
    for logits in (wide[:, 101:333], wide.t().contiguous().t(), wide[:1].expand(6, -1)):
        found = token_sample(logits, **settings, key=key, backend=backend)
        expected = token_sample(logits.contiguous(), **dense, key=dense_key, backend=backend)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_row_stride_beyond_int32(backend, device):
    """The second row begins 2^31 elements after the first; only the pages of the two rows are ever touched."""
    storage = torch.empty(2**31 + 300, dtype=torch.float16, device=device)
    logits = storage.as_strided((2, 300), (2**31, 1))
    logits.copy_(make_logits(2, 300))
    found = sample(logits, 0.8, 50, 0.9, 0.01, backend=backend)
    expected = sample(logits.contiguous(), 0.8, 50, 0.9, 0.01, backend=backend)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_settings_out_of_range_draw_no_id_out_of_range(backend, device):
    """On a GPU the public function does not wait to look at values."""
    if backend == "torch":
        pytest.skip("the reference indexes with top_k")
    good = {"temperature": 1.0, "top_k": 0, "top_p": 0.5, "min_p": 0.0}
    bad = [("top_k", -3), ("top_p", NAN), ("top_p", -1.0), ("top_p", 2.0), ("min_p", NAN), ("min_p", -1.0),
           ("min_p", 2.0), ("temperature", NAN), ("temperature", -1.0), ("temperature", INF)]  # fmt: skip
    logits = make_logits(len(bad), 131, device)
    settings = {name: torch.tensor([value] * len(bad), device=device) for name, value in good.items()}
    for row, (name, value) in enumerate(bad):
        settings[name][row] = value
    token, logprob = registry.dispatch(OP, backend, logits, **settings, key=make_key(len(bad), device))
    assert ((token >= -1) & (token < 131)).all()
    assert torch.equal(token == -1, logprob.isnan())


@needs_extension
def test_memory_past_the_row_is_not_read():
    """Rows in storage that is poisoned with NaN around them."""
    storage = torch.full((4, 400), NAN)
    storage[:, 100:231] = make_logits(4, 131)
    found = sample(storage[:, 100:231], 0.7, 20, 0.9, backend="cpu")
    assert torch.equal(found[0], sample(make_logits(4, 131), 0.7, 20, 0.9)[0])


def op_arguments(num_rows=3, vocab_size=200):
    """Arguments of torch.ops.hermesflow.token_sample."""
    settings = torch.full((num_rows,), 0.7), torch.full((num_rows,), 9), torch.full((num_rows,), 0.9)
    return [make_logits(num_rows, vocab_size), *settings, torch.full((num_rows,), 0.1), *make_key(num_rows)]


@needs_extension
def test_opcheck():
    sample(make_logits(1, 4), backend="cpu")  # loads the extension
    torch.library.opcheck(torch.ops.hermesflow.token_sample.default, tuple(op_arguments()))


@needs_extension
@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(4), r"expected logits \[R, V\]"),
        (0, torch.zeros(3, 0), "expected at least one token id"),
        (0, torch.zeros(3, 4).double(), "expected fp32, bf16 or fp16"),
        (1, torch.ones(2), r"expected temperature Float \[3\]"),
        (2, torch.ones(3), r"expected top_k Long \[3\]"),
        (3, torch.ones(3, 1), r"expected top_p Float \[3\]"),
        (4, torch.ones(3).double(), r"expected min_p Float \[3\]"),
        (5, torch.arange(4), "expected int64 seed, step and position"),
    ],
)
def test_extension_checks_its_arguments(index, value, message):
    """Callers of torch.ops.hermesflow bypass the public function's checks."""
    sample(make_logits(1, 4), backend="cpu")
    arguments = op_arguments()
    arguments[index] = value
    with pytest.raises(ValueError, match="token_sample: " + message):
        torch.ops.hermesflow.token_sample(*arguments)


def test_backends_that_cannot_run_say_why():
    meta = torch.zeros(2, 4, device="meta")
    reasons = dict(registry.explain(OP, meta))
    assert reasons["torch"] is None
    assert reasons["cpu"] in (checks.extension_missing(), "a tensor is on meta, needs cpu")
    assert reasons["cuda"] == checks.cuda_missing() or "a tensor is on meta" in reasons["cuda"]


def test_compiles_as_a_whole(backend, device):
    """torch.compile finds no graph break, and the compiled op draws the same."""
    logits, key = make_logits(6, 300, device), make_key(6, device)
    settings = random_settings(6, 100, torch.Generator().manual_seed(5))
    settings = {name: value.to(device) for name, value in settings.items()}

    def call(logits, settings, key):
        return token_sample(logits, **settings, key=key, backend=backend)

    found, expected = torch.compile(call, fullgraph=True)(logits, settings, key), call(logits, settings, key)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=2e-6)


L, F, K = torch.zeros(3, 9), torch.ones(3), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": L[0]}, r"token_sample: expected logits .*\[R, V\], got float32 \[9\]"),
        ({"logits": L.double()}, r"expected logits float32 or .*got float64"),
        ({"logits": L[:, :0]}, r"expected at least one token id, got logits \[3, 0\]"),
        ({"temperature": F[:2]}, r"expected temperature float32 \[R\] = \[3\].*got float32 \[2\]"),
        ({"temperature": F - 2}, r"expected temperature at least 0, got -1 in row 0"),
        ({"temperature": F * float("inf")}, r"expected temperature at least 0, got inf in row 0"),
        ({"top_k": K.int()}, r"expected top_k int64 .*got int32"),
        ({"top_k": torch.tensor([0, 5, -3])}, r"expected top_k at least 0, got -3 in row 2"),
        ({"top_p": torch.tensor([0.5, 1.5, 2.5])}, r"expected top_p in \[0, 1\], got 1.5 in row 1"),
        ({"min_p": torch.tensor([0.5, float("nan"), 1.0])}, r"expected min_p in \[0, 1\], got nan in row 1"),
        ({"key": make_key(4)}, r"expected key.seed int64 \[R\] = \[3\].*got int64 \[4\]"),
    ],
)
def test_errors(changes, message):
    arguments = {"logits": L, "temperature": F, "top_k": K, "top_p": F, "min_p": F, "key": make_key(3)} | changes
    with pytest.raises(ValueError, match=message):
        token_sample(arguments.pop("logits"), **arguments)
