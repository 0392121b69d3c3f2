"""The random stream of all ops: Philox4x32-10, a pure function of (seed, step, position), in torch.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); the same stream as csrc/philox.h.
Words are uint32 held in int64 tensors, since torch has no full set of uint32 operations.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

TOKEN_STREAM = 0
MASK_STREAM = 1
NOISE_STREAM = 2

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


class RandomKey(NamedTuple):
    """What a row's random numbers depend on, all int64: seed [R], step [R] or 0-dim, position [R].

    One sample keeps its seed whatever batch it rides in; steps number the draws at one position.
    """

    seed: Tensor
    step: Tensor
    position: Tensor


def philox4x32(
    key_lo: Tensor, key_hi: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of a counter of four words under a key of two.

    Args: int64 tensors holding uint32 words, broadcastable.
    Returns: four int64 tensors holding uint32 words, broadcast shape.
    """
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key_lo, low1, high0 ^ c3 ^ key_hi, low0
        key_lo, key_hi = (key_lo + _WEYL[0]) & _WORD, (key_hi + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of a product of two words.

    By halves of the factor: the whole product may pass int64's range, and the C++ that torch.compile writes has no
    defined overflow (its compiler drew other words).
    """
    low = word * (factor & 0xFFFF)
    high = word * (factor >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def random_words(key: RandomKey, num_blocks: int, stream: int, *, use_position: bool = True) -> tuple[Tensor, ...]:
    """The four words of counters (block, step, position, stream) for blocks 0 .. num_blocks - 1.

    Args:
        key: RandomKey of R rows.
        use_position: False puts 0 in the position's place.
    Returns: four int64 tensors [R, num_blocks] holding uint32 words.
    """
    seed = key.seed[:, None]
    step = key.step[:, None] if key.step.dim() else key.step
    position = key.position[:, None] if use_position else torch.zeros_like(seed)
    block = torch.arange(num_blocks, device=seed.device)[None, :]
    fixed = torch.full_like(seed, stream)
    return philox4x32(seed & _WORD, (seed >> 32) & _WORD, block, step & _WORD, position & _WORD, fixed)


def uniform(word: Tensor) -> Tensor:
    """fp32 in the open interval (0, 1): 23 bits of the word, plus a half, which fp32 holds exactly.

    With 24 bits the half is rounded away in the upper half of the range, and the largest word gives 1.
    """
    return ((word >> 9).float() + 0.5) * 2.0**-23


def gumbel(word: Tensor) -> Tensor:
    """Standard Gumbel noise in fp32, -log(-log(u)); finite for every word."""
    return -torch.log(-torch.log(uniform(word)))


def normal(key: RandomKey, count: int) -> Tensor:
    """Standard normal numbers fp32 [R, count], four of each counter by Box and Muller's formula."""
    words = random_words(key, -(-count // 4), NOISE_STREAM)
    pairs = []
    for radius, angle in (words[:2], words[2:]):
        length, turn = (-2 * uniform(radius).log()).sqrt(), 2 * math.pi * uniform(angle)
        pairs += [length * turn.cos(), length * turn.sin()]
    return torch.stack(pairs, dim=-1).flatten(1)[:, :count]
