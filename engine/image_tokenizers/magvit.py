"""Lookup-free-quantization image tokenizer: the architecture of MAGVIT-v2 as Show-o uses it, other sizes by config.

Encoder and decoder are residual convolution stacks; the latent's signs are the code (LFQ, arXiv 2310.05737): channel i
of code_bits carries the bit 2 ** (code_bits - 1 - i). Module names follow the published state dict.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hermesflow.engine.image_tokenizers.blocks import Decoder, Encoder, ImageTokenizer, check_ranges, group_norm

# Wider than any model, and narrow enough that a damaged configuration asks for no endless work.
_RANGES = {
    "code_bits": (1, 24), "channels": (1, 2**16), "channel_multipliers": (1, 64), "num_res_blocks": (0, 64),
    "num_groups": (1, 2**16), "patch_size": (1, 64),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VQTokenizerConfig:
    """Shape of a tokenizer; the defaults are Show-o's MAGVIT-v2 (downsampling 16, 13 bits).

    patch_size folds pixels into channels before the first convolution (1: none); each level of channel_multipliers but
    the last halves the resolution.
    """

    code_bits: int = 13
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4, 4)
    num_res_blocks: tuple[int, ...] = (4, 3, 4, 3, 4)
    num_groups: int = 32
    patch_size: int = 1

    def __post_init__(self) -> None:
        check_ranges(self, _RANGES)
        if len(self.num_res_blocks) != len(self.channel_multipliers):
            raise ValueError(
                f"VQTokenizerConfig: num_res_blocks and channel_multipliers need one entry a level, "
                f"got {self.num_res_blocks!r:.80} and {self.channel_multipliers}"
            )

    @property
    def downsampling(self) -> int:
        """Pixels a token spans in each direction."""
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return 2**self.code_bits

    def to_dict(self) -> dict[str, Any]:
        """The fields, for a configuration file."""
        return asdict(self)


class MagvitEncoder(Encoder):
    """Images -> latents before quantization."""

    def __init__(self, config: VQTokenizerConfig) -> None:
        super().__init__(
            3 * config.patch_size**2,
            config.channels,
            [config.channels * multiplier for multiplier in config.channel_multipliers],
            config.num_res_blocks,
            config.code_bits,
            group_norm(config.num_groups),
        )
        self.quant_conv = nn.Conv2d(config.code_bits, config.code_bits, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3 * patch_size ** 2, h, w] -> z [B, code_bits, h / 2 ** levels, w / 2 ** levels]."""
        return self.quant_conv(super().forward(x))


class MagvitDecoder(Decoder):
    """Quantized latents -> images."""

    def __init__(self, config: VQTokenizerConfig) -> None:
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        # A level is as wide and deep as the encoder's next finer one: the published decoder narrows, then upsamples.
        finer = [max(level - 1, 0) for level in range(len(widths))]
        super().__init__(
            config.code_bits,
            widths[-1],
            [widths[level] for level in finer],
            [config.num_res_blocks[level] for level in finer],
            3 * config.patch_size**2,
            group_norm(config.num_groups),
            post_quant_conv=nn.Conv2d(config.code_bits, config.code_bits, 1),
        )


class VQTokenizer(ImageTokenizer):
    """Images in [-1, 1] <-> grids of codes."""

    def __init__(self, config: VQTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = MagvitEncoder(config)
        self.decoder = MagvitDecoder(config)

    def images_to_latent(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] -> z [B, code_bits, h, w]."""
        return self.encoder(F.pixel_unshuffle(images, self.config.patch_size))

    def latent_to_codes(self, z: Tensor) -> Tensor:
        """z [B, code_bits, h, w] -> codes int64 [B, h * w]: a bit is set where its channel is positive."""
        return ((z > 0).long() * self._bit_values(z.device)[:, None, None]).sum(1).flatten(1)

    def codes_to_latent(self, codes: Tensor, height: int, width: int) -> Tensor:
        """codes int64 [B, h * w] -> latent of +1 and -1, [B, code_bits, h, w] in the weights' dtype."""
        bits = (codes[:, None, :] & self._bit_values(codes.device)[:, None]) != 0
        return (bits.to(self.dtype) * 2 - 1).view(len(codes), self.config.code_bits, height, width)

    def decode_latent(self, z: Tensor) -> Tensor:
        """z [B, code_bits, h, w] -> images [B, 3, H, W]."""
        return F.pixel_shuffle(self.decoder(z), self.config.patch_size)

    def _bit_values(self, device: torch.device) -> Tensor:
        return 2 ** torch.arange(self.config.code_bits - 1, -1, -1, device=device)
