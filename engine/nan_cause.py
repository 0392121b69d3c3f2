"""Why a model's logits hold NaN, as far as its weights show."""

from __future__ import annotations

import torch
from torch import nn


class NotFiniteError(RuntimeError):
    """A model gives NaN or infinity; the message names the place and says what to check."""


@torch.no_grad()
def likely_cause(transformer: nn.Module) -> str:
    """What to check after a draw failed, for the end of an error's message. Reads every parameter, so only then."""
    for name, parameter in transformer.named_parameters():
        if not parameter.isfinite().all():
            return f"check its weights: {name} holds NaN or infinity"
    dtype = next(transformer.parameters()).dtype
    if dtype == torch.float16:
        return "its weights are finite, so its activations overflowed float16: load it in bfloat16 or float32"
    if dtype == torch.float32:
        return "its weights are finite, so its input is not, or its activations overflowed: check both for huge values"
    return f"its weights are finite, so its input is not, or its activations overflowed {dtype}: try float32"
