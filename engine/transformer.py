"""One config-driven decoder over span trees: the built-in tiny model, and other families by a weight map."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental import _config as symbolic_shapes
from torch.utils.checkpoint import checkpoint, noop_context_fn

from hermesflow.engine.fused_layers import FusedPass, join_weights
from hermesflow.engine.kv_cache import KVCache
from hermesflow.engine.token_layout import Ids
from hermesflow.kernels.checks import FLOAT_DTYPES, not_on_triton_device
from hermesflow.kernels.matmul import linear
from hermesflow.kernels.span_attention import span_attention
from hermesflow.kernels.span_tree import ExpertRows, SpanTree

Embeds = tuple[Tensor, Tensor]
"""(packed rows int64 [n] of a tree, vectors [n, D] in place of the embeddings of those tokens)."""
Rotary = tuple[Tensor, Tensor]
"""Cosine and sine [Tq, 1, rotary_dim / 2], fp32; see rotary_table."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries [Tq, H, head_dim], keys and values [Tq, Hkv, head_dim] of new tokens -> [Tq, H, head_dim]."""
Halves = tuple[Callable, Callable]
"""Block.before_attention and Block.after_attention: as they are, compiled, or those of a FusedPass."""

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
    "rope_theta": (1, 1e12), "experts": (1, 2),
}  # fmt: skip
BLOCKS = ("sequential", "post", "parallel")
NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape of a decoder.

    block "sequential" is attention then MLP, each behind its own norm; "post" (Swin) has the norms after them instead;
    "parallel" (Phi) adds both from one norm. gated makes the MLP activation(gate) * up (SwiGLU with silu).
    rotary_fraction is the rotated part of each head. qkv_bias gives queries, keys and values a bias where bias gives
    none. qk_norm norms queries and keys; with qk_norm_per_head (Chameleon) by a LayerNorm of eps 1e-5 whose weights and
    biases are each head's own, whatever norm is. experts 2 is a mixture of transformers (BAGEL): a second set of layers
    and final norm computes the rows that the span tree says (Place.framed); attention is joint.
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
    qk_norm_per_head: bool = False
    bias: bool = True
    qkv_bias: bool = False
    experts: int = 1
    head_bias: bool = False
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("norm", NORMS), ("block", BLOCKS), ("activation", ACTIVATIONS)):
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


class CodeHead(NamedTuple):
    """How hidden states give the logits of image codes: linear in what `inputs` makes of them.

    weight [K, E], bias [K] or None; inputs: hidden states [R, D] -> [R, E].
    """

    weight: Tensor
    bias: Tensor | None
    inputs: Callable[[Tensor], Tensor]


class Linear(nn.Linear):
    """A linear layer by kernels/matmul.py, for x [T, D]."""

    takes_gelu = True

    @property
    def plain(self) -> nn.Linear:
        """This layer: it is nothing but its weight and bias."""
        return self

    def forward(self, x: Tensor, gelu: str | None = None) -> Tensor:
        """x [T, D] -> [T, V], and GELU of it (F.gelu's approximation)."""
        return linear(x, self.weight, self.bias, gelu=gelu)


class HeadNorm(nn.Module):
    """LayerNorm over each head, with weights and biases [H, head_dim] of its own."""

    eps = 1e-5

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads, head_dim))
        self.bias = nn.Parameter(torch.zeros(num_heads, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [T, H, head_dim] -> the same shape."""
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight + self.bias


class Attention(nn.Module):
    """The projections around grouped-query attention, with partial rotary embedding."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = Linear(config.hidden_size, width, bias=config.bias or config.qkv_bias)
        self.out = Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.q_norm, self.k_norm = (_head_norm(config, count) for count in (config.num_heads, config.num_kv_heads))

    def forward(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """x [Tq, D] -> queries [Tq, H, head_dim], keys and values [Tq, Hkv, head_dim]."""
        config = self.config
        counts = [config.num_heads, config.num_kv_heads]
        heads = self.qkv(x).view(x.shape[0], -1, config.head_dim)
        qk, v = heads.split([sum(counts), config.num_kv_heads], dim=1)
        if isinstance(self.q_norm, nn.Identity):
            q, k = rotate(qk, rotary).split(counts, dim=1)
        else:
            q, k = qk.split(counts, dim=1)
            q, k = rotate(self.q_norm(q), rotary), rotate(self.k_norm(k), rotary)
        return q, k, v.to(q.dtype)


def _head_norm(config: TransformerConfig, num_heads: int) -> nn.Module:
    if config.qk_norm_per_head:
        return HeadNorm(num_heads, config.head_dim)
    return NORMS[config.norm](config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()


class MLP(nn.Module):
    """Two linear layers around an activation, gated on request."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.activation, self.gated = ACTIVATIONS[config.activation], config.gated
        self.gelu = None if config.gated else {"gelu": "none", "gelu_tanh": "tanh"}.get(config.activation)
        self.up = Linear(config.hidden_size, config.mlp_size * (2 if config.gated else 1), bias=config.bias)
        self.down = Linear(config.mlp_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [Tq, D] -> [Tq, D]."""
        # An adapter around the layer adds to what comes before GELU.
        if self.gelu is not None and getattr(self.up, "takes_gelu", False):
            return self.down(self.up(x, self.gelu))
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            x = self.activation(gate) * x
        else:
            x = self.activation(x)
        return self.down(x)


class Block(nn.Module):
    """One layer: attention and MLP with residual connections, in two halves that torch.compile takes whole."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        norm = NORMS[config.norm]
        self.attention_norm = norm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = norm(config.hidden_size, eps=config.norm_eps) if config.block != "parallel" else None
        self.norms_after = config.block == "post"
        self.mlp = MLP(config)
        self.is_checkpointed = False
        self.checkpoint_contexts: Callable[[], tuple] = noop_context_fn
        if config.experts == 2:
            self.latent = Block(replace(config, experts=1))

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        attend: Attend,
        rows: Tensor | None,
        halves: Halves,
        experts: ExpertRows | None = None,
    ) -> Tensor:
        """x [Tq, D] -> [Tq, D], or [R, D] for the rows int64 [R] alone; halves are those of this class, or compiled.
        experts: which rows the second expert computes; then rows are None."""
        arguments = (x, rotary, attend, rows, halves, experts)
        if self.is_checkpointed and torch.is_grad_enabled():
            return checkpoint(self._compute, *arguments, use_reentrant=False, context_fn=self.checkpoint_contexts)
        return self._compute(*arguments)

    def _compute(
        self,
        x: Tensor,
        rotary: Rotary,
        attend: Attend,
        rows: Tensor | None,
        halves: Halves,
        experts: ExpertRows | None,
    ) -> Tensor:
        before_attention, after_attention = halves
        if experts is not None:
            pair = (self, self.latent)
            normed, *qkv = _by_expert(before_attention, pair, experts, x, rotary)
            return _by_expert(after_attention, pair, experts, x, normed, attend(*qkv))
        normed, *qkv = before_attention(self, x, rotary)
        attended = attend(*qkv)
        del qkv  # the MLP needs the memory
        if rows is not None:
            x, normed, attended = x[rows], normed[rows], attended[rows]
        return after_attention(self, x, normed, attended)

    def before_attention(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [Tq, D] -> normed [Tq, D], queries, keys and values."""
        normed = x if self.norms_after else self.attention_norm(x)
        return normed, *self.attention(normed, rotary)

    def after_attention(self, x: Tensor, normed: Tensor, attended: Tensor) -> Tensor:
        """x, normed [R, D] and attended [R, H, head_dim] of any rows -> [R, D]."""
        attended = self.attention.out(attended.flatten(1))
        if self.mlp_norm is None:
            return x + attended + self.mlp(normed)
        if self.norms_after:
            x = x + self.attention_norm(attended)
            return x + self.mlp_norm(self.mlp(x))
        x = x + attended
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Token ids of a span tree -> hidden states; the head stays outside, so callers run it on the rows they need."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = NORMS[config.norm](config.hidden_size, eps=config.norm_eps)
        if config.experts == 2:
            self.latent_norm = NORMS[config.norm](config.hidden_size, eps=config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self._is_fused = False
        self._training_compiler: str | None = None

    def forward(
        self,
        tree: SpanTree,
        cache: KVCache | None = None,
        embeds: Embeds | Callable[[], Embeds] | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [Tq, D] of the tree's new tokens after the final norm.

        Without a cache every span must be new; with one, cached spans are read from it and new ones written to it.
        embeds stand in place of the embeddings of some new tokens; they are converted to the weights' dtype and device.
        A function that returns them is called here, where weights that are sharded are whole.
        rows, int64 [R], are the packed rows whose hidden states [R, D] are wanted; what follows the last layer's
        attention is computed for them alone. None: all rows.
        """
        x = self._embedded(tree.token_ids, embeds() if callable(embeds) else embeds)
        rotary = rotary_table(tree.position_ids, self.config.rotary_dim, self.config.rope_theta)
        experts = tree.expert_rows() if self.config.experts == 2 else None
        fused = FusedPass(self.blocks, tree, cache) if experts is None and self._takes_fused() else None
        for layer, block in enumerate(self.blocks):
            is_last = layer == len(self.blocks) - 1
            if fused is None:
                halves, attend = self._halves(), functools.partial(tree_attention, tree, cache, layer)
            else:
                halves, attend = fused.halves(layer), functools.partial(span_attention, tree=tree)
            x = block(x, rotary, attend, rows if is_last and experts is None else None, halves, experts)
        if experts is not None:
            x = _by_expert(lambda norm, part: norm(part), (self.norm, self.latent_norm), experts, x)
            return x if rows is None else x[rows]
        return self.norm(x) if fused is None else fused.norm(self.norm, x, 2 * len(self.blocks))

    def _embedded(self, token_ids: Tensor, embeds: Embeds | None) -> Tensor:
        """[Tq, D]."""
        if embeds is None:
            return self.embed(token_ids)
        rows, values = embeds
        weight = self.embed.weight
        values = values.to(weight)
        # Where all are given, the embedding has no part in it, and no gradient.
        x = self.embed(token_ids) if len(rows) < len(token_ids) else values.new_empty(len(token_ids), values.shape[1])
        return x.index_copy(0, rows.to(x.device), values)

    def prepare_training(self, *, compiled: bool, checkpointed: bool, backend: str = "inductor") -> None:
        """How the layers run outside inference mode: through torch.compile, one graph on each side of attention which
        all layers share, for any number of tokens, or not; and where gradients are wanted, keeping their inputs alone
        and computing the rest again in the backward pass, or not. backend is torch.compile's."""
        self._training_compiler = backend if compiled else None
        for block in self.blocks:
            block.is_checkpointed = checkpointed

    def fuse_layers(self) -> None:
        """Inference mode now runs the layers by Triton's kernels (fused_layers.py) where the weights are on a GPU.

        Block "post" and float64 keep the plain layers.

        Weights that are read together are moved together; the parameters stay the same objects.
        """
        self._is_fused = True
        for block in self.blocks:
            join_weights(block)

    def _takes_fused(self) -> bool:
        weight = self.embed.weight
        can = self.config.block != "post" and weight.dtype in FLOAT_DTYPES and not_on_triton_device(weight) is None
        return self._is_fused and can and torch.is_inference_mode_enabled()

    def _halves(self) -> Halves:
        if self._training_compiler is None or torch.is_inference_mode_enabled():
            return Block.before_attention, Block.after_attention
        return _compiled_halves(self._training_compiler)

    def skeleton(self) -> Transformer:
        """Another one of the same kind and shape; under torch.device("meta") without memory."""
        return Transformer(self.config)

    def code_head(self, code_ids: Ids) -> CodeHead:
        """The head of the image codes with these ids; a family with a separate head overrides it."""
        weight, bias = code_ids.rows(self.head)
        return CodeHead(weight, bias, lambda hidden: hidden)

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


def _by_expert(half: Callable, experts: Sequence[nn.Module], of: ExpertRows, *values: Any) -> Any:
    """half(expert, *values) of the expert that each row has; values are tensors [Tq, ...], or pairs of such.

    Both experts run on one piece each, and again on the few rows of a piece that are the other's: nothing large is
    gathered.
    """
    text, latent = experts
    pieces = [(text, slice(0, of.split)), (latent, slice(of.split, len(values[0])))]
    parts = [half(expert, *_select(values, piece)) for expert, piece in pieces if piece.start < piece.stop]
    is_single = isinstance(parts[0], Tensor)
    parts = [(part,) for part in parts] if is_single else parts
    found = [torch.cat(each) if len(each) > 1 else each[0] for each in zip(*parts, strict=True)]
    for expert, rows in ((text, of.text), (latent, of.latent)):
        if len(rows):
            corrected = half(expert, *_select(values, rows))
            corrected = (corrected,) if is_single else corrected
            found = [each.index_copy(0, rows, right) for each, right in zip(found, corrected, strict=True)]
    return found[0] if is_single else found


def _select(values: Sequence[Any], rows: slice | Tensor) -> list[Any]:
    return [value[rows] if isinstance(value, Tensor) else tuple(part[rows] for part in value) for value in values]


def tree_attention(tree: SpanTree, cache: KVCache | None, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """span_attention of a tree's new tokens; with a cache, keys and values [Tq, Hkv, head_dim] are written to its layer
    first, and what is there is seen too."""
    if cache is not None:
        k, v = cache.write(layer, tree.slots, k, v)
    return span_attention(q.to(k.dtype), k, v, tree)


@functools.cache
def _compiled_halves(backend: str) -> Halves:
    # With "duck shapes" a first number of tokens that happens to be some width would be taken for that width.
    any_length = symbolic_shapes.patch(use_duck_shape=False)
    halves = (Block.before_attention, Block.after_attention)
    before, after = (torch.compile(half, fullgraph=True, dynamic=True, backend=backend) for half in halves)
    return any_length(before), any_length(after)


def rotary_table(position_ids: Tensor, rotary_dim: int, theta: float) -> Rotary:
    """Cosine and sine [T, 1, rotary_dim / 2], fp32, of the rotary embedding's angles."""
    exponent = torch.arange(0, rotary_dim, 2, device=position_ids.device, dtype=torch.float32) / rotary_dim
    angles = position_ids[:, None, None].float() * theta**-exponent
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotary embedding of x [T, H, head_dim] on its first rotary_dim channels (halves paired), in fp32."""
    cos, sin = rotary
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([*(part.to(x.dtype) for part in turned), rest], dim=-1)
