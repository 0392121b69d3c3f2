"""VQGAN (arXiv 2012.09841): the image tokenizer of Chameleon and Anole, and as LlamaGen's VQ-16 of Janus.

Sources: chameleon/inference/vqgan.py of facebookresearch/chameleon, janus/models/vq_model.py of deepseek-ai/Janus.
Module names are those of Chameleon's published state dict.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from hermesflow.engine.image_tokenizers.blocks import (
    Codebook,
    Decoder,
    Encoder,
    ImageTokenizer,
    check_ranges,
    group_norm,
)

# Wider than any model, and narrow enough that a damaged configuration asks for no endless work.
_RANGES = {
    "codebook_size": (1, 2**24), "embed_dim": (1, 2**16), "latent_channels": (1, 2**16), "channels": (1, 2**16),
    "channel_multipliers": (1, 64), "num_res_blocks": (1, 64), "attention_levels": (0, 64), "num_groups": (1, 2**16),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """Shape of a VQGAN; the defaults are Chameleon's (downsampling 16)."""

    codebook_size: int = 8192
    """Number of codes."""
    embed_dim: int = 256
    """Channels of a code."""
    latent_channels: int = 256
    """Channels between the convolution stacks and the code book's 1x1 convolutions."""
    channels: int = 128
    """Channels at full resolution are this times the first of channel_multipliers."""
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """One a level; each level but the last halves the resolution."""
    num_res_blocks: int = 2
    """Of each level of the encoder; the decoder's have one more."""
    attention_levels: tuple[int, ...] = ()
    """Levels with attention after each block; 0 is the finest."""
    middle_attention: bool = True
    """Whether the middle has it too."""
    unit_pixels: bool = False
    """Whether it was trained on images in [0, 1]."""
    normalized_codes: bool = False
    """Whether latents and codes lie on the unit sphere, as LlamaGen's do."""
    has_decoder: bool = True
    """facebook/chameleon-7b is published without one: it sees images and draws none."""
    num_groups: int = 32
    """Of the group norms."""

    def __post_init__(self) -> None:
        check_ranges(self, _RANGES)

    @property
    def downsampling(self) -> int:
        """Pixels a token spans in each direction."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of each level, the finest first."""
        return [self.channels * multiplier for multiplier in self.channel_multipliers]

    def to_dict(self) -> dict[str, Any]:
        """The fields, for a configuration file."""
        return asdict(self)


class VQGAN(ImageTokenizer):
    """Images in [-1, 1] <-> grids of learned codes, of any rectangle."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        depth, norm = config.num_res_blocks, group_norm(config.num_groups)
        self.encoder = Encoder(
            3,
            config.channels,
            config.widths,
            [depth] * len(config.widths),
            config.latent_channels,
            norm,
            config.attention_levels,
            config.middle_attention,
        )
        self.quant_conv = nn.Conv2d(config.latent_channels, config.embed_dim, 1)
        self.quantize = Codebook(config.codebook_size, config.embed_dim, config.normalized_codes)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.latent_channels, 1)
        if config.has_decoder:
            self.decoder = Decoder(
                config.latent_channels,
                config.widths[-1],
                config.widths,
                [depth + 1] * len(config.widths),
                3,
                norm,
                config.attention_levels,
                config.middle_attention,
            )

    def images_to_latent(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] -> z [B, embed_dim, h, w]."""
        images = (images + 1) / 2 if self.config.unit_pixels else images
        return self.quant_conv(self.encoder(images))

    def latent_to_codes(self, z: Tensor) -> Tensor:
        """z [B, embed_dim, h, w] -> nearest codes int64 [B, h * w]."""
        return self.quantize.nearest(z)

    def codes_to_latent(self, codes: Tensor, height: int, width: int) -> Tensor:
        """codes int64 [B, h * w] -> latent [B, embed_dim, h, w] in the weights' dtype."""
        return self.quantize.lookup(codes, height, width)

    def decode_latent(self, z: Tensor) -> Tensor:
        """Quantized latent [B, embed_dim, h, w] -> images [B, 3, H, W].

        Raises: ValueError if the tokenizer has no decoder.
        """
        if not self.config.has_decoder:
            raise ValueError("VQGAN: this tokenizer has no decoder; load one that has it, such as Anole's")
        images = self.decoder(self.post_quant_conv(z))
        return images * 2 - 1 if self.config.unit_pixels else images
