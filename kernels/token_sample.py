"""Text sampling with settings of each row's own: temperature, top-k, top-p and min-p in one op, draw and confidence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hermesflow.kernels import registry
from hermesflow.kernels.checks import (
    FLOAT_DTYPES,
    can_read_values,
    check_key,
    check_tensor,
    not_on,
    not_on_cuda_device,
)
from hermesflow.kernels.philox import RandomKey
from hermesflow.kernels.sampling import argmax_rows, sample_tiles

OP = "token_sample"


def token_sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    key: RandomKey,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a token a row of softmax(logits / temperature) after top_k, then top_p, then min_p.

    Each filter keeps the ids from some probability upwards, so that ids of equal probability stay or go together.

    Args:
        logits: [R, V]; fp32, bf16 or fp16, any stride. -inf entries are never drawn.
        temperature: fp32 [R], at least 0; 0 takes the argmax, the lower id on ties, and no filter.
        top_k: int64 [R]; keeps the top_k most probable ids and those that tie with the last of them; 0 is off.
        top_p: fp32 [R] in [0, 1]; keeps the fewest most probable ids whose mass, after top_k, reaches top_p, at least
            one, and those that tie with the last of them; 1 is off.
        min_p: fp32 [R] in [0, 1]; keeps the ids with at least min_p times the largest probability; 0 is off.
        key: RandomKey of R rows on logits' device.
        backend: "cuda", "cpu" or "torch"; None takes the first that can run.
    Returns: token int64 [R] and its log-probability fp32 [R] under the filtered distribution, made to sum to 1 again
        (temperature 0: under softmax(logits)). Token -1 and NaN in rows that hold NaN or +inf, or nothing but -inf.
    Raises: ValueError on shapes, dtypes, devices or, on the CPU, settings out of range; BackendError if the named
        backend cannot run.
    Source: top-p of Holtzman et al. (arXiv 1904.09751), min-p of Nguyen et al. (arXiv 2407.01082).
    """
    check_tensor(OP, "logits", logits, "[R, V]", (None, None), dtypes=FLOAT_DTYPES)
    (num_rows, vocab_size), device = logits.shape, logits.device
    if vocab_size == 0:
        raise ValueError(f"{OP}: expected at least one token id, got logits {list(logits.shape)}")
    _check_setting("temperature", temperature, num_rows, torch.float32, device)
    _check_setting("top_k", top_k, num_rows, torch.int64, device)
    _check_setting("top_p", top_p, num_rows, torch.float32, device, largest=1)
    _check_setting("min_p", min_p, num_rows, torch.float32, device, largest=1)
    check_key(OP, key, num_rows, device)
    return registry.dispatch(
        OP, backend, logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, key=key
    )


def _check_setting(
    name: str, setting: Tensor, num_rows: int, dtype: torch.dtype, device: torch.device, largest: int | None = None
) -> None:
    """Raise ValueError unless the setting fits and, where no wait is needed to look, lies in [0, largest]."""
    check_tensor(OP, name, setting, "[R]", (num_rows,), dtypes=(dtype,), device=device)
    if not can_read_values(device):
        return
    right = (setting >= 0) & torch.isfinite(setting)
    if largest is not None:
        right &= setting <= largest
    if not right.all():
        row = int(right.int().argmin())
        bound = "at least 0" if largest is None else f"in [0, {largest}]"
        raise ValueError(f"{OP}: expected {name} {bound}, got {setting[row].item():g} in row {row}")


@torch.no_grad()
def token_sample_reference(
    logits: Tensor, *, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, key: RandomKey
) -> tuple[Tensor, Tensor]:
    """The same in plain torch: the specification."""
    logits, greedy = logits.float(), temperature == 0
    tempered = logits / torch.where(greedy, 1.0, temperature)[:, None]
    lowest = _lowest_kept(tempered, top_k, top_p, min_p)
    drawn = sample_tiles(tempered.masked_fill(tempered < lowest, float("-inf")), key)
    token, logprob = (torch.where(greedy, *pair) for pair in zip(argmax_rows(logits), drawn, strict=True))
    return token, logprob


def _lowest_kept(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The lowest logit [R, 1] that the filters keep."""
    vocab_size = logits.shape[1]
    ordered = logits.sort(dim=1, descending=True).values
    num_kept = torch.where(top_k == 0, vocab_size, top_k.clamp(max=vocab_size))
    lowest = ordered.gather(1, num_kept[:, None] - 1)

    # Ids whose more probable ones have less than top_p together; fp64, for fp32 sums drift over a large vocabulary.
    mass = ordered.masked_fill(ordered < lowest, float("-inf")).softmax(dim=1, dtype=torch.float64)
    mass_before = F.pad(mass.cumsum(dim=1)[:, :-1], (1, 0))
    num_kept = (mass_before < top_p[:, None]).sum(dim=1).clamp(min=1)
    num_kept = torch.where(top_p < 1, num_kept, vocab_size)
    lowest = torch.maximum(lowest, ordered.gather(1, num_kept[:, None] - 1))

    return torch.maximum(lowest, ordered[:, :1] + min_p.log()[:, None])


def _cuda_can_run(logits: Tensor, **_: object) -> str | None:
    return not_on_cuda_device(logits)


def _cpu_can_run(logits: Tensor, **_: object) -> str | None:
    return not_on("cpu", logits)


registry.register(OP, "cuda", "hermesflow.kernels.extension_ops:token_sample", _cuda_can_run)
registry.register(OP, "cpu", "hermesflow.kernels.extension_ops:token_sample", _cpu_can_run)
registry.register(OP, "torch", "hermesflow.kernels.token_sample:token_sample_reference", lambda *_, **__: None)
