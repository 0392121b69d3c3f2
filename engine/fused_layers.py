"""Forward pass in inference on a GPU with few kernels, each fused with its neighbors.

    norm -> [q k v] -> norm, rotation, storage -> attention -> out -> (norm ->) up, activation -> down

Attention and MLP are added to x by their own matmuls, in place. The biases of those layers are the same for each token:
they are left out of x, and each norm adds the sum of those before it. Where tokens are few, a parallel block reads its
weights [q k v | up] in one matmul; the kernel after it activates the MLP's half too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hermesflow.engine.kv_cache import KVCache
from hermesflow.kernels.span_tree import SpanTree

_FEW = 512
"""Up to this many tokens a matmul takes as long as reading its weights."""


class FusedPass:
    """One pass over the new tokens of a tree."""

    def __init__(self, blocks: nn.ModuleList, tree: SpanTree, cache: KVCache | None) -> None:
        self._tree, self._cache, self._shifts = tree, cache, _shifts(blocks)
        self._kernels: ModuleType = import_module("hermesflow.kernels.layer_triton")
        self._is_activated = False

    def norm(self, module: nn.Module, x: Tensor, num_added: int) -> Tensor:
        """The norm of x, to which num_added layers have been added without their biases."""
        shift = self._shifts[num_added - 1] if num_added and self._shifts is not None else None
        return self._kernels.norm(plain_norm(module), x, shift)

    def halves(self, layer: int) -> tuple[Callable, Callable]:
        """before_attention and after_attention of a layer, with the signatures of Block's."""
        return functools.partial(self._before_attention, layer), functools.partial(self._after_attention, layer)

    def _before_attention(self, layer: int, block: nn.Module, x: Tensor, rotary: tuple) -> tuple[Tensor, ...]:
        """As Block.before_attention, but keys and values are the layer's whole storage; after a joined matmul the first
        result is the MLP's activated rows."""
        attention, config = block.attention, block.attention.config
        normed = self.norm(block.attention_norm, x, 2 * layer)
        joined = _joined(block) if len(x) <= _FEW else None
        row = attention.qkv(normed) if joined is None else F.linear(normed, *joined)
        if self._cache is None:
            keys, values = row.new_empty(2, len(x), config.num_kv_heads, config.head_dim)
        else:
            keys, values = self._cache.keys[layer], self._cache.values[layer]
        norms = plain_norm(attention.q_norm), plain_norm(attention.k_norm)
        slots = None if self._cache is None else self._tree.slots
        mlp = None if joined is None else (config.activation, config.mlp_size)
        q, activated = self._kernels.heads(row, rotary, norms, config.num_heads, keys, values, slots, mlp)
        self._is_activated = activated is not None
        return activated if self._is_activated else normed, q, keys, values

    def _after_attention(self, layer: int, block: nn.Module, x: Tensor, normed: Tensor, attended: Tensor) -> Tensor:
        """As Block.after_attention, in place."""
        _add(x, block.attention.out, attended.flatten(1))
        if block.mlp_norm is not None:
            normed = self.norm(block.mlp_norm, x, 2 * layer + 1)
        return _add(x, block.mlp.down, normed if self._is_activated else self._up(block, normed))

    def _up(self, block: nn.Module, normed: Tensor) -> Tensor:
        mlp = block.mlp
        if mlp.gelu is not None and getattr(mlp.up, "takes_gelu", False):
            return mlp.up(normed, mlp.gelu)
        return self._kernels.activation(block.attention.config.activation, mlp.up(normed), gated=mlp.gated)


def join_weights(block: nn.Module) -> None:
    """Lays the weights [q k v | up] of a parallel block one after the other in memory, where both layers are plain and
    nothing stands in between; the parameters stay the same objects."""
    qkv, up = plain_layer(block.attention.qkv), plain_layer(block.mlp.up)
    if not _can_join(block):
        return
    for first, second in ((qkv.weight, up.weight), (qkv.bias, up.bias)):
        if first is not None and type(first.data) is Tensor and type(second.data) is Tensor:
            both = torch.cat([first.data, second.data])
            first.data, second.data = both.split([len(first), len(second)])


def _joined(block: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of both layers as one, if join_weights has laid them so and nobody has moved them since."""
    qkv, up = plain_layer(block.attention.qkv), plain_layer(block.mlp.up)
    if not _can_join(block):
        return None
    pairs = [(qkv.weight, up.weight), *([] if qkv.bias is None else [(qkv.bias, up.bias)])]
    if not all(_follows(*pair) for pair in pairs):
        return None
    weight, *bias = (
        first.as_strided((len(first) + len(second), *first.shape[1:]), first.stride()) for first, second in pairs
    )
    return weight, *(bias or [None])


def _can_join(block: nn.Module) -> bool:
    qkv, up = plain_layer(block.attention.qkv), plain_layer(block.mlp.up)
    if block.mlp_norm is not None or block.mlp.gated or qkv is None or up is None:
        return False
    return (qkv.bias is None) == (up.bias is None)


def _follows(first: Tensor, second: Tensor) -> bool:
    one_storage = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    return one_storage and first.data_ptr() + first.nbytes == second.data_ptr() and first.dtype == second.dtype


def _shifts(blocks: nn.ModuleList) -> Tensor | None:
    """fp32 [2 L, D]: sums of the biases of the first 1, 2, ... layers that are added to x; None if there are none."""
    plain = (plain_layer(layer) for block in blocks for layer in (block.attention.out, block.mlp.down))
    biases = [None if layer is None else layer.bias for layer in plain]
    present = next((bias for bias in biases if bias is not None), None)
    if present is None:
        return None
    nothing = None if all(bias is not None for bias in biases) else torch.zeros_like(present)
    return torch.stack([nothing if bias is None else bias for bias in biases]).float().cumsum(0)


def plain_layer(layer: nn.Module) -> nn.Linear | None:
    """The nn.Linear behind a layer; None for an adapter."""
    return getattr(layer, "plain", None)


def plain_norm(module: nn.Module) -> nn.Module:
    """The norm inside another model's, or itself."""
    return getattr(module, "source", module)


def _add(x: Tensor, layer: nn.Module, values: Tensor) -> Tensor:
    """x += layer(values), without its bias where the layer is plain."""
    plain = plain_layer(layer)
    if plain is None:
        return x.add_(layer(values))
    return x.addmm_(values.to(x.dtype), plain.weight.t())
