"""Models of random weights of the families that draw code by code, made in memory: no checkpoint, no tokenizers.

Shapes keep the published proportions: MLPs 2.7 times as wide as the model, heads that share keys and values in Emu3, a
code book of an eighth of the text vocabulary. Janus sees images as one feature a code, at random, without its tower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hermesflow.benchmarks.naive_causal import WAYS, Way
from hermesflow.engine.decoders.autoregressive import CodeSamplingParams
from hermesflow.engine.token_layout import Ids, Layout
from hermesflow.engine.transformer import Linear, Transformer, TransformerConfig
from hermesflow.models import chameleon, emu3, janus
from hermesflow.models.model import Model

NUM_SPECIAL = 16
"""Text ids from 0 that stand for special tokens, or for nothing."""
CODE_WIDTH = 8
"""Of Janus's image codes before they are brought to the model's width."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a model."""

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    text_vocab_size: int
    codebook_size: int
    side: int
    """Rows, and columns, of an image's codes."""
    system_len: int
    """Text ids before an image that is asked about, in Janus and Emu3."""
    negative_len: int
    """Text ids of Emu3's negative prompt."""


SHAPES = {
    "tiny": ModelShape(
        hidden_size=32, num_layers=2, num_heads=4, mlp_size=48, text_vocab_size=120, codebook_size=24, side=3,
        system_len=4, negative_len=7,
    ),
    "small": ModelShape(
        hidden_size=512, num_layers=4, num_heads=8, mlp_size=1376, text_vocab_size=32_000, codebook_size=4096, side=12,
        system_len=40, negative_len=40,
    ),
}  # fmt: skip


class FeatureModel(Model):
    """Sees an image as features, which its codes give at random."""

    views_codes = False

    @property
    def num_features(self) -> int:
        """One a code."""
        return self.layout.num_image_tokens

    def view_codes(self, codes: Tensor) -> Tensor:
        """Codes int64 [n, N] -> features [n, N, D]."""
        return random_features(codes, self.transformer)


def random_features(codes: Tensor, transformer: Transformer) -> Tensor:
    """Features [n, N, D] of images given by their codes int64 [n, N], the same for the same codes."""
    generators = (torch.Generator().manual_seed(int(image.sum())) for image in codes)
    shape = (codes.shape[1], transformer.config.hidden_size)
    features = [torch.randn(shape, generator=generator) for generator in generators]
    return torch.stack(features).to(transformer.embed.weight)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family by data."""

    layout: Callable[[ModelShape], Layout]
    sampling: CodeSamplingParams
    """As published."""
    way: Way
    """Of the published code."""
    kind: type[Model] = Model
    more: Mapping[str, Any] = field(default_factory=dict)
    """Of the transformer's configuration."""
    kv_share: int = 1
    """Heads that share keys and values."""


def janus_layout(shape: ModelShape) -> janus.JanusLayout:
    """[text | codes]."""
    return janus.JanusLayout(
        text_vocab_size=shape.text_vocab_size,
        codebook_size=shape.codebook_size,
        image_grid=(shape.side, shape.side),
        bos=0,
        eot=1,
        boi=2,
        eoi=3,
        pad=4,
        before_image_ids=_plain_ids(shape.system_len),
    )


def emu3_layout(shape: ModelShape) -> emu3.Emu3Layout:
    """[text | codes]; a grid is spelled letter by letter."""
    vocab_size = shape.text_vocab_size + shape.codebook_size
    return emu3.Emu3Layout(
        vocab_size=vocab_size,
        code_ids=Ids(range(shape.text_vocab_size, vocab_size)),
        image_grid=(shape.side, shape.side),
        bos=0,
        eot=1,
        boi=2,
        eoi=3,
        img=4,
        eol=5,
        eof=6,
        system_ids=_plain_ids(shape.system_len),
        negative_ids=_plain_ids(shape.negative_len),
        encode=lambda text: [NUM_SPECIAL + ord(letter) for letter in text],
    )


def chameleon_layout(shape: ModelShape) -> chameleon.ChameleonLayout:
    """[4 specials | codes, in an order of their own | 4 specials | text]."""
    order = torch.randperm(shape.codebook_size, generator=torch.Generator().manual_seed(0))
    after = 4 + shape.codebook_size
    return chameleon.ChameleonLayout(
        vocab_size=shape.text_vocab_size + shape.codebook_size,
        code_ids=Ids((4 + order).tolist()),
        image_grid=(shape.side, shape.side),
        bos=0,
        eot=2,
        eoi=after,
        boi=after + 1,
        turn=after + 2,
    )


FAMILIES = {
    "janus": Family(
        layout=janus_layout, sampling=janus.SAMPLING, way=WAYS["janus"], kind=FeatureModel, more={"norm_eps": 1e-6}
    ),
    "emu3": Family(
        layout=emu3_layout, sampling=emu3.SAMPLING, way=WAYS["emu3"], kv_share=4, more={"rope_theta": 1e6}
    ),
    "chameleon": Family(
        layout=chameleon_layout, sampling=chameleon.SAMPLING, way=WAYS["chameleon"], more={"qk_norm_per_head": True}
    ),
}  # fmt: skip


def make_model(
    family: Family, shape: ModelShape, device: torch.device, dtype: torch.dtype
) -> tuple[Transformer, Layout]:
    """A model on the device, nothing written."""
    layout, width = family.layout(shape), shape.hidden_size
    config = TransformerConfig(
        vocab_size=layout.vocab_size,
        hidden_size=width,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_heads // family.kv_share,
        mlp_size=shape.mlp_size,
        **{"norm": "rmsnorm", "gated": True, "activation": "silu", "bias": False} | dict(family.more),
    )
    with torch.device(device):
        if family.way.own_head:
            aligner = nn.Sequential(Linear(CODE_WIDTH, width), nn.GELU(), Linear(width, width))
            embed = nn.Sequential(nn.Embedding(shape.codebook_size, CODE_WIDTH), *aligner)
            parts = (shape.text_vocab_size, embed, Linear(width, width), shape.codebook_size)
            transformer = janus.JanusTransformer(config, *parts)
        else:
            transformer = Transformer(config)
    fill_weights(transformer.to(dtype), torch.Generator(device).manual_seed(0))
    return transformer.eval().requires_grad_(False), layout


@torch.no_grad()
def fill_weights(transformer: Transformer, generator: torch.Generator) -> None:
    """Weights of such a size that hidden states keep theirs; norms near 1 and biases near 0."""
    for name, weight in transformer.named_parameters():
        if weight.dim() == 2 and "_norm." not in name:
            weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
        else:
            weight.normal_(float("norm" in name and name.endswith("weight")), 0.02, generator=generator)


def _plain_ids(length: int) -> tuple[int, ...]:
    return tuple(range(NUM_SPECIAL, NUM_SPECIAL + length))
