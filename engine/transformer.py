"""One config-driven decoder over span trees: the built-in tiny model, and other families by a weight map."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hermesflow.kernels.span_attention import span_attention

from .kv_cache import KVCache
from .span_tree import SpanTree

Embeds = tuple[Tensor, Tensor]
"""(packed rows int64 [n] of a tree, vectors [n, D] in place of the embeddings of those tokens)."""

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
}
# Wider than any model, and narrow enough that a damaged configuration asks for no endless work.
_RANGES = {
    "vocab_size": (1, 2**24), "hidden_size": (1, 2**20), "num_layers": (1, 2**10), "num_heads": (1, 2**16),
    "num_kv_heads": (1, 2**16), "mlp_size": (1, 2**24), "norm_eps": (0, 1), "rotary_fraction": (0, 1),
    "rope_theta": (1, 1e12),
}  # fmt: skip
NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape of a decoder.

    block "sequential" is attention then MLP, each behind its own norm; "parallel" (Phi) adds both from one norm.
    gated makes the MLP activation(gate) * up (SwiGLU with silu). rotary_fraction is the rotated part of each head.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_size: int
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    block: str = "sequential"
    activation: str = "gelu"
    gated: bool = False
    rotary_fraction: float = 1.0
    rope_theta: float = 10_000.0
    qk_norm: bool = False
    bias: bool = True
    head_bias: bool = False
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("norm", NORMS), ("block", ("sequential", "parallel")), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"TransformerConfig: {name} must be one of {list(choices)}, got {getattr(self, name)!r:.80}"
                )
        for name, (low, high) in _RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"TransformerConfig: {name} must lie in [{low}, {high}], got {getattr(self, name)}")
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"TransformerConfig: hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}, "
                f"and that of num_kv_heads {self.num_kv_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def rotary_dim(self) -> int:
        """Width of a head's rotated part."""
        return int(self.head_dim * self.rotary_fraction) // 2 * 2

    def to_dict(self) -> dict[str, Any]:
        """The fields, for a configuration file."""
        return asdict(self)


class Attention(nn.Module):
    """Grouped-query attention with partial rotary embedding over a span tree."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = nn.Linear(config.hidden_size, width, bias=config.bias)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        norm = NORMS[config.norm] if config.qk_norm else nn.Identity
        self.q_norm = norm(config.head_dim, eps=config.norm_eps)
        self.k_norm = norm(config.head_dim, eps=config.norm_eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], tree: SpanTree, cache: KVCache | None) -> Tensor:
        """x [Tq, D] -> [Tq, D]; with a cache the new keys and values are written to it first."""
        config = self.config
        heads = self.qkv(x).view(x.shape[0], -1, config.head_dim)
        q, k, v = heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        q, k = rotate(self.q_norm(q), rotary), rotate(self.k_norm(k), rotary)
        v = v.to(q.dtype)
        if cache is not None:
            k, v = cache.write(self.layer, tree.slots, k, v)
            q = q.to(k.dtype)
        return self.out(span_attention(q, k, v, tree).flatten(1))


class MLP(nn.Module):
    """Two linear layers around an activation, gated on request."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.activation, self.gated = ACTIVATIONS[config.activation], config.gated
        self.up = nn.Linear(config.hidden_size, config.mlp_size * (2 if config.gated else 1), bias=config.bias)
        self.down = nn.Linear(config.mlp_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [Tq, D] -> [Tq, D]."""
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            return self.down(self.activation(gate) * x)
        return self.down(self.activation(x))


class Block(nn.Module):
    """One layer: attention and MLP with residual connections."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        norm = NORMS[config.norm]
        self.attention_norm = norm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = norm(config.hidden_size, eps=config.norm_eps) if config.block == "sequential" else None
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], tree: SpanTree, cache: KVCache | None) -> Tensor:
        """x [Tq, D] -> [Tq, D]."""
        normed = self.attention_norm(x)
        if self.mlp_norm is None:
            return x + self.attention(normed, rotary, tree, cache) + self.mlp(normed)
        x = x + self.attention(normed, rotary, tree, cache)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Token ids of a span tree -> hidden states; the head stays outside, so callers run it on the rows they need."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = NORMS[config.norm](config.hidden_size, eps=config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, tree: SpanTree, cache: KVCache | None = None, embeds: Embeds | None = None) -> Tensor:
        """Hidden states [Tq, D] of the tree's new tokens after the final norm.

        Without a cache every span must be new; with one, cached spans are read from it and new ones written to it.
        embeds stand in place of the embeddings of some new tokens; they are converted to the weights' dtype and device.
        """
        x = self.embed(tree.token_ids)
        if embeds is not None:
            rows, values = embeds
            x = x.index_copy(0, rows.to(x.device), values.to(x))
        rotary = rotary_table(tree.position_ids, self.config.rotary_dim, self.config.rope_theta)
        for block in self.blocks:
            x = block(x, rotary, tree, cache)
        return self.norm(x)

    def new_cache(self, capacity: int) -> KVCache:
        """A cache of capacity token slots on the weights' device, in their dtype."""
        config, weight = self.config, self.embed.weight
        return KVCache(config.num_layers, capacity, config.num_kv_heads, config.head_dim, weight.device, weight.dtype)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, std: float = 0.02) -> Transformer:
        """Normal weights, residual outputs scaled by depth, as GPT-2 does it."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                scale = std / (2 * self.config.num_layers) ** 0.5 if residual else std
                parameter.normal_(0.0, scale, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
        return self


def rotary_table(position_ids: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, 1, rotary_dim / 2], fp32, of the rotary embedding's angles."""
    exponent = torch.arange(0, rotary_dim, 2, device=position_ids.device, dtype=torch.float32) / rotary_dim
    angles = position_ids[:, None, None].float() * theta**-exponent
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x [T, H, head_dim] on its first rotary_dim channels (halves paired), in fp32."""
    cos, sin = rotary
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([rotated.to(x.dtype), rest], dim=-1)
