"""Schedules of parallel decoding."""

import math

import pytest
import torch

from hermesflow.engine.mask_schedule import mask_ratio, mask_temperatures, num_to_mask

SCHEDULES = ["cosine", "linear", "sigmoid", "pow2", "pow0.5", "pow3"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_ratio_falls_from_one_to_zero(schedule, dtype):
    ratio = mask_ratio(torch.linspace(0, 1, 101, dtype=dtype), schedule)
    assert ratio.dtype == dtype
    assert ratio[0].item() == pytest.approx(1, abs=1e-6)
    assert ratio[-1].item() == pytest.approx(0, abs=1e-6)
    assert (ratio.diff() < 0).all()
    assert ((ratio >= 0) & (ratio <= 1)).all()


def test_ratio_at_one_half():
    half = torch.tensor(0.5, dtype=torch.float64)
    assert mask_ratio(half).item() == pytest.approx(math.sqrt(0.5))
    assert mask_ratio(half, "linear").item() == 0.5
    assert mask_ratio(half, "pow2").item() == 0.75
    assert mask_ratio(half, "pow0.5").item() == pytest.approx(1 - math.sqrt(0.5))
    assert mask_ratio(half, "sigmoid").item() == pytest.approx(0.5)


def test_counts_of_the_published_rule():
    """floor(16 cos(pi / 2 * (step + 1) / 8)), worked out by hand."""
    assert num_to_mask(16, 8) == [15, 14, 13, 11, 8, 6, 3, 0]
    assert num_to_mask(16, 4, "linear") == [12, 8, 4, 0]
    # cos(pi / 3) is a little below 1/2 in fp32, and so the published code masks 127 tokens, not 128.
    assert num_to_mask(256, 3) == [221, 127, 0]


@pytest.mark.parametrize(
    ("num_unknown", "counts"),
    [
        (16, [15, 14, 13, 11, 8, 6, 3, 0]),
        (10, [9, 8, 7, 6, 5, 4, 3, 0]),
        (4, [3, 2, 1, 1, 1, 1, 1, 0]),
        (1, [1] * 7 + [0]),
    ],
)
def test_counts_with_known_tokens(num_unknown, counts):
    """Still shares of the whole image, as published; the tokens that are left bound them."""
    assert num_to_mask(16, 8, num_unknown=num_unknown) == counts


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("num_tokens", "num_steps"), [(1, 1), (1, 4), (2, 9), (16, 1), (16, 16), (16, 50), (1024, 18)])
def test_each_step_settles_a_token_until_one_is_left(schedule, num_tokens, num_steps):
    counts = num_to_mask(num_tokens, num_steps, schedule)
    assert len(counts) == num_steps
    assert counts[-1] == 0
    for before, after in zip([num_tokens, *counts], counts[:-1], strict=False):
        assert 1 <= after <= max(1, before - 1)


def test_temperatures():
    assert mask_temperatures(4.0, 4) == [3.0, 2.0, 1.0, 0.0]
    # The published code overwrites the temperature that it decays: 4 * 3/4, then * 2/4, then * 1/4.
    assert mask_temperatures(4.0, 4, "showo") == [3.0, 1.5, 0.375, 0.0]
    assert mask_temperatures(4.0, 1) == [0.0]


@pytest.mark.parametrize("schedule", ["cos", "pow", "powx", "pow-1", "pow0", "pownan", "powinf", ""])
def test_unknown_schedule(schedule):
    with pytest.raises(ValueError, match="mask_ratio: expected schedule cosine, linear, sigmoid, powX"):
        mask_ratio(torch.tensor(0.5), schedule)


def test_other_messages():
    with pytest.raises(ValueError, match="num_to_mask: expected num_steps of 1 to 65536, got 0"):
        num_to_mask(16, 0)
    with pytest.raises(ValueError, match="num_to_mask: expected num_tokens of at least 1, got 0"):
        num_to_mask(0, 4)
    for num_unknown in (0, 17):
        message = f"num_to_mask: expected num_unknown of 1 to num_tokens 16, got {num_unknown}"
        with pytest.raises(ValueError, match=message):
            num_to_mask(16, 4, num_unknown=num_unknown)
    with pytest.raises(ValueError, match="mask_temperatures: expected num_steps of 1 to 65536, got 0"):
        mask_temperatures(1.0, 0)
    with pytest.raises(ValueError, match="expected decay 'linear' or 'showo' or 'none', got 'no'"):
        mask_temperatures(1.0, 4, "no")


def test_shares_of_the_callers_own():
    assert num_to_mask(16, 3, (0.5, 0.2, 0.7)) == [8, 3, 0]  # the last is not read
    with pytest.raises(ValueError, match="num_to_mask: expected a share for each of 3 steps, got 2"):
        num_to_mask(16, 3, (0.5, 0.2))
