"""A Transformer over the modules of another model: the same parameters, our passes.

Nothing is copied, so training either shows in both. Where the caller uses autocast, its dtype is what linear layers and
the head compute in, as it would be without us, while norms and the residual stay in the weights' dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hermesflow.engine.kv_cache import KVCache
from hermesflow.engine.transformer import NORMS, Block, Embeds, Halves, Linear, Transformer, TransformerConfig
from hermesflow.kernels.matmul import linear
from hermesflow.kernels.span_tree import SpanTree


class Head(NamedTuple):
    """Of the joint vocabulary: weight [V, D] and bias [V]."""

    weight: Tensor
    bias: Tensor | None


class Precision:
    """The dtype that linear layers compute in: autocast's, or None for that of the weights."""

    def __init__(self) -> None:
        self.dtype: torch.dtype | None = None
        self._casts: dict[int, Tensor] = {}

    @contextmanager
    def of_caller(self, device: torch.device) -> Iterator[None]:
        """Computes the block in the dtype of the autocast around it, which is off inside: kernels are none of its."""
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        try:
            with torch.autocast(device.type, enabled=False), _Held(self, dtype):
                yield
        finally:
            self._casts.clear()

    def checkpoint_contexts(self) -> tuple:
        """For torch's checkpoint: what is computed again in the backward pass has the dtype of now."""
        return nullcontext(), _Held(self, self.dtype)

    def cast(self, tensor: Tensor | None) -> Tensor | None:
        """The tensor in this dtype; a weight's copy is kept to the block's end where it needs no gradient."""
        if tensor is None or self.dtype in (None, tensor.dtype):
            return tensor
        if torch.is_grad_enabled() or not isinstance(tensor, nn.Parameter):
            return tensor.to(self.dtype)
        if id(tensor) not in self._casts:
            self._casts[id(tensor)] = tensor.to(self.dtype)
        return self._casts[id(tensor)]


class _Held:
    """For a block, which may be entered again after it was left, a precision's dtype."""

    def __init__(self, precision: Precision, dtype: torch.dtype | None) -> None:
        self._precision, self._dtype = precision, dtype

    def __enter__(self) -> None:
        self._before, self._precision.dtype = self._precision.dtype, self._dtype

    def __exit__(self, *_: object) -> None:
        self._precision.dtype = self._before


class SharedLinear(nn.Module):
    """Linear layers of another model, their results side by side. Adapters (all but a plain nn.Linear) are called."""

    takes_gelu = True

    def __init__(self, sources: Sequence[nn.Module], precision: Precision) -> None:
        super().__init__()
        self.sources, self.precision = nn.ModuleList(sources), precision

    @property
    def plain(self) -> nn.Linear | None:
        """The single nn.Linear behind it; None for several layers or an adapter."""
        return self.sources[0] if len(self.sources) == 1 and type(self.sources[0]) is nn.Linear else None

    def forward(self, x: Tensor, gelu: str | None = None) -> Tensor:
        """x [T, D] -> [T, V], and GELU of it (F.gelu's approximation)."""
        results = [self._apply_one(source, self.precision.cast(x), gelu) for source in self.sources]
        return results[0] if len(results) == 1 else torch.cat(results, dim=-1)

    def _apply_one(self, source: nn.Module, x: Tensor, gelu: str | None) -> Tensor:
        if type(source) is nn.Linear:
            weight, bias = self.precision.cast(source.weight), self.precision.cast(source.bias)
            if len(x) > 1:
                return linear(x, weight, bias, gelu=gelu)
            # A matrix-vector product reads the weights at the memory's speed, where oneDNN lays them out anew.
            x = F.linear(x, weight, bias)
            return x if gelu is None else F.gelu(x, approximate=gelu)
        with torch.autocast(x.device.type, dtype=self.precision.dtype, enabled=self.precision.dtype is not None):
            x = source(x)
        return x if gelu is None else F.gelu(x, approximate=gelu)


class SharedNorm(nn.Module):
    """A norm of another model, in its weights' dtype, whatever that of x."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        """Shape and dtype of x."""
        return self.source(x.to(self.source.weight.dtype)).to(x.dtype)


class SharedTransformer(Transformer):
    """The backbone whose modules are those of another model."""

    def __init__(self, config: TransformerConfig, modules: Mapping[str, Sequence[nn.Module]]) -> None:
        """
        Args:
            config: the shape.
            modules: our module's name -> those of the other model that it is, several for rows one below the other.
        """
        with torch.device("meta"):
            super().__init__(config)
        self.precision = Precision()
        for name, sources in modules.items():
            ours = self.get_submodule(name) if name != "head" else None
            if isinstance(ours, Linear):
                shared: nn.Module = SharedLinear(sources, self.precision)
            elif ours is None or isinstance(ours, nn.Embedding):
                (shared,) = sources
            else:
                shared = SharedNorm(*sources)
            parent, _, attribute = name.rpartition(".")
            self.get_submodule(parent).add_module(attribute, shared)
        layers = (module for module in self.blocks.modules() if isinstance(module, SharedLinear))
        self.has_plain_layers = all(type(source) is nn.Linear for layer in layers for source in layer.sources)
        norms = [module.source for module in self.modules() if isinstance(module, SharedNorm)]
        self.has_torch_norms = all(type(norm) in NORMS.values() for norm in norms)
        for block in self.blocks:
            block.checkpoint_contexts = self.precision.checkpoint_contexts

    @property
    def head(self) -> Head:
        """In the dtype that linear layers compute in."""
        source = self._modules["head"]
        return Head(self.precision.cast(source.weight), self.precision.cast(source.bias))

    def forward(
        self, tree: SpanTree, cache: KVCache | None = None, embeds: Embeds | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """As in Transformer; the hidden states are in the head's dtype."""
        return self.precision.cast(super().forward(tree, cache, embeds, rows))

    def new_cache(self, capacity: int) -> KVCache:
        """As in Transformer, in the dtype that linear layers compute in."""
        config, weight = self.config, self.embed.weight
        dtype = self.precision.dtype or weight.dtype
        return KVCache(config.num_layers, capacity, config.num_kv_heads, config.head_dim, weight.device, dtype)

    def _takes_fused(self) -> bool:
        return super()._takes_fused() and self.precision.dtype is None and self.has_torch_norms

    def _halves(self) -> Halves:
        # A compiled block would cast its weights anew at each step, and may not take what is in place of a layer.
        is_plain = self.precision.dtype is None and self.has_plain_layers
        return super()._halves() if is_plain else (Block.before_attention, Block.after_attention)


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says: hooks, or a forward of the instance's own."""
    return has_hooks(module) or "forward" in vars(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether something runs before or after the module's forward or backward."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))
