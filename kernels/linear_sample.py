"""Draw tokens from hidden states: the head's matmul, softmax, draw and confidence, no [R, V] kept.

Guidance commutes with a linear head: guided hidden states (1 + g) cond - g uncond go in, and one matmul serves both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hermesflow.kernels import registry
from hermesflow.kernels.checks import (
    FLOAT_DTYPES,
    check_key,
    check_temperature,
    not_on,
    not_on_cuda_device,
    not_on_triton_device,
)
from hermesflow.kernels.linear_logprob import check_linear, linear_wide, row_blocks
from hermesflow.kernels.philox import RandomKey
from hermesflow.kernels.sampling import sample_rows

OP = "linear_sample"


def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    temperature: float,
    key: RandomKey,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a token a row of softmax((hidden @ weight.T + bias) / temperature).

    Args:
        hidden: hidden states [R, D], guidance applied; fp32, bf16 or fp16.
        weight: output embedding [V, D], the ids that may be drawn; dtype and device of hidden.
        bias: [V], dtype and device of hidden, or None.
        temperature: 0 to 1e30; 0 takes the argmax, the lower id on ties.
        key: RandomKey of R rows on hidden's device.
        backend: "cuda", "triton", "cpu" or "torch"; None takes the first that can run.
    Returns: token int64 [R] and its log-probability fp32 [R], both as guided_sample gives them for the fp32 logits
        hidden @ weight.T + bias: under the tempered distribution, token -1 and NaN in rows without a distribution.
    Raises: ValueError on shapes, dtypes or devices; BackendError if the named backend cannot run.
    """
    check_linear(OP, "hidden", "R", hidden, weight, bias, FLOAT_DTYPES)
    if weight.shape[0] == 0:
        raise ValueError(f"{OP}: expected at least one token id, got weight {list(weight.shape)}")
    check_temperature(OP, temperature)
    check_key(OP, key, hidden.shape[0], hidden.device)
    return registry.dispatch(OP, backend, hidden, weight, bias, temperature=float(temperature), key=key)


@torch.no_grad()
def linear_sample_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, temperature: float, key: RandomKey
) -> tuple[Tensor, Tensor]:
    """The same in plain torch, one block of rows at a time: the specification."""
    weight, bias = weight.float(), None if bias is None else bias.float()
    draws = []
    for rows in row_blocks(hidden.shape[0], weight.shape[0] * weight.itemsize):
        logits = linear_wide(hidden[rows].float(), weight, bias)
        step = key.step[rows] if key.step.dim() else key.step
        draws.append(sample_rows(logits, temperature, RandomKey(key.seed[rows], step, key.position[rows])))
    token, logprob = zip(*draws, strict=True)
    return torch.cat(token), torch.cat(logprob)


def _cuda_can_run(hidden: Tensor, weight: Tensor, bias: Tensor | None, **_: object) -> str | None:
    return not_on_cuda_device(hidden, weight, bias)


def _triton_can_run(hidden: Tensor, weight: Tensor, bias: Tensor | None, **_: object) -> str | None:
    return not_on_triton_device(hidden, weight, bias)


def _cpu_can_run(hidden: Tensor, weight: Tensor, bias: Tensor | None, **_: object) -> str | None:
    return not_on("cpu", hidden, weight, bias)


# guided_sample's kernels draw: for 512 bytes of fp32 logits CUDA's takes 76 instructions, Triton's 177.
registry.register(OP, "cuda", "hermesflow.kernels.linear_sample_blocked:by_extension", _cuda_can_run)
registry.register(OP, "triton", "hermesflow.kernels.linear_sample_blocked:by_triton", _triton_can_run)
registry.register(OP, "cpu", "hermesflow.kernels.linear_sample_blocked:by_extension", _cpu_can_run)
registry.register(OP, "torch", "hermesflow.kernels.linear_sample:linear_sample_reference", lambda *_, **__: None)
