"""Schedules of parallel decoding: how many image tokens stay masked after each step, and how noisy their choice is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SCHEDULES = ("cosine", "linear", "sigmoid", "powX with a number X > 0, such as pow2")
DECAYS = ("linear", "showo", "none")
MOST_STEPS = 2**16
"""An image has no more tokens."""
Schedule = str | tuple[float, ...]
"""One of SCHEDULES, or the share that is masked after each step."""


def mask_ratio(t: Tensor, schedule: str = "cosine") -> Tensor:
    """Share of the image that is masked at time t: 1 at t = 0, 0 at t = 1.

    Args:
        t: any shape, floating, in [0, 1]; uniform in training, (step + 1) / num_steps in decoding.
        schedule: "cosine", "linear" (1 - t), "sigmoid", or "powX" (1 - t ** X).
    Returns: shape and dtype of t.
    Raises: ValueError on an unknown schedule.
    Source: MaskGIT (arXiv 2202.04200), section 3.3; Muse's sigmoid from -3 to 3.
    """
    if schedule == "cosine":
        ratio = torch.cos(t * math.pi * 0.5)
    elif schedule == "linear":
        ratio = 1 - t
    elif schedule == "sigmoid":
        high, low = 1 / (1 + math.exp(-3)), 1 / (1 + math.exp(3))
        ratio = (high - torch.sigmoid(6 * t - 3)) / (high - low)
    else:
        ratio = 1 - t ** _exponent(schedule)
    return ratio.clamp(0, 1)


def num_to_mask(
    num_tokens: int, num_steps: int, schedule: Schedule = "cosine", num_unknown: int | None = None
) -> list[int]:
    """Tokens that are masked again after each step, one entry a step.

    floor(num_tokens * mask_ratio((step + 1) / num_steps)), at least 1 and fewer than before the step; a single unknown
    token stays masked. The last step masks none.

    Args:
        num_tokens: tokens of an image.
        num_steps: at least 1.
        schedule: as in mask_ratio, or num_steps shares, of which the last is not read.
        num_unknown: tokens masked before step 0, 1 to num_tokens; None: all.
    Returns: num_steps counts, never rising, the last 0.
    Raises: ValueError on an unknown schedule, fewer than one token or step, or num_unknown out of range.
    Source: decoding rule of Show-o (arXiv 2408.12528), in fp32 as in its code, whose roundings decide a floor.
    """
    _check_steps("num_to_mask", num_steps)
    if num_tokens < 1:
        raise ValueError(f"num_to_mask: expected num_tokens of at least 1, got {num_tokens}")
    unknown = num_tokens if num_unknown is None else num_unknown
    if not 1 <= unknown <= num_tokens:
        raise ValueError(f"num_to_mask: expected num_unknown of 1 to num_tokens {num_tokens}, got {unknown}")
    if isinstance(schedule, str):
        times = torch.tensor([(step + 1) / num_steps for step in range(num_steps - 1)])
        ratios = mask_ratio(times, schedule)
    elif len(schedule) == num_steps:
        ratios = torch.tensor(schedule[:-1])
    else:
        raise ValueError(f"num_to_mask: expected a share for each of {num_steps} steps, got {len(schedule)}")
    counts = []
    for count in torch.floor(num_tokens * ratios).long().tolist():
        unknown = max(1, min(unknown - 1, count))
        counts.append(unknown)
    return [*counts, 0]


def mask_temperatures(mask_temperature: float, num_steps: int, decay: str = "linear") -> list[float]:
    """Temperature of the re-masking noise at each step.

    Args:
        mask_temperature: before the decay.
        num_steps: at least 1.
        decay: "linear" multiplies mask_temperature by 1 - (step + 1) / num_steps; "showo" multiplies the last step's
            temperature by it, as the published code of Show-o does; "none" keeps it, but for the last step, which masks
            nothing.
    Returns: num_steps temperatures.
    Raises: ValueError on an unknown decay or fewer than one step.
    """
    _check_steps("mask_temperatures", num_steps)
    if decay not in DECAYS:
        raise ValueError(f"mask_temperatures: expected decay {' or '.join(map(repr, DECAYS))}, got {decay!r}")
    if decay == "none":
        return [*[mask_temperature] * (num_steps - 1), 0.0]
    temperatures, current = [], mask_temperature
    for step in range(num_steps):
        factor = 1 - (step + 1) / num_steps
        current = (current if decay == "showo" else mask_temperature) * factor
        temperatures.append(current)
    return temperatures


def _exponent(schedule: str) -> float:
    try:
        exponent = float(schedule.removeprefix("pow")) if schedule.startswith("pow") else 0.0
    except ValueError:
        exponent = 0.0
    if not 0 < exponent < math.inf:
        raise ValueError(f"mask_ratio: expected schedule {', '.join(SCHEDULES)}; got {schedule!r}")
    return exponent


def _check_steps(name: str, num_steps: int) -> None:
    if not 1 <= num_steps <= MOST_STEPS:
        raise ValueError(f"{name}: expected num_steps of 1 to {MOST_STEPS}, got {num_steps}")
