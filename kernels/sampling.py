"""The one sampling rule of all token draws, in torch: a Gumbel per tile of the vocabulary, an inverse CDF inside it.

The vocabulary is cut into tiles of SAMPLE_TILE ids. The tile with the largest log-sum-exp + Gumbel noise wins
(Gumbel-max over tiles: a tile wins with the probability of its mass); inside it the first id whose cumulative mass
exceeds u times the tile's mass is drawn. Exact, and every backend can follow it in one pass over the logits, with two
random words a tile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hermesflow.kernels.philox import TOKEN_STREAM, RandomKey, gumbel, random_words, uniform

SAMPLE_TILE = 128


def sample_rows(logits: Tensor, temperature: float, key: RandomKey) -> tuple[Tensor, Tensor]:
    """Draw a token a row of softmax(logits / temperature); temperature 0 takes the argmax.

    Args:
        logits: fp32 [R, V]; -inf entries are never drawn.
        temperature: at least 0.
        key: RandomKey of R rows.
    Returns: token int64 [R], logprob fp32 [R] (of softmax(logits) at temperature 0); token -1 and logprob NaN in rows
        that hold NaN or +inf, or nothing but -inf.
    """
    if temperature == 0:
        return argmax_rows(logits)
    return sample_tiles(logits / temperature, key)


def sample_tiles(logits: Tensor, key: RandomKey) -> tuple[Tensor, Tensor]:
    """Draw a token a row of softmax(logits) by the tile rule; arguments and returns as sample_rows at temperature 1."""
    num_rows, vocab_size = logits.shape
    num_tiles = -(-vocab_size // SAMPLE_TILE)
    padded = F.pad(logits, (0, num_tiles * SAMPLE_TILE - vocab_size), value=float("-inf"))
    tiles = padded.view(num_rows, num_tiles, SAMPLE_TILE)
    tile_max = tiles.amax(-1)
    # A tile of -inf alone subtracts 0, so that its mass is 0 and not NaN.
    tile_max = tile_max.masked_fill(tile_max == float("-inf"), 0.0)
    mass = torch.exp(tiles - tile_max[..., None])
    tile_sum = mass.sum(-1)
    tile_lse = tile_max + torch.log(tile_sum)

    words = random_words(key, num_tiles, TOKEN_STREAM)
    best = torch.argmax(tile_lse + gumbel(words[0]), dim=1, keepdim=True)
    best_mass = mass.gather(1, best[..., None].expand(-1, -1, SAMPLE_TILE)).squeeze(1)
    target = uniform(words[1]).gather(1, best) * tile_sum.gather(1, best)
    # Ids that the cumulative mass passes; rounding may leave none, then the last id that has mass.
    passed = best_mass.cumsum(-1) > target
    last = SAMPLE_TILE - 1 - (best_mass > 0).flip(-1).int().argmax(-1)
    inside = torch.where(passed.any(-1), passed.int().argmax(-1), last)
    return _with_logprob(logits, best.squeeze(1) * SAMPLE_TILE + inside, torch.logsumexp(tile_lse, dim=1))


def argmax_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit's id a row, the lower id on ties; returns as sample_rows at temperature 0."""
    return _with_logprob(logits, torch.argmax(logits, dim=1), torch.logsumexp(logits, dim=1))


def _with_logprob(logits: Tensor, token: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Token and its log-probability, with -1 and NaN where the row's log-sum-exp shows that it has no distribution."""
    valid = torch.isfinite(lse)
    # A row without a distribution may have any token; it must still be an index.
    logprob = logits.gather(1, token.clamp(max=logits.shape[1] - 1)[:, None]).squeeze(1) - lse
    return torch.where(valid, token, -1), torch.where(valid, logprob, float("nan"))
