"""The algorithms as the published code writes them, in eager torch: what the ops are compared with.

Sources: Show-o (arXiv 2408.12528) for sampling, re-masking and attention, HermesFlow (arXiv 2502.12148) for the
log-probabilities and the loss; the sort-based filter is that of the large inference engines, one sort a batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def guided_sample(cond: Tensor, uncond: Tensor, guidance_scale: float) -> tuple[Tensor, Tensor]:
    """Token [R] and its probability [R]: guidance on logits [R, V], softmax, multinomial, gather."""
    logits = (1 + guidance_scale) * cond - guidance_scale * uncond
    return _draw(logits.float().softmax(dim=-1))


def linear_sample(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Token [R] and its probability [R] from hidden states [R, D], by the whole logits [R, V]."""
    return _draw(F.linear(hidden, weight, bias).float().softmax(dim=-1))


def token_sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Token [R] and its probability [R] after the top-k and top-p filters of each row, by one sort of the logits."""
    logits = logits.float() / temperature[:, None]
    ordered, order = logits.sort(dim=-1)
    kth = ordered.gather(1, logits.shape[1] - top_k[:, None])
    ordered = ordered.masked_fill(ordered < kth, float("-inf"))
    below = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p[:, None]
    below[:, -1] = False
    ordered = ordered.masked_fill(below, float("-inf"))
    return _draw(torch.empty_like(logits).scatter_(1, order, ordered).softmax(dim=-1))


def _draw(probs: Tensor) -> tuple[Tensor, Tensor]:
    token = torch.multinomial(probs, 1)
    return token.squeeze(1), probs.gather(1, token).squeeze(1)


def mask_topk(probs: Tensor, known: Tensor, num_masked: Tensor, temperature: float) -> Tensor:
    """Tokens to mask again, bool [B, N]: those below the num_masked-th lowest noisy confidence."""
    confidence = torch.where(known, torch.finfo(probs.dtype).max, probs)
    noise = torch.zeros_like(probs).uniform_()
    noise = -torch.log((-torch.log(noise.clamp(min=1e-20))).clamp(min=1e-20))
    confidence = torch.log(confidence.clamp(min=1e-20)) + temperature * noise
    cut = confidence.sort(dim=-1).values.gather(1, num_masked[:, None])
    return confidence < cut


def token_logprob(logits: Tensor, target: Tensor) -> Tensor:
    """Log-probability of each target [T] from logits [T, V]."""
    return logits.float().log_softmax(dim=-1).gather(-1, target[:, None]).squeeze(-1)


def linear_logprob(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """Log-probability of each target [T] from hidden states [T, D], by the whole logits [T, V]."""
    return token_logprob(F.linear(x, weight, bias), target)


def pair_dpo(policy: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each pair, rewards of win and lose, from per-token log-probabilities [P, 2, tokens] (win, lose)."""
    win, lose = policy.sum(-1).unbind(1)
    reference_win, reference_lose = reference.sum(-1).unbind(1)
    losses = -F.logsigmoid(beta * ((win - lose) - (reference_win - reference_lose)))
    return losses, beta * (win - reference_win).detach(), beta * (lose - reference_lose).detach()


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of padded whole sequences, [B, H, L, head_dim], under a dense mask bool [B, 1, L, L]."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
