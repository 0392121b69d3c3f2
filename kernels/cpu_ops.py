"""The C++ backends: calls into the extension, and the fake kernels that tell torch.compile their shapes and dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _C  # noqa: F401 - loading it registers torch.ops.hermesflow
from .philox import RandomKey


def guided_sample(
    cond: Tensor, uncond: Tensor | None, *, guidance_scale: float, temperature: float, key: RandomKey
) -> tuple[Tensor, Tensor]:
    """The "cpu" backend of kernels/guided_sample.py."""
    return torch.ops.hermesflow.guided_sample(cond, uncond, guidance_scale, temperature, *key)


def mask_topk(
    logprob: Tensor, known: Tensor, num_masked: Tensor, *, temperature: float | Tensor, key: RandomKey
) -> Tensor:
    """The "cpu" backend of kernels/mask_topk.py."""
    noise = torch.as_tensor(temperature, dtype=torch.float32)
    return torch.ops.hermesflow.mask_topk(logprob, known, num_masked, noise, key.seed, key.step)


@torch.library.register_fake("hermesflow::guided_sample")
def _guided_sample_fake(cond, uncond, guidance_scale, temperature, seed, step, position):
    return cond.new_empty(cond.shape[0], dtype=torch.int64), cond.new_empty(cond.shape[0], dtype=torch.float32)


@torch.library.register_fake("hermesflow::mask_topk")
def _mask_topk_fake(logprob, known, num_masked, temperature, seed, step):
    return known.new_empty(known.shape)
