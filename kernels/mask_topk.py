"""MaskGIT re-masking: noise on the confidences, then the least confident tokens of each row are masked again."""

from __future__ import annotations

import torch
from torch import Tensor

from hermesflow.kernels import registry
from hermesflow.kernels.checks import (
    check_key,
    check_number,
    check_tensor,
    not_on,
    not_on_cuda_device,
)
from hermesflow.kernels.philox import MASK_STREAM, RandomKey, gumbel, random_words

OP = "mask_topk"


def mask_topk(
    logprob: Tensor,
    known: Tensor,
    num_masked: Tensor,
    *,
    temperature: float | Tensor,
    key: RandomKey,
    backend: str | None = None,
) -> Tensor:
    """Mask the num_masked unknown tokens of each row with the lowest logprob + temperature * Gumbel noise.

    Args:
        logprob: confidence of each token fp32 [B, N]; NaN counts as the lowest.
        known: bool [B, N]; known tokens are never masked.
        num_masked: int64 [B]; cut to 0 .. the row's number of unknown tokens.
        temperature: of the noise, one number or fp32 [B]; 0 is no noise.
        key: RandomKey of B rows on logprob's device; its position is not used.
        backend: "cuda", "cpu" or "torch"; None takes the first that can run.
    Returns: masked bool [B, N]; on equal scores the lower index is masked first.
    Raises: ValueError on shapes, dtypes or devices; BackendError if the named backend cannot run.
    Source: re-masking of MaskGIT (arXiv 2202.04200), section 3.2, with the noise of its published code.
    """
    check_tensor(OP, "logprob", logprob, "[B, N]", (None, None), dtypes=(torch.float32,))
    (num_rows, num_tokens), device = logprob.shape, logprob.device
    check_tensor(OP, "known", known, "[B, N]", (num_rows, num_tokens), dtypes=(torch.bool,), device=device)
    check_tensor(OP, "num_masked", num_masked, "[B]", (num_rows,), dtypes=(torch.int64,), device=device)
    if isinstance(temperature, Tensor):
        check_tensor(OP, "temperature", temperature, "[B]", (num_rows,), dtypes=(torch.float32,), device=device)
    else:
        check_number(OP, "temperature", temperature, minimum=0)
    check_key(OP, key, num_rows, device)
    return registry.dispatch(OP, backend, logprob, known, num_masked, temperature=temperature, key=key)


@torch.no_grad()
def mask_topk_reference(
    logprob: Tensor, known: Tensor, num_masked: Tensor, *, temperature: float | Tensor, key: RandomKey
) -> Tensor:
    """The same in plain torch: the specification."""
    noise = gumbel(random_words(key, logprob.shape[1], MASK_STREAM, use_position=False)[0])
    scale = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    score = logprob + scale * noise
    score = score.masked_fill(torch.isnan(score), float("-inf"))
    # Two stable sorts: by score, then unknown before known.
    order = torch.argsort(score, dim=1, stable=True)
    order = order.gather(1, torch.argsort(known.gather(1, order).to(torch.int8), dim=1, stable=True))
    count = torch.minimum(num_masked, (~known).sum(1)).clamp(min=0)
    first = torch.arange(logprob.shape[1], device=logprob.device) < count[:, None]
    return torch.zeros_like(known).scatter(1, order, first)


def _cuda_can_run(logprob: Tensor, *_: object, **__: object) -> str | None:
    return not_on_cuda_device(logprob)


def _cpu_can_run(logprob: Tensor, *_: object, **__: object) -> str | None:
    return not_on("cpu", logprob)


registry.register(OP, "cuda", "hermesflow.kernels.extension_ops:mask_topk", _cuda_can_run)
registry.register(OP, "cpu", "hermesflow.kernels.extension_ops:mask_topk", _cpu_can_run)
registry.register(OP, "torch", "hermesflow.kernels.mask_topk:mask_topk_reference", lambda *_, **__: None)
