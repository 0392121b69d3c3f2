"""Log-probability of target tokens from logits: log_softmax and gather in one op, with ignored rows.

Formula: logits[t, target[t]] - log sum_v exp(logits[t, v]), in fp32 (fp64 for fp64 logits).
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from hermesflow.kernels import registry
from hermesflow.kernels.checks import (
    FLOAT_DTYPES,
    can_read_values,
    check_tensor,
    not_on,
    not_on_cuda_device,
    not_on_triton_device,
)

OP = "token_logprob"
LOGPROB_DTYPES = (*FLOAT_DTYPES, torch.float64)


@overload
def token_logprob(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = ...,
    return_entropy: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def token_logprob(
    logits: Tensor, target: Tensor, *, ignore_index: int = ..., return_entropy: Literal[True], backend: str | None = ...
) -> tuple[Tensor, Tensor]: ...
def token_logprob(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    return_entropy: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target token under softmax(logits).

    Args:
        logits: [T, V]; fp32, bf16, fp16 or fp64, any strides. The backends "cuda" and "cpu" copy logits whose columns
            are not neighbors in memory.
        target: token ids [T], int64 in [0, V) or ignore_index, on logits' device.
        ignore_index: target of the rows to skip; such a row may hold anything, NaN included.
        return_entropy: return (logprob, entropy), the entropy of softmax(logits) in nats.
        backend: "cuda", "cpu", "triton" or "torch" (alone in fp64); None takes the first that can run.
    Returns: logprob fp32 [T] (fp64 for fp64 logits), 0 where ignored, NaN in rows that hold NaN or +inf or nothing but
        -inf. Differentiable in logits, once. entropy as logprob, without gradient.
    Raises: ValueError on shapes, dtypes, devices or, on the CPU outside torch.compile, target ids out of range, whose
        logprob is NaN elsewhere ("torch" raises an error of its own); BackendError if the named backend cannot run.
    """
    check_tensor(OP, "logits", logits, "[T, V]", (None, None), dtypes=LOGPROB_DTYPES)
    check_target(OP, target, logits.shape[0], logits.shape[1], ignore_index, logits.device)
    options = {"ignore_index": ignore_index, "return_entropy": return_entropy}
    logprob, entropy = registry.dispatch(OP, backend, logits, target, **options)
    return (logprob, entropy) if return_entropy else logprob


def check_target(
    op: str, target: Tensor, num_tokens: int, vocab_size: int, ignore_index: int, device: torch.device
) -> None:
    """Raise ValueError unless target is int64 [T] on the device and, where no wait is needed to look, in range."""
    check_tensor(op, "target", target, "[T]", (num_tokens,), dtypes=(torch.int64,), device=device)
    if vocab_size == 0:
        raise ValueError(f"{op}: expected at least one token id, got a vocabulary of 0")
    if not can_read_values(device):
        return
    wrong = (target != ignore_index) & ((target < 0) | (target >= vocab_size))
    if wrong.any():
        row = int(wrong.int().argmax())
        raise ValueError(
            f"{op}: expected target ids in [0, {vocab_size}) or ignore_index {ignore_index}, "
            f"got {int(target[row])} in row {row}"
        )


def token_logprob_reference(
    logits: Tensor, target: Tensor, *, ignore_index: int = -100, return_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The same in plain torch: the specification. Like every backend it returns logprob and the entropy or None."""
    kept = target != ignore_index
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # An ignored row's logits go before the softmax: a NaN there would reach the gradient as 0 * NaN.
    logprobs = torch.where(kept[:, None], wide, 0.0).log_softmax(dim=1)
    logprob = torch.where(kept, logprobs.gather(1, torch.where(kept, target, 0)[:, None]).squeeze(1), 0.0)
    if not return_entropy:
        return logprob, None
    logprobs = logprobs.detach()
    # An id of probability 0 adds 0, not 0 * -inf.
    summands = torch.where(logprobs == float("-inf"), 0.0, logprobs * logprobs.exp())
    return logprob, torch.where(kept, -summands.sum(dim=1), 0.0)


def _cuda_can_run(logits: Tensor, target: Tensor, **_: object) -> str | None:
    return _too_wide(logits) or not_on_cuda_device(logits, target)


def _cpu_can_run(logits: Tensor, target: Tensor, **_: object) -> str | None:
    return _too_wide(logits) or not_on("cpu", logits, target)


def _triton_can_run(logits: Tensor, target: Tensor, **_: object) -> str | None:
    return _too_wide(logits) or not_on_triton_device(logits, target)


def _too_wide(logits: Tensor) -> str | None:
    return "the kernel computes in fp32, logits are fp64" if logits.dtype == torch.float64 else None


registry.register(OP, "cuda", "hermesflow.kernels.extension_ops:token_logprob", _cuda_can_run)
registry.register(OP, "cpu", "hermesflow.kernels.extension_ops:token_logprob", _cpu_can_run)
registry.register(OP, "triton", "hermesflow.kernels.token_logprob_triton:token_logprob", _triton_can_run)
registry.register(OP, "torch", "hermesflow.kernels.token_logprob:token_logprob_reference", lambda *_, **__: None)
