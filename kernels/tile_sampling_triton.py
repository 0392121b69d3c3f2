"""The rule of kernels/sampling.py in Triton, for programs that draw from one row: which tile wins, and which id in it.

Of a tile only maximum and mass are used, so nothing of the row's length is stored; the winner is read once more.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def uniform(word):
    """fp32 in (0, 1), as uniform in kernels/philox.py."""
    return ((word >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608)


@triton.jit
def add_tiles(logits, tile, state, seed, step, position, greedy, STREAM: tl.constexpr):
    """The row's state after the logits [TILES, TILE] of neighboring tiles: score and index of the best tile, and the
    maximum and sum of the running log-sum-exp. It begins with (-inf, 0, -inf, 0).
    """
    best, best_tile, running_max, running_sum = state
    tile_max = tl.max(logits, axis=1)
    shift = tl.where(tile_max == -float("inf"), 0.0, tile_max)
    tile_sum = tl.sum(tl.exp(logits - shift[:, None]), axis=1)
    if greedy:
        score = tile_max
    else:
        word, _, _, _ = tl.philox(seed, tile.to(tl.uint32), step, position, STREAM)
        score = shift + tl.log(tile_sum) - tl.log(-tl.log(uniform(word)))
    # A tile with NaN must not win; its row is invalid by running_sum.
    score = tl.where(score == score, score, -float("inf"))
    block_best = tl.max(score, axis=0)
    winner = tl.min(tile, axis=0) + tl.argmax(score, axis=0)
    best_tile = tl.where(block_best > best, winner, best_tile)
    best = tl.maximum(best, block_best)

    new_max = tl.maximum(running_max, tl.max(tile_max, axis=0))
    safe_max = tl.where(new_max == -float("inf"), 0.0, new_max)
    # A tile without mass adds nothing; its shift of 0 may lie far above the maximum. NaN goes through.
    block_sum = tl.sum(tl.where(tile_sum == 0, 0.0, tile_sum * tl.exp(shift - safe_max)), axis=0)
    running_sum = running_sum * tl.exp(running_max - safe_max) + block_sum
    return best, best_tile, new_max, running_sum


@triton.jit
def draw_in_tile(logits, state, seed, step, position, greedy, STREAM: tl.constexpr, TILE: tl.constexpr):
    """Token and log-probability of a row from its state and the logits [TILE] of its best tile; -1 and NaN where NaN or
    +inf made the state's sum NaN, or nothing but -inf left it 0.
    """
    _, best_tile, running_max, running_sum = state
    offs = tl.arange(0, TILE).to(tl.int64)
    tile_max = tl.max(logits, axis=0)
    mass = tl.exp(logits - tile_max)
    _, word, _, _ = tl.philox(seed, best_tile.to(tl.uint32), step, position, STREAM)
    # A scan adds in another order for each id, so that rounding could let one without mass pass.
    passed = (tl.cumsum(mass, axis=0) > uniform(word) * tl.sum(mass, axis=0)) & (mass > 0)
    # Rounding may leave no id that passes; then the last id that has mass.
    last = tl.max(tl.where(mass > 0, offs, 0), axis=0)
    hit = tl.where(greedy, logits == tile_max, passed | (offs == last))
    inside = tl.min(tl.where(hit, offs, TILE - 1), axis=0)
    chosen = tl.max(tl.where(offs == inside, logits, -float("inf")), axis=0)
    logprob = chosen - (running_max + tl.log(running_sum))
    valid = running_sum > 0
    return tl.where(valid, best_tile * TILE + inside, -1), tl.where(valid, logprob, float("nan"))
