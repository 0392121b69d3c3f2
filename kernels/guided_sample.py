"""Classifier-free guidance, softmax, draw and confidence in one op over a pair of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from hermesflow.kernels import registry
from hermesflow.kernels.checks import (
    FLOAT_DTYPES,
    check_key,
    check_number,
    check_temperature,
    check_tensor,
    not_on,
    not_on_cuda_device,
    not_on_triton_device,
)
from hermesflow.kernels.philox import RandomKey
from hermesflow.kernels.sampling import sample_rows

OP = "guided_sample"


def guided_sample(
    cond: Tensor,
    uncond: Tensor | None,
    *,
    guidance_scale: float,
    temperature: float,
    key: RandomKey,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a token a row of softmax(((1 + g) cond - g uncond) / temperature), g the guidance scale.

    Args:
        cond: conditional logits [R, V]; fp32, bf16 or fp16, any row stride. An id that is -inf here is never drawn,
            whatever uncond holds.
        uncond: unconditional logits, as cond; None (or guidance_scale 0) draws from cond alone.
        guidance_scale: g; 0 is no guidance.
        temperature: 0 to 1e30; 0 takes the argmax, the lower id on ties.
        key: RandomKey of R rows on cond's device.
        backend: "cuda", "triton", "cpu" or "torch"; None takes the first that can run.
    Returns: token int64 [R] and its log-probability fp32 [R] under the tempered distribution (temperature 0: under
        the untempered one), without gradient. Token -1 and NaN in rows that hold NaN or +inf, or nothing but -inf.
    Raises: ValueError on shapes, dtypes or devices; BackendError if the named backend cannot run.
    Source: guidance as in Show-o (arXiv 2408.12528), section 3.4.
    """
    check_tensor(OP, "cond", cond, "[R, V]", (None, None), dtypes=FLOAT_DTYPES)
    if cond.shape[1] == 0:
        raise ValueError(f"{OP}: expected at least one token id, got cond {list(cond.shape)}")
    if uncond is not None:
        check_tensor(OP, "uncond", uncond, "[R, V]", tuple(cond.shape), dtypes=(cond.dtype,), device=cond.device)
    check_number(OP, "guidance_scale", guidance_scale)
    check_temperature(OP, temperature)
    check_key(OP, key, cond.shape[0], cond.device)
    options = {"guidance_scale": float(guidance_scale), "temperature": float(temperature), "key": key}
    return registry.dispatch(OP, backend, cond, uncond if guidance_scale else None, **options)


@torch.no_grad()
def guided_sample_reference(
    cond: Tensor, uncond: Tensor | None, *, guidance_scale: float, temperature: float, key: RandomKey
) -> tuple[Tensor, Tensor]:
    """The same in plain torch: the specification."""
    logits = cond.float()
    if uncond is not None:
        guided = (1 + guidance_scale) * logits - guidance_scale * uncond.float()
        # -inf - -inf is NaN; what the condition forbids stays forbidden.
        logits = torch.where(logits == float("-inf"), logits, guided)
    return sample_rows(logits, temperature, key)


def _cuda_can_run(cond: Tensor, uncond: Tensor | None, **_: object) -> str | None:
    return not_on_cuda_device(cond, uncond)


def _cpu_can_run(cond: Tensor, uncond: Tensor | None, **_: object) -> str | None:
    return not_on("cpu", cond, uncond)


def _triton_can_run(cond: Tensor, uncond: Tensor | None, **_: object) -> str | None:
    return not_on_triton_device(cond, uncond)


# For 512 bytes of bf16 logits with guidance CUDA's kernel takes 91 instructions, Triton's 151; neither was timed.
# Triton's serves machines without nvcc.
registry.register(OP, "cuda", "hermesflow.kernels.extension_ops:guided_sample", _cuda_can_run)
registry.register(OP, "triton", "hermesflow.kernels.guided_sample_triton:guided_sample", _triton_can_run)
registry.register(OP, "cpu", "hermesflow.kernels.extension_ops:guided_sample", _cpu_can_run)
registry.register(OP, "torch", "hermesflow.kernels.guided_sample:guided_sample_reference", lambda *_, **__: None)
