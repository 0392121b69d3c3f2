import pytest
import torch

from hermesflow.kernels.philox import MASK_STREAM, TOKEN_STREAM, RandomKey, gumbel, philox4x32, random_words, uniform

# (key, counter, words) of Random123's kat_vectors, philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("key", "counter", "words"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_known_answers(key, counter, words):
    result = philox4x32(*(torch.tensor(word) for word in (*key, *counter)))
    assert tuple(int(word) for word in result) == words


def test_counter_layout():
    """The key is the seed's two words, the counter (block, step, position, stream)."""
    seed = (0x299F31D0 << 32) | 0xA4093822
    key = RandomKey(torch.tensor([seed, -seed]), torch.tensor(7), torch.tensor([8, -1]))
    words = random_words(key, 6, MASK_STREAM)
    # Two's complement: -seed has the words below.
    rows = ((0xA4093822, 0x299F31D0, 8), (0x5BF6C7DE, 0xD660CE2F, 0xFFFFFFFF))
    for row, (seed_lo, seed_hi, position) in enumerate(rows):
        expected = philox4x32(*(torch.tensor(word) for word in (seed_lo, seed_hi, 5, 7, position, MASK_STREAM)))
        assert [int(word[row, 5]) for word in words] == [int(word) for word in expected]


def test_every_part_of_the_key_matters():
    def words(seed=7, step=1, position=2, stream=TOKEN_STREAM, use_position=True):
        key = RandomKey(torch.tensor([seed]), torch.tensor([step]), torch.tensor([position]))
        return tuple(random_words(key, 4, stream, use_position=use_position)[0][0].tolist())

    changed = [words(), words(seed=8), words(seed=7 + 2**32), words(seed=-7), words(step=2), words(position=3)]
    changed += [words(stream=MASK_STREAM), words(use_position=False)]
    assert len(set(changed)) == len(changed)
    assert len(set(words())) == 4
    assert words(use_position=False) == words(position=0)


def test_rows_do_not_depend_on_their_batch():
    seeds, positions = torch.tensor([3, -(2**63), 2**63 - 1]), torch.tensor([0, 9, 2**31])
    together = random_words(RandomKey(seeds, torch.tensor(4), positions), 5, TOKEN_STREAM)
    for row in range(3):
        alone = random_words(RandomKey(seeds[row, None], torch.tensor([4]), positions[row, None]), 5, TOKEN_STREAM)
        for one, all_rows in zip(alone, together, strict=True):
            assert torch.equal(one[0], all_rows[row])
            assert ((one >= 0) & (one <= 0xFFFFFFFF)).all()


def test_uniform_and_gumbel_stay_inside_their_range():
    extremes = torch.tensor([0, 511, 0x7FFFFFFF, 0x80000000, 0xFFFFFE00, 0xFFFFFFFF])
    values = uniform(extremes)
    assert values.dtype == torch.float32
    assert (values > 0).all() and (values < 1).all() and (values.diff() >= 0).all()
    assert torch.isfinite(gumbel(extremes)).all()


def test_gumbel_moments():
    key = RandomKey(torch.arange(1000), torch.tensor(0), torch.zeros(1000, dtype=torch.int64))
    noise = gumbel(random_words(key, 200, TOKEN_STREAM)[0]).double()
    # Mean is Euler's constant, variance pi^2 / 6; the bounds are five standard errors of 200,000 draws.
    assert abs(noise.mean().item() - 0.577216) < 5 * 1.2825 / 200_000**0.5
    assert abs(noise.var().item() - 1.644934) < 5 * (4.4 * 1.644934**2 / 200_000) ** 0.5


@pytest.mark.parametrize("num_blocks", [3, 50])
def test_compiled_words_are_equal(num_blocks):
    """A product beyond int64 has no defined value in the C++ that torch.compile writes."""
    key = RandomKey(torch.arange(6) * 977 - 5, torch.tensor(2), torch.arange(6))
    compiled = torch.compile(random_words, fullgraph=True)(key, num_blocks, MASK_STREAM)
    for found, expected in zip(compiled, random_words(key, num_blocks, MASK_STREAM), strict=True):
        assert torch.equal(found, expected)
