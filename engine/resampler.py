"""A fixed number of vectors from any number of them, by one cross attention (Qwen-VL, arXiv 2308.12966).

Positions are on queries and keys, not on values. Module names are those of SEED-X's checkpoints.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Resampler(nn.Module):
    """Vectors [B, N, inputs] -> [B, queries, width]."""

    def __init__(self, num_queries: int, width: int, inputs: int, num_heads: int, eps: float) -> None:
        """
        Args:
            num_queries: a square.
            width: of the results.
            inputs: width of the inputs; where it is that of the results, nothing projects them.
            num_heads: of the attention.
            eps: of both norms.
        Raises: ValueError if the sizes do not fit together.
        """
        super().__init__()
        if math.isqrt(num_queries) ** 2 != num_queries or width % num_heads:
            raise ValueError(
                f"Resampler: expected a square number of queries and heads that divide {width}, got {num_queries} and "
                f"{num_heads}"
            )
        self.pos_embed = nn.Parameter(torch.empty(num_queries, width), requires_grad=False)
        self.query = nn.Parameter(torch.empty(num_queries, width))
        self.kv_proj = nn.Identity() if inputs == width else nn.Linear(inputs, width, bias=False)
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.ln_q, self.ln_kv = (nn.LayerNorm(width, eps=eps) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """See the class; N is a square."""
        values = self.ln_kv(self.kv_proj(x))
        queries = (self.ln_q(self.query) + self.pos_embed.to(values)).expand(len(x), -1, -1)
        keys = values + places(self.pos_embed, (math.isqrt(x.shape[1]),) * 2).to(values)
        return self.attn(queries, keys, values, need_weights=False)[0]


def places(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Of a table [n^2, D] of a square's places those of a grid [N, D], bicubic between them."""
    side = math.isqrt(len(table))
    if grid == (side, side):
        return table
    image = table.float().T.unflatten(1, (side, side))[None]
    return F.interpolate(image, size=grid, mode="bicubic", align_corners=False)[0].flatten(1).T.to(table.dtype)
