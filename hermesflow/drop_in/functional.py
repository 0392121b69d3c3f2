"""The published code's small functions, with their arguments, on the fast ops: for code that keeps its own loop.

Random draws differ bit by bit from the published ones and are equal in distribution. They depend on torch's generator
alone: in equal states it gives equal draws, whichever backend runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hermesflow.kernels.checks import FLOAT_DTYPES, check_number, check_tensor, describe
from hermesflow.kernels.mask_topk import mask_topk
from hermesflow.kernels.philox import RandomKey
from hermesflow.kernels.token_logprob import token_logprob
from hermesflow.kernels.token_sample import token_sample


@torch.no_grad()
def mask_by_random_topk(
    mask_len: Tensor, probs: Tensor, temperature: float | Tensor = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Mask the mask_len least confident tokens of each row by log(probs) + temperature * Gumbel noise.

    Exactly mask_len tokens are masked. Of equal confidences the lower index goes first, where the published code masks
    none that equals the first one kept, hence fewer than mask_len: at times in bf16, in which it rounds confidences and
    noise. Both are fp32 here. A NaN counts as the lowest confidence, there as the highest.

    Args:
        mask_len: [B, 1], integers or floats, which are cut to integers; on probs' device. One above N masks the row.
        probs: probability of each token [B, N], any floating dtype, raised to at least 1e-20. Known tokens carry the
            dtype's largest number, whose logarithm (88.7 for fp32 and bf16) lies above any other confidence unless
            the temperature is above 4; that of fp16 is 11.1, so at times the noise masks a known token.
        temperature: at least 0, a number or a 0-dim tensor, whose value is not checked; 0 is no noise.
        generator: of any device; None is torch's default one of the device.
    Returns: masked bool [B, N].
    Raises: ValueError on shapes, dtypes, devices or a temperature that is negative or not finite.
    Source: re-masking of MaskGIT (arXiv 2202.04200), section 3.2, as Show-o (arXiv 2408.12528) does it.
    """
    name = "mask_by_random_topk"
    if probs.dim() != 2 or not probs.is_floating_point():
        raise ValueError(f"{name}: expected floating probs [B, N], got {describe(probs)}; give one row an image")
    num_rows, device = len(probs), probs.device
    check_tensor(name, "mask_len", mask_len, "[B, 1]", (num_rows, 1), device=device)
    if not isinstance(temperature, Tensor):
        check_number(name, "temperature", temperature, minimum=0)
    return mask_topk(
        probs.float().clamp(min=1e-20).log(),
        # Not even the known ones: a row that has fewer unknown tokens than mask_len masks known ones too.
        torch.zeros(1, 1, dtype=torch.bool, device=device).expand_as(probs),
        mask_len.long().squeeze(1),
        temperature=_one_a_row(name, temperature, num_rows, device),
        key=_draw_key(num_rows, generator, device),
    )


@torch.no_grad()
def gumbel_sample(
    t: Tensor, temperature: float | Tensor = 1.0, dim: int = -1, generator: torch.Generator | None = None
) -> Tensor:
    """Draw from softmax(t / temperature) along dim.

    Args:
        t: logits of any shape; computed in fp32. -inf entries are never drawn.
        temperature: a number or a 0-dim tensor; up to 1e-10 it takes the argmax, the lower index on ties.
        dim: the dimension to draw from.
        generator: of any device; None is torch's default one of the device.
    Returns: index int64, t's shape without dim; -1 where the logits hold NaN or +inf, or nothing but -inf.
    Raises: ValueError on logits without entries to draw from or a temperature that is not finite; IndexError on dim.
    """
    name = "gumbel_sample"
    if not isinstance(temperature, Tensor):
        check_number(name, "temperature", temperature)
    rows = t.movedim(dim, -1)
    if rows.dim() == 0 or rows.shape[-1] == 0:
        raise ValueError(f"{name}: expected logits with at least one entry along dim {dim}, got {describe(t)}")
    logits = rows.reshape(-1, rows.shape[-1])
    num_rows, device = len(logits), t.device
    scale = _one_a_row(name, temperature, num_rows, device)
    off = torch.zeros(num_rows, device=device)
    index, _ = token_sample(
        logits if logits.dtype in FLOAT_DTYPES else logits.float(),
        temperature=torch.where(scale > 1e-10, scale, off),
        top_k=off.long(),
        top_p=off + 1,
        min_p=off,
        key=_draw_key(num_rows, generator, device),
    )
    return index.view(rows.shape[:-1])


def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    """log_softmax(logits) at index, without the other log-probabilities in memory.

    Args:
        logits: [..., V]; fp32, bf16, fp16 or fp64.
        index: int64 [...] in [0, V), or the label -100 of a token to skip, whose logits may hold anything.
    Returns: log-probability [...], 0 at -100: fp64 for fp64 logits, fp32 for all others, where log_softmax rounds to
        bf16 or fp16. Differentiable in logits, once.
    Raises: ValueError on shapes and dtypes, and as kernels.token_logprob does.
    Source: the name is TRL's; the published code writes log_softmax, gather and squeeze.
    """
    if logits.dim() == 0 or index.shape != logits.shape[:-1] or index.dtype != torch.int64:
        raise ValueError(
            f"selective_log_softmax: expected logits [..., V] and index int64 [...], got {describe(logits)} and "
            f"{describe(index)}; give index.long(), and squeeze(-1) an index [..., 1]"
        )
    if logits.shape[-1] == 0:
        raise ValueError(f"selective_log_softmax: expected at least one token id, got logits {describe(logits)}")
    return token_logprob(logits.reshape(-1, logits.shape[-1]), index.reshape(-1)).view(index.shape)


def dpo_loss(
    policy_win: Tensor, policy_lose: Tensor, reference_win: Tensor, reference_lose: Tensor, beta: float = 0.2
) -> Tensor:
    """-logsigmoid(beta * ((policy_win - reference_win) - (policy_lose - reference_lose))), the mean over pairs.

    Finite for every finite margin, where log(sigmoid(x)) is -inf below -88.7 in fp32. Give [P] sums of each pair: one
    sum over a batch's pairs, as in the published code, lets a pair won well hide one that is lost.

    Args:
        policy_win, policy_lose: log-probability of each pair's win and lose under the policy, 0-dim or [P].
        reference_win, reference_lose: the same under the frozen reference; they get no gradient.
        beta: above 0; scale of the rewards. kernels.pair_dpo has other losses, and takes the tokens of many pairs.
    Returns: 0-dim, at least fp32; differentiable in policy_win and policy_lose.
    Raises: ValueError on shapes that differ, no pair at all, or beta.
    Source: DPO (arXiv 2305.18290), beta of HermesFlow (arXiv 2502.12148).
    """
    sums = policy_win, policy_lose, reference_win, reference_lose
    if policy_win.dim() > 1 or any(each.shape != policy_win.shape for each in sums):
        shapes = ", ".join(str(list(each.shape)) for each in sums)
        raise ValueError(
            f"dpo_loss: expected four 0-dim or [P] tensors of one shape, got {shapes}; sum over tokens first"
        )
    if policy_win.numel() == 0:
        raise ValueError("dpo_loss: expected at least one pair, got none; skip the step")
    if not 0 < beta < float("inf"):
        raise ValueError(f"dpo_loss: expected beta to be a finite number above 0, got {beta}; the published one is 0.2")
    # No op: it would sum segments that are sums already, and P numbers leave no time to gain.
    wide = [each.to(torch.promote_types(each.dtype, torch.float32)) for each in sums]
    win, lose = wide[0] - wide[2].detach(), wide[1] - wide[3].detach()
    return -F.logsigmoid(beta * (win - lose)).mean()


def draw_seeds(count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Draw seeds for the ops, int64 [count] on device, from a generator of any device; None is the device's default."""
    source = device if generator is None else generator.device
    seeds = torch.randint(2**63 - 1, (count,), generator=generator, device=source)
    # CUDA takes a copy of pageable memory before the call returns, so nobody has to wait for the device.
    return seeds.to(device, non_blocking=source.type == "cpu")


def _draw_key(count: int, generator: torch.Generator | None, device: torch.device) -> RandomKey:
    seeds = draw_seeds(count, generator, device)
    return RandomKey(seeds, torch.zeros((), dtype=torch.int64, device=device), torch.zeros_like(seeds))


def _one_a_row(function: str, temperature: float | Tensor, num_rows: int, device: torch.device) -> Tensor:
    """The temperature as the ops take it, fp32 [R], without waiting to learn a tensor's value."""
    if not isinstance(temperature, Tensor):
        return torch.full((num_rows,), float(temperature), device=device)
    check_tensor(function, "temperature", temperature, "a number or 0-dim", ())
    return temperature.to(device, torch.float32, non_blocking=temperature.device.type == "cpu").expand(num_rows)
