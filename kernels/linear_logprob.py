"""Log-probability of target tokens from hidden states: the head's matmul, log_softmax and gather, no [T, V] kept.

Formula: z = x @ weight.T + bias; z[t, target[t]] - log sum_v exp(z[t, v]), in fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hermesflow.kernels import registry
from hermesflow.kernels.checks import check_tensor, not_on, not_on_triton_device
from hermesflow.kernels.token_logprob import LOGPROB_DTYPES, check_target, token_logprob_reference

OP = "linear_logprob"
# The reference's logits at one time: small beside the weights of a large model, large enough for an efficient matmul.
REFERENCE_BLOCK_BYTES = 64 << 20


def linear_logprob(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target token under softmax(x @ weight.T + bias).

    Args:
        x: hidden states [T, D]; fp32, bf16, fp16 or fp64.
        weight: output embedding [V, D]; dtype and device of x.
        target: token ids [T], int64 in [0, V) or ignore_index, on x's device.
        bias: [V], dtype and device of x, or None.
        ignore_index: target of the rows to skip; such a row of x may hold anything, NaN included.
        return_entropy: also return the entropy of each row's distribution.
        backend: "triton" and "cpu" (blocks of logits by the library's matmul, then a fused kernel) or "torch"; None
            takes the first that can run.
    Returns: fp32 [T] (fp64 for fp64 inputs), 0 where ignored; NaN for a target out of range where no check could read
        it (on a GPU, under torch.compile). Differentiable in x, weight and bias; with fp16 inputs on a GPU the
        logits' gradient is fp16, so that its parts below 6e-8 vanish. With return_entropy (logprob, entropy); entropy
        is like logprob, but without gradient.
    Raises: ValueError on shapes, dtypes, devices or, on the CPU, target ids out of range; BackendError if the named
        backend cannot run.
    Source: log-probabilities of Pair-DPO, HermesFlow (arXiv 2502.12148), section 4.
    """
    check_linear(OP, "x", "T", x, weight, bias, LOGPROB_DTYPES)
    check_target(OP, target, x.shape[0], weight.shape[0], ignore_index, x.device)
    options = {"bias": bias, "ignore_index": ignore_index, "return_entropy": return_entropy}
    logprob, entropy = registry.dispatch(OP, backend, x, weight, target, **options)
    return (logprob, entropy) if return_entropy else logprob


def check_linear(
    op: str, name: str, rows: str, x: Tensor, weight: Tensor, bias: Tensor | None, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Raise ValueError unless x [rows, D], weight [V, D] and bias [V] go together: sizes, dtype and device."""
    check_tensor(op, name, x, f"[{rows}, D]", (None, None), dtypes=dtypes)
    same = {"dtypes": (x.dtype,), "device": x.device}
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"{op}: expected {name} [{rows}, D] and weight [V, D], got {list(x.shape)} and {list(weight.shape)}"
        )
    check_tensor(op, "weight", weight, "[V, D]", tuple(weight.shape), **same)
    if bias is not None:
        check_tensor(op, "bias", bias, "[V]", (weight.shape[0],), **same)


def linear_logprob_reference(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The same in plain torch: the specification. Each row block's logits are computed again in the backward pass."""
    wide = torch.promote_types(x.dtype, torch.float32)
    # Widened once, so that the blocks' gradients of weight and bias add up in the wide dtype.
    weight, bias = weight.to(wide), None if bias is None else bias.to(wide)

    def block_logprob(rows: slice) -> tuple[Tensor, Tensor | None]:
        # An ignored row of x goes before the matmul: a NaN there would reach weight's gradient as 0 * NaN.
        kept = target[rows] != ignore_index
        logits = linear_wide(torch.where(kept[:, None], x[rows].to(wide), 0.0), weight, bias)
        return token_logprob_reference(logits, target[rows], ignore_index=ignore_index, return_entropy=return_entropy)

    options = {"use_reentrant": False, "preserve_rng_state": False}
    blocks = row_blocks(x.shape[0], weight.shape[0] * wide.itemsize)
    logprob, entropy = zip(*(checkpoint(block_logprob, rows, **options) for rows in blocks), strict=True)
    return torch.cat(logprob), torch.cat(entropy) if return_entropy else None


def linear_wide(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear in the dtype of its arguments, inside an autocast region too."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight, bias)


def row_blocks(num_rows: int, row_bytes: int) -> Iterator[slice]:
    """Slices that cover the rows, each of at most REFERENCE_BLOCK_BYTES or one row; no rows give one empty slice."""
    step = max(1, REFERENCE_BLOCK_BYTES // row_bytes)
    for start in range(0, max(num_rows, 1), step):
        yield slice(start, min(start + step, num_rows))


def _refusal(x: Tensor, not_on_device: Callable[..., str | None], tensors: tuple[Tensor | None, ...]) -> str | None:
    return "the kernels compute in fp32, x is fp64" if x.dtype == torch.float64 else not_on_device(x, *tensors)


def _triton_can_run(x: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None, **_: object) -> str | None:
    return _refusal(x, not_on_triton_device, (weight, target, bias))


def _cpu_can_run(x: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None, **_: object) -> str | None:
    return _refusal(x, functools.partial(not_on, "cpu"), (weight, target, bias))


registry.register(OP, "triton", "hermesflow.kernels.linear_logprob_triton:linear_logprob", _triton_can_run)
registry.register(OP, "cpu", "hermesflow.kernels.extension_ops:linear_logprob", _cpu_can_run)
registry.register(OP, "torch", "hermesflow.kernels.linear_logprob:linear_logprob_reference", lambda *_, **__: None)
