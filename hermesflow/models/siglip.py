"""SigLIP's vision transformer (arXiv 2303.15343) as Janus takes it: all patches after the last norm, no pooling."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hermesflow.engine.transformer import Block, TransformerConfig, rotary_table
from hermesflow.kernels.span_attention import span_attention
from hermesflow.kernels.span_tree import SpanTree
from hermesflow.models import loading
from hermesflow.models.loading import WeightTable
from hermesflow.runtime.files import InputError, shown

WEIGHTS = {
    "patch": ["embeddings.patch_embedding"],
    "position": ["embeddings.position_embedding"],
    "blocks.*.attention_norm": ["encoder.layers.*.layer_norm1"],
    "blocks.*.attention.qkv": [f"encoder.layers.*.self_attn.{name}_proj" for name in "qkv"],
    "blocks.*.attention.out": ["encoder.layers.*.self_attn.projection_layer"],
    "blocks.*.mlp_norm": ["encoder.layers.*.layer_norm2"],
    "blocks.*.mlp.up": ["encoder.layers.*.mlp.fc1"],
    "blocks.*.mlp.down": ["encoder.layers.*.mlp.fc2"],
    "norm": ["post_layernorm"],
}
"""Our modules -> those of transformers' JanusVisionModel."""
TIMM_WEIGHTS = {
    "patch": ["patch_embed.proj"],
    "position": ["pos_embed"],
    "blocks.*.attention_norm": ["blocks.*.norm1"],
    "blocks.*.attention.qkv": ["blocks.*.attn.qkv"],
    "blocks.*.attention.out": ["blocks.*.attn.proj"],
    "blocks.*.mlp_norm": ["blocks.*.norm2"],
    "blocks.*.mlp.up": ["blocks.*.mlp.fc1"],
    "blocks.*.mlp.down": ["blocks.*.mlp.fc2"],
    "norm": ["norm"],
}
"""Our modules -> those of timm's, which deepseek-ai's checkpoints hold; its table of positions is a bare tensor."""
_PUBLISHED = {"siglip_large_patch16_384": (1024, 24, 16, 4096, 384, 16)}
"""By the name in deepseek-ai's config.json, which says no sizes."""
_FIXED = {
    "use_qk_norm": False, "select_layer": -1, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "attention_bias": True,
}  # fmt: skip
"""Settings of which one value is supported."""
_SIZES = ("width", "depth", "num_heads", "mlp_size", "image_size", "patch_size")


class SiglipTower(nn.Module):
    """Pixels -> a vector a patch."""

    def __init__(
        self, *, width: int, depth: int, num_heads: int, mlp_size: int, image_size: int, patch_size: int
    ) -> None:
        """Raises: ValueError if the sizes do not fit together."""
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"SiglipTower: image_size {image_size} must be a multiple of patch_size {patch_size}")
        shape = {"hidden_size": width, "num_layers": depth, "num_heads": num_heads, "num_kv_heads": num_heads}
        self.config = TransformerConfig(vocab_size=1, **shape, mlp_size=mlp_size, norm_eps=1e-6, rotary_fraction=0.0)
        self.image_size = image_size
        self.patch = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.position = nn.Embedding((image_size // patch_size) ** 2, width)
        self.blocks = nn.ModuleList(Block(self.config) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, image_size, image_size], normalized -> [B, F, width]."""
        return self.norm(see(self.blocks, self.patch(pixels).flatten(2).transpose(1, 2) + self.position.weight))


def see(blocks: Iterable[Block], x: Tensor) -> Tensor:
    """x [B, F, width] of B images through blocks, in which the rows of an image see one another -> the same shape."""
    tree = SpanTree.build([([0] * x.shape[1], -1, "full")] * len(x), x.device)
    attend = functools.partial(span_attention, tree=tree)
    rotary, halves = rotary_table(tree.position_ids, 0, 1.0), (Block.before_attention, Block.after_attention)
    rows = x.flatten(0, 1)
    for block in blocks:
        rows = block(rows, rotary, attend, None, halves)
    return rows.view_as(x)


def sizes(config: Any, path: Path) -> dict[str, int]:
    """Of a tower: SiglipTower's arguments, from transformers' vision_config or deepseek-ai's.

    Raises: InputError, which names the file, if a size is missing or something is not supported.
    """
    config = config if isinstance(config, Mapping) else {}
    params = config.get("params") if isinstance(config.get("params"), Mapping) else {}
    if params:
        published = dict(zip(_SIZES, _PUBLISHED.get(str(params.get("model_name")), [None] * 6), strict=True))
        found = {name: params.get(name, published[name]) for name in _SIZES}
    else:
        ratio, width = config.get("mlp_ratio", 4.0), config.get("hidden_size")
        is_number = isinstance(width, int) and isinstance(ratio, int | float) and 0 < ratio < 2**20
        mlp_size = int(width * ratio) if is_number else None
        given = (config.get(name) for name in ("num_hidden_layers", "num_attention_heads"))
        found = dict(
            zip(_SIZES, (width, *given, mlp_size, config.get("image_size"), config.get("patch_size")), strict=True)
        )
    for name, value in found.items():
        if type(value) is not int or not 1 <= value <= 2**20:
            raise InputError(f"{path}: vision_config gives {name} as {shown(value)}; restore it from its source")
    for name, expected in _FIXED.items():
        value = params.get(name, config.get(name, expected))
        if value != expected:
            raise InputError(
                f"{path}: vision_config: {name} {shown(value)} is not supported, {expected} is; use another checkpoint"
            )
    return found


def published_tensors(tower: SiglipTower, table: WeightTable, prefix: str) -> dict[str, Tensor]:
    """Of a tower: the name of each published tensor -> the parameter, or the rows of one, that it is."""
    found = loading.published_tensors(table, tower)
    if "pos_embed.weight" in found:
        found["pos_embed"] = found.pop("pos_embed.weight")[None]
    return {prefix + name: tensor for name, tensor in found.items()}
