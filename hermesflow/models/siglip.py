"""SigLIP's vision transformer (arXiv 2303.15343) as Janus takes it: all patches after the last norm, no pooling."""

from __future__ import annotations

import functools

from torch import Tensor, nn

from hermesflow.engine.transformer import Block, TransformerConfig, rotary_table
from hermesflow.kernels.span_attention import span_attention
from hermesflow.kernels.span_tree import SpanTree

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
        x = self.patch(pixels).flatten(2).transpose(1, 2) + self.position.weight
        num_images, num_patches, _ = x.shape
        tree = SpanTree.build([([0] * num_patches, -1, "full")] * num_images, x.device)
        attend = functools.partial(span_attention, tree=tree)
        rotary, halves = rotary_table(tree.position_ids, 0, 1.0), (Block.before_attention, Block.after_attention)
        x = x.flatten(0, 1)
        for block in self.blocks:
            x = block(x, rotary, attend, None, halves)
        return self.norm(x).unflatten(0, (num_images, num_patches))
