import math

import pytest
import torch

from hermesflow.kernels.guided_sample import guided_sample
from hermesflow.kernels.philox import RandomKey
from hermesflow.kernels.token_sample import token_sample

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_key(num_rows, seed=7):
    """The same seed and step in all rows, positions 0, 1, ..."""
    return RandomKey(torch.full((num_rows,), seed), torch.tensor(3), torch.arange(num_rows))


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, key=None):
    """token_sample with settings that are numbers or one number a row."""
    num_rows = logits.shape[0]

    def rows(value, dtype=torch.float32):
        return torch.as_tensor(value, dtype=dtype).expand(num_rows)

    settings = {
        "temperature": rows(temperature),
        "top_k": rows(top_k, torch.int64),
        "top_p": rows(top_p),
        "min_p": rows(min_p),
    }
    return token_sample(logits, key=key or make_key(num_rows), **settings)


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
    """Chi-square test: the draws follow the probabilities {token: p}; ids outside are never drawn."""
    counts = dict(zip(*(t.tolist() for t in token.unique(return_counts=True)), strict=True))
    assert set(counts) <= set(probability)
    statistic = sum((counts.get(t, 0) - p * len(token)) ** 2 / (p * len(token)) for t, p in probability.items())
    freedom, spread = len(probability) - 1, 2 / (9 * max(len(probability) - 1, 1))
    # Wilson and Hilferty's approximation of the quantile that one test in 10,000 passes by chance.
    assert statistic <= freedom * (1 - spread + 3.719 * spread**0.5) ** 3


# Two tiles and a ragged one of the sampler; the filters alone and together.
FILTERS = {
    "none": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 20},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "all": {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.03},
}


@pytest.mark.parametrize("settings", FILTERS.values(), ids=FILTERS)
def test_distribution(settings):
    logits = 1.5 * torch.randn(300, generator=torch.Generator().manual_seed(1))
    expected = filtered_by_hand(logits.tolist(), **settings)
    token, logprob = sample(logits.expand(20_000, -1), **settings)
    check_distribution(token, expected)
    exact = torch.tensor([math.log(expected[t]) for t in token.tolist()])
    torch.testing.assert_close(logprob, exact, rtol=1e-5, atol=1e-5)


def test_rows_have_settings_of_their_own():
    """Random settings and coarse logits, so that many ids tie; the log-probability tells which ids were kept."""
    generator = torch.Generator().manual_seed(2)
    num_rows = 400
    logits = torch.randint(-4, 5, (num_rows, 17), generator=generator) / 2

    def draw(low, high):
        return low + (high - low) * torch.rand(num_rows, generator=generator)

    settings = {"temperature": draw(0.3, 2), "top_p": draw(0.05, 1), "min_p": draw(0, 0.5)}
    settings["top_k"] = torch.randint(0, 20, (num_rows,), generator=generator)
    for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
        settings[name][torch.rand(num_rows, generator=generator) < 0.3] = off
    token, logprob = sample(logits, **settings)
    for row in range(num_rows):
        expected = filtered_by_hand(
            logits[row].tolist(), **{name: values[row].item() for name, values in settings.items()}
        )
        assert logprob[row].item() == pytest.approx(math.log(expected[token[row].item()]), abs=1e-5), row


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_guided_sample_without_filters(dtype, temperature):
    logits = (3 * torch.randn(500, 257, generator=torch.Generator().manual_seed(3))).to(dtype)
    key = make_key(500)
    expected = guided_sample(logits, None, guidance_scale=0.0, temperature=temperature, key=key, backend="torch")
    result = sample(logits, temperature, key=key)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    # Filters that keep everything are no filters.
    torch.testing.assert_close(sample(logits, temperature, top_k=257, key=key), expected, rtol=1e-6, atol=1e-6)


def test_a_row_does_not_depend_on_its_batch():
    logits = torch.randn(6, 200, generator=torch.Generator().manual_seed(4))
    key = make_key(6)
    together = sample(logits, 0.9, 30, 0.9, 0.01, key)
    for row in range(6):
        alone = RandomKey(key.seed[row : row + 1], key.step, key.position[row : row + 1])
        token, logprob = sample(logits[row : row + 1], 0.9, 30, 0.9, 0.01, alone)
        assert token[0] == together[0][row] and logprob[0] == together[1][row]


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 0.0}], ids=str)
def test_one_id_left(settings):
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(5))
    token, logprob = sample(logits, **settings)
    assert (token == logits.argmax(1)).all()
    kept_all = "temperature" in settings  # greedy: the confidence under the whole distribution
    expected = logits.log_softmax(1).amax(1) if kept_all else torch.zeros(50)
    torch.testing.assert_close(logprob, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings", [{"top_k": 1}, {"top_k": 2}, {"top_p": 0.0}, {"top_p": 0.3}, {"min_p": 1.0}], ids=str
)
def test_ties_are_kept_together(settings):
    logits = torch.tensor([0.0, 5.0, 1.0, 5.0, 5.0, 2.0]).expand(3000, -1)
    token, logprob = sample(logits, **settings)
    check_distribution(token, dict.fromkeys((1, 3, 4), 1 / 3))
    torch.testing.assert_close(logprob, torch.full((3000,), -math.log(3)))


def test_greedy_takes_the_lower_id_and_no_filter():
    logits = torch.tensor([[0.0, 5.0, 1.0, 5.0]])
    token, logprob = sample(logits, 0.0, top_k=1, top_p=0.1, min_p=0.9)
    assert token.item() == 1
    torch.testing.assert_close(logprob, logits.log_softmax(1)[:, 1])


def test_greedy_and_drawn_rows_in_one_batch():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(6))
    temperature = torch.tensor([0.0, 1.0, 0.0, 0.5])
    together = sample(logits, temperature)
    for value in (0.0, 1.0, 0.5):
        rows = temperature == value
        alone = sample(logits, value)
        assert (together[0][rows] == alone[0][rows]).all() and (together[1][rows] == alone[1][rows]).all()


def test_order_of_the_filters():
    """top_p counts the mass after top_k, min_p after both."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(2000, -1)
    # top_k leaves 4/7 and 3/7, so that 0.5 is reached by the first alone; of the whole, 0.5 would need two.
    assert (sample(logits, top_k=2, top_p=0.5)[0] == 0).all()
    check_distribution(sample(logits, top_p=0.5)[0], {0: 4 / 7, 1: 3 / 7})
    check_distribution(sample(logits, top_k=3, min_p=0.6)[0], {0: 4 / 7, 1: 3 / 7})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
def test_rows_without_a_distribution(settings, temperature):
    logits = torch.randn(5, 140, generator=torch.Generator().manual_seed(7))
    logits[0, 3], logits[1, 130], logits[2] = float("nan"), float("inf"), float("-inf")
    clean = sample(
        logits[3:],
        temperature,
        key=make_key(5)._replace(seed=torch.full((2,), 7), position=torch.tensor([3, 4])),
        **settings,
    )
    token, logprob = sample(logits, temperature, **settings)
    assert (token[:3] == -1).all() and logprob[:3].isnan().all()
    assert (token[3:] == clean[0]).all() and (logprob[3:] == clean[1]).all()


@pytest.mark.parametrize("settings", [{}, {"top_k": 50}, {"top_p": 0.9999}, {"min_p": 0.0}], ids=str)
def test_forbidden_ids_are_never_drawn(settings):
    logits = torch.full((2000, 200), float("-inf"))
    logits[:, [3, 150, 199]] = 0.0
    check_distribution(sample(logits, **settings)[0], dict.fromkeys((3, 150, 199), 1 / 3))


def test_non_contiguous_one_row_and_empty():
    logits = torch.randn(40, 8, generator=torch.Generator().manual_seed(8)).t()
    expected = sample(logits.contiguous(), 0.8, 10, 0.9, 0.01)
    assert all((a == b).all() for a, b in zip(sample(logits, 0.8, 10, 0.9, 0.01), expected, strict=True))
    for num_rows in (1, 0):
        token, logprob = sample(logits[:num_rows])
        assert token.shape == logprob.shape == (num_rows,)
        assert token.dtype == torch.int64 and logprob.dtype == torch.float32
    assert sample(torch.zeros(2, 1), 0.5, 1, 0.5, 0.5)[0].tolist() == [0, 0]


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
