"""Times of a flow: 1 is noise, 0 the image.

Source: BAGEL (arXiv 2505.14683), whose code moves u = linspace(1, 0, n) towards the noise by a shift s, to
s u / (1 + (s - 1) u).
"""

from __future__ import annotations

import torch
from torch import Tensor


def flow_times(num_steps: int, shift: float) -> list[float]:
    """The num_steps times between which num_steps - 1 evaluations step, from 1 to 0, rounded to fp32.

    Raises: ValueError on fewer than 2 steps, or a shift that is not above 0.
    """
    if type(num_steps) is not int or num_steps < 2 or not 1e-3 <= shift <= 1e3:
        raise ValueError(
            f"flow_times: expected num_steps from 2 and a shift from 0.001 to 1000, got {num_steps} and {shift}"
        )
    times = torch.linspace(1, 0, num_steps)
    return shifted(times, shift).tolist()


def shifted(times: Tensor, shift: float) -> Tensor:
    """Times in [0, 1], moved towards 1 by a shift above 1."""
    return shift * times / (1 + (shift - 1) * times)
