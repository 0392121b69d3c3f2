"""Blocks between a transformer and the velocities that it gives: they see text too, and the time modulates images.

Each block is a transformer's, in which the time of an image shifts, scales and gates the rows of its span (adaLN, DiT,
arXiv 2212.09748). Text rows are not modulated, so that their keys and values can be cached.
Source: Show-o2 (arXiv 2506.15564).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hermesflow.engine.kv_cache import KVCache
from hermesflow.engine.transformer import MLP, Attend, Attention, Rotary, TransformerConfig, tree_attention
from hermesflow.kernels.span_tree import SpanTree

_EPS = 1e-6
_THETA, _FACTOR, _LOW, _HIGH, _TRAINED = 500_000.0, 32.0, 1.0, 4.0, 8192
"""Of the rotary embedding, which is Llama 3.2's."""


@dataclass(frozen=True, kw_only=True)
class FlowHeadConfig:
    """Shape of a head: of its blocks, and how many numbers a velocity has."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_size: int
    size: int

    @functools.cached_property
    def blocks(self) -> TransformerConfig:
        """The shape of the blocks. Raises: ValueError if the sizes do not fit together."""
        return TransformerConfig(
            vocab_size=1, hidden_size=self.hidden_size, num_layers=self.num_layers, num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads, mlp_size=self.mlp_size, norm="rmsnorm", bias=False, qk_norm=True,
            gated=True, activation="silu",
        )  # fmt: skip


class FlowHead(nn.Module):
    """Hidden states of a pass whose last spans are images, and the images' times -> velocities."""

    def __init__(self, config: FlowHeadConfig, width: int) -> None:
        """
        Args:
            config: its shape.
            width: of the hidden states; where it is the head's own, nothing stands between them.
        """
        super().__init__()
        self.shape, self.config, inner = config, config.blocks, config.hidden_size
        between = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, inner))
        self.inputs = nn.Identity() if width == inner else between
        self.blocks = nn.ModuleList(FlowBlock(self.config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(inner, eps=_EPS)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(inner, 2 * inner))
        self.out = nn.Linear(inner, config.size)

    def forward(
        self, tree: SpanTree, hidden: Tensor, times: Tensor | None, length: int, cache: KVCache | None
    ) -> Tensor:
        """
        Args:
            tree: of the pass.
            hidden: [T, D] of all its tokens.
            times: embedded [S, inner], of the spans that come last; None where there are none.
            length: tokens of each.
            cache: of the head's keys and values; None: every span of the tree is new.
        Returns: fp32 [S, length, size].
        """
        x, rotary = self.inputs(hidden), _rotary_table(tree.position_ids, self.config.head_dim)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotary, functools.partial(tree_attention, tree, cache, layer), times, length)
        if times is None:
            return x.new_zeros(0, length, self.shape.size, dtype=torch.float32)
        shift, scale = self.modulation(times).chunk(2, dim=-1)
        images = self.norm(x[len(x) - len(times) * length :]).unflatten(0, (len(times), length))
        return self.out(_modulated(images, shift, scale)).float()

    def new_cache(self, capacity: int) -> KVCache:
        """Room for the head's keys and values of so many tokens."""
        config, weight = self.config, self.out.weight
        return KVCache(config.num_layers, capacity, config.num_kv_heads, config.head_dim, weight.device, weight.dtype)


class FlowBlock(nn.Module):
    """One layer of a head."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attention_norm, self.mlp_norm = (nn.RMSNorm(width, eps=config.norm_eps) for _ in range(2))
        self.attention, self.mlp = Attention(config), MLP(config)
        self.attention.q_norm.eps = self.attention.k_norm.eps = _EPS
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.is_checkpointed = False

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend, times: Tensor | None, length: int) -> Tensor:
        """x [T, inner] -> the same shape; see FlowHead."""
        arguments = (x, rotary, attend, times, length)
        if self.is_checkpointed and torch.is_grad_enabled():
            return checkpoint(self._compute, *arguments, use_reentrant=False)
        return self._compute(*arguments)

    def _compute(self, x: Tensor, rotary: Rotary, attend: Attend, times: Tensor | None, length: int) -> Tensor:
        shift, scale, gate, *of_mlp = [None] * 6 if times is None else self.modulation(times).chunk(6, dim=-1)
        normed = _of_images(self.attention_norm(x), length, _modulated, shift, scale)
        attended = self.attention.out(attend(*self.attention(normed, rotary)).flatten(1))
        x = x + _of_images(attended, length, _gated, gate)
        shift, scale, gate = of_mlp
        x_mlp = self.mlp(_of_images(self.mlp_norm(x), length, _modulated, shift, scale))
        return x + _of_images(x_mlp, length, _gated, gate)


def _of_images(x: Tensor, length: int, change, *by: Tensor | None) -> Tensor:
    """x [T, inner] with its last rows changed, span by span, by tensors [S, inner]."""
    if by[0] is None:
        return x
    text = len(x) - len(by[0]) * length
    images = change(x[text:].unflatten(0, (len(by[0]), length)), *by).flatten(0, 1)
    return torch.cat([x[:text], images]) if text else images


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [S, length, inner] shifted and scaled by tensors [S, inner], in fp32."""
    return (x.float() * (1 + scale[:, None].float()) + shift[:, None].float()).to(x.dtype)


def _gated(x: Tensor, gate: Tensor) -> Tensor:
    return x * gate[:, None]


def _rotary_table(position_ids: Tensor, head_dim: int) -> Rotary:
    """As rotary_table, with Llama 3's scaling: low frequencies by 1 / _FACTOR, high ones as they are, between them a
    line in wavelengths per trained length."""
    exponent = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    frequencies = _THETA**-exponent
    turns = _TRAINED * frequencies / (2 * math.pi)
    smooth = ((turns - _LOW) / (_HIGH - _LOW)).clamp(0, 1)
    angles = position_ids[:, None, None].float() * frequencies * (smooth + (1 - smooth) / _FACTOR)
    return angles.cos(), angles.sin()
